"""Which experts loops choose for the same token, and how far their choices agree."""

from dataclasses import asdict, dataclass, field
from math import comb
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from openmythos.analysis.observe import Loop


@dataclass(frozen=True, kw_only=True)
class ExpertOverlap:
    """How far the expert choices of two loops agree for a token, in one layer of the core.

    Agreement of two sets is Jaccard's: the experts in both over the experts in either.

    Attributes:
        layer: The layer of the core, from 0.
        overlap: By pair of loops: the mean agreement for the same token; 1 on the diagonal.
        other_token: The same between a token and the one after it, at the two loops: what the
            experts' unequal load gives without any choice by token.
        chance: The expectation for two independent choices in which every expert is as likely.

    Source: Lee et al. (arXiv 2605.09165), who find that experts differ between loops.
    """

    layer: int
    overlap: tuple[tuple[float, ...], ...]
    other_token: tuple[tuple[float, ...], ...]
    chance: float

    def to_dict(self) -> dict[str, Any]:
        """The record, ready for JSON."""
        return asdict(self)


def jaccard(a: Int[Tensor, "N K"], b: Int[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """The agreement of two sets of experts, row by row; no row names an expert twice."""
    both = (a[:, :, None] == b[:, None, :]).sum(dim=(1, 2))
    return both / (2 * a.shape[1] - both)


def chance_of_overlap(num_experts: int, num_chosen: int) -> float:
    """The expected agreement of two independent choices in which every expert is as likely."""
    ways = comb(num_experts, num_chosen)
    return sum(
        comb(num_chosen, both)
        * comb(num_experts - num_chosen, num_chosen - both)
        / ways
        * both
        / (2 * num_chosen - both)
        for both in range(1, num_chosen + 1)
    )


@dataclass
class ExpertSums:
    """Sums over tokens from which the overlaps follow; batches are added one after the other."""

    num_experts: int
    _chosen: dict[int, list[Tensor]] = field(default_factory=dict)
    _sums: dict[int, dict[tuple[int, int], tuple[float, float]]] = field(default_factory=dict)
    _counts: list[int] = field(default_factory=lambda: [0, 0])
    _num_chosen: int = 0

    def add(self, loop: Loop, valid: Bool[Tensor, "B T"]) -> None:
        """Add a loop of a batch; each batch begins with its first loop."""
        index = loop.number - 1
        for layer, experts in loop.experts.items():
            chosen = experts[valid]
            self._num_chosen = chosen.shape[1]
            earlier = self._chosen.setdefault(layer, [])
            del earlier[index:]  # of the batch before
            earlier.append(chosen)
            sums = self._sums.setdefault(layer, {})
            for other, before in enumerate(earlier):
                same = float(jaccard(before, chosen).sum())
                shifted = float(jaccard(before[:-1], chosen[1:]).sum())
                old = sums.get((other, index), (0.0, 0.0))
                sums[other, index] = old[0] + same, old[1] + shifted
        if index == 0:
            count = int(valid.sum())
            self._counts = [self._counts[0] + count, self._counts[1] + max(count - 1, 0)]

    def overlaps(self) -> list[ExpertOverlap]:
        """The means of all that was added, by layer; none for a core without experts."""
        found = []
        for layer, sums in sorted(self._sums.items()):
            loops = range(1 + max(b for _, b in sums))
            same, other = (
                tuple(
                    tuple(
                        sums[min(a, b), max(a, b)][kind] / max(self._counts[kind], 1) for b in loops
                    )
                    for a in loops
                )
                for kind in (0, 1)
            )
            chance = chance_of_overlap(self.num_experts, self._num_chosen)
            found.append(ExpertOverlap(layer=layer, overlap=same, other_token=other, chance=chance))
        return found
