"""The routed experts for engines in which no bit of a token may depend on the other tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.ops.cpu import build as native
from openmythos.ops.moe import LoopedExperts, gathered_experts, has_native


def separate_experts(
    x: Float[Tensor, "N D"],
    expert: Int[Tensor, "N K"],
    weight: Float[Tensor, "N K"],
    counts: Int[Tensor, "E"],
    gate_up: Float[Tensor, "E _ D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """As ``moe_experts``, and no bit of a token's result depends on the other tokens.

    A library's product with an expert's weights may sum in another order for another number of
    tokens. Our kernel has one order for all.
    """
    if not native.eager():
        return gathered_experts(x, expert, weight, gate_up, down)
    if has_native(gate_up, x) and has_native(down, x):
        return LoopedExperts(gate_up, down)(x, expert, weight, counts)
    tokens = zip(x.split(1), expert.split(1), weight.split(1), strict=True)
    return torch.cat([gathered_experts(*token, gate_up, down) for token in tokens])
