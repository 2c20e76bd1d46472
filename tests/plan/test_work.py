"""What a step does, counted: FLOPs by depth, and what is kept of loops without a gradient."""

from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openmythos.config import ModelConfig, MoEConfig, counts
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.attention import attention_reference
from openmythos.ops.cross_entropy import cross_entropy
from tests.strategies import MLA, random_tokens, small_config, unchecked

LENGTH = 16
MOE = MoEConfig(num_experts=4, num_experts_per_token=2, d_expert=8)
FEW = {"d_model": 32, "num_core_layers": 1, "num_coda_layers": 0}
CONFIGS = {
    "dense": small_config(**FEW, tie_embeddings=False),
    "experts": small_config(**FEW, attention=MLA, core_feed_forward=MOE),
}


def step(config: ModelConfig, num_loops: int, grad_loops: int | None = None) -> tuple[int, int]:
    """FLOPs of a step, and bytes that its forward keeps for the backward pass."""
    model = RecurrentDepthLM(config).double().train()  # experts are plain products in fp64
    tokens = random_tokens(config, 2, LENGTH)
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen.setdefault(storage._cdata, storage)
        return tensor

    plain = patch("openmythos.model.context.attention", attention_reference)
    with unchecked(), plain, FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(tokens, num_loops=num_loops, grad_loops=grad_loops).logits
            loss = cross_entropy(logits, tokens).mean()
        kept = sum(storage.nbytes() for storage in seen.values())
        loss.backward()
    return counter.get_total_flops(), kept


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_costs_its_flops_at_every_depth(name: str) -> None:
    config, tokens = CONFIGS[name], 2 * LENGTH
    for num_loops, grad_loops in ((1, None), (4, None), (8, 2), (16, None)):
        planned = counts.training_flops(
            config, num_loops=num_loops, grad_loops=grad_loops, context_length=LENGTH
        )
        done, _ = step(config, num_loops, grad_loops)
        assert done == pytest.approx(planned * tokens, rel=0.15), (num_loops, grad_loops)


@pytest.mark.parametrize("name", CONFIGS)
def test_loops_without_gradient_keep_nothing(name: str) -> None:
    config = CONFIGS[name]
    few, many = (step(config, num_loops, grad_loops=2)[1] for num_loops in (3, 8))
    assert many <= 1.01 * few
    # With gradients they keep as much each.
    by_depth = [step(config, num_loops)[1] for num_loops in (2, 3, 4)]
    assert by_depth[2] - by_depth[1] == pytest.approx(by_depth[1] - by_depth[0], rel=0.01)
    assert by_depth[1] > 1.2 * by_depth[0]
