"""Convert a pretrained stack into a loop of shared layers with a low-rank change per loop.

The core's n layers become K layers, looped n / K times: the source's layer l becomes layer l mod K
at loop l // K, where W_l is approximated by W + B_l A_l, with A and B from the truncated SVD of
W_l - W. At full rank that is exact.

The weights g of the norms also differ between layers, but a low-rank change applies to matrices
only. So they are folded exactly into the matrix that follows, (norm(x) * g) W^T =
norm(x) (W diag(g))^T, and set to 1. The SVD then minimises the error of the layer's output for
inputs of mean square 1, which is what a norm without weights gives.

Our matrices are fused (q, k, v in one; gate, up in one), so their parts share one rank.

Source: Relaxed Recursive Transformers (arXiv 2410.20672), sections 3.1 and 3.2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from openmythos.checkpoint.load import empty_model, fill_model
from openmythos.config import (
    GQAConfig,
    ModelConfig,
    SwiGLUConfig,
    WeightLoRAConfig,
)
from openmythos.config.schema import require
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.retrofit.split import WHERE, Layers, carried, check_stack

STARTS = ("stepwise", "average", "lower")
NORM_BEFORE = {"attention_norm": "attention.qkv", "feed_forward_norm": "feed_forward.gate_up"}


@dataclass(frozen=True)
class Tied:
    """The looped model, and the relative error of its weights.

    ``error`` is the Frobenius norm of W_l - (W + B_l A_l) over all folded matrices, divided by that
    of W_l.
    """

    model: RecurrentDepthLM
    error: float


@torch.no_grad()
def tie(
    model: RecurrentDepthLM,
    layers: Layers,
    *,
    num_core_layers: int,
    rank: int,
    start: str = "average",
) -> Tied:
    """Tie the layers of ``layers.core`` into ``num_core_layers`` layers that are looped.

    Args:
        model: A plain stack of pre-norm blocks with grouped-query attention, such as a Llama.
        layers: The layers of each part; prelude and coda keep their weights, the core's are tied.
        num_core_layers: K, a divisor of the number of the core's layers.
        rank: Rank of the changes; ``d_model`` is full rank for every matrix, 0 means no changes.
        start: The shared weights: "average" of the layers that share, "stepwise" (layers at even
            distances from the first to the last), or "lower" (the first K layers).

    Raises:
        ValueError: The stack cannot be tied, or an argument is out of range.
    """
    config = model.config
    check_stack(config, layers)
    _check_tieable(config)
    depth, dim = len(layers.core), config.d_model
    divides = num_core_layers >= 1 and depth % num_core_layers == 0
    require(divides, "tie", num_core_layers, f"a divisor of the core's {depth} layers")
    require(0 <= rank <= dim, "rank", rank, f"in 0..{dim}: d_model is full rank for every matrix")
    require(start in STARTS, "start", start, "one of " + ", ".join(map(repr, STARTS)))
    num_loops = depth // num_core_layers
    tied = replace(
        config,
        num_prelude_layers=len(layers.prelude),
        num_core_layers=num_core_layers,
        num_coda_layers=len(layers.coda),
        num_loops=num_loops,
        loop_adapter=WeightLoRAConfig(rank=rank, num_loops=num_loops) if rank else None,
    )
    split = dict(carried(model, layers))
    weights = {name: tensor for name, tensor in split.items() if not name.startswith("core.")}
    stack = [_folded(split, layer) for layer in range(depth)]
    left = whole = 0.0
    for k in range(num_core_layers):
        for name, own in stack[k].items():
            wanted = torch.stack([layer[name].double() for layer in stack[k::num_core_layers]])
            shared = wanted.mean(dim=0)
            if start != "average":
                shared = stack[_first_layer(k, num_core_layers, depth, start)][name]
            shared = shared.to(own.dtype)
            down, up = low_rank(wanted - shared.double(), rank)
            weights[f"core.{k}.{name}.weight"] = shared
            if rank:
                weights[f"core.{k}.{name}.lora_down"] = down.to(own.dtype)
                weights[f"core.{k}.{name}.lora_up"] = up.to(own.dtype)
            left += float((wanted - shared - up @ down).square().sum())
            whole += float(wanted.square().sum())
    for k in range(num_core_layers):
        for norm in NORM_BEFORE:
            weights[f"core.{k}.{norm}.weight"] = torch.ones_like(split[f"core.{k}.{norm}.weight"])
    device = model.embed.weight.device
    made = fill_model(empty_model(tied), weights.items(), WHERE, None, device)
    return Tied(made, math.sqrt(left / whole))


def _check_tieable(config: ModelConfig) -> None:
    attention, block = config.attention, config.block
    gqa = isinstance(attention, GQAConfig)
    require(gqa, "the source's attention.kind", attention.kind, "'gqa'")
    assert isinstance(attention, GQAConfig)
    # Other norms' weights differ between layers, and no matrix follows to fold them into.
    require(block.norm == "pre", "the source's block.norm", block.norm, "'pre'")
    scale = block.layer_scale
    require(scale is None, "the source's block.layer_scale", scale, "null")
    weighted = attention.qk_norm
    require(weighted != "weighted", "the source's qk_norm", weighted, "'none' or 'weightless'")
    require(not attention.qk_bias, "the source's qk_bias", attention.qk_bias, "false")
    gated = isinstance(config.core_ff, SwiGLUConfig)
    require(gated, "the source's feed_forward.kind", config.core_ff.kind, "'swiglu'")


def _folded(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """One layer's matrices, with the weights of the norms before them folded in."""
    prefix = f"core.{layer}."
    own = {n.removeprefix(prefix): tensor for n, tensor in weights.items() if n.startswith(prefix)}
    gains = {matrix: own[f"{norm}.weight"].double() for norm, matrix in NORM_BEFORE.items()}
    matrices = {
        name.removesuffix(".weight"): tensor for name, tensor in own.items() if tensor.ndim == 2
    }
    return {
        name: (tensor.double() * gains[name]).to(tensor.dtype) if name in gains else tensor
        for name, tensor in matrices.items()
    }


def _first_layer(k: int, num_core_layers: int, depth: int, start: str) -> int:
    """The source layer whose weights the k-th shared layer starts from."""
    if start == "lower":
        return k
    return round(k * (depth - 1) / max(1, num_core_layers - 1))


def low_rank(
    residual: Float[Tensor, "L O I"], rank: int
) -> tuple[Float[Tensor, "L R I"], Float[Tensor, "L O R"]]:
    """A and B with B A the best rank-``rank`` approximation of each residual.

    Above full rank they are filled up with zeros.

    Source: Relaxed Recursive Transformers (arXiv 2410.20672), section 3.2: A = V_r^T, B = U_r S_r.
    """
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    kept = min(rank, s.shape[-1])
    loops, num_out, num_in = residual.shape
    down, up = residual.new_zeros(loops, rank, num_in), residual.new_zeros(loops, num_out, rank)
    down[:, :kept] = vh[:, :kept]
    up[:, :, :kept] = u[:, :, :kept] * s[:, None, :kept]
    return down, up
