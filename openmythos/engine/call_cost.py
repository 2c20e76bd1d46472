"""What the model's calls cost by their rows, and when tokens should wait for each other.

Between two tokens of a request coda, head and prelude run: the boundary. If tokens cross it as soon
as they can, every step pays a call of few rows; if they wait for each other, fewer rows loop
meanwhile. What is better depends on the model, the machine, and how soon others will come.
"""

import functools
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
        return self._at(self.core, num_rows) if num_rows else 0.0

    def crossing(self, num_rows: int) -> float:
        """Seconds of one crossing of so many rows."""
        return self._at(self.boundary, num_rows)

    def worth_waiting(
        self, held: Sequence[float], looping: Sequence[Ends], loops: Sequence[float]
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
        """
        worth = [1 / each for each in loops]
        num_rows, total = len(held) + len(looping), sum(worth) + sum(1 / each for each in held)
        whole = self._at(self.core, num_rows) / total  # seconds of a token, when all rows loop
        lost, joined, done = 0.0, 0.0, 0.0
        for ended in zip(*looping, strict=True):
            lost += self._at(self.core, len(looping) - joined) - (sum(worth) - done) * whole
            joined, done = sum(ended), sum(map(mul, ended, worth))
            if self._saved(len(held), joined) > lost:
                return True
        return False

    def _saved(self, num_held: int, joined: int | float) -> float:
        """Seconds that one crossing takes less than two; of less than one row its share."""
        others = max(joined, 1.0)
        apart = self._at(self.boundary, num_held) + self._at(self.boundary, others)
        return min(joined, 1.0) * (apart - self._at(self.boundary, num_held + others))

    def _at(self, costs: Mapping[int, float], rows: int | float) -> float:
        """The cost of so many rows on average."""
        below = max((known for known in costs if known <= rows), default=min(costs))
        above = min((known for known in costs if known >= rows), default=max(costs))
        if below == above or self.padded:
            return costs[above]
        share = (rows - below) / (above - below)
        return costs[below] + share * (costs[above] - costs[below])
