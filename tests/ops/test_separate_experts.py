"""The experts of batch-invariant engines."""

import pytest
import torch

from openmythos.ops.moe import moe_experts
from openmythos.ops.separate_experts import separate_experts
from tests.ops.test_moe import experts_case, loop_case


@torch.no_grad()
@pytest.mark.parametrize(("dim", "width"), [(12, 20), (64, 32)])
def test_separate_experts_equal_the_reference_and_no_bit_depends_on_the_others(dim, width):
    weights = experts_case(dim, width, torch.float32)
    x, expert, weight, counts = loop_case(16, dim, torch.float32, seed=0)
    mine = separate_experts(x, expert, weight, counts, *weights)
    torch.testing.assert_close(mine, moe_experts(x, expert, weight, counts, *weights))
    other = loop_case(16, dim, torch.float32, seed=1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for kept in (1, 5, 16):
        mixed = [part.clone() for part in other[:3]]
        for part, of_mine in zip(mixed, (x, expert, weight), strict=True):
            part[order[:kept]] = of_mine[:kept]
        mixed.append(torch.bincount(mixed[1].flatten(), minlength=len(counts)))
        assert torch.equal(separate_experts(*mixed, *weights)[order[:kept]], mine[:kept])
