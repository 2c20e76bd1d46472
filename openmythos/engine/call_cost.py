"""What the model's calls cost by their rows, and how long tokens should wait for each other.

Between two tokens of a request coda, head and prelude run: the boundary. If tokens cross it as soon
as they can, every step pays a call of few rows; if they wait for each other, fewer rows loop
meanwhile. Where the best lies depends on the model and the machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class CallCosts:
    """Measured seconds per call, by the number of rows; between them it is a straight line.

    Attributes:
        core: One loop.
        boundary: Decoding a token, and encoding the next one.
    """

    core: Mapping[int, float]
    boundary: Mapping[int, float]

    def hold(self, num_rows: int, mean_loops: float) -> int:
        """The number of rows that tokens wait for at the boundary, for the least time per token.

        Args:
            num_rows: Rows that loop or wait.
            mean_loops: Loops per token. Each loop is taken to be the last with equal probability.
        """
        key = num_rows, round(mean_loops)
        if key not in self._holds:
            self._holds[key] = min(
                range(1, num_rows + 1), key=lambda hold: self.seconds(hold, num_rows, mean_loops)
            )
        return self._holds[key]

    def seconds(self, hold: int, num_rows: int, mean_loops: float) -> float:
        """Expected seconds per token if tokens wait until there are ``hold``.

        While j rows wait, the others run loops until one of them stops: after
        ``mean_loops / (num_rows - j)`` loops on average.
        """
        looping = range(num_rows, num_rows - hold, -1)
        spent = sum(_at(self.core, rows) * mean_loops / rows for rows in looping)
        return (spent + _at(self.boundary, hold)) / hold

    @cached_property
    def _holds(self) -> dict[tuple[int, int], int]:
        return {}


def _at(costs: Mapping[int, float], rows: int) -> float:
    """The cost of so many rows, from the measured numbers around it."""
    below = max((known for known in costs if known <= rows), default=min(costs))
    above = min((known for known in costs if known >= rows), default=max(costs))
    if below == above:
        return costs[below]
    share = (rows - below) / (above - below)
    return costs[below] + share * (costs[above] - costs[below])
