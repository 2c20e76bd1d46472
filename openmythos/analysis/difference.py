"""Do consecutive loops read different tokens? A number in bits, from a reading map."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from openmythos.analysis.bootstrap import Interval, defined, interval, resample
from openmythos.analysis.reading import ReadingMap

MIN_MASS = 0.05


@dataclass(frozen=True, kw_only=True)
class LoopDifference:
    """How much the rows of a reading map differ from one loop to the next.

    Bits are Jensen-Shannon divergences: 0 where two loops read the same tokens in the same shares,
    1 where they read no token in common. Only loops that work are compared, and only with their
    neighbours. None stands for what is undefined: no two neighbours work.

    Attributes:
        mass: Per loop, the sum of its shares of all columns, negative ones counted as 0.
        working: The loops, from 0, whose mass is above ``MIN_MASS``.
        bits: Between each loop and the next.
        mean_bits: Their mean.
        mean_interval: 95 % of the means when the examples are drawn again, between the same loops.
        bits_interval: The same for each of ``bits``.
        num_working_interval: The same for the number of working loops.
        null: 95 % of the means when the loops are shuffled within each example: what remains is not
            the order of the loops but noise.
    """

    mass: tuple[float, ...]
    working: tuple[int, ...]
    bits: tuple[float | None, ...]
    mean_bits: float | None
    mean_interval: Interval | None
    bits_interval: tuple[Interval | None, ...]
    num_working_interval: Interval
    null: Interval | None

    @property
    def num_working(self) -> int:
        """Number of loops that work; 0 says that no loop reads anything."""
        return len(self.working)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {**asdict(self), "num_working": self.num_working}


def loop_difference(
    found: ReadingMap, *, num_samples: int = 1000, num_shuffles: int = 200, seed: int = 0
) -> LoopDifference:
    """Compare the necessity of consecutive loops.

    Args:
        found: The map of one model.
        num_samples: Samples of the examples for the intervals.
        num_shuffles: Shuffles of the loops for the null.
        seed: Of both.
    """
    shares = found.share(found.corrupted_at)
    works = is_working(shares)
    (bits,) = neighbour_bits(shares, works)
    samples = found.share(found.corrupted_at, resample(len(found.correct), num_samples, seed))
    sampled = neighbour_bits(samples, works)
    draw = torch.Generator().manual_seed(seed)
    num_loops, _, num_examples = found.corrupted_at.shape
    nulls = []
    for _ in range(num_shuffles):
        order = torch.rand(num_loops, num_examples, generator=draw).argsort(dim=0)
        shuffled = found.corrupted_at.gather(0, order[:, None].expand(found.corrupted_at.shape))
        null = found.share(shuffled)
        nulls.append(neighbour_bits(null, is_working(null))[0])
    number = interval(is_working(samples).sum(dim=1).double())
    assert number is not None
    return LoopDifference(
        mass=tuple(_mass(shares)[0].tolist()),
        working=tuple(works[0].nonzero()[:, 0].tolist()),
        bits=tuple(map(defined, bits.tolist())),
        mean_bits=defined(float(bits.nanmean())),
        mean_interval=interval(sampled.nanmean(dim=1)),
        bits_interval=tuple(interval(entry) for entry in sampled.unbind(dim=1)),
        num_working_interval=number,
        null=interval(torch.stack(nulls).nanmean(dim=1)) if nulls else None,
    )


def _mass(shares: Float[Tensor, "S L K"]) -> Float[Tensor, "S L"]:
    return shares.clamp(min=0).nan_to_num(0.0).sum(dim=-1)


def is_working(shares: Float[Tensor, "S L K"]) -> Bool[Tensor, "S L"]:
    """Which loops read more than ``MIN_MASS`` in all."""
    return _mass(shares) > MIN_MASS


def neighbour_bits(
    shares: Float[Tensor, "S L K"], works: Bool[Tensor, "#S L"]
) -> Float[Tensor, "S M"]:
    """Divergence in bits of each loop's shares from the next one's; NaN unless both work.

    Source: Lin 1991, Divergence measures based on the Shannon entropy, section IV.
    """
    read = shares.clamp(min=0).nan_to_num(0.0)
    rows = read / read.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(read.dtype).tiny)
    first, second = rows[:, :-1], rows[:, 1:]
    bits = _entropy((first + second) / 2) - (_entropy(first) + _entropy(second)) / 2
    return bits.clamp(min=0).masked_fill(~(works[:, :-1] & works[:, 1:]), torch.nan)


def _entropy(shares: Float[Tensor, "S M K"]) -> Float[Tensor, "S M"]:
    return -torch.xlogy(shares, shares).sum(dim=-1) / torch.log(shares.new_tensor(2.0))
