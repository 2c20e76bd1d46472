"""Counts of a part's weights: all, active per token, and multiply-adds per token. No torch.

``Shapes`` are those of its parameters by the name that each has in the part's module.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Weights:
    """Counts of one part or of several parts together.

    Args:
        params: All weights.
        active: The weights that one token uses.
        macs: Multiply-adds with these weights, per token and application.
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
    """A matrix that every token is multiplied by, for example a linear layer."""
    return Weights(num_in * num_out, num_in * num_out, num_in * num_out)


def vector(size: int) -> Weights:
    """A bias, a scale or the weights of a norm; its multiplications are not counted."""
    return Weights(size, size)


def table(rows: int, width: int) -> Weights:
    """A lookup table, of which one token uses one row."""
    return Weights(rows * width, width)


def within(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """The shapes of the module ``name``, as its parent names them."""
    return {f"{name}.{inner}": shape for inner, shape in shapes.items()}
