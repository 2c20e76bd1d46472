"""The layout of a model over many devices.

The engine is PyTorch's: one mesh of devices, and FSDP2 with a unit per block. Only where there is
a mesh this module is imported: FSDP2 and DTensor take a second to load.
"""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from openmythos.model.feedforward import Router
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.experts import divide_experts, expert_placement
from openmythos.train.gradients import units
from openmythos.train.ranks import Ranks
from openmythos.train.recipe import COMPILING, TrainConfig
from openmythos.train.tensor import become, divide_tensors


class NoView(nn.Module):
    """A layer whose output is no view of another tensor, of which FSDP2 warns its callers."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """As of the layer."""
        y: Tensor = super().forward(x)
        return y.clone()


def parallelize(model: RecurrentDepthLM, config: TrainConfig, ranks: Ranks) -> None:
    """Lay the model out over the ranks; nothing changes for one process alone.

    In this order: tensor parallel, expert parallel, compilation by block, FSDP2. Activation
    checkpointing is the loop's (``recompute``), inside which the units of FSDP2 lie.

    A unit is a block, the embedding or the head. With ``autocast`` their weights are gathered in
    that precision, except for the routers, which are units of their own: rounded router weights
    choose other experts. What is left is one unit in the weights' own precision: the norms outside
    the blocks, and the injection, whose decay is too close to 1 to be rounded.

    Unless the core is gathered in every loop, its blocks keep their weights from their first use in
    a step until ``reshard``. So does what is left, and the coda and the head if they read every
    loop. The embedding is gathered for the forward pass only: its gradient needs no weights.
    """
    if ranks.mesh is None:
        return
    layout = config.parallel
    layout.check(model.config)
    divide_tensors(model, ranks.mesh["tp"])
    divide_experts(model, ranks.mesh)
    if config.compile:
        for block in blocks(model):
            block.compile(**COMPILING)
    with warnings.catch_warnings(action="ignore"):  # of joint axes beside others
        place = expert_placement(ranks.mesh)
        axes = ("dp_replicate", "dp_shard") if layout.dp_replicate > 1 else ("dp_shard",)
        mesh = ranks.mesh[axes]
    own = MixedPrecisionPolicy()
    policy = own
    if config.autocast == "bfloat16":
        # The inputs are not cast: the state stays in the precision of the weights outside.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    kept: list[FSDPModule] = []

    def unit(module: nn.Module, keep: bool, precision: MixedPrecisionPolicy) -> FSDPModule:
        made: FSDPModule = fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=not keep,
            shard_placement_fn=place,
            mp_policy=precision,
        )
        if keep:
            kept.append(made)
        return made

    by_step, every_loop = layout.core_gather == "step", config.objective.needs_states
    keeps = {id(block): by_step for block in model.core}
    keeps |= {id(block): by_step and every_loop for block in model.coda}
    for block in blocks(model):
        keep = keeps.get(id(block), False)
        if policy is not own:
            for module in block.modules():
                if isinstance(module, Router):
                    unit(module, keep, own)
        unit(block, keep, policy)
    if model.halting is not None:  # an objective calls it outside the model's forward
        become(model.halting.proj, NoView)
        unit(model.halting.proj, True, own)
    # What the head has gathered in the forward pass is used next in its backward pass.
    head = model.embed if model.head is None else model.head
    last = unit(head, every_loop, policy)
    last.set_reshard_after_forward(False, recurse=False)
    first = last if head is model.embed else unit(model.embed, False, policy)
    first.set_unshard_in_backward(False)
    model.embed.activations = model.embed.weight.dtype
    unit(model, True, own)
    for held in kept:
        held.set_reshard_after_backward(False, recurse=False)
        # By default it would gather what ran before it, here the prelude, ahead of its own backward
        # pass; but not where its first loops have no gradient, and so not on every rank at the same
        # time: they would wait for each other for ever.
        held.set_modules_to_backward_prefetch([held])
    for each in units(model):
        # Losses are divided by the number of targets of the whole batch, so gradients are summed.
        each.set_gradient_divide_factor(1.0)
        each.set_force_sum_reduction_for_comms(True)


def blocks(model: RecurrentDepthLM) -> list[nn.Module]:
    """All blocks, in the order of a forward."""
    return [*model.prelude, *model.core, *model.coda]
