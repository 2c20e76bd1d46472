"""A batch of rows that grows token by token, with a cache or computing everything again.

Both kinds have the same calls: ``prefill`` reads tokens that predict nothing, ``decode`` reads one
token of some rows and returns the logits of the next one and the loops that it took.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from openmythos.engine.compile import compile_call
from openmythos.model.cache import KVCache
from openmythos.model.context import ForwardContext
from openmythos.model.exit import Fixed, Rule
from openmythos.model.loop import advance, readout, run_loop, start_loops
from openmythos.model.recurrent import RecurrentDepthLM


class CachedBatch:
    """The rows of a session in one cache; a row that is not asked for costs nothing.

    ``compiled`` concerns ``decode`` alone: one graph of a loop serves every loop and column.
    """

    def __init__(
        self, model: RecurrentDepthLM, cache: KVCache, seed: int, *, compiled: bool = False
    ) -> None:
        self.model, self.cache, self.seed, self.core_applications = model, cache, seed, 0
        self.eager = _Calls(RecurrentDepthLM.encode, run_loop, RecurrentDepthLM.decode)
        self.fast = _compiled_calls(model) if compiled else self.eager

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return self.cache.length

    def prefill(self, rows: list[list[int]], depths: list[int], chunk: int | None) -> None:
        """Read tokens that predict nothing, at full depth; rows may be empty."""
        longest = max(map(len, rows))
        for start in range(0, longest, chunk or max(longest, 1)):
            stop = longest if chunk is None else start + chunk
            parts = {row: tokens[start:stop] for row, tokens in enumerate(rows) if tokens[start:]}
            chosen = [depths[row] for row in parts]
            ctx = self._context(parts)
            state, _ = self._loop(self.eager, ctx, chosen, Fixed())
            if self.model.config.num_coda_layers:
                self.model.decode(state, ctx)  # for the coda's keys and values
            assert ctx.cache is not None
            ctx.cache.commit()

    def decode(
        self, tokens: dict[int, int], depths: list[int], rule: Rule
    ) -> tuple[Float[Tensor, "N V"], list[int]]:
        """Read one token of some rows: logits of the next, and the loops each row took."""
        ctx = self._context({row: [token] for row, token in tokens.items()})
        state, loops = self._loop(self.fast, ctx, [depths[row] for row in tokens], rule)
        logits = self.fast.decode(self.model, state, ctx)[:, -1]
        assert ctx.cache is not None
        ctx.cache.commit()
        return logits, loops

    def _context(self, parts: dict[int, list[int]]) -> ForwardContext:
        """The context of these rows' next tokens."""
        every = list(parts) == list(range(len(self.cache.lengths)))
        tokens, valid = _padded(list(parts.values()), self.cache.tensors[0].device)
        return self.model.context(
            tokens,
            cache=self.cache,
            padding_mask=valid,
            rows=None if every else list(parts),
        )

    def _loop(
        self, calls: "_Calls", ctx: ForwardContext, depths: list[int], rule: Rule
    ) -> tuple[Float[Tensor, "N T D"], list[int]]:
        """Loop the context's rows until the rule or their depth stops them: readouts, loops."""
        model, view = self.model, ctx.cache
        assert view is not None
        e = calls.encode(model, ctx.tokens, ctx)
        noise = torch.Generator().manual_seed(self.seed)  # the same for every chunk
        state = start_loops(model, e, ctx, depths, generator=noise)
        # h_0 may be e itself, which would be one more graph to compile.
        state = replace(state, h=state.h.clone(), exits=rule.start(state.h[:, -1]))
        readouts, loops = torch.zeros_like(state.h), [0] * len(depths)
        going, counts = list(range(len(depths))), [count for _, _, count in view.lengths]
        live = ctx
        while going:
            state = advance(model, state, live, calls.run)
            self.core_applications += sum(counts[row] for row in going)
            ended = [loop >= depth for loop, depth in zip(state.loops, state.depths, strict=True)]
            if not all(ended) and not isinstance(rule, Fixed):
                stop, state = self._ask(calls, state, live, rule)
                ended = [end or said for end, said in zip(ended, stop, strict=True)]
            if not any(ended):
                continue
            out = [place for place, end in enumerate(ended) if end]
            rest = [place for place, end in enumerate(ended) if not end]
            readouts[[going[place] for place in out]] = readout(model, state)[out]
            for place in out:
                loops[going[place]] = state.loops[place]
            going = [going[place] for place in rest]
            if rest:
                state, live = state.select(rest), live.select(rest)
        if min(loops) < self.cache.max_loops:
            view.fill_forward(torch.tensor(loops, device=e.device))
        return readouts, loops

    def _ask(
        self, calls: "_Calls", state: Any, live: ForwardContext, rule: Rule
    ) -> tuple[list[bool], Any]:
        """Which rows the rule stops after this loop, and what it remembers of the others."""
        logits = None
        if rule.needs_logits:
            logits = calls.decode(self.model, readout(self.model, state), live)[:, -1]
        mass = None if state.halted is None else state.halted.tracker.mass[:, -1]
        assert state.exits is not None
        stop, exits = rule.check(state.exits, state.h[:, -1], logits, mass)
        return stop.tolist(), replace(state, exits=exits)


class UncachedBatch:
    """The rows of a session as lists of tokens: every call computes all of them again."""

    def __init__(self, model: RecurrentDepthLM, batch_size: int, seed: int) -> None:
        self.model, self.seed, self.core_applications = model, seed, 0
        self.rows: list[list[int]] = [[] for _ in range(batch_size)]

    @property
    def length(self) -> int:
        """The longest row."""
        return max(map(len, self.rows))

    def prefill(self, rows: list[list[int]], depths: list[int], chunk: int | None) -> None:
        """Take tokens; nothing is computed."""
        self.rows = [old + new for old, new in zip(self.rows, rows, strict=True)]

    def decode(
        self, tokens: dict[int, int], depths: list[int], rule: Rule
    ) -> tuple[Float[Tensor, "N V"], list[int]]:
        """As ``CachedBatch.decode``, at full depth."""
        for row, token in tokens.items():
            self.rows[row].append(token)
        device = self.model.embed.weight.device
        ids, valid = _padded([self.rows[row] for row in tokens], device)
        taken = [depths[row] for row in tokens]
        out = self.model(
            ids,
            num_loops=torch.tensor(taken, device=device),
            ctx=self.model.context(ids, padding_mask=valid),
            generator=torch.Generator().manual_seed(self.seed),
        )
        self.core_applications += sum(len(self.rows[row]) * depths[row] for row in tokens)
        last = torch.tensor([len(self.rows[row]) - 1 for row in tokens], device=device)
        return out.logits[torch.arange(len(last), device=device), last], taken


@dataclass(frozen=True)
class _Calls:
    """What is computed of a token: the waist's calls, and ``run_loop`` around its step."""

    encode: Callable[..., Tensor]
    run: Callable[..., tuple[Any, ...]]
    decode: Callable[..., Tensor]


# A model is compiled once for all of its sessions, and forgotten with it.
_COMPILED: WeakKeyDictionary[RecurrentDepthLM, _Calls] = WeakKeyDictionary()


def _compiled_calls(model: RecurrentDepthLM) -> _Calls:
    if model not in _COMPILED:
        _COMPILED[model] = _Calls(
            compile_call(RecurrentDepthLM.encode),
            compile_call(run_loop),
            compile_call(RecurrentDepthLM.decode),
        )
    return _COMPILED[model]


def _padded(
    rows: Sequence[list[int]], device: torch.device
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"] | None]:
    """The rows as one tensor, padded at their ends, and where it has real tokens (None: all)."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    if all(len(row) == width for row in rows):
        return tokens, None
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return tokens, torch.arange(width, device=device) < lengths[:, None]
