"""A batch of rows that grows token by token, with a cache or computing everything again.

Both kinds have the same calls: ``prefill`` reads tokens that predict nothing, ``decode`` reads one
token of some rows and returns the logits of the next one and the loops that it took.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from openmythos.engine.compile import compile_call
from openmythos.model.cache import KVCache
from openmythos.model.context import ForwardContext
from openmythos.model.exit import ExitState, Fixed, Rule
from openmythos.model.halting import Tracker
from openmythos.model.recurrent import RecurrentDepthLM


class CachedBatch:
    """The rows of a session in one cache; a row that is not asked for costs nothing.

    ``compiled`` concerns ``decode`` alone: one graph of a loop serves every loop and column.
    """

    def __init__(
        self, model: RecurrentDepthLM, cache: KVCache, seed: int, *, compiled: bool = False
    ) -> None:
        self.model, self.cache, self.seed, self.core_applications = model, cache, seed, 0
        self.eager = _Calls(RecurrentDepthLM.encode, _advance, RecurrentDepthLM.decode)
        self.fast = _compiled_calls(model) if compiled else self.eager

    @property
    def length(self) -> int:
        """Columns in use."""
        return self.cache.length

    def prefill(self, rows: list[list[int]], depths: list[int], chunk: int | None) -> None:
        """Read tokens that predict nothing, at full depth; rows may be empty."""
        tokens, valid = _left_padded(rows, self.cache.valid.device)
        for part in range(0, tokens.shape[1], chunk or max(tokens.shape[1], 1)):
            stop = None if chunk is None else part + chunk
            ctx = self._append(tokens[:, part:stop], valid[:, part:stop])
            readout, _ = self._loop(self.eager, ctx, valid[:, part:stop], depths, Fixed())
            if self.model.config.num_coda_layers:
                self.model.decode(readout, ctx)  # for the coda's keys and values

    def decode(
        self, tokens: dict[int, int], depths: list[int], rule: Rule
    ) -> tuple[Float[Tensor, "N V"], list[int]]:
        """Read one token of some rows: logits of the next, and the loops each row took."""
        fed = [[tokens[row]] if row in tokens else [] for row in range(len(depths))]
        ids, valid = _left_padded(fed, self.cache.valid.device)
        ctx = self._append(ids, valid)
        readout, loops = self._loop(self.fast, ctx, valid, depths, rule)
        return self.fast.decode(self.model, readout, ctx)[:, -1], loops.tolist()

    def _append(self, tokens: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> ForwardContext:
        """The context of the rows that have a real token among ``tokens``."""
        if bool(valid.all()):
            return self.model.context(tokens, cache=self.cache)
        ctx = self.model.context(tokens, padding_mask=valid, cache=self.cache)
        return ctx.select(valid.any(dim=1).nonzero()[:, 0])

    def _loop(
        self,
        calls: "_Calls",
        ctx: ForwardContext,
        valid: Bool[Tensor, "B T"],
        depths: list[int],
        rule: Rule,
    ) -> tuple[Float[Tensor, "N T D"], Int[Tensor, "N"]]:
        """Loop the context's rows until the rule or their depth stops them: readouts, loops."""
        halting = self.model.halting
        rows = torch.arange(len(valid), device=valid.device) if ctx.rows is None else ctx.rows
        e = calls.encode(self.model, ctx.tokens, ctx)
        noise = torch.Generator().manual_seed(self.seed)  # the same for every chunk
        h = self.model.init_state(e, noise, ctx).clone()  # may be e: one more graph to compile
        live = _Live(
            index=torch.arange(len(h), device=h.device),
            depths=torch.tensor(depths, device=h.device)[rows],
            num_tokens=valid.sum(dim=1)[rows],
            h=h,
            e=e,
            ctx=ctx,
            state=rule.start(h[:, -1]),
            mixed=torch.zeros_like(h),
            tracker=None if halting is None else halting.start(h),
        )
        readouts, loops = torch.zeros_like(h), torch.zeros_like(live.depths)
        loop, shallowest, work = 0, int(live.depths.min()), int(live.num_tokens.sum())
        while True:
            loop_idx = torch.full_like(live.index, loop)
            h, readout, mixed, tracker = calls.advance(
                self.model, live.h, live.e, loop_idx, live.ctx, live.mixed, live.tracker
            )
            live = replace(live, h=h, mixed=mixed, tracker=tracker)
            self.core_applications += work
            loop += 1
            if loop < shallowest and isinstance(rule, Fixed):
                continue
            out = live.depths <= loop
            if not bool(out.all()):
                logits = None
                if rule.needs_logits:
                    logits = calls.decode(self.model, readout, live.ctx)[:, -1]
                mass = None if tracker is None else tracker.mass[:, -1]
                stop, state = rule.check(live.state, h[:, -1], logits, mass)
                out, live = out | stop, replace(live, state=state)
            if not bool(out.any()):
                continue
            readouts[live.index[out]], loops[live.index[out]] = readout[out], loop
            if loop < self.cache.max_loops:
                stopped = rows[live.index[out]]
                taken = torch.full_like(stopped, loop)
                self.cache.fill_forward(stopped, taken, ctx.start, ctx.start + h.shape[1])
            if bool(out.all()):
                return readouts, loops
            live = live.select((~out).nonzero()[:, 0])
            shallowest, work = int(live.depths.min()), int(live.num_tokens.sum())


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
        ids, valid = _left_padded([self.rows[row] for row in tokens], device)
        taken = [depths[row] for row in tokens]
        out = self.model(
            ids,
            num_loops=torch.tensor(taken, device=device),
            ctx=self.model.context(ids, padding_mask=None if bool(valid.all()) else valid),
            generator=torch.Generator().manual_seed(self.seed),
        )
        self.core_applications += sum(len(self.rows[row]) * depths[row] for row in tokens)
        return out.logits[:, -1], taken


@dataclass(frozen=True)
class _Live:
    """The rows that still run, without gaps; ``index`` is their place in the call's batch."""

    index: Int[Tensor, "N"]
    depths: Int[Tensor, "N"]
    num_tokens: Int[Tensor, "N"]
    h: Float[Tensor, "N T D"]
    e: Float[Tensor, "N T D"]
    ctx: ForwardContext
    state: ExitState
    mixed: Float[Tensor, "N T D"]
    tracker: Tracker | None

    def select(self, keep: Int[Tensor, "M"]) -> "_Live":
        return _Live(
            index=self.index[keep],
            depths=self.depths[keep],
            num_tokens=self.num_tokens[keep],
            h=self.h[keep],
            e=self.e[keep],
            ctx=self.ctx.select(keep),
            state=self.state.select(keep),
            mixed=self.mixed[keep],
            tracker=None if self.tracker is None else self.tracker.select(keep),
        )


@dataclass(frozen=True)
class _Calls:
    """What is computed of a token: the waist's calls, and ``_advance`` around its step."""

    encode: Callable[..., Tensor]
    advance: Callable[..., tuple[Any, ...]]
    decode: Callable[..., Tensor]


# A model is compiled once for all of its sessions, and forgotten with it.
_COMPILED: WeakKeyDictionary[RecurrentDepthLM, _Calls] = WeakKeyDictionary()


def _compiled_calls(model: RecurrentDepthLM) -> _Calls:
    if model not in _COMPILED:
        _COMPILED[model] = _Calls(
            compile_call(RecurrentDepthLM.encode),
            compile_call(_advance),
            compile_call(RecurrentDepthLM.decode),
        )
    return _COMPILED[model]


def _advance(
    model: RecurrentDepthLM,
    h: Float[Tensor, "N T D"],
    e: Float[Tensor, "N T D"],
    loop_idx: Int[Tensor, "N"],
    ctx: ForwardContext,
    mixed: Float[Tensor, "N T D"],
    tracker: Tracker | None,
) -> tuple[Tensor, Tensor, Tensor, Tracker | None]:
    """One loop: the state, the readout if the rows stopped here, what they carry on if not."""
    before, halting = h, model.halting
    h = model.step(h, e, loop_idx, ctx)
    if halting is None or tracker is None:
        return h, h, mixed, None
    prob = model.exit_prob(before, h, loop_idx, ctx)
    weight, after = halting.step(tracker, prob, last=False)
    if not halting.mixes_states:
        return h, h, mixed, after
    last, _ = halting.step(tracker, prob, last=True)
    readout, mixed = (halting.mix(mixed, h, w) for w in (last, weight))
    return h, readout, mixed, after


def _left_padded(
    rows: list[list[int]], device: torch.device
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    width = max(map(len, rows))
    tokens = [[0] * (width - len(row)) + row for row in rows]
    valid = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    shape = (len(rows), width)
    return (
        torch.tensor(tokens, dtype=torch.int64, device=device).view(shape),
        torch.tensor(valid, dtype=torch.bool, device=device).view(shape),
    )
