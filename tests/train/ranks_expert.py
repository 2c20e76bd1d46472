"""Cases for several ranks: tensor and expert parallelism and Muon by owner, against one process."""

import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from openmythos.checkpoint.parts import own_values
from openmythos.config import (
    PonderNetConfig,
    ReLUSquaredConfig,
    ValueEmbeddingConfig,
    WeightLoRAConfig,
)
from openmythos.interop.adapter import new_adapter
from openmythos.model.attention import LatentExpansion
from openmythos.model.feedforward import MoE
from openmythos.train import experts, gradients, loop, optim, shard, tensor
from openmythos.train.objective import ExitWeightedObjective, PerLoopObjective
from openmythos.train.optim import OptimizerConfig
from openmythos.train.ranks import Ranks, join
from openmythos.train.run_folder import RunFolder, RunState
from tests.strategies import GQA, MLA
from tests.train.launch import Case, on_ranks
from tests.train.ranks_shard import (
    ADAPTER,
    ARMS,
    BATCH,
    BY_ROW,
    EXPERTS,
    Arm,
    Rows,
    _named,
    at_depth,
    counted,
    differences,
    first_step,
    make,
    run,
    weights_gap,
    within_limits,
)
from tests.train.test_run_folder import Remembering

# A direction without a gradient is noise that Muon's iterations amplify 485 times: at 2e-3 it grows
# from step to step, and within 50 of them 1e-16 becomes 5e-8. With AdamW at 3e-4, which amplifies
# rounding of MLA with adapters, it becomes 3e-11 on four ranks.
MUON = {
    "optimizer": OptimizerConfig(
        lr=3e-5, muon_lr=1e-4, embedding_lr=None, clip_norm=0.5, weight_decay=0.1
    )
}
GROUPS = {"depth": replace(BY_ROW, rows_per_draw=4)}
LORA = {"loop_adapter": WeightLoRAConfig(rank=2, num_loops=2)}
EVERY_GQA = {
    "attention": replace(GQA, qk_norm="weighted", qk_bias=True),
    "value_embedding": ValueEmbeddingConfig(layers=(0, 2), gate_channels=4),
    **LORA,
}
MOE = {"core_feed_forward": EXPERTS}
MLA_MOE = {"attention": MLA, **MOE, **LORA, "tie_embeddings": False}
TP, EP = {"dp_shard": 1, "tp": 2}, {"dp_shard": 2, "ep": 2}
ON_TWO = {
    "tp": Arm(EVERY_GQA, GROUPS, TP),
    "tp, mla, experts": Arm(MLA_MOE, {**GROUPS, "grad_accumulation": 2}, TP),
    "tp, relu squared": Arm({"feed_forward": ReLUSquaredConfig(d_ff=24)}, GROUPS, TP),
    "tp, per loop": Arm(train={**GROUPS, "objective": PerLoopObjective()}, layout=TP),
    "tp, exit weighted": Arm(
        {"halting": PonderNetConfig()},
        {**GROUPS, "objective": ExitWeightedObjective(kl_weight=0.1)},
        TP,
    ),
    "ep": Arm(MOE, GROUPS, EP),
    "ep, per loop": Arm(MOE, {**GROUPS, "objective": PerLoopObjective()}, EP),
    "ep, checkpointing": Arm(
        MLA_MOE,
        {
            "depth": replace(GROUPS["depth"], mean_backprop_depth=2),
            "recompute": True,
            "grad_accumulation": 2,
        },
        EP,
    ),
    "ep, adapter": Arm(MOE, {**ADAPTER, **GROUPS}, EP),
    "ep, gathered by loop": Arm(MOE, GROUPS, {**EP, "core_gather": "loop"}),
    "muon": Arm(MOE, MUON),
    "muon, tp": Arm(EVERY_GQA, {**MUON, **GROUPS}, TP),
    "muon, ep": Arm(MLA_MOE, {**MUON, **GROUPS}, EP),
}
EP_TP = {"dp_shard": 2, "ep": 2, "tp": 2}
ON_FOUR = {
    "ep x fsdp": Arm(MOE, GROUPS, {"dp_shard": 4, "ep": 2}),
    "ep, replicated": Arm(MOE, GROUPS, {"dp_replicate": 2, "dp_shard": 2, "ep": 2}),
    "tp x fsdp": Arm(EVERY_GQA, GROUPS, {"dp_shard": 2, "tp": 2}),
    "tp, replicated": Arm(MLA_MOE, GROUPS, {"dp_replicate": 2, "dp_shard": 1, "tp": 2}),
    "ep + tp": Arm(MLA_MOE, GROUPS, EP_TP),
    "ep + tp, gathered by loop": Arm(MOE, GROUPS, {**EP_TP, "core_gather": "loop"}),
    "muon, fsdp": Arm(MLA_MOE, MUON, {"dp_shard": 4}),
    "muon, tp x fsdp": Arm(EVERY_GQA, {**MUON, **GROUPS}, {"dp_shard": 2, "tp": 2}),
    "muon, ep x fsdp": Arm(MOE, {**MUON, **GROUPS}, {"dp_shard": 4, "ep": 2}),
    "muon, ep + tp": Arm(MLA_MOE, {**MUON, **GROUPS}, EP_TP),
}


QUICK = ("tp", "tp, mla, experts", "ep", "ep, adapter", "muon, tp", "muon, ep")


def divided_trains_as_one_process(name: str) -> dict[str, float]:
    """One of the arms, in fp64."""
    # Muon makes all singular values equal, the smallest as well, and rounding with them.
    limits = {"grad_norm": 1e-9, "weights": 1e-9} if name.startswith("muon") else {}
    return within_limits(differences({**ON_TWO, **ON_FOUR}[name]), **limits)


def case_of(name: str) -> Case:
    return on_ranks(2 if name in ON_TWO else 4)(partial(divided_trains_as_one_process, name))


# --- what must make a comparison fail ------------------------------------------------------------


def logits_and_gradients(arm: Arm) -> tuple[float, float]:
    """The largest relative differences to one process, of logits and of any gradient."""
    torch.set_default_dtype(torch.float64)
    recipe = arm.recipe()
    ranks = join(recipe.parallel)
    tokens = next(Rows(Ranks.alone()).batches(0, BATCH)).tokens
    rows = slice(ranks.row_rank, None, ranks.num_row_ranks)
    alone, ours = make(arm.config(), recipe, Ranks.alone()), make(arm.config(), recipe, ranks)
    expected, got = alone(tokens, num_loops=3).logits, ours(tokens[rows], num_loops=3).logits
    expected.square().mean().backward()
    (got.square().mean() / ranks.num_row_ranks).backward()
    gradients.reshard(ours)
    logits = float((got - expected[rows]).abs().max() / expected.abs().max())
    part_of, wanted = shard.own_parts(ours), dict(alone.named_parameters())
    gaps = torch.zeros(2, len(wanted))
    for number, (name, parameter) in enumerate(ours.named_parameters()):
        grad, whole = parameter.grad, wanted[name].grad
        if whole is None:
            assert grad is None, name
            continue
        gaps[1, number] = whole.abs().max()
        if grad is None:
            gaps[0, number] = gaps[1, number]
            continue
        part, at, columns = part_of(name, grad)
        mine = whole.reshape(-1, whole.shape[-1])[at][:, columns]
        if mine.numel():
            gaps[0, number] = (part - mine).abs().max()
    dist.all_reduce(gaps, op=dist.ReduceOp.MAX)
    worst = (gaps[0] / gaps[1].clamp(min=1e-30)).max()
    said = torch.tensor(logits)
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return float(said), float(worst)


def plain(parts: tuple[int, ...], num_ranks: int) -> Tensor:
    return torch.arange(sum(parts))


def uncopied(x: Tensor, group: Any) -> Tensor:
    return x


def first_forward(self: Any, x: Tensor, *others: Any, **named: Any) -> Any:
    """As of ``First``, without the sum of MLA's rotary keys' gradients."""
    if not isinstance(self, LatentExpansion):
        return super(tensor.First, self).forward(tensor.copied(x, self.group), *others, **named)
    latent, k_rope = x.tensor_split((self.in_features,), dim=-1)
    x = torch.cat((tensor.copied(latent, self.group), k_rope), dim=-1)
    return super(tensor.First, self).forward(x, *others, **named)


@on_ranks(2)
def a_fused_matrix_is_divided_by_its_parts() -> list[float]:
    """Trap: gate and up are one matrix; halves of it give wrong logits, without a word."""
    right = logits_and_gradients(ON_TWO["tp"])
    assert max(right) <= 1e-12, right
    with patch.object(tensor, "order_of", plain):
        wrong, _ = logits_and_gradients(
            Arm({"feed_forward": ON_TWO["tp"].config().feed_forward}, GROUPS, TP)
        )
    assert wrong > 0.1, wrong
    return [*right, wrong]


@on_ranks(2)
def one_gradient_that_is_not_summed_is_noticed() -> list[float]:
    arm = ON_TWO["tp, mla, experts"]
    right = logits_and_gradients(arm)
    assert max(right) <= 1e-12, right
    found = [*right]
    for name, stub in (("copied", uncopied), ("Partial", tensor.Replicate)):
        with patch.object(tensor, name, stub):
            logits, wrong = logits_and_gradients(arm)
        assert logits <= 1e-12 < 1e-6 < wrong, (name, logits, wrong)
        found.append(wrong)
    with patch.object(tensor.First, "forward", first_forward):
        logits, wrong = logits_and_gradients(arm)
    assert logits <= 1e-12 < 1e-6 < wrong, (logits, wrong)
    return [*found, wrong]


@on_ranks(2)
def an_expert_whose_gradient_is_lost_is_noticed() -> list[float]:
    right = logits_and_gradients(ON_TWO["ep"])
    assert max(right) <= 1e-12, right
    real = experts.all_to_all_single_autograd

    def lossy(rows: Tensor, *others: Any) -> Tensor:
        return real(rows.detach(), *others).requires_grad_()

    with patch.object(experts, "all_to_all_single_autograd", lossy):
        logits, wrong = logits_and_gradients(ON_TWO["ep"])
    assert logits <= 1e-12 < 1e-6 < wrong, (logits, wrong)
    return [*right, wrong]


@on_ranks(2)
def loads_are_summed_over_the_ranks() -> list[float]:
    """Trap: with its own rows' loads alone, each rank moves the routers' biases apart."""

    def gap() -> float:
        model, _, _ = run(arm, join(arm.recipe().parallel), steps=2)
        biases = torch.stack([m.bias for m in model.modules() if isinstance(m, MoE)])
        low, high = biases.clone(), biases.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        return float((high - low).max())

    arm = ON_TWO["ep"]
    torch.set_default_dtype(torch.float64)
    right, real = gap(), Ranks.sum

    def own_loads(self: Ranks, numbers: Tensor) -> Tensor:
        total = real(self, numbers)
        return torch.cat((total[:8], numbers[8:])) if len(numbers) > 8 else total

    with patch.object(Ranks, "sum", own_loads):
        wrong = gap()
    assert right == 0 < wrong, (right, wrong)
    return [right, wrong]


@on_ranks(2)
def gradients_are_summed_and_not_averaged() -> list[str]:
    """Trap: gloo refuses a factor of 1 unless its sum is forced."""
    arm, said = ON_TWO["ep"], ""
    with patch.object(FSDPModule, "set_force_sum_reduction_for_comms"):
        try:
            first_step(arm, join(arm.recipe().parallel))
        except RuntimeError as error:
            said = str(error).splitlines()[0]
    assert "gloo" in said.lower() or "PREMUL" in said.upper(), said
    return [said]


@on_ranks(2)
def the_norm_is_taken_over_both_meshes() -> list[str]:
    """Trap: PyTorch's ``clip_grad_norm_`` raises where gradients lie on two meshes."""
    arm, said = ON_TWO["ep"], ""
    torch.set_default_dtype(torch.float64)
    _, alone = first_step(arm, Ranks.alone())
    model, ours = first_step(arm, join(arm.recipe().parallel))
    assert abs(ours["grad_norm"] / alone["grad_norm"] - 1) <= 1e-12
    try:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
    assert said
    return [said]


@on_ranks(2)
def five_hundred_sampled_steps_never_disagree() -> int:
    """Each rank runs the same loops in the same order, or their exchanges would not meet."""
    arm, depths, real = ON_TWO["ep"], list[list[int]](), loop._backward

    def noted(model: Any, batch: Any, seeds: Tensor, drawn: Tensor, *others: Any) -> Any:
        depths.append(drawn.tolist())
        return real(model, batch, seeds, drawn, *others)

    ranks = join(arm.recipe().parallel)
    with patch.object(loop, "_backward", noted):
        run(arm, ranks, steps=500)
    first, second = ranks.each(lambda: depths)
    assert first == second and len(first) == 500
    return len({tuple(each) for each in first})


@on_ranks(4)
def gathers_with_experts_do_not_grow_with_the_loops() -> dict[str, dict[str, int]]:
    """Experts are a gather of their own in each core block; exchanges are five per loop of each."""
    found: dict[str, dict[str, int]] = {}
    for loops in (1, 4, 16):
        arm = at_depth(loops, model=MOE, layout={"dp_shard": 4, "ep": 2})
        found[f"{loops} loops"] = got = counted(arm)
        exchanges = sum(n for name, n in got.items() if "alltoall" in name.replace("_", ""))
        assert _named(got)[0] == 6 + 2 * 2, (loops, got)
        assert exchanges == 5 * 2 * loops, (loops, got)
    return found


# --- Muon ----------------------------------------------------------------------------------------


@on_ranks(2)
def each_matrix_has_one_owner() -> dict[str, int]:
    """Over all ranks every matrix is orthogonalised once, with two exchanges per shape."""
    arm, counts = ON_TWO["muon"], Counter[str]()
    torch.set_default_dtype(torch.float64)
    recipe = arm.recipe()
    model, _ = first_step(arm, join(recipe.parallel))
    muon = optim.make_optimizers(model, recipe.optimizer)[0]
    matrices = [p for group in muon.param_groups for p in group["params"]]
    real, exchange = optim.orthogonalise, dist.all_to_all_single

    def counted(batch: Tensor) -> Tensor:
        counts["matrices"] += len(batch)
        return real(batch)

    def exchanged(*args: Any, **kwargs: Any) -> Any:
        counts["exchanges"] += 1
        return exchange(*args, **kwargs)

    with (
        patch.object(optim, "orthogonalise", counted),
        patch.object(dist, "all_to_all_single", exchanged),
    ):
        muon.step()
    total = torch.tensor([counts["matrices"]])
    dist.all_reduce(total)
    assert int(total) == sum(p.shape[:-2].numel() for p in matrices)
    shapes = {p.shape for p in matrices if p.ndim == 2}  # experts are whole where they lie
    assert counts["exchanges"] == 2 * len(shapes)
    return dict(counts)


# --- checkpoints ---------------------------------------------------------------------------------


@on_ranks(2, 4)
def a_checkpoint_has_the_order_of_one_process() -> None:
    """What ranks with parts of fused matrices have written, one process reads; and back."""
    torch.set_default_dtype(torch.float64)
    arm = {2: ON_TWO["muon, tp"], 4: ON_FOUR["muon, ep + tp"]}[dist.get_world_size()]
    trained = partial(after_steps, arm)
    ranks = join(arm.recipe().parallel)
    alone, ours = trained(Ranks.alone(), 1), trained(ranks, 1)
    folder = Path(ranks.on_first(tempfile.mkdtemp))
    try:
        RunFolder(folder, ranks=ranks).save(*ours, Remembering(), RunState(step=1, seconds=1.0))
        read = trained(Ranks.alone(), 0)
        RunFolder(folder).resume(*read, Remembering())
        assert close(alone[0].state_dict(), read[0].state_dict())
        momentum, expected = read[1][0].state_dict(), alone[1][0].state_dict()
        for number, values in expected["state"].items():
            assert close(values, momentum["state"][number])
        again = trained(ranks, 0)
        RunFolder(folder, ranks=ranks).resume(*again, Remembering())
        assert weights_gap(again[0], alone[0]) <= 1e-9
        for a, b in zip(again[1], ours[1], strict=True):
            for p, q in zip(again[0].parameters(), ours[0].parameters(), strict=True):
                for name, value in b.state.get(q, {}).items():
                    assert torch.equal(own_values(a.state[p][name]), own_values(value)), name
    finally:
        ranks.wait()
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)


def after_steps(arm: Arm, place: Ranks, steps: int) -> tuple[Any, Any]:
    """The arm's model and optimisers."""
    recipe = arm.recipe()
    model = make(arm.config(), recipe, place)
    optimizers = optim.make_optimizers(model, recipe.optimizer)
    for step in range(steps):
        batch = next(Rows(place).batches(step, BATCH))
        loop._gradients(model, batch, recipe, step, 0.0, place)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizers


def an_adapter_goes_on_on_any_number_of_ranks(name: str) -> None:
    """All ranks write one file in PEFT's format, which they and one process resume."""
    torch.set_default_dtype(torch.float64)
    arm = {**ARMS, **ON_TWO}[name]
    recipe = arm.recipe()
    ranks = join(recipe.parallel)
    assert recipe.adapter is not None

    def kept(model: Any, place: Ranks) -> RunFolder:
        run = RunFolder(folder, ranks=place)
        run.adapter = new_adapter(model, recipe.adapter, "base", 0)  # type: ignore[arg-type]
        return run

    folder = Path(ranks.on_first(tempfile.mkdtemp))
    try:
        expected, ours = after_steps(arm, Ranks.alone(), 2), after_steps(arm, ranks, 1)
        state = RunState(step=1, seconds=1.0)
        at = kept(ours[0], ranks).save(*ours, Remembering(), state)
        assert (at / "adapter_model.safetensors").is_file() and not list(at.glob("model*"))
        for place in (ranks, Ranks.alone()):
            model, optimizers = after_steps(arm, place, 0)
            assert kept(model, place).resume(model, optimizers, Remembering()) == state
            batch = next(Rows(place).batches(1, BATCH))
            loop._gradients(model, batch, recipe, 1, 0.0, place)
            optimizers[0].step()
            assert weights_gap(model, expected[0]) <= 1e-12
    finally:
        ranks.wait()
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)


def close(expected: dict[str, Tensor], got: dict[str, Tensor]) -> bool:
    return all(torch.allclose(got[name], value, 1e-9, 1e-9) for name, value in expected.items())


CASES = [
    *map(case_of, QUICK),
    a_fused_matrix_is_divided_by_its_parts,
    one_gradient_that_is_not_summed_is_noticed,
    an_expert_whose_gradient_is_lost_is_noticed,
    loads_are_summed_over_the_ranks,
    gradients_are_summed_and_not_averaged,
    the_norm_is_taken_over_both_meshes,
    each_matrix_has_one_owner,
    a_checkpoint_has_the_order_of_one_process,
    partial(an_adapter_goes_on_on_any_number_of_ranks, "adapter"),
    on_ranks(2)(partial(an_adapter_goes_on_on_any_number_of_ranks, "ep, adapter")),
]
MORE = [  # by `make stress-ranks` only
    *(case_of(name) for name in (*ON_TWO, *ON_FOUR) if name not in QUICK),
    five_hundred_sampled_steps_never_disagree,
    gathers_with_experts_do_not_grow_with_the_loops,
]
