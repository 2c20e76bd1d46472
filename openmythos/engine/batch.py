"""A batch of rows that grows token by token, with a KV cache or with recomputation.

Both kinds have the same calls. ``prefill`` reads tokens whose predictions are not needed;
``decode`` reads one token in some of the rows and returns the next token's logits and the number of
loops taken.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from openmythos.engine.compile import EAGER, Calls, compiled_calls
from openmythos.model.cache import KVCache
from openmythos.model.context import ForwardContext
from openmythos.model.exit import Fixed, Rule
from openmythos.model.loop import advance, readout, start_loops
from openmythos.model.recurrent import RecurrentDepthLM


class CachedBatch:
    """The rows of a session in one KV cache; rows that a call leaves out are not computed.

    ``compiled`` applies to ``decode`` only, where one compiled graph serves all loops and columns.
    """

    def __init__(self, model: RecurrentDepthLM, cache: KVCache, *, compiled: bool = False) -> None:
        self.model, self.cache, self.core_applications = model, cache, 0
        self.seeds: Sequence[int] = [0] * len(cache.lengths)  # of the rows' initial states
        self.fast = compiled_calls(model) if compiled else EAGER

    @property
    def length(self) -> int:
        """Number of tokens of the longest row."""
        return self.cache.length

    def prefill(self, rows: list[list[int]], depths: list[int], chunk: int | None) -> None:
        """Read tokens of each row (``rows`` may have empty ones) with all of the row's loops.

        ``chunk`` is the number of tokens per row that are read at once; None: all. Each row's
        chunks end at multiples of it, counted from the row's first token.
        """
        left = dict(enumerate(rows))
        while left := {row: tokens for row, tokens in left.items() if tokens}:
            before = self.cache.lengths
            ends = {row: None if chunk is None else chunk - before[row] % chunk for row in left}
            parts = {row: tokens[: ends[row]] for row, tokens in left.items()}
            left = {row: tokens[len(parts[row]) :] for row, tokens in left.items()}
            chosen = [depths[row] for row in parts]
            ctx = self._context(parts)
            state, _ = self._loop(EAGER, ctx, chosen, Fixed())
            if self.model.config.num_coda_layers:
                self.model.decode(state, ctx)  # for the coda's keys and values
            assert ctx.cache is not None
            ctx.cache.commit()

    def decode(
        self, tokens: dict[int, int], depths: list[int], rule: Rule
    ) -> tuple[Float[Tensor, "N V"], list[int]]:
        """Read one token in some of the rows; return the next token's logits and the loops taken.

        ``tokens`` are given by row; ``depths`` are the loops that every row of the batch may take.
        """
        ctx = self._context({row: [token] for row, token in tokens.items()})
        state, loops = self._loop(self.fast, ctx, [depths[row] for row in tokens], rule)
        logits = self.fast.decode(self.model, state, ctx)[:, -1]
        assert ctx.cache is not None
        ctx.cache.commit()
        return logits, loops

    def rewind(self, lengths: list[int]) -> None:
        """Forget all but the first ``lengths`` tokens of the rows."""
        self.cache.lengths = list(lengths)

    def _context(self, parts: dict[int, list[int]]) -> ForwardContext:
        """The context for the next tokens of some rows, given by row."""
        every = list(parts) == list(range(len(self.cache.lengths)))
        tokens, valid = _padded(list(parts.values()), self.cache.tensors[0].device)
        return self.model.context(
            tokens,
            cache=self.cache,
            padding_mask=valid,
            rows=None if every else list(parts),
            seeds=[self.seeds[row] for row in parts],
        )

    def _loop(
        self, calls: Calls, ctx: ForwardContext, depths: list[int], rule: Rule
    ) -> tuple[Float[Tensor, "N T D"], list[int]]:
        """Loop until the rule or its depth stops every row; return readouts and loops taken."""
        model, view = self.model, ctx.cache
        assert view is not None
        view.check()
        e = calls.encode(model, ctx.tokens, ctx)
        state = start_loops(model, e, ctx, depths)
        # h_0 may be the tensor e itself; such an alias would need another compiled graph.
        state = replace(state, h=state.h.clone(), exits=rule.start(state.h[:, -1]))
        readouts, loops = torch.zeros_like(state.h), [0] * len(depths)
        going, counts = list(range(len(depths))), [count for _, _, count in view.lengths]
        live = ctx
        while going:
            state = advance(model, state, live, calls.run)
            self.core_applications += sum(counts[row] for row in going)
            ended = [loop >= depth for loop, depth in zip(state.loops, state.depths, strict=True)]
            if not all(ended) and rule.is_due(state.loops[0]):  # all rows began together
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
        self, calls: Calls, state: Any, live: ForwardContext, rule: Rule
    ) -> tuple[list[bool], Any]:
        """Which rows the exit rule stops after this loop, and the state with the rule's updated."""
        logits = None
        if rule.needs_logits:
            logits = calls.decode(self.model, readout(self.model, state), live)[:, -1]
        mass = None if state.halted is None else state.halted.tracker.mass[:, -1]
        assert state.exits is not None
        stop, exits = rule.check(state.exits, state.h[:, -1], logits, mass)
        return stop.tolist(), replace(state, exits=exits)


class UncachedBatch:
    """The rows of a session without a KV cache: each ``decode`` computes all their tokens again."""

    def __init__(self, model: RecurrentDepthLM, batch_size: int) -> None:
        self.model, self.core_applications = model, 0
        self.seeds: Sequence[int] = [0] * batch_size  # of the rows' initial states
        self.rows: list[list[int]] = [[] for _ in range(batch_size)]

    @property
    def length(self) -> int:
        """Number of tokens of the longest row."""
        return max(map(len, self.rows))

    def prefill(self, rows: list[list[int]], depths: list[int], chunk: int | None) -> None:
        """Append tokens to the rows; nothing is computed."""
        self.rows = [old + new for old, new in zip(self.rows, rows, strict=True)]

    def rewind(self, lengths: list[int]) -> None:
        """Forget all but the first ``lengths`` tokens of the rows."""
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]

    def decode(
        self, tokens: dict[int, int], depths: list[int], rule: Rule
    ) -> tuple[Float[Tensor, "N V"], list[int]]:
        """As ``CachedBatch.decode``, always with all loops."""
        rows = {row: [*self.rows[row], token] for row, token in tokens.items()}
        device = self.model.embed.weight.device
        ids, valid = _padded(list(rows.values()), device)
        taken, seeds = [depths[row] for row in tokens], [self.seeds[row] for row in tokens]
        out = self.model(
            ids,
            num_loops=torch.tensor(taken, device=device),
            ctx=self.model.context(ids, padding_mask=valid, seeds=seeds),
        )
        self.core_applications += sum(len(rows[row]) * depths[row] for row in rows)
        last = torch.tensor([len(row) - 1 for row in rows.values()], device=device)
        self.rows = [rows.get(row, old) for row, old in enumerate(self.rows)]
        return out.logits[torch.arange(len(last), device=device), last], taken


def _padded(
    rows: Sequence[list[int]], device: torch.device
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"] | None]:
    """The rows as one right-padded tensor, and a mask of its real tokens (None: no padding)."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    if all(len(row) == width for row in rows):
        return tokens, None
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return tokens, torch.arange(width, device=device) < lengths[:, None]
