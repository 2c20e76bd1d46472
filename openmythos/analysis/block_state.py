"""The core's blocks over loops: whether each comes to rest, and how far apart their limits are."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vector_norm

from openmythos.analysis.observe import Loop, wide
from openmythos.analysis.trace import Mean

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class BlockStates:
    """Means over tokens, by place in the core: its input, then the output of each block.

    With more loops each place may come to rest at a limit of its own. Then the trajectory is a
    cycle: the state passes the same points in every loop, and the loop as a whole stands still.

    Attributes:
        places: Their names, in the order in which the state passes them.
        norm: By place and loop: the Euclidean norm.
        relative_step: By place and loop: how far the place has moved since the loop before, over
            its norm; None at the first loop.
        distance: By loop and pair of places: the distance between the two, over the mean of their
            norms. Its last entry compares the limits, if ``relative_step`` is small by then.
        net_movement: By loop: how far the last block's output has moved since the loop before, over
            the length of the way through the blocks; 0 is a closed cycle, None the first loop.

    Source: Blayney et al. (arXiv 2604.11791) for fixed points of single layers.
    """

    places: tuple[str, ...]
    norm: tuple[tuple[float | None, ...], ...]
    relative_step: tuple[tuple[float | None, ...], ...]
    distance: tuple[tuple[tuple[float | None, ...], ...], ...]
    net_movement: tuple[float | None, ...]

    @property
    def num_loops(self) -> int:
        """Number of loops observed."""
        return len(self.distance)

    @property
    def between_blocks(self) -> float | None:
        """The mean distance between the outputs of different blocks at the last loop.

        None for a core of one block.
        """
        last = self.distance[-1]
        pairs = [last[a][b] for a in range(1, len(last)) for b in range(1, a)]
        known = [value for value in pairs if value is not None]
        return sum(known) / len(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """The record, ready for JSON."""
        return {**asdict(self), "between_blocks": self.between_blocks}


@dataclass
class BlockStateSums:
    """Sums over tokens from which ``BlockStates`` follow; batches are added one after the other."""

    _places: list[Mean] = field(default_factory=list)
    _steps: list[Mean] = field(default_factory=list)
    _distances: list[Mean] = field(default_factory=list)

    def add(self, loop: Loop, valid: Bool[Tensor, "B T"]) -> None:
        """Add a loop of a batch; each batch begins with its first loop."""
        now = _stacked(loop, valid)
        index, size = loop.number - 1, len(now)
        if index == len(self._places):
            self._places.append(Mean(size))
            self._steps.append(Mean(size + 1))
            self._distances.append(Mean(size * size))
        norms = vector_norm(now, dim=-1)
        self._places[index].add([*norms])
        for a in range(size):
            apart = vector_norm(now[a] - now, dim=-1) / ((norms[a] + norms) / 2).clamp(min=_TINY)
            self._distances[index].add([*apart], a * size)
        if loop.earlier is None:
            return
        before = _stacked(loop.earlier, valid)
        moved = vector_norm(now - before, dim=-1)
        way = vector_norm(now[1:] - now[:-1], dim=-1).sum(dim=0)
        net = moved[-1] / way
        self._steps[index].add([*(moved / norms.clamp(min=_TINY)), net])

    def states(self) -> BlockStates:
        """The means of all that was added."""
        size = len(self._places[0].sums)
        steps = [mean.values() for mean in self._steps]
        flat = [mean.values() for mean in self._distances]
        return BlockStates(
            places=("input", *(f"block {number}" for number in range(1, size))),
            norm=tuple(zip(*(mean.values() for mean in self._places), strict=True)),
            relative_step=tuple(zip(*(row[:-1] for row in steps), strict=True)),
            distance=tuple(
                tuple(tuple(row[a * size : (a + 1) * size]) for a in range(size)) for row in flat
            ),
            net_movement=tuple(row[-1] for row in steps),
        )


def _stacked(loop: Loop, valid: Bool[Tensor, "B T"]) -> Float[Tensor, "P N D"]:
    return torch.stack([wide(place[valid]) for place in loop.places])
