import math
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from openmythos.config import ACTConfig, ExitGateConfig
from openmythos.config.parallel import ParallelConfig
from openmythos.config.presets import preset
from openmythos.plan import placement
from openmythos.plan.training import Work
from openmythos.train import dry_run
from openmythos.train.dry_run import dry_run_shards, dry_run_step, fake_rank
from tests.strategies import MLA, MOE, small_config, unchecked

EXPERTS = small_config(
    d_model=32,
    num_core_layers=1,
    num_loops=2,
    attention=MLA,
    core_feed_forward=replace(MOE, d_expert=16),
)
LAYOUTS = {
    "plain": ParallelConfig(dp_shard=8),
    "copies": ParallelConfig(dp_replicate=2, dp_shard=4),
    "experts": ParallelConfig(dp_shard=4, ep=2),
    "tensor": ParallelConfig(dp_shard=2, tp=2),
    "both": ParallelConfig(dp_shard=4, ep=2, tp=2),
    "by_loop": ParallelConfig(dp_shard=4, ep=2, core_gather="loop"),
}
UNTIED = replace(EXPERTS, tie_embeddings=False)
STEPS = [("plain", False), ("copies", True), ("by_loop", True), ("both", False), ("both", True)]


@pytest.fixture(autouse=True)
def _unchecked() -> Any:
    with unchecked():  # FSDP reads annotations that the type checker replaces
        yield


@pytest.mark.parametrize("name", ["plain", "copies", "tensor", "both"])
def test_real_shards_are_the_planned_ones_on_every_rank(name: str) -> None:
    layout = LAYOUTS[name]
    for rank in range(layout.num_ranks):
        found = dry_run_shards(EXPERTS, layout, rank)
        assert found.differing == () and found.built == found.planned > 0
    assert not dist.is_initialized()


def test_a_trillion_parameters_on_the_last_of_1024_ranks() -> None:
    found = dry_run_shards(preset("mythos-1t"), ParallelConfig(dp_shard=1024, ep=128), 1023)
    assert found.differing == () and found.built == found.planned
    assert round(found.built / 2**30, 2) == 3.66


@pytest.mark.parametrize("grad_loops", [None, 1])
@pytest.mark.parametrize(("name", "recompute"), STEPS)
def test_exchanges_of_a_step_are_the_planned_ones(
    name: str, recompute: bool, grad_loops: int | None
) -> None:
    work = Work(context_length=32, recompute=recompute, grad_loops=grad_loops)
    for config in (EXPERTS, UNTIED) if name == "plain" else (EXPERTS,):
        for each in dry_run_step(config, LAYOUTS[name], work):
            assert each.counted == each.planned, each


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # of a view that nothing writes to
@pytest.mark.parametrize("halting", [ExitGateConfig(), ACTConfig()])
def test_a_gate_without_a_gradient_is_not_reduced(halting: Any) -> None:
    config = small_config(num_core_layers=1, num_coda_layers=0, num_loops=2, halting=halting)
    found = dry_run_step(config, ParallelConfig(dp_shard=2), Work(context_length=8))
    for each in found:
        assert each.counted == each.planned, each
    reduced = next(each for each in found if each.kind == "reduce_scatter")
    assert reduced.counted[0] == 4 + halting.mixes_states  # two blocks, table, the rest; the gate


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = placement.local_shapes
    monkeypatch.setattr(
        dry_run,
        "local_shapes",
        lambda *layout: {**real(*layout), "embed.weight": (5, 32)},
    )
    found = dry_run_shards(EXPERTS, LAYOUTS["plain"], 0)
    assert found.differing == ("embed.weight",)
    assert found.planned - found.built == 4 * (5 - math.ceil(32 / 8)) * 32


def test_one_process_has_no_group_and_a_group_is_left_alone() -> None:
    found = dry_run_shards(EXPERTS, ParallelConfig(), 0)
    assert (
        found.differing == ()
        and dry_run_step(EXPERTS, ParallelConfig(), Work(context_length=8)) == ()
    )
    with fake_rank(0, 2), pytest.raises(ValueError, match="start it without torchrun"):
        dry_run_shards(EXPERTS, LAYOUTS["plain"], 0)
    assert not dist.is_initialized()


def test_pairs_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"number of pairs of a rank is 14; .* change --context"):
        dry_run_step(EXPERTS, ParallelConfig(dp_shard=4, ep=4), Work(context_length=7))
