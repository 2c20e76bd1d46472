"""What the model's calls cost by their rows, and when tokens should wait for each other.

Between two tokens of a request coda, head and prelude run: the boundary. If tokens cross it as soon
as they can, every step pays a call of few rows; if they wait for each other, fewer rows loop
meanwhile. What is better depends on the model, the machine, and how soon others will come.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul

HORIZON = 8  # loops that are looked ahead
PARTS = 8  # of a row that the expected number of rows is rounded down to
Ends = tuple[float, ...]  # the probabilities to have ended after 1, 2 ... HORIZON more loops


@functools.lru_cache(maxsize=4096)  # asked at every step, for what changes slowly
def ends_after(seen: tuple[int, ...], done: int, depth: int) -> Ends:
    """The probabilities for a token that has run ``done`` loops of at most ``depth``.

    It ends as one of those ``seen``, each as likely, that took more; without any such, all numbers
    of loops up to ``depth`` are as likely.
    """
    loops = [taken - done for taken in seen if taken > done] or range(1, depth - done + 1)
    counts = [0] * HORIZON
    for number in loops:
        if number <= HORIZON:
            counts[number - 1] += 1
    return tuple(count / len(loops) for count in accumulate(counts))


@dataclass(frozen=True)
class CallCosts:
    """Measured seconds per call, by the number of rows.

    Attributes:
        core: One loop.
        boundary: Decoding a token, and encoding the next one.
        core_padding: One loop if all rows are filling: calls are filled up to the next measured
            number of rows, and every row that is none costs its share more. None: they are not
            filled up, and their cost lies on a line between the measured ones.
        boundary_padding: The same of the boundary.
    """

    core: Mapping[int, float]
    boundary: Mapping[int, float]
    core_padding: Mapping[int, float] | None = None
    boundary_padding: Mapping[int, float] | None = None

    def loop(self, num_rows: int) -> float:
        """Seconds of one loop of so many rows."""
        return self._tables[0][num_rows * PARTS] if num_rows else 0.0

    def crossing(self, num_rows: int) -> float:
        """Seconds of one crossing of so many rows."""
        return self._tables[1][num_rows * PARTS]

    def loops_to_wait(
        self,
        held: Sequence[float],
        looping: Sequence[Ends],
        loops: Sequence[float],
        step: float = 0.0,
    ) -> int:
        """The loops that tokens at the boundary should let the others run before they cross it.

        If they wait for some loops and cross together with those that have ended by then, one call
        does the work of two. Until then fewer rows loop than there are, and the time that it takes
        is worth more than what they get done. The number is the one that saves most; 0: none does.

        Args:
            held: Of each row at the boundary, the loops that its tokens take on average: one loop
                is that share of a token.
            looping: When the others will have ended.
            loops: The same of these as of those held.
            step: Seconds that each loop takes besides its call, whatever its rows.
        """
        core, boundary = self._tables
        worth = [1 / each for each in loops]
        num_held, num_looping, left = len(held), len(looping), sum(worth)
        total = left + sum(1 / each for each in held)
        # Seconds of a token when all rows loop, and of a crossing of those held alone.
        whole = (core[(num_held + num_looping) * PARTS] + step) / total
        alone = boundary[num_held * PARTS]
        lost, joined, done, most, found = 0.0, 0.0, 0.0, 0.0, 0
        for number, ended in enumerate(zip(*looping, strict=True), start=1):
            lost += core[int((num_looping - joined) * PARTS)] + step - (left - done) * whole
            joined, done = sum(ended), sum(map(mul, ended, worth))
            # What one crossing takes less than two; of less than one row its share.
            others = int((joined if joined > 1 else 1) * PARTS)
            both = alone + boundary[others] - boundary[num_held * PARTS + others]
            saved = (both if joined > 1 else joined * both) - lost
            if saved > most:
                most, found = saved, number
            if joined == num_looping:
                break
        return found

    @functools.cached_property
    def _tables(self) -> tuple[list[float], list[float]]:
        """The costs of loops and of crossings, in steps of ``1 / PARTS`` row."""
        core, boundary = (
            _table([_cost(costs, padding, rows) for rows in range(max(costs, default=-1) + 1)])
            for costs, padding in (
                (self.core, self.core_padding),
                (self.boundary, self.boundary_padding),
            )
        )
        return core, boundary


def _table(costs: Sequence[float]) -> list[float]:
    """Costs of 0, 1, 2 ... rows, and on the line between these."""
    between = [
        low + (high - low) * part / PARTS for low, high in pairwise(costs) for part in range(PARTS)
    ]
    return [*between, *costs[-1:]]


def _cost(costs: Mapping[int, float], padding: Mapping[int, float] | None, rows: int) -> float:
    """The cost of so many rows by those that were measured."""
    above = min(known for known in costs if known >= rows)
    if padding is not None:
        return padding[above] + (costs[above] - padding[above]) * rows / above
    below = max((known for known in costs if known <= rows), default=min(costs))
    share = (rows - below) / (above - below) if above > below else 0.0
    return costs[below] + share * (costs[above] - costs[below])
