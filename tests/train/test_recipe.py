import json
from pathlib import Path
from typing import Any

import pytest

from openmythos.config import ACTConfig, PonderNetConfig
from openmythos.config.adapter import AdapterConfig
from openmythos.config.parallel import ParallelConfig
from openmythos.config.schema import apply_overrides, from_dict, to_dict
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth
from openmythos.train.objective import ExitWeightedObjective, FinalLoopObjective
from openmythos.train.recipe import (
    HopsData,
    MixtureData,
    MixtureSource,
    RunConfig,
    TextData,
    TrainConfig,
)
from openmythos.train.run import resolve
from tests.train.examples import hops_config, text_config, tiny_model


def test_progress_is_the_further_of_steps_and_seconds() -> None:
    both = TrainConfig(max_steps=100, max_seconds=10.0)
    assert both.progress(25, 1.0) == 0.25
    assert both.progress(25, 5.0) == 0.5
    assert both.progress(200, 0.0) == 1.0
    assert TrainConfig(max_steps=8).progress(2, 1e9) == 0.25
    assert TrainConfig(max_seconds=8.0).progress(10**9, 2.0) == 0.25


def test_round_trip_of_every_part() -> None:
    for config in (text_config(Path("data")), hops_config()):
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_overrides_reach_every_seam() -> None:
    overrides = [
        "train.depth.sampling.kind=log_normal_poisson",
        "train.depth.sampling.sigma=0.25",
        "train.objective=per_loop",
        "train.optimizer.muon_lr=null",
        "data.seq_len=16",
    ]
    config = apply_overrides(text_config(Path("data")), overrides)
    assert to_dict(config.train.depth.sampling) == {
        "kind": "log_normal_poisson",
        "mean_recurrence": 4,
        "sigma": 0.25,
    }
    assert config.train.objective.kind == "per_loop"
    assert config.train.optimizer.muon_lr is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "give max_steps or max_seconds"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_seconds": 0.0}, "max_seconds is 0.0"),
        ({"max_steps": 1, "batch_size": 0}, "batch_size is 0"),
        ({"max_steps": 1, "grad_accumulation": 3}, "a divisor of batch_size=16"),
        ({"max_steps": 1, "eval_loops": (2, 0)}, "eval_loops"),
        ({"max_steps": 1, "save_every": -1}, "save_every is -1"),
        ({"max_steps": 1, "balance_rate": -0.1}, "balance_rate is -0.1"),
        ({"max_steps": 1, "seed": -1}, "seed is -1"),
        (
            {
                "max_steps": 1,
                "init_from": "x",
                "adapter": AdapterConfig(num_loops=3),
                "depth": DepthSchedule(sampling=FixedDepth(mean_recurrence=2)),
            },
            "train.adapter.num_loops is 3; it must be at most 2, the loops of the deepest step",
        ),
        (
            {"max_steps": 1, "grad_accumulation": 8, "parallel": ParallelConfig(dp_shard=4)},
            "batch_size is 16; it must be a multiple of dp_replicate x dp_shard x "
            "grad_accumulation, 32",
        ),
        (
            {
                "max_steps": 1,
                "depth": DepthSchedule(sampling=FixedDepth(), per_sequence=True),
                "parallel": ParallelConfig(dp_shard=4, core_gather="loop"),
            },
            "rows_per_draw is 1; it must be a multiple of dp_replicate x dp_shard, 4",
        ),
        (
            {"max_steps": 1, "compile": True, "parallel": ParallelConfig(tp=2)},
            "compile is True; it must be false with parallel.ep or parallel.tp above 1",
        ),
    ],
)
def test_bad_training_fields(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig(**fields)


def test_a_misspelt_word() -> None:
    with pytest.raises(ValueError, match="'none', 'bfloat16'"):
        apply_overrides(hops_config(), ["train.autocast=float8"])


def test_bad_data_fields() -> None:
    with pytest.raises(ValueError, match="seq_len is 0"):
        TextData(seq_len=0)
    with pytest.raises(ValueError, match="val_fraction"):
        TextData(val_fraction=1.0)
    with pytest.raises(ValueError, match="num_entities"):
        HopsData(num_entities=0)


def parts(*weights: float) -> tuple[MixtureSource, ...]:
    return tuple(MixtureSource(source=f"s{i}", weight=w) for i, w in enumerate(weights))


def test_bad_mixtures() -> None:
    with pytest.raises(ValueError, match=r"the weights are 0\.5 \+ 0\.4 = 0\.9"):
        MixtureData(sources=parts(0.5, 0.4))
    with pytest.raises(ValueError, match="a weight is nan"):
        apply_overrides(
            RunConfig(
                model=tiny_model(),
                train=TrainConfig(max_steps=1),
                data=MixtureData(sources=parts(0.5, 0.5), seq_len=8),
            ),
            ['data.sources=[{"source": "a", "weight": NaN}]'],
        )
    with pytest.raises(ValueError, match="all different"):
        MixtureData(sources=(*parts(0.5), *parts(0.5)))
    with pytest.raises(ValueError, match="standard input can be read once only"):
        MixtureData(sources=(*parts(0.5), MixtureSource(source="-", weight=0.5)))


def test_data_in_words() -> None:
    mixture = MixtureData(sources=parts(0.75, 0.25))
    assert mixture.in_words == "s0 (75.00%) and s1 (25.00%)"
    assert TextData(source="python-source").in_words == "python-source"
    assert HopsData(num_entities=5).in_words == "walks over 5 entities and 4 permutations"
    sums = HopsData(shifts=True, written_out=True)
    assert sums.in_words == "walks over 16 entities and 4 summands, written out"


def test_rows_longer_than_the_model() -> None:
    train = TrainConfig(max_steps=1)
    with pytest.raises(ValueError, match=r"data\.seq_len is 65; .* model\.max_seq_len=64"):
        RunConfig(model=tiny_model(), train=train, data=TextData(seq_len=65))
    with pytest.raises(ValueError, match="the longest example, in tokens, is 65"):
        RunConfig(model=tiny_model(), train=train, data=HopsData(max_train_hops=64))
    with pytest.raises(ValueError, match="the longest example, in tokens, is 66"):
        RunConfig(
            model=tiny_model(), train=train, data=HopsData(max_train_hops=33, written_out=True)
        )


@pytest.mark.parametrize(
    ("objective", "halting", "said"),
    [
        (FinalLoopObjective(ponder_weight=0.1), None, "needs model.halting.kind=act; it is null"),
        (FinalLoopObjective(ponder_weight=0.1), PonderNetConfig(), "it is pondernet"),
        (ExitWeightedObjective(), None, "kind=pondernet or exit_gate; it is null"),
        (ExitWeightedObjective(), ACTConfig(), "it is act"),
    ],
)
def test_objective_without_its_halting_head(objective: Any, halting: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig(
            model=tiny_model(halting=halting),
            train=TrainConfig(max_steps=1, objective=objective),
            data=HopsData(),
        )


def test_targets_per_loop_need_targets_on_the_way() -> None:
    along = ["train.objective=per_loop", "train.objective.targets_per_loop=2"]
    with pytest.raises(ValueError, match=r"objective.targets_per_loop is 2; .*passed_targets=true"):
        resolve(None, "hops", None, along)
    assert resolve(None, "hops", None, [*along, "data.passed_targets=true"])
    with pytest.raises(ValueError, match=r"data.position_range is 9999; .*max_seq_len"):
        resolve(None, "hops", None, ["data.position_range=9999"])
    with pytest.raises(ValueError, match=r"data.passed_targets"):
        resolve(None, "hops", None, ["data.passed_targets=true", "data.written_out=true"])
