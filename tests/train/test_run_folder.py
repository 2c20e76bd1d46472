import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openmythos import load_pretrained
from openmythos.config.schema import to_dict
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import byte_tokenizer
from openmythos.train.optim import OptimizerConfig, make_optimizers
from openmythos.train.run import set_up
from openmythos.train.run_folder import RunFolder, RunState
from tests.checkpoint.examples import without_checksums
from tests.strategies import random_model, seeded, small_config
from tests.train import examples
from tests.train.examples import FixedTask, changed, full_disk, hops_config, random_batch

CONFIG = small_config(core_feed_forward=examples.MOE)


class Remembering(FixedTask):
    def __init__(self, stage: int = 1) -> None:
        super().__init__(random_batch(CONFIG, 2, 4))
        self.stage = stage

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage = state["stage"]


def trained(seed: int) -> tuple[RecurrentDepthLM, list[torch.optim.Optimizer]]:
    """A model and optimisers that have done two steps."""
    model = random_model(CONFIG, seed=seed)
    optimizers = make_optimizers(model, OptimizerConfig())
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=seeded(seed))
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


def state_of(optimizers: list[torch.optim.Optimizer]) -> list[Any]:
    return [optimizer.state_dict() for optimizer in optimizers]


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizers = trained(0)
    state = RunState(step=7, seconds=1.25, first_nats=3.5, bad_steps=2)
    folder = RunFolder(tmp_path)
    path = folder.save(model, optimizers, Remembering(stage=4), state)
    assert path == folder.last_checkpoint() == tmp_path / "checkpoints" / "step-00000007"

    other, fresh = trained(1)
    task = Remembering()
    assert RunFolder(tmp_path).resume(other, fresh, task) == state
    assert task.stage == 4
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    for ours, theirs in zip(state_of(optimizers), state_of(fresh), strict=True):
        assert json.dumps(ours["param_groups"]) == json.dumps(theirs["param_groups"])
        assert ours["state"].keys() == theirs["state"].keys()
        for param, values in ours["state"].items():
            for name, value in values.items():
                assert torch.equal(value, theirs["state"][param][name])
    loaded = load_pretrained(path)
    assert torch.equal(loaded.embed.weight, model.embed.weight)
    assert all(file.suffix in (".safetensors", ".json") for file in path.iterdir())


def test_the_state_is_found_by_the_parameters_names(tmp_path: Path) -> None:
    model, optimizers = trained(0)
    folder = RunFolder(tmp_path)
    path = folder.save(model, optimizers, Remembering(), RunState(step=2, seconds=0.0))
    stored = load_file(path / "training_state.safetensors")
    assert {name.rpartition(".")[2] for name in stored} == {
        *("momentum", "exp_avg", "exp_avg_sq", "step"),
    }
    assert {name.rpartition(".")[0] for name in stored} == dict(model.named_parameters()).keys()

    other, fresh = trained(1)
    for optimizer in fresh:  # another order, as of another version that groups differently
        for group in optimizer.param_groups:
            group["params"].reverse()
    assert RunFolder(tmp_path).resume(other, fresh, Remembering()) is not None
    for ours, theirs in zip(optimizers, fresh, strict=True):
        for name, param in model.named_parameters():
            for key, value in ours.state.get(param, {}).items():
                assert torch.equal(value, theirs.state[other.get_parameter(name)][key]), name

    stored["gone.weight.momentum"] = torch.zeros(2)
    save_file(stored, without_checksums(path) / "training_state.safetensors")
    with pytest.raises(ValueError, match=r"of other parameters: gone\.weight"):
        RunFolder(tmp_path).resume(other, fresh, Remembering())


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """Its training state names an optimiser and a parameter by their numbers."""
    model, optimizers = trained(0)
    folder = RunFolder(tmp_path)
    path = folder.save(model, optimizers, Remembering(), RunState(step=2, seconds=0.0))
    record = json.loads((path / "training_state.json").read_text())
    packed = [optimizer.state_dict() for optimizer in optimizers]
    record["optimizers"] = [{"param_groups": each["param_groups"]} for each in packed]
    (without_checksums(path) / "training_state.json").write_text(json.dumps(record))
    numbered = {
        f"{number}.{param}.{key}": value
        for number, each in enumerate(packed)
        for param, values in each["state"].items()
        for key, value in values.items()
    }
    save_file(numbered, path / "training_state.safetensors")
    other, fresh = trained(1)
    assert RunFolder(tmp_path).resume(other, fresh, Remembering()) is not None
    for ours, theirs in zip(state_of(optimizers), state_of(fresh), strict=True):
        for param, values in ours["state"].items():
            assert all(torch.equal(v, theirs["state"][param][name]) for name, v in values.items())


def test_only_the_newest_are_kept_and_nothing_to_resume_is_none(tmp_path: Path) -> None:
    model, optimizers = trained(0)
    folder = RunFolder(tmp_path, keep=2)
    assert folder.last_checkpoint() is None
    assert folder.resume(model, optimizers, Remembering()) is None
    for step in (1, 2, 30, 4000):
        folder.save(model, optimizers, Remembering(), RunState(step=step, seconds=0.0))
    assert [p.name for p in folder.checkpoints()] == ["step-00000030", "step-00004000"]


def test_half_written_folders_are_ignored_and_removed(tmp_path: Path) -> None:
    model, optimizers = trained(0)
    folder = RunFolder(tmp_path)
    folder.save(model, optimizers, Remembering(), RunState(step=3, seconds=0.0))
    for name in (".step-00000004.tmp", "..step-00000005.tmp.tmp"):
        half = tmp_path / "checkpoints" / name
        half.mkdir()
        (half / "model.safetensors").write_bytes(b"half")
    assert folder.last_checkpoint() == tmp_path / "checkpoints" / "step-00000003"
    state = folder.resume(model, optimizers, Remembering())
    assert state is not None and state.step == 3
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


FILES = (
    *("training_state.json", "training_state.safetensors", "manifest.json"),
    *("config.json", "model.safetensors", "tokenizer.json"),
)

DAMAGES = ("missing", "cut", "one bit")


def spoil(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        content[len(content) * 2 // 3] ^= 16
        path.write_bytes(content)


@pytest.mark.parametrize(("file", "damage"), [*product(FILES, DAMAGES)])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, file: str, damage: str
) -> None:
    folder = RunFolder(tmp_path, tokenizer=byte_tokenizer())
    for step in (3, 6):
        model, optimizers = trained(step)
        folder.save(model, optimizers, Remembering(step), RunState(step=step, seconds=0.0))
    spoil(tmp_path / "checkpoints" / "step-00000006" / file, damage)
    message = r"step-00000006 is damaged: .*; .*step-00000003 is used instead"
    with pytest.warns(UserWarning, match=message):
        loaded = load_pretrained(tmp_path)
    assert torch.equal(loaded.embed.weight, trained(3)[0].embed.weight)
    with pytest.raises(ValueError, match=r"."):
        load_pretrained(tmp_path / "checkpoints" / "step-00000006")

    model, optimizers = trained(0)
    task = Remembering()
    with pytest.warns(UserWarning, match=message):
        state = folder.resume(model, optimizers, task)
    assert state is not None and (state.step, task.stage) == (3, 3)
    assert torch.equal(model.embed.weight, loaded.embed.weight)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["damaged-step-00000006", "step-00000003"]
    assert load_pretrained(tmp_path) is not None

    spoil(tmp_path / "checkpoints" / "step-00000003" / file, damage)
    message = r"step-00000003 is damaged: .*no other checkpoint is left"
    with pytest.raises(ValueError, match=message):
        folder.resume(model, optimizers, task)


@pytest.mark.parametrize("file", ["training_state.json", "training_state.safetensors"])
def test_a_damaged_training_state_without_checksums_is_named(tmp_path: Path, file: str) -> None:
    model, optimizers = trained(0)
    folder = RunFolder(tmp_path)
    path = folder.save(model, optimizers, Remembering(), RunState(step=3, seconds=0.0))
    spoil(without_checksums(path) / file, "cut")
    with pytest.raises(ValueError, match="step-00000003 cannot be resumed"):
        folder.resume(model, optimizers, Remembering())


@pytest.mark.parametrize("num_bytes", [0, 2_000, 40_000])
def test_a_full_disk_loses_nothing_and_is_named(tmp_path: Path, num_bytes: int) -> None:
    model, optimizers = trained(0)
    folder = RunFolder(tmp_path, keep=1)
    kept = folder.save(model, optimizers, Remembering(), RunState(step=3, seconds=0.0))
    with full_disk(num_bytes), pytest.raises(OSError, match=r"too large") as caught:
        folder.save(model, optimizers, Remembering(), RunState(step=4, seconds=0.0))
    assert str(tmp_path / "checkpoints") in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [kept.name]
    state = folder.resume(model, optimizers, Remembering())
    assert state is not None and state.step == 3


def test_another_configuration_is_refused_and_named(tmp_path: Path) -> None:
    config = hops_config()
    folder = RunFolder(tmp_path)
    assert folder.changes(to_dict(config)) == {}
    folder.write_config(to_dict(config))
    written = (tmp_path / "config.json").read_bytes()
    folder.write_config(to_dict(config))
    other = to_dict(changed(config, batch_size=8, seed=7))
    other["model"]["injection"] = {"kind": "add"}
    with pytest.raises(ValueError, match="holds a run with another configuration") as caught:
        folder.write_config(other)
    message = str(caught.value)
    assert "train.batch_size (16 there, 8 here)" in message
    assert "train.seed (3 there, 7 here)" in message
    assert 'model.injection.kind ("lti" there, "add" here)' in message
    assert "model.injection.decay_init (" in message and " there, absent here)" in message
    assert "choose another --out" in message and "\n" not in message
    assert (tmp_path / "config.json").read_bytes() == written
    only = to_dict(config)
    only["model"]["vocab_size"] = 9
    assert folder.changes(only, ignore=("model.vocab_size",)) == {}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        folder.changes(to_dict(config))


def test_a_run_with_another_seed_is_refused(tmp_path: Path) -> None:
    set_up(hops_config(), tmp_path)
    with pytest.raises(ValueError, match=r"train\.seed \(3 there, 4 here\)"):
        set_up(changed(hops_config(), seed=4), tmp_path)
