import itertools
from dataclasses import replace

import pytest
import torch

from openmythos.analysis.expert import ExpertSums, chance_of_overlap, jaccard
from tests.analysis.family import planted_loops


def test_agreement_is_shared_experts_over_all() -> None:
    a = torch.tensor([[0, 1], [0, 1], [0, 1]])
    b = torch.tensor([[1, 0], [1, 2], [2, 3]])
    assert jaccard(a, b).tolist() == pytest.approx([1.0, 1 / 3, 0.0])


@pytest.mark.parametrize(("experts", "chosen"), [(4, 2), (5, 3), (6, 1), (3, 3)])
def test_chance_is_the_mean_over_all_choices(experts: int, chosen: int) -> None:
    sets = [set(ids) for ids in itertools.combinations(range(experts), chosen)]
    every = [len(a & b) / len(a | b) for a in sets for b in sets]
    assert chance_of_overlap(experts, chosen) == pytest.approx(sum(every) / len(every))


def test_overlaps_over_batches() -> None:
    # One layer, two loops: the first token keeps its experts, the second keeps one of two.
    first = [torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([[[1, 0], [2, 1]]])]
    second = [torch.tensor([[[0, 1], [0, 1]]]), torch.tensor([[[2, 3], [0, 1]]])]
    sums = ExpertSums(4)
    for batch in (first, second):
        loops = planted_loops(torch.zeros(3, 1, 2, 1))
        for loop, experts in zip(loops, batch, strict=True):
            sums.add(replace(loop, experts={0: experts}), torch.ones(1, 2, dtype=torch.bool))
    (found,) = sums.overlaps()
    assert found.layer == 0
    assert found.overlap[0][0] == found.overlap[1][1] == 1.0
    assert found.overlap[0][1] == found.overlap[1][0] == pytest.approx((1 + 1 / 3 + 0 + 1) / 4)
    # A token at loop 1 and the next at loop 2: {0,1} with {2,1}, and {0,1} with {0,1}.
    assert found.other_token[0][1] == pytest.approx((1 / 3 + 1) / 2)
    assert found.chance == chance_of_overlap(4, 2)


def test_a_core_without_experts_has_no_overlap() -> None:
    sums = ExpertSums(0)
    for loop in planted_loops(torch.zeros(3, 1, 2, 1)):
        sums.add(loop, torch.ones(1, 2, dtype=torch.bool))
    assert sums.overlaps() == []
