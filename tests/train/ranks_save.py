"""Cases for two ranks and more: checkpoints that all ranks write, and that any number reads."""

import contextlib
import pickle
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from openmythos import load_pretrained, save_pretrained
from openmythos.checkpoint import weights
from openmythos.config.parallel import ParallelConfig
from openmythos.folder import write_manifest
from openmythos.interop import export
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train import shard
from openmythos.train.optim import OptimizerConfig, make_optimizers
from openmythos.train.ranks import Ranks, join
from openmythos.train.recipe import TrainConfig
from openmythos.train.run_folder import RunFolder, RunState
from openmythos.train.setup import initial_model
from tests.strategies import MLA, random_model, seeded, small_config
from tests.train.examples import full_disk
from tests.train.launch import on_ranks
from tests.train.test_run_folder import CONFIG, Remembering

STATE = RunState(step=3, seconds=1.5, first_nats=2.0)
Trained = tuple[RecurrentDepthLM, list[torch.optim.Optimizer]]


@contextlib.contextmanager
def no_pickle() -> Iterator[None]:
    """Unpickling is an error, of torch's own kind as well."""
    refuse = mock.Mock(side_effect=AssertionError("something was unpickled"))
    with (
        mock.patch.object(pickle, "load", refuse),
        mock.patch.object(pickle, "loads", refuse),
        mock.patch.object(pickle, "Unpickler", refuse),
        mock.patch.object(torch, "load", refuse),
        mock.patch.object(distributed_c10d, "_unpickler", refuse),  # of objects between ranks
    ):
        yield


def the_guard_sees_objects_between_ranks() -> None:
    """Collectives of objects unpickle: in a guarded case they would be an error."""
    join(ParallelConfig(dp_shard=dist.get_world_size()))
    with no_pickle(), pytest.raises(AssertionError, match="something was unpickled"):
        dist.all_gather_object([None] * dist.get_world_size(), "words")


def in_a_folder(case: Callable[[Path, Ranks], None]) -> Callable[[], None]:
    """A case with a folder that all ranks share; nothing may be unpickled in it."""

    @wraps(case)
    def run() -> None:
        ranks = join(ParallelConfig(dp_shard=dist.get_world_size()))
        folder = Path(ranks.on_first(tempfile.mkdtemp))
        try:
            with no_pickle():
                case(folder, ranks)
            ranks.wait()
        finally:
            if ranks.first:
                shutil.rmtree(folder, ignore_errors=True)

    run.__wrapped__ = None  # type: ignore[attr-defined]  # a case takes no arguments
    return run


def trained(seed: int, ranks: Ranks | None) -> Trained:
    """A model and optimisers that have done two steps; the same on any number of ranks.

    But for rounding: of a part whose length is no multiple of a vector's, AdamW updates the last
    numbers one by one.
    """
    model = random_model(CONFIG, seed=seed)
    if ranks is not None:
        assert ranks.mesh is not None
        for block in (*model.prelude, *model.core, *model.coda):
            fully_shard(block, mesh=ranks.mesh["dp_shard"])
        fully_shard(model, mesh=ranks.mesh["dp_shard"])
    optimizers = make_optimizers(model, OptimizerConfig(muon_lr=None))
    for _ in range(2):
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=seeded(seed))
            if isinstance(param, DTensor):
                like = torch.distributed.tensor.distribute_tensor
                grad = like(grad, param.device_mesh, param.placements)
            param.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


def numbers(trained: Trained) -> dict[str, torch.Tensor]:
    """All tensors of a model and its optimisers, whole."""
    model, optimizers = trained
    found = dict(model.state_dict())
    for name, param in model.named_parameters():
        for optimizer in optimizers:
            found |= {f"{name} {key}": value for key, value in optimizer.state[param].items()}
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in found.items()}


def assert_equal(one: Trained, other: Trained, rounding: float = 0.0) -> None:
    expected, got = numbers(one), numbers(other)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=rounding, rtol=rounding, msg=name)


@in_a_folder
def all_write_and_any_number_reads(folder: Path, ranks: Ranks) -> None:
    mine, task = trained(0, ranks), Remembering(stage=4)
    path = RunFolder(folder, ranks=ranks).save(*mine, task, STATE)
    assert not list(folder.glob("checkpoints/.*"))
    names = {file.name for file in path.iterdir()}
    parts = {f"-rank-{i:05}-of-{ranks.world:05}.safetensors" for i in range(ranks.world)}
    assert {f"{stem}{part}" for stem in ("model", "training_state") for part in parts} == {
        name for name in names if name.endswith(".safetensors")
    }

    other, task = trained(1, ranks), Remembering()
    assert RunFolder(folder, ranks=ranks).resume(*other, task) == STATE and task.stage == 4
    assert_equal(mine, other)
    alone = trained(1, None)
    assert RunFolder(folder).resume(*alone, Remembering()) == STATE
    assert_equal(mine, alone)
    assert_equal(trained(0, None), alone, rounding=1e-6)
    loaded = load_pretrained(folder)
    assert all(torch.equal(v, alone[0].state_dict()[k]) for k, v in loaded.state_dict().items())
    found = {name: torch.zeros_like(tensor) for name, tensor in loaded.state_dict().items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    assert all(torch.equal(tensor, found[name]) for name, tensor in loaded.state_dict().items())


@in_a_folder
def what_one_wrote_all_read(folder: Path, ranks: Ranks) -> None:
    alone = trained(0, None)
    if ranks.first:
        RunFolder(folder).save(*alone, Remembering(), STATE)
    ranks.wait()
    other = trained(1, ranks)
    assert RunFolder(folder, ranks=ranks).resume(*other, Remembering()) == STATE
    assert_equal(alone, other)


@in_a_folder
def a_disk_that_is_full_for_one_is_said_by_all(folder: Path, ranks: Ranks) -> None:
    run, mine = RunFolder(folder, ranks=ranks), trained(0, ranks)
    kept = run.save(*mine, Remembering(), STATE)
    last = ranks.rank == ranks.world - 1
    limit = full_disk(2000) if last else contextlib.nullcontext()
    with limit, pytest.raises(OSError, match=r"cannot be written.*too large"):
        run.save(*mine, Remembering(), RunState(step=4, seconds=2.0))
    names = ranks.on_first(lambda: [path.name for path in (folder / "checkpoints").iterdir()])
    assert names == [kept.name]
    assert run.save(*mine, Remembering(), RunState(step=4, seconds=2.0)).name == "step-00000004"
    assert run.last_state() == RunState(step=4, seconds=2.0)


@on_ranks(2, 4)
@in_a_folder
def a_damaged_part_is_passed_over_by_all(folder: Path, ranks: Ranks) -> None:
    run, mine = RunFolder(folder, ranks=ranks), trained(0, ranks)
    run.save(*mine, Remembering(), STATE)
    for number, stem in enumerate(("model", "training_state")):
        newest = run.save(*trained(2, ranks), Remembering(), RunState(step=4 + number, seconds=2.0))
        file = newest / f"{stem}-rank-00001-of-{ranks.world:05}.safetensors"
        if ranks.first:
            content = bytearray(file.read_bytes())
            content[-3] ^= 4
            file.write_bytes(content)
        ranks.wait()
        other = trained(1, ranks)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert run.resume(*other, Remembering()) == STATE
        words = [
            str(warning.message) for warning in said if "is used instead" in str(warning.message)
        ]
        assert len(words) == (1 if ranks.first else 0)
        assert all(f"{file.name} does not match its SHA-256" in each for each in words)
        assert_equal(mine, other)
        assert run.last_checkpoint() == folder / "checkpoints" / "step-00000003"
    newest = run.save(*mine, Remembering(), RunState(step=9, seconds=2.0))
    if ranks.first:  # a manifest that knows of the other files only
        (newest / f"model-rank-00001-of-{ranks.world:05}.safetensors").unlink()
        write_manifest(newest)
    ranks.wait()
    with pytest.raises(ValueError, match=f"has {ranks.world - 1} of the {ranks.world} files"):
        run.resume(*trained(1, ranks), Remembering())


@in_a_folder
def training_goes_on_while_a_checkpoint_is_written(folder: Path, ranks: Ranks) -> None:
    """The writer's messages are in a group of their own: both threads send, in any order."""
    run = RunFolder(folder, ranks=ranks, in_background=True)
    mine, expected = trained(0, ranks), trained(0, ranks)
    rng = random.Random(ranks.rank)
    for step in range(1, 5):
        run.save(*mine, Remembering(stage=step), RunState(step, 0.0), wait=False)
        with torch.no_grad():
            for param in mine[0].parameters():
                param.add_(1.0)  # what is written is of before
        for number in range(50):
            time.sleep(rng.random() / 1000)
            total = ranks.sum(torch.tensor([float(number), float(ranks.rank)]))
            assert total.tolist() == [number * ranks.world, ranks.world * (ranks.world - 1) / 2]
        assert run.finish()
        assert sorted(path.name for path in run.checkpoints())[-1] == f"step-{step:08d}"
        other, task = trained(1, ranks), Remembering()
        state = RunFolder(folder, ranks=ranks).resume(*other, task)
        assert state == RunState(step, 0.0) and task.stage == step
        assert_equal(expected, other)
        with torch.no_grad():
            for param in expected[0].parameters():
                param.add_(1.0)
    limit = full_disk(2000) if ranks.first else contextlib.nullcontext()
    with limit, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.save(*mine, Remembering(), RunState(9, 0.0), wait=False)
        assert not run.finish()
    words = [str(warning.message) for warning in said if "training goes on" in str(warning.message)]
    assert len(words) == int(ranks.first) and all("too large" in each for each in words)
    assert run.finish() and run.save(*mine, Remembering(), RunState(9, 0.0)).is_dir()


@in_a_folder
def initial_weights_are_read_in_parts(folder: Path, ranks: Ranks) -> None:
    """Of one of our checkpoints, twice (once to refuse what is not finite); of others, in turn."""
    config = small_config(attention=MLA, tie_embeddings=False)
    whole = random_model(config, seed=3)
    if ranks.first:
        save_pretrained(whole, folder / "ours")
        export.export_hf(whole, folder / "theirs")
    ranks.wait()
    read, real = Counter[str](), weights._Tensors.read

    def counted(self: Any, name: str, box: Any = None) -> torch.Tensor:
        tensor = real(self, name, box)
        read["bytes"] += tensor.nbytes
        return tensor

    layouts = [{"dp_shard": ranks.world}, {"dp_shard": 1, "tp": 2}][: 2 if ranks.world == 2 else 1]
    for layout in layouts:
        train = TrainConfig(max_steps=1, batch_size=8, parallel=ParallelConfig(**layout))
        place = join(train.parallel)
        for source in ("ours", "theirs"):
            read.clear()
            with mock.patch.object(weights._Tensors, "read", counted):
                model = initial_model(folder / source, config, None, train, place)
            part_of, held, expected = shard.own_parts(model), 0, whole.state_dict()
            for name, own in model.state_dict(keep_vars=True).items():
                part, rows, columns = part_of(name, own.detach())
                tensor = expected[name].view(-1, expected[name].shape[-1])
                assert torch.equal(part, tensor[rows][:, columns]), (source, layout, name)
                held += part.nbytes
            if source == "ours":
                assert read["bytes"] == 2 * held, (read, held)
                total = sum(tensor.nbytes for tensor in expected.values())
                assert held < (0.6 if "tp" not in layout else 0.9) * total or ranks.world == 1
    with pytest.raises(ValueError, match="shape"):
        initial_model(folder / "ours", replace(config, vocab_size=40), None, train, place)


@on_ranks(2, 4)
def what_all_say_and_who_fails() -> None:
    ranks = join(ParallelConfig(dp_shard=dist.get_world_size()))
    with no_pickle():
        said: list[Any] = ranks.each(lambda: {"rank": "é" * ranks.rank})
        assert said == [{"rank": "é" * rank} for rank in range(ranks.world)]
        assert ranks.on_first(lambda: ranks.rank) == 0

        def fail() -> None:
            if ranks.rank == 1:
                raise OSError("of rank 1")

        with pytest.raises(OSError, match="of rank 1"):
            ranks.each(fail)


CASES = [
    the_guard_sees_objects_between_ranks,
    initial_weights_are_read_in_parts,
    what_all_say_and_who_fails,
    all_write_and_any_number_reads,
    what_one_wrote_all_read,
    a_disk_that_is_full_for_one_is_said_by_all,
    a_damaged_part_is_passed_over_by_all,
    training_goes_on_while_a_checkpoint_is_written,
]
