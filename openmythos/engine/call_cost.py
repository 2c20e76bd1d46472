"""What the model's calls cost by their rows, and when tokens should wait for each other.

Between two tokens of a request coda, head and prelude run: the boundary. If tokens cross it as soon
as they can, every step pays a call of few rows; if they wait for each other, fewer rows loop
meanwhile. What is better depends on the model, the machine, and how soon others will come.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

HORIZON = 8  # loops that are looked ahead
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
        padded: Whether calls are filled up to the next measured number of rows; otherwise their
            cost lies on a line between the measured ones.
    """

    core: Mapping[int, float]
    boundary: Mapping[int, float]
    padded: bool = False

    def loop(self, num_rows: int) -> float:
        """Seconds of one loop of so many rows."""
        return self._at(self._tables[0], num_rows) if num_rows else 0.0

    def crossing(self, num_rows: int) -> float:
        """Seconds of one crossing of so many rows."""
        return self._at(self._tables[1], num_rows)

    def worth_waiting(
        self,
        held: Sequence[float],
        looping: Sequence[Ends],
        loops: Sequence[float],
        step: float = 0.0,
    ) -> bool:
        """Whether tokens at the boundary should let the others run loops until more have come.

        If they wait for some loops and cross together with those that have ended by then, one call
        does the work of two. Until then fewer rows loop than there are, and the time that it takes
        is worth more than what they get done. They wait if, for some number of loops, more is saved
        than lost.

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
        whole = (self._at(core, num_held + num_looping) + step) / total
        alone = self._at(boundary, num_held)
        lost, joined, done = 0.0, 0.0, 0.0
        for ended in zip(*looping, strict=True):
            lost += self._at(core, num_looping - joined) + step - (left - done) * whole
            joined, done = sum(ended), sum(map(mul, ended, worth))
            # What one crossing takes less than two; of less than one row its share.
            others = max(joined, 1.0)
            both = alone + self._at(boundary, others) - self._at(boundary, num_held + others)
            if min(joined, 1.0) * both > lost:
                return True
        return False

    def _at(self, table: Sequence[float], rows: int | float) -> float:
        """The cost of so many rows on average."""
        last = len(table) - 1
        low, high = min(int(rows), last), min(math.ceil(rows), last)
        if low == high or self.padded:
            return table[high]
        return table[low] + (rows - low) * (table[high] - table[low])

    @functools.cached_property
    def _tables(self) -> tuple[list[float], list[float]]:
        """The costs of 0, 1, 2 ... rows: of loops, and of crossings."""
        core, boundary = (
            [self._between(costs, rows) for rows in range(max(costs, default=-1) + 1)]
            for costs in (self.core, self.boundary)
        )
        return core, boundary

    def _between(self, costs: Mapping[int, float], rows: int) -> float:
        below = max((known for known in costs if known <= rows), default=min(costs))
        above = min(known for known in costs if known >= rows)
        if below == above or self.padded:
            return costs[above]
        share = (rows - below) / (above - below)
        return costs[below] + share * (costs[above] - costs[below])
