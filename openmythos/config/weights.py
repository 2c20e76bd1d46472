"""How many weights a part has, how many one token reads, how many products they cost. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """A sum of weights.

    Args:
        params: All of them.
        active: Those that one token reads.
        macs: Multiply-adds with them, for one token and one application.
    """

    params: int = 0
    active: int = 0
    macs: int = 0

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(
            self.params + other.params, self.active + other.active, self.macs + other.macs
        )

    def __mul__(self, times: int) -> "Weights":
        return Weights(self.params * times, self.active * times, self.macs * times)


def matrix(num_in: int, num_out: int) -> Weights:
    """A matrix that every token is multiplied by."""
    return Weights(num_in * num_out, num_in * num_out, num_in * num_out)


def vector(size: int) -> Weights:
    """A bias, a norm's weights or a scale, whose products are not counted."""
    return Weights(size, size)


def table(rows: int, width: int) -> Weights:
    """Rows of which a token looks one up."""
    return Weights(rows * width, width)
