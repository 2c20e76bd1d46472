"""The rows of an engine, each one token of one request, and the model's calls on some of them.

Rows are addressed by seat. A call may take any seats, at different loops: it gathers their state,
computes, and puts it back.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from openmythos.config.schema import require
from openmythos.engine.call_cost import CallCosts
from openmythos.engine.compile import EAGER, compiled_calls
from openmythos.engine.page_pool import SCRATCH
from openmythos.engine.paged_cache import PagedCache, PagedContext
from openmythos.model.context import select_rows
from openmythos.model.exit import Fixed, Rule, join_states
from openmythos.model.int8 import Int8Weight
from openmythos.model.loop import (
    ExitState,
    Halted,
    LoopState,
    advance,
    readout,
    start_loops,
    unroll,
)
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.separate_experts import separate_experts

SEPARATE_ROWS = 16  # of every call whose rows must not depend on each other; see ``Runner``


@dataclass(frozen=True)
class Entry:
    """A token that begins to loop in a seat.

    Attributes:
        seat: Its row.
        token: The token.
        position: Its place in the text.
        pages: Those of the text up to the token.
        depth: The most loops that any token of the text may take.
        rule: Stops this one earlier.
        seed: Of its initial state.
        loops: How many it takes, if that is known; the rule is then not asked.
    """

    seat: int
    token: int
    position: int
    pages: Sequence[int]
    depth: int
    rule: Rule
    seed: int
    loops: int | None = None


@dataclass(frozen=True)
class Part:
    """Tokens of a text that are read at once, of which the first is at position ``start``.

    Attributes:
        tokens: The tokens.
        start: The first one's place in the text.
        pages: Those of the text, at least up to the last token.
        depth: The loops; the keys and values are for tokens that loop no deeper.
        seed: Of the initial states.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    depth: int
    seed: int


class Runner:
    """The state of ``num_seats`` rows with room for ``max_len`` tokens each.

    Compiled calls get row counts that are powers of two, or all rows, so that few graphs serve
    them: a seat of nobody, in the page of nobody, fills up the others.

    With ``batch_invariant`` no bit of a row depends on the other rows, nor on how many there are:
    every call has the same shape. Single rows do not need that.

    ``core_applications`` counts the loops of all tokens.
    """

    def __init__(
        self,
        model: RecurrentDepthLM,
        cache: PagedCache,
        num_seats: int,
        max_len: int,
        *,
        compiled: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        self.model, self.cache, self.num_seats = model, cache, num_seats
        self.separate = batch_invariant and num_seats > 1
        if self.separate:
            require_separate_products(model, SEPARATE_ROWS)
        self.calls = compiled_calls(model) if compiled else EAGER
        self.compiled, self.core_applications = compiled, 0
        weight, width = model.embed.weight, -(-max_len // cache.page_size)
        self.device, rows = weight.device, num_seats + 1
        self._h = torch.zeros(rows, 1, weight.shape[1], dtype=weight.dtype, device=self.device)
        self._e = torch.zeros_like(self._h)
        self._halted: Halted | None = None
        if model.halting is not None:
            begun = Halted.start(model.halting, self._h)
            self._halted = tree_map(torch.clone, begun)  # some of its tensors are one and the same
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self._positions = torch.zeros_like(self._tokens)
        self._seeds = torch.zeros_like(self._tokens)
        self._tables = torch.full_like(self._tokens.expand(-1, width), SCRATCH)
        # The same and more on the host, by seat.
        self._pages: list[list[int]] = [[] for _ in range(rows)]
        self._loops, self._limits, self._depths = [0] * rows, [1] * rows, [1] * rows
        self._rules: list[Rule] = [Fixed()] * rows
        self._contexts: dict[tuple[int, ...], PagedContext] = {}  # until a token begins
        self._exits: dict[int, ExitState] = {}
        self._logits: dict[int, Tensor] = {}  # of tokens that stopped by a rule that needs them

    # --- costs ------------------------------------------------------------------------------------

    def measure(self, repeats: int = 7) -> CallCosts:
        """Seconds of the calls for 1, 2, 4 ... rows; compiled calls are compiled for them first.

        All rows are the seat of nobody, whose text is one token long.
        """
        core, boundary, count, before = {}, {}, 1, self.core_applications
        while count < 2 * self.num_seats:
            size = min(count, self.num_seats)
            rows = [self.num_seats] * size
            core[size] = _least_seconds(partial(self._loop_nobody, rows), repeats)
            boundary[size] = _least_seconds(partial(self._cross_nobody, rows), repeats)
            count *= 2
        self.core_applications = before
        return CallCosts(core, boundary, padded=self.compiled or self.separate)

    def _loop_nobody(self, rows: Sequence[int]) -> None:
        self._loops[self.num_seats] = 0
        self.advance(rows)

    def _cross_nobody(self, rows: Sequence[int]) -> None:
        self._loops[self.num_seats] = 1
        logits, _ = self.leave(rows)
        logits.argmax(dim=-1).tolist()
        self.enter([Entry(row, 0, 0, (SCRATCH,), 1, Fixed(), 0) for row in rows])

    # --- prompts ----------------------------------------------------------------------------------

    def read(self, parts: Sequence[Part]) -> None:
        """Read parts of several texts with all their loops, those of similar length in one call."""
        alike: dict[int, list[Part]] = {}
        for place, part in enumerate(parts):
            key = -1 - place if self.separate else len(part.tokens).bit_length()
            alike.setdefault(key, []).append(part)
        for group in alike.values():
            self._read(group)

    def _read(self, parts: Sequence[Part]) -> None:
        model, lengths = self.model, [len(part.tokens) for part in parts]
        ends = [part.start + length for part, length in zip(parts, lengths, strict=True)]
        most, width = max(lengths), -(-max(ends) // self.cache.page_size)
        seeds = [[_signed(part.seed)] for part in parts]
        valid = None
        if min(lengths) < most:
            valid = torch.arange(most, device=self.device) < self._integers(lengths)[:, None]
        ctx = self.cache.context(
            self._integers([_filled(part.tokens, most) for part in parts]),
            self._integers(
                [_filled(range(p.start, end), most) for p, end in zip(parts, ends, strict=True)]
            ),
            self._integers([_filled(part.pages[:width], width) for part in parts]),
            self._integers(seeds),
            valid,
        )
        e, depths = model.encode(ctx.tokens, ctx), [part.depth for part in parts]
        *_, state = unroll(model, start_loops(model, e, ctx, depths, wait=True), ctx)
        self.core_applications += sum(p.depth * n for p, n in zip(parts, lengths, strict=True))
        if model.config.num_coda_layers:
            model.decode(readout(model, state), ctx)  # for the coda's keys and values

    # --- tokens -----------------------------------------------------------------------------------

    def enter(self, entries: Sequence[Entry]) -> None:
        """Encode a token in each of some seats."""
        self._contexts.clear()
        for entry in entries:
            seat, pages = entry.seat, list(entry.pages)
            self._loops[seat], self._depths[seat] = 0, entry.depth
            self._limits[seat] = entry.depth if entry.loops is None else entry.loops
            self._rules[seat] = entry.rule if entry.loops is None else Fixed()
            self._logits.pop(seat, None)
            if pages != self._pages[seat]:
                self._pages[seat] = pages
                self._tables[seat, : len(pages)] = self._integers(pages)
        index = self._integers([entry.seat for entry in entries])
        self._tokens[index, 0] = self._integers([entry.token for entry in entries])
        self._positions[index, 0] = self._integers([entry.position for entry in entries])
        self._seeds[index, 0] = self._integers([_signed(entry.seed) for entry in entries])
        for seats in self._calls_of([entry.seat for entry in entries]):
            rows, index = self._padded(seats), self._integers(seats)
            ctx = self._context(rows)
            e = self.calls.encode(self.model, ctx.tokens, ctx)
            state = start_loops(self.model, e, ctx, [self._limits[row] for row in rows])
            self._e[index] = e[: len(seats)]
            self._put(index, state)
            for place, seat in enumerate(seats):
                self._exits[seat] = self._rules[seat].start(state.h[place : place + 1, -1])

    def advance(self, seats: Sequence[int]) -> list[int]:
        """Run one loop in each of some seats; return the seats whose token stops there."""
        for part in self._calls_of(seats):
            rows = self._padded(part)
            state = advance(self.model, self._state(rows), self._context(rows), self.calls.run)
            self._put(self._integers(part), state)
        self.core_applications += len(seats)
        for seat in seats:
            self._loops[seat] += 1
        stopped = {seat for seat in seats if self._loops[seat] >= self._limits[seat]}
        ruled = [s for s in seats if s not in stopped and self._rules[s].is_due(self._loops[s])]
        if ruled:
            stopped |= self._ask(ruled)
        return [seat for seat in seats if seat in stopped]

    def leave(self, seats: Sequence[int]) -> tuple[Float[Tensor, "N V"], list[int]]:
        """End the tokens of some seats; return the next tokens' logits and the loops taken."""
        loops = [self._loops[seat] for seat in seats]
        self._fill_forward(seats)
        found = {seat: self._logits.pop(seat) for seat in seats if seat in self._logits}
        others = [seat for seat in seats if seat not in found]
        if others:
            found |= dict(zip(others, self._decode(others), strict=True))
        return torch.stack([found[seat] for seat in seats]), loops

    def _ask(self, seats: list[int]) -> set[int]:
        """The seats whose exit rule stops the token after the loop that they have run."""
        wanted = [seat for seat in seats if self._rules[seat].needs_logits]
        logits = dict(zip(wanted, self._decode(wanted), strict=True)) if wanted else {}
        together: dict[tuple[Rule, int], list[int]] = {}
        for seat in seats:
            key = self._rules[seat], seat if self.separate else -1
            together.setdefault(key, []).append(seat)
        stopped = set()
        for (rule, _), group in together.items():
            state = self._state(group)
            stop, exits = rule.check(
                join_states([self._exits[seat] for seat in group]),
                state.h[:, -1],
                torch.stack([logits[seat] for seat in group]) if rule.needs_logits else None,
                None if state.halted is None else state.halted.tracker.mass[:, -1],
            )
            for place, (seat, ends) in enumerate(zip(group, stop.tolist(), strict=True)):
                index = self._integers([place])
                self._exits[seat] = select_rows(exits, index)
                if ends:
                    stopped.add(seat)
                    if rule.needs_logits:
                        self._logits[seat] = logits[seat]
        return stopped

    def _decode(self, seats: Sequence[int]) -> Float[Tensor, "N V"]:
        """The logits if the tokens of some seats stopped now."""
        found = []
        for part in self._calls_of(seats):
            rows = self._padded(part)
            h = readout(self.model, self._state(rows))
            logits = self.calls.decode(self.model, h, self._context(rows))
            found.append(logits[: len(part), -1])
        return torch.cat(found)

    # --- rows -------------------------------------------------------------------------------------

    def _calls_of(self, seats: Sequence[int]) -> list[Sequence[int]]:
        """The seats of each call."""
        size = SEPARATE_ROWS if self.separate else len(seats)
        return [seats[start : start + size] for start in range(0, len(seats), size)]

    def _padded(self, seats: Sequence[int]) -> Sequence[int]:
        """The seats, filled up with the seat of nobody for compiled calls and those of one size."""
        if not (self.compiled or self.separate):
            return seats
        bucket = min(1 << (len(seats) - 1).bit_length(), self.num_seats)
        bucket = SEPARATE_ROWS if self.separate else bucket
        return [*seats, *[self.num_seats] * (bucket - len(seats))]

    def _context(self, rows: Sequence[int]) -> PagedContext:
        """The context of the rows' tokens."""
        key = tuple(rows)
        if key not in self._contexts:
            self._contexts[key] = self._make_context(rows)
        return self._contexts[key]

    def _make_context(self, rows: Sequence[int]) -> PagedContext:
        index = self._integers(rows)
        tables = self._tables
        if not (self.compiled or self.separate):  # else the width must not change
            tables = tables[:, : max(1, *(len(self._pages[row]) for row in rows))]
        parts = self._tokens, self._positions, tables, self._seeds
        ctx = self.cache.context(*(part.index_select(0, index) for part in parts))
        return replace(ctx, experts=separate_experts) if self.separate else ctx

    def _state(self, rows: Sequence[int]) -> LoopState:
        """The state of the rows."""
        index = self._integers(rows)
        loops = [self._loops[row] for row in rows]
        return LoopState(
            h=self._h.index_select(0, index),
            e=self._e.index_select(0, index),
            loop_idx=self._integers(loops),
            loops=tuple(loops),
            depths=tuple(self._limits[row] for row in rows),
            halted=select_rows(self._halted, index),
        )

    def _put(self, index: Int[Tensor, "N"], state: LoopState) -> None:
        """Write back the first rows of a state: of as many as there are in ``index``."""
        put = lambda old, new: old.index_copy_(0, index, new[: len(index)])  # noqa: E731
        put(self._h, state.h)
        if self._halted is not None:
            tree_map(put, self._halted, state.halted)

    def _fill_forward(self, seats: Sequence[int]) -> None:
        """Show the last loop of each token at the later ones that its text may reach."""
        early = [seat for seat in seats if self._loops[seat] < self._depths[seat]]
        if not early:
            return
        loops, depths = ([each[seat] for seat in early] for each in (self._loops, self._depths))
        view = self._context(early).cache
        assert view is not None
        view.fill_forward(torch.tensor(loops), torch.tensor(depths))

    def _integers(self, numbers: Sequence[Any]) -> Int[Tensor, "..."]:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def require_separate_products(model: RecurrentDepthLM, num_rows: int) -> None:
    """Check that a product of ``num_rows`` rows and a weight gives a row the same at every place.

    Raises:
        ValueError: On this machine it does not, for the shape of one of the model's weights, or
            they are in 8 bits.
    """
    stored = not any(isinstance(module, Int8Weight) for module in model.modules())
    require(stored, "batch_invariant", True, "False with weights in 8 bits")
    weights = {each.shape: each.detach() for each in model.parameters() if each.ndim == 2}
    generator = torch.Generator().manual_seed(0)
    for shape, weight in weights.items():
        x = torch.randn(num_rows, 1, shape[1], generator=generator).to(weight)
        wanted = functional.linear(x, weight)
        for shift in range(1, num_rows):
            if not torch.equal(functional.linear(x.roll(shift, 0), weight).roll(-shift, 0), wanted):
                raise ValueError(
                    f"batch_invariant is not possible here: products with weights of the shape "
                    f"{list(shape)} depend on a row's place among the others on this machine"
                )


def _least_seconds(call: Callable[[], object], repeats: int) -> float:
    """The shortest of some calls, after one that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


def _filled(numbers: Sequence[int], length: int) -> list[int]:
    """The numbers, and zeros up to a length; page 0 is nobody's."""
    return [*numbers, *[0] * (length - len(numbers))]


def _signed(seed: int) -> int:
    """A seed of up to 64 bits as the signed integer of the same bits."""
    return (seed + 2**63) % 2**64 - 2**63
