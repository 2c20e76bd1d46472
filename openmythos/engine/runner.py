"""The rows of an engine, each one token of one request, and the model's calls on some of them.

Rows are addressed by seat. A call may take any seats, at different loops: it gathers their state,
computes, and puts it back.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from openmythos.config.schema import require
from openmythos.engine.call_cost import CallCosts
from openmythos.engine.compile import record
from openmythos.engine.page_pool import SCRATCH
from openmythos.engine.paged_cache import PagedCache, PagedContext
from openmythos.engine.sampling import SamplingConfig, sample
from openmythos.model.context import select_rows
from openmythos.model.exit import Fixed, Rule, join_states, split_states
from openmythos.model.int8 import Int8Weight
from openmythos.model.loop import (
    ExitState,
    Halted,
    LoopState,
    readout,
    run_loop,
    start_loops,
    unroll,
)
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.separate_experts import separate_experts

SEPARATE_ROWS = 16  # of every call whose rows must not depend on each other; see ``Runner``

MEASURED_LENGTH = 128  # tokens that a row attends to when the costs of calls are measured
MOST_REPEATS, MEASURED_SECONDS = 15, 0.1  # of each of these calls
Program = Literal[
    "encode", "begin", "loop", "decode"
]  # what is run on rows: ``Runner._encode_rows`` ...


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
        self.compiled, self.core_applications = compiled, 0
        weight, width = model.embed.weight, -(-max_len // cache.page_size)
        self.device, rows = weight.device, num_seats + 1
        self._h = torch.zeros(rows, 1, weight.shape[1], dtype=weight.dtype, device=self.device)
        self._e = torch.zeros_like(self._h)
        self._halted: Halted | None = None
        if model.halting is not None:
            begun = Halted.start(model.halting, self._h)
            self._halted = tree_map(torch.clone, begun)  # some of its tensors are one and the same
        self._seeds = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self._tables = torch.full((rows, width), SCRATCH, device=self.device)
        # The rest is on the host, by seat.
        self._pages: list[list[int]] = [[] for _ in range(rows)]
        self._tokens, self._positions, self._known_seeds = [0] * rows, [0] * rows, [0] * rows
        self._loops, self._limits, self._depths = [0] * rows, [1] * rows, [1] * rows
        self._rules: list[Rule] = [Fixed()] * rows
        self._contexts: dict[tuple[int, ...], PagedContext] = {}  # until a token begins
        self._exits: dict[int, ExitState] = {}
        self._logits: dict[int, Tensor] = {}  # of tokens that stopped by a rule that needs them
        self._recorded: dict[tuple[Program, int], tuple[Tensor, Callable[[], Any]]] = {}

    # --- costs ------------------------------------------------------------------------------------

    def measure(self) -> CallCosts:
        """Seconds of the calls for 1, 2, 4 ... rows; compiled calls are compiled for them first.

        All rows are the seat of nobody, whose text is ``MEASURED_LENGTH`` tokens long meanwhile.
        """
        nobody, size, before = self.num_seats, self.cache.page_size, self.core_applications
        pages = min(-(-MEASURED_LENGTH // size), self._tables.shape[1])
        place = min(MEASURED_LENGTH, pages * size) - 1, (SCRATCH,) * pages
        row = Entry(nobody, 0, *place, self.cache.max_loops, Fixed(), 0)
        filling = replace(row, position=0, pages=(SCRATCH,))
        counts = [min(1 << power, self.num_seats) for power in range(self.num_seats.bit_length())]
        counts = sorted({*counts, self.num_seats})
        found = []
        for entry in (row, filling):
            core, boundary = {}, {}
            for count in counts:
                boundary[count] = _least_seconds(partial(self._cross_nobody, [entry] * count))
                core[count] = _least_seconds(partial(self._loop_nobody, count))
            found += [core, boundary]
            if not (self.compiled or self.separate):
                break  # calls are not filled up
        self.enter([filling])
        self.core_applications = before
        return CallCosts(*found)

    def _loop_nobody(self, num_rows: int) -> None:
        self.advance([self.num_seats] * num_rows)
        self._loops[self.num_seats] = 0

    def _cross_nobody(self, entries: Sequence[Entry]) -> None:
        self._loops[self.num_seats] = 1
        logits, _ = self.leave([entry.seat for entry in entries])
        logits.amax(dim=-1).isfinite().tolist()  # as the engine does, greedily
        sample(
            logits, [SamplingConfig()] * len(entries), [torch.Generator()] * len(entries)
        ).tolist()
        self.enter(entries)

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
            seat, pages, seed = entry.seat, list(entry.pages), _signed(entry.seed)
            self._tokens[seat], self._positions[seat] = entry.token, entry.position
            self._loops[seat], self._depths[seat] = 0, entry.depth
            self._limits[seat] = entry.depth if entry.loops is None else entry.loops
            self._rules[seat] = entry.rule if entry.loops is None else Fixed()
            self._logits.pop(seat, None)
            if pages != self._pages[seat]:
                self._pages[seat] = pages
                self._tables[seat, : len(pages)] = self._integers(pages)
            if seed != self._known_seeds[seat]:
                self._known_seeds[seat] = seed
                self._seeds[seat] = seed
        for part in self._calls_of([entry.seat for entry in entries]):
            self._call("encode", part)
            if self.model.config.state_init.is_random:
                self._call("begin", part)
        for entry in entries:
            seat, rule = entry.seat, self._rules[entry.seat]
            if not isinstance(rule, Fixed):
                self._exits[seat] = rule.start(self._h[seat : seat + 1, -1].clone())

    def advance(self, seats: Sequence[int]) -> list[int]:
        """Run one loop in each of some seats; return the seats whose token stops there."""
        for part in self._calls_of(seats):
            self._call("loop", part)
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
        if not found:
            return self._decode(seats), loops
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
            state = self._state(self._integers(group))
            stop, exits = rule.check(
                join_states([self._exits[seat] for seat in group]),
                state.h[:, -1],
                torch.stack([logits[seat] for seat in group]) if rule.needs_logits else None,
                None if state.halted is None else state.halted.tracker.mass[:, -1],
            )
            self._exits |= zip(group, split_states(exits), strict=True)
            for seat, ends in zip(group, stop.tolist(), strict=True):
                if ends:
                    stopped.add(seat)
                    if rule.needs_logits:
                        self._logits[seat] = logits[seat]
        return stopped

    def _decode(self, seats: Sequence[int]) -> Float[Tensor, "N V"]:
        """The logits if the tokens of some seats stopped now."""
        return torch.cat(
            [self._call("decode", part)[: len(part)] for part in self._calls_of(seats)]
        )

    def _fill_forward(self, seats: Sequence[int]) -> None:
        """Show the last loop of each token at the later ones that its text may reach."""
        size = self.cache.page_size
        early = [
            (*self._place(seat, size), self._loops[seat], self._depths[seat])
            for seat in seats
            if self._loops[seat] < self._depths[seat]
        ]
        if early:
            self.cache.fill_forward(early)

    def _place(self, seat: int, size: int) -> tuple[int, int]:
        """The page of a seat's token, and where in it."""
        index, offset = divmod(self._positions[seat], size)
        return self._pages[seat][index], offset

    # --- the model's calls ------------------------------------------------------------------------

    def _call(self, program: "Program", seats: Sequence[int]) -> Any:
        """Run a program on some seats; it finds in ``given`` what the host knows of each.

        Compiled, it is recorded for each number of rows, and reads and writes the same memory
        every time.
        """
        rows = self._padded(seats)
        lists = self._loops, self._tokens, self._positions
        given = self._integers([rows, *([known[row] for row in rows] for known in lists)])
        run = getattr(self, f"_{program}_rows")
        if not self.compiled or program == "begin":  # random states take minutes to compile
            return run(given, self._context(rows, given))
        key = program, len(rows)
        if key not in self._recorded:
            result, again = record(lambda: run(given, self._make_context(given, None)))
            self._recorded[key] = given, again
            return result
        kept, again = self._recorded[key]
        kept.copy_(given)
        return again()

    def _encode_rows(self, given: Int[Tensor, "4 N"], ctx: PagedContext) -> None:
        self._e.index_copy_(0, given[0], self.model.encode(ctx.tokens, ctx))
        if not self.model.config.state_init.is_random:
            self._begin_rows(given, ctx)

    def _begin_rows(self, given: Int[Tensor, "4 N"], ctx: PagedContext) -> None:
        h = self.model.init_state(self._e.index_select(0, given[0]), ctx)
        halting = self.model.halting
        self._put(given[0], h, None if halting is None else Halted.start(halting, h))

    def _loop_rows(self, given: Int[Tensor, "4 N"], ctx: PagedContext) -> None:
        state = self._state(given[0])
        parts = state.h, state.e, given[1], ctx, state.halted
        self._put(given[0], *run_loop(self.model, *parts))

    def _decode_rows(self, given: Int[Tensor, "4 N"], ctx: PagedContext) -> Float[Tensor, "N V"]:
        return self.model.decode(readout(self.model, self._state(given[0])), ctx)[:, -1]

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

    def _context(self, rows: Sequence[int], given: Int[Tensor, "4 N"]) -> PagedContext:
        """The context of the rows' tokens."""
        key = tuple(rows)
        if key not in self._contexts:
            width = max(1, *(len(self._pages[row]) for row in rows))
            whole = self.compiled or self.separate  # shapes must not change
            self._contexts[key] = self._make_context(given, None if whole else width)
        return self._contexts[key]

    def _make_context(self, given: Int[Tensor, "4 N"], width: int | None) -> PagedContext:
        """The context, with tables of so many pages; None: all."""
        rows, _, tokens, positions = given
        tables, seeds = self._tables[:, :width].index_select(0, rows), self._seeds[rows]
        ctx = self.cache.context(tokens[:, None], positions[:, None], tables, seeds)
        return replace(ctx, experts=separate_experts) if self.separate else ctx

    def _state(self, index: Int[Tensor, "N"]) -> LoopState:
        """The state of some rows, without what the host counts."""
        h, e = (part.index_select(0, index) for part in (self._h, self._e))
        return LoopState(h, e, index, (), (), select_rows(self._halted, index))

    def _put(
        self, index: Int[Tensor, "N"], h: Float[Tensor, "N 1 D"], halted: Halted | None
    ) -> None:
        self._h.index_copy_(0, index, h)
        if self._halted is not None:
            tree_map(lambda old, new: old.index_copy_(0, index, new), self._halted, halted)

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


def _least_seconds(call: Callable[[], object]) -> float:
    """The shortest of some calls, after one that is not counted."""
    call()
    found: list[float] = []
    while len(found) < MOST_REPEATS and sum(found) < MEASURED_SECONDS:
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
