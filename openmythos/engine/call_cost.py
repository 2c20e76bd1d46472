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

HORIZON = 16  # loops that are looked ahead
TOGETHER = 0.92  # of the best rate at which rows stay in step, which later cycles keep up
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

    def loops_between(
        self,
        looping: Sequence[Ends],
        loops: Sequence[float],
        step: float = 0.0,
        slower: float = 1.0,
    ) -> tuple[int, int]:
        """The loops to run from one crossing to the next, and how many tokens should cross it.

        The longer tokens wait at the boundary, the more of them one crossing serves, and the fewer
        rows loop meanwhile. The crossing is best after the loop that makes most loops per second of
        those until then, and of what a crossing costs whatever its rows. What it costs by the row
        every token pays, whenever it crosses. Rows that are out of step afterwards do worse in the
        next cycles than in this one, so that staying in step is chosen if it is nearly as good.

        Args:
            looping: When the rows will have ended.
            loops: The loops that each row's tokens take on average: a loop is worth that share of
                a token.
            step: Seconds that each loop takes besides its call, whatever its rows.
            slower: How many times as long as its calls a crossing takes.
        """
        core, _ = self._tables
        worth = [1 / each for each in loops]
        num_looping, left = len(looping), sum(worth)
        seconds, gained, joined, done, most, found = 0.0, 0.0, 0.0, 0.0, 0.0, (1, 1)
        for number, ended in enumerate(zip(*looping, strict=True), start=1):
            seconds += core[int((num_looping - joined) * PARTS)] + step
            gained += left - done
            joined, done = sum(ended), sum(map(mul, ended, worth))
            rate = gained / (seconds + slower * self._crossing_at_all)
            if joined and rate > most:
                most, found = rate, (number, round(joined))
            if joined == num_looping:
                if rate >= TOGETHER * most:
                    found = number, num_looping
                break
        return found

    @functools.cached_property
    def _crossing_at_all(self) -> float:
        """Seconds of a crossing that do not depend on its rows, by a line through its costs."""
        most = max(self.boundary)
        if most == 1:
            return self.crossing(1)
        return max(0.0, (most * self.crossing(1) - self.crossing(most)) / (most - 1))

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
