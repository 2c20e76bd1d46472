import contextlib
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmythos import load_pretrained
from openmythos.checkpoint import save
from openmythos.config import (
    ACTConfig,
    AddInjectionConfig,
    ExitGateConfig,
    MoEConfig,
    NormalInitConfig,
)
from openmythos.model.feedforward import MoE, max_violation
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cpu import build as native
from openmythos.train import loop
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth, PoissonDepth
from openmythos.train.loop import DivergenceGuard, TrainingStopped, train
from openmythos.train.metrics import Recorder, read_metrics
from openmythos.train.objective import ExitGainObjective, FinalLoopObjective, PerLoopObjective
from openmythos.train.optim import OptimizerConfig
from openmythos.train.recipe import RunConfig, TrainConfig
from openmythos.train.run import set_up
from openmythos.train.run_folder import RunFolder, RunState
from tests.strategies import random_model, small_config, unchecked
from tests.train import examples
from tests.train.examples import (
    FixedTask,
    assert_equal_runs,
    changed,
    full_disk,
    hops_config,
    measured,
    random_batch,
    text_config,
    write_config,
    write_text,
)

# --- killed and resumed = never stopped ----------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL where every instant of a write is tried."""


def start(config: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "openmythos", "train", "--config", str(config)]
    return subprocess.Popen(
        [*command, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Until the run has written a checkpoint at or after ``step``."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        names = [path.name for path in (out / "checkpoints").glob("step-*")]
        if names and int(max(names).removeprefix("step-")) >= step:
            return
        time.sleep(0.002)


@pytest.mark.slow
def test_a_killed_process_goes_on_exactly(tmp_path: Path) -> None:
    """On walks; the runs on text that are killed stand in tests/stress."""
    config = hops_config()
    whole, out = tmp_path / "whole", tmp_path / "killed"
    examples.run(config, whole)
    file, num_killed = write_config(config, tmp_path / "config.json"), 0
    for step, delay in [(4, 0.007), (30, 0.0)]:
        process = start(file, out)
        wait_for_step(process, out, step)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        num_killed += process.returncode == -signal.SIGKILL
    examples.run(config, out)
    assert num_killed >= 1  # on a busy machine a run may end before its kill
    assert_equal_runs(whole, out)
    stages = [row["stage"] for row in measured(whole) if row["kind"] == "train"]
    assert stages[0] == 1 and stages[-1] > 1  # the curriculum moved on


@pytest.mark.slow
def test_interrupt_saves_and_exits_with_130(tmp_path: Path) -> None:
    config = changed(text_config(write_text(tmp_path)), max_steps=60, save_every=20)
    whole, out = tmp_path / "whole", tmp_path / "interrupted"
    examples.run(config, whole)
    file = write_config(config, tmp_path / "config.json")
    process = start(file, out)
    wait_for_step(process, out, 20)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted and saved: step" in output
    stopped_at = int(RunFolder(out).checkpoints()[-1].name.removeprefix("step-"))
    assert 20 <= stopped_at < 60
    examples.run(config, out)
    assert_equal_runs(whole, out)


@pytest.mark.slow
def test_death_at_every_instant_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file operation of two saves, in turn, is the last one that is done."""
    config = changed(text_config(write_text(tmp_path)), max_steps=3, keep_checkpoints=1)
    examples.run(config, tmp_path / "whole")
    calls, saving = 0, False
    writes = [(os, name) for name in ("replace", "rename", "mkdir", "unlink", "fsync")]
    writes += [(shutil, "rmtree"), (save, "save_file")]

    def dying(function: Any, at: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += saving
            if saving and calls >= at:  # and nothing is cleaned up after it
                raise Killed
            return function(*arguments, **options)

        return call

    def save_or_die(*arguments: Any, **options: Any) -> Path:
        nonlocal saving
        saving = True
        path = write(*arguments, **options)
        saving = False
        return path

    at, died, write = 1, True, RunFolder.save
    while died:
        out, calls, saving, died = tmp_path / f"killed-{at}", 0, False, False
        with unchecked(), monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save", save_or_die)
            for owner, name in writes:
                patch.setattr(owner, name, dying(getattr(owner, name), at))
            try:
                examples.run(config, out)
            except Killed:
                died = True
        with unchecked():
            examples.run(config, out)
        assert_equal_runs(tmp_path / "whole", out)
        assert not list((out / "checkpoints").glob(".*"))
        at += 3 if at > 12 else 1
    assert at > 20


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    config = changed(hops_config(), max_steps=4)
    first = examples.run(config, tmp_path)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")}
    rows = measured(tmp_path)
    again = examples.run(config, tmp_path)
    assert (again.step, again.seconds, again.interrupted) == (4, first.seconds, False)
    assert measured(tmp_path) == rows
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")} == files


def test_rows_are_neither_missing_nor_doubled(tmp_path: Path) -> None:
    examples.run(changed(hops_config(), max_steps=10, eval_every=4, save_every=0), tmp_path)
    rows = measured(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 11))
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [4, 8, 10]
    sparse = changed(hops_config(), max_steps=10, eval_every=0, log_every=4)
    examples.run(sparse, tmp_path / "sparse")
    rows = measured(tmp_path / "sparse")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 4, 8, 10]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [10]


class Interrupting(FixedTask):
    """Sends Ctrl-C to this process after some steps, and within evaluation."""

    def __init__(
        self, batch: Any, at: tuple[int, ...], evaluating: int = 0, sent: int = signal.SIGINT
    ) -> None:
        super().__init__(batch)
        self.at, self.evaluating, self.sent = at, evaluating, sent

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        for _ in range(self.at.count(step)):
            os.kill(os.getpid(), self.sent)
        return {}

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Any]:
        for _ in range(self.evaluating):
            os.kill(os.getpid(), signal.SIGINT)
        return [{"num_loops": 1, "accuracy": 0.5}]


def run_fixed(
    out: Path, task: FixedTask, model: RecurrentDepthLM | None = None, **settings: Any
) -> loop.TrainResult:
    fields: dict[str, Any] = {"max_steps": 8, "batch_size": 4, "log_every": 1}
    config = TrainConfig(**{**fields, **settings})
    if model is None:
        model = RecurrentDepthLM(small_config())
    return train(model, task, config, RunFolder(out), Recorder(out))


def test_one_interrupt_saves_two_end_at_once(tmp_path: Path) -> None:
    batch = random_batch(small_config(), 4, 8)
    before = signal.getsignal(signal.SIGINT)
    result = run_fixed(tmp_path / "one", Interrupting(batch, at=(3,)))
    assert result.interrupted and result.step == 3
    assert [p.name for p in RunFolder(tmp_path / "one").checkpoints()] == ["step-00000003"]
    with pytest.raises(KeyboardInterrupt):
        run_fixed(tmp_path / "two", Interrupting(batch, at=(3, 3)))
    assert RunFolder(tmp_path / "two").last_checkpoint() is None
    assert signal.getsignal(signal.SIGINT) is before

    result = run_fixed(tmp_path / "eval", Interrupting(batch, (), evaluating=1), eval_every=4)
    assert result.interrupted and result.step == 4
    assert RunFolder(tmp_path / "eval").last_checkpoint() is not None
    assert measured(tmp_path / "eval")[-1]["kind"] == "validation"
    result = run_fixed(tmp_path / "end", Interrupting(batch, at=(8,)))
    assert not result.interrupted  # it was done anyway


def test_a_stopped_run_leaves_the_evaluation_to_the_next_start(tmp_path: Path) -> None:
    batch = random_batch(small_config(), 4, 8)
    run_fixed(tmp_path / "whole", Interrupting(batch, at=()), eval_every=4, eval_loops=(1,))
    out = tmp_path / "stopped"
    assert run_fixed(out, Interrupting(batch, at=(4,)), eval_every=4, eval_loops=(1,)).signal == 2
    assert [row["kind"] for row in measured(out)] == ["train"] * 4
    assert run_fixed(out, Interrupting(batch, at=()), eval_every=4, eval_loops=(1,)).signal == 0
    assert_equal_runs(tmp_path / "whole", out)


class OnFullDisk(FixedTask):
    """No file can grow beyond 1,000 bytes after the steps from ``first`` up to before ``last``."""

    def __init__(self, batch: Any, first: int, last: int) -> None:
        super().__init__(batch)
        self.first, self.last, self.full = first, last, contextlib.ExitStack()

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        if step == self.first:
            self.full.enter_context(full_disk(1000))
        if step == self.last:
            self.full.close()
        return {}


def test_training_goes_on_over_a_full_disk(tmp_path: Path) -> None:
    batch, settings = random_batch(small_config(), 4, 8), {"save_every": 1, "max_steps": 12}
    run_fixed(tmp_path / "whole", FixedTask(batch), **settings)
    task = OnFullDisk(batch, 3, 10)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = run_fixed(tmp_path / "run", task, **settings)
    assert result.step == 12
    words = [str(warning.message) for warning in said]
    assert sum("step-" in each and each.endswith("; training goes on") for each in words) >= 1
    assert sum("metrics.jsonl" in each and "until there is room" in each for each in words) == 1
    assert all("too large" in each for each in words)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_a_disk_that_stays_full_is_an_error_at_the_end(tmp_path: Path) -> None:
    batch, settings = random_batch(small_config(), 4, 8), {"save_every": 1, "max_steps": 6}
    task = OnFullDisk(batch, 3, 99)
    ignored = warnings.catch_warnings(action="ignore")
    with ignored, task.full, pytest.raises(OSError, match="too large"):
        run_fixed(tmp_path / "run", task, **settings)
    kept = RunFolder(tmp_path / "run").last_checkpoint()
    assert kept is not None and kept.name == "step-00000002"
    run_fixed(tmp_path / "run", FixedTask(batch), **settings)
    run_fixed(tmp_path / "whole", FixedTask(batch), **settings)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_many_sigterms_save_once(tmp_path: Path) -> None:
    """A scheduler and the launcher under it each send one."""
    task = Interrupting(random_batch(small_config(), 4, 8), at=(3, 3, 3), sent=signal.SIGTERM)
    result = run_fixed(tmp_path, task)
    assert (result.step, result.signal, result.interrupted) == (3, signal.SIGTERM, True)
    assert [p.name for p in RunFolder(tmp_path).checkpoints()] == ["step-00000003"]
    assert run_fixed(tmp_path, task).signal == 0


def test_a_run_keeps_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(native, "_load", lambda name: loaded.append(name) or True)
    task = FixedTask(random_batch(small_config(), 4, 8))
    monkeypatch.setenv(native.OFF, "experts")
    run_fixed(tmp_path, task, max_steps=2)
    state = RunFolder(tmp_path).last_state()
    assert state is not None and state.kernels == ["attention"]
    monkeypatch.delenv(native.OFF)
    loaded.clear()
    run_fixed(tmp_path, task, max_steps=4)
    state = RunFolder(tmp_path).last_state()
    assert state is not None and state.step == 4 and state.kernels == ["attention"]
    assert "experts" not in loaded


class Failing(FixedTask):
    """An evaluation that fails once."""

    def __init__(self, batch: Any, at: int) -> None:
        super().__init__(batch)
        self.at = at

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[Any]:
        self.at -= 1
        if self.at == 0:
            raise RuntimeError("out of memory")
        return [{"num_loops": loops, "accuracy": 0.5} for loops in config.eval_loops]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_evaluation_that_fails_costs_no_step(tmp_path: Path, at: int) -> None:
    """Nor its results: the next start makes up for them."""
    settings = {"eval_every": 3, "eval_loops": (1, 2)}
    batch = random_batch(small_config(), 4, 8)
    run_fixed(tmp_path / "whole", Failing(batch, at=0), **settings)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_fixed(tmp_path / "run", Failing(batch, at), **settings)
    kept = RunFolder(tmp_path / "run").last_checkpoint()
    assert kept is not None and kept.name == f"step-0000000{(3, 6, 8)[at - 1]}"
    run_fixed(tmp_path / "run", Failing(batch, at=0), **settings)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_a_run_saves_by_default() -> None:
    assert 0 < TrainConfig(max_steps=1).save_every <= 1000


def test_seconds_add_up_over_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0  # a clock of our own: this machine may be slow

    def tick() -> float:
        nonlocal now
        now += 1 / 1024
        return now

    monkeypatch.setattr(loop.time, "perf_counter", tick)

    class Slow(Interrupting):
        def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
            nonlocal now
            now += 0.125
            return super().after_step(model, step)

    batch, limits = random_batch(small_config(), 4, 8), {"max_steps": None, "max_seconds": 0.8}
    first = run_fixed(tmp_path, Slow(batch, at=(2,)), **limits)
    assert first.interrupted and 0.125 <= first.seconds < 0.8
    second = run_fixed(tmp_path, Slow(batch, at=()), **limits)
    assert second.step > first.step and second.seconds >= 0.8
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    seconds = [row["seconds"] for row in rows if row["step"] < second.step]
    assert seconds == sorted(seconds) and seconds[-1] < 0.8


# --- gradients -----------------------------------------------------------------------------------


def gradients(
    model: RecurrentDepthLM, batch: Any, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    model.zero_grad()
    optimizer = OptimizerConfig(clip_norm=1e9)
    config = TrainConfig(
        max_steps=10, batch_size=len(batch.tokens), optimizer=optimizer, **settings
    )
    metrics, _ = loop._gradients(model, batch, config, 3, 0.5)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, metrics


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("objective", [FinalLoopObjective(z_loss=0.01), PerLoopObjective()])
def test_accumulation_equals_one_large_batch(unequal: bool, objective: Any) -> None:
    config = small_config(core_feed_forward=examples.MOE, state_init=NormalInitConfig())
    model = random_model(config, dtype=torch.float64).train()
    batch = random_batch(config, 8, 6, unequal=unequal)
    depth = DepthSchedule(
        sampling=PoissonDepth(mean_recurrence=3), per_sequence=True, mean_backprop_depth=2
    )
    options: dict[str, Any] = {"depth": depth, "objective": objective}
    whole, expected = gradients(model, batch, **options)
    for pieces in (2, 4, 8):
        parts, got = gradients(model, batch, grad_accumulation=pieces, **options)
        assert whole.keys() == parts.keys()
        for name, grad in whole.items():
            assert torch.allclose(grad, parts[name], rtol=1e-9, atol=1e-12), name
        assert got == pytest.approx(expected, rel=1e-6)


def test_truncated_backpropagation_detaches_the_first_loops() -> None:
    config = small_config(num_prelude_layers=0)
    model = random_model(config, dtype=torch.float64).train()
    batch = random_batch(config, 4, 6)
    depth = DepthSchedule(sampling=FixedDepth(mean_recurrence=4), mean_backprop_depth=2)
    truncated, _ = gradients(model, batch, depth=depth)
    full, _ = gradients(model, batch, depth=DepthSchedule(sampling=FixedDepth(mean_recurrence=4)))
    model.zero_grad()
    ctx = model.context(batch.tokens)
    e = model.encode(batch.tokens, ctx)
    h = model.init_state(e, ctx)
    for index in range(4):
        h = model.step(h, e, torch.full((4,), index), ctx)
        h = h.detach() if index < 2 else h
    logits = model.decode(h, ctx)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None
        assert torch.allclose(param.grad, truncated[name], atol=1e-12), name
    assert not torch.allclose(
        full["core.0.attention.qkv.weight"], truncated["core.0.attention.qkv.weight"]
    )


def test_measured_numbers() -> None:
    model = random_model(small_config()).train()
    batch = random_batch(small_config(), 4, 8)
    _, metrics = gradients(model, batch)
    assert set(metrics) == {
        "loss", "nats_per_token", "state_norm", "grad_norm", "rho", "num_loops"
    }  # fmt: skip
    assert metrics["rho"] == pytest.approx(model.injection.decay().max().item())
    assert 0 < metrics["rho"] < 1
    plain = random_model(small_config(injection=AddInjectionConfig())).train()
    assert "rho" not in gradients(plain, batch)[1]


def test_clipping(tmp_path: Path) -> None:
    model = random_model(small_config()).train()
    config = TrainConfig(max_steps=1, batch_size=4, optimizer=OptimizerConfig(clip_norm=0.01))
    metrics, _ = loop._gradients(model, random_batch(small_config(), 4, 8), config, 0, 0.0)
    squares = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    assert metrics["grad_norm"] > 0.1
    assert float(squares) ** 0.5 == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_the_same_batch_is_learnt(tmp_path: Path, autocast: str) -> None:
    batch = random_batch(small_config(), 4, 8)
    depth = DepthSchedule(sampling=FixedDepth(mean_recurrence=2), mean_backprop_depth=1)
    settings = {"max_steps": 60, "log_every": 59, "autocast": autocast, "depth": depth}
    run_fixed(tmp_path, FixedTask(batch), **settings)
    losses = [row["loss"] for row in measured(tmp_path)]
    assert losses[0] == pytest.approx(np.log(32), abs=0.6)
    assert losses[-1] < 0.5 * losses[0]


def test_compile_wraps_the_body_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(options) or f)
    run_fixed(tmp_path, FixedTask(random_batch(small_config(), 4, 8)), max_steps=2, compile=True)
    assert asked == [{"fullgraph": True, "recompile_limit": 64, "isolate_recompiles": True}]
    model = RecurrentDepthLM(small_config())
    run_fixed(tmp_path / "b", FixedTask(random_batch(small_config(), 4, 8)), model, max_steps=1)
    assert "step" not in vars(model)


COMPILED_RUNS = """
import functools, sys
from pathlib import Path
import torch
from tests.train import examples
from openmythos.train import loop
from openmythos.train.depth_schedule import DepthSchedule, PoissonDepth

torch.compile = functools.partial(torch.compile, backend="eager")  # dynamo's graphs, not compiled
loop.native.require_compiler = lambda *arguments: None
depth = DepthSchedule(sampling=PoissonDepth(mean_recurrence=4), per_sequence=True,
                      mean_backprop_depth=2)
for name in ("plain", "compiled"):
    config = examples.hops_config(depth=depth, max_steps=40, eval_every=0,
                                  compile=name == "compiled", save_every=100)
    examples.run(config, Path(sys.argv[1], name))
"""


@pytest.mark.slow
def test_a_compiled_run_has_a_depth_per_sequence(tmp_path: Path, repo_root: Path) -> None:
    """In a process without shape checks, which dynamo cannot trace."""
    command = [sys.executable, "-c", COMPILED_RUNS, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=repo_root)
    assert ran.returncode == 0, ran.stderr[-2000:]
    one, other = (
        [row["loss"] for row in measured(tmp_path / name) if row["kind"] == "train"]
        for name in ("plain", "compiled")
    )
    assert len(one) == 40 and one == pytest.approx(other, rel=0.05)


# --- runs that are lost --------------------------------------------------------------------------


class Poison(FixedTask):
    """Makes a weight NaN after a step."""

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        if step == 3:
            with torch.no_grad():
                model.final_norm.weight[0] = float("nan")
        return {}


def test_a_loss_that_stays_no_number_stops(tmp_path: Path) -> None:
    task, said = Poison(random_batch(small_config(), 4, 8)), "after 10 skipped steps, at step 14"
    with pytest.raises(TrainingStopped, match=rf"the loss is nan .*{said}; .*step-00000002$"):
        run_fixed(tmp_path, task, save_every=2, max_steps=20)
    kept = RunFolder(tmp_path).last_checkpoint()
    assert kept is not None
    load_pretrained(kept)  # refuses weights that are not finite
    rows = measured(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 14))
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 0, 0, *range(1, 11)]
    with pytest.raises(TrainingStopped, match="last checkpoint: none was written yet"):
        run_fixed(tmp_path / "unsaved", task, max_steps=20)


class Infinite(FixedTask):
    """Makes the gradients of some steps infinite, and remembers the weights after each step."""

    def __init__(self, batch: Any, at: tuple[int, ...]) -> None:
        super().__init__(batch)
        self.at, self.weights = at, [torch.empty(0)]

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        self.weights.append(model.embed.weight.detach().clone())
        handle = getattr(self, "handle", None)
        if handle is not None:
            handle.remove()
            self.handle = None
        if step + 1 in self.at:
            self.handle = model.final_norm.weight.register_hook(lambda grad: grad * math.inf)
        return {}


def test_a_step_without_finite_gradients_is_skipped_and_counted(tmp_path: Path) -> None:
    task = Infinite(random_batch(small_config(), 4, 8), at=(3, 4, 6))
    assert run_fixed(tmp_path, task).skipped == 3
    same = [torch.equal(task.weights[n], task.weights[n - 1]) for n in range(2, 9)]
    assert same == [False, True, True, False, True, False, False]
    rows = measured(tmp_path)
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 0, 1, 2, 2, 3, 3, 3]
    state = RunFolder(tmp_path).last_state()
    assert state is not None and (state.skipped, state.skipped_running) == (3, 0)


def test_a_loss_that_explodes_stops_and_keeps_an_early_checkpoint(tmp_path: Path) -> None:
    task = FixedTask(random_batch(small_config(), 4, 8))
    wild = OptimizerConfig(
        lr=5.0, embedding_lr=None, muon_lr=None, betas=(0.9, 0.95), warmup=0.5, decay=0.0
    )
    with pytest.raises(TrainingStopped, match=r"above 1.5 x its first value .* for 20 steps"):
        run_fixed(tmp_path, task, max_steps=200, optimizer=wild, save_every=5, keep_checkpoints=1)
    rows = measured(tmp_path)
    kept = RunFolder(tmp_path).last_checkpoint()
    assert kept is not None
    step = int(kept.name.removeprefix("step-"))
    assert rows[step - 1]["loss"] < 1.5 * rows[0]["loss"]
    assert load_pretrained(kept) is not None


def test_guard_counts_steps_in_a_row() -> None:
    def measure(nats: float, loss: float | None = None, norm: float = 1.0) -> dict[str, float]:
        return {"loss": nats if loss is None else loss, "nats_per_token": nats, "grad_norm": norm}

    def fresh(**fields: Any) -> DivergenceGuard:
        return DivergenceGuard(RunState(0, 0.0, **fields))

    guard = fresh()
    assert guard.check(measure(2.0, loss=-5.0)) is None  # an entropy bonus
    for _ in range(DivergenceGuard.patience - 1):
        assert guard.check(measure(3.1)) is None
    assert guard.check(measure(2.9)) is None
    for _ in range(DivergenceGuard.patience - 1):
        assert guard.check(measure(3.1)) is None
    goes_on = fresh(**guard.state())
    assert "above 1.5 x its first value 2.00" in str(goes_on.check(measure(3.1)))
    guard = fresh(skipped=14, skipped_running=9)
    assert guard.check(measure(1.0, norm=float("inf"))) is None and guard.skips and guard.bad
    assert "gradient norm inf" in str(guard.check(measure(1.0, norm=float("inf"))))
    guard = fresh(skipped=14, skipped_running=10)
    assert guard.check(measure(1.0)) is None and not guard.skips
    assert guard.state()["skipped"] == 14
    assert guard.check(measure(1.0, loss=float("nan"))) is None and guard.skips


# --- experts -------------------------------------------------------------------------------------


def trained_violation(tmp_path: Path, rate: float) -> list[float]:
    """Max load / mean load - 1 of every loop after training on skewed text."""
    source = write_text(tmp_path)
    made = text_config(source, max_steps=200, batch_size=8, balance_rate=rate, eval_every=0)
    experts = MoEConfig(num_experts=8, num_experts_per_token=2, d_expert=8, bias_loops=3)
    depth = DepthSchedule(sampling=FixedDepth(mean_recurrence=3))
    model = examples.tiny_model(core_feed_forward=experts)
    config = RunConfig(model=model, train=made.train, data=made.data)
    config = changed(config, depth=depth, save_every=0, log_every=50)
    ready = set_up(config, tmp_path / f"rate-{rate}")
    ready.train()
    (layer,) = [m for m in ready.model.modules() if isinstance(m, MoE)]
    ready.model.train()
    for batch in itertools.islice(ready.task.batches(300, 8), 20):
        ctx = ready.model.context(batch.tokens, documents=batch.documents)
        with torch.no_grad():
            ready.model(batch.tokens, num_loops=3, ctx=ctx)
    return max_violation(layer.load).tolist()


@pytest.mark.slow
def test_experts_stay_balanced_at_every_loop(tmp_path: Path) -> None:
    with unchecked():
        balanced = trained_violation(tmp_path, 0.01)
        left_alone = trained_violation(tmp_path, 0.0)
    assert max(balanced) < 0.5
    assert all(b < u for b, u in zip(balanced, left_alone, strict=True))
    assert min(left_alone) > 0.6
    rows = [r for r in measured(tmp_path / "rate-0.01") if r["kind"] == "train"]
    assert {f"max_violation_loop_{i}" for i in range(3)} <= rows[-1].keys()


def test_the_second_stage_trains_the_gate_alone_and_can_be_resumed(tmp_path: Path) -> None:
    config = text_config(write_text(tmp_path), max_steps=4, eval_every=0, save_every=2)
    config = replace(
        config,
        model=replace(config.model, halting=ExitGateConfig()),
        train=replace(config.train, objective=ExitGainObjective()),
    )
    ready = set_up(config, tmp_path / "whole")
    before = {name: tensor.clone() for name, tensor in ready.model.state_dict().items()}
    ready.train()
    after = ready.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"halting.proj.weight", "halting.proj.bias"}  # not the experts' bias either
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000004")
    examples.run(config, tmp_path / "again")
    assert_equal_runs(tmp_path / "whole", tmp_path / "again")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at every input's
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_loops_train_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None, compiled: bool
) -> None:
    if compiled:
        real = torch.compile
        monkeypatch.setattr(loop.native, "require_compiler", lambda name, wanted: None)
        monkeypatch.setattr(torch, "compile", lambda step, **_: real(step, backend="eager"))
    losses = []
    for recompute in (False, True):
        config = text_config(
            write_text(tmp_path),
            max_steps=3,
            eval_every=0,
            compile=compiled,
            recompute=recompute,
            grad_accumulation=2,
        )
        with unchecked():
            examples.run(config, tmp_path / str(recompute))
        rows = measured(tmp_path / str(recompute))
        names = ("loss", "grad_norm", *(f"max_violation_loop_{i}" for i in range(3)))
        losses.append([[row[name] for name in names if name in row] for row in rows])
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(losses[0][0]) >= 3  # the experts' load is among them


def test_loops_that_were_not_run_report_no_load(tmp_path: Path) -> None:
    config = small_config(core_feed_forward=examples.MOE, halting=ACTConfig())
    model = RecurrentDepthLM(config)
    depth = DepthSchedule(sampling=FixedDepth(mean_recurrence=2))
    task = FixedTask(random_batch(config, 4, 8))
    run_fixed(tmp_path, task, model, max_steps=2, depth=depth)
    (first, _) = measured(tmp_path)
    assert "max_violation_loop_1" in first and "max_violation_loop_2" not in first
    assert all(value >= 0 for name, value in first.items() if name.startswith("max_violation"))
    (*_, layer) = [m for m in model.modules() if isinstance(m, MoE)]
    assert layer.load.sum() == 0 and layer.bias[:2].abs().sum() > 0 and layer.bias[2].sum() == 0


def test_every_row_and_document_of_a_step_has_initial_states_of_its_own() -> None:
    """And micro-batches do not change them: the gradients are those of the whole batch."""
    documents = torch.tensor([[0, 0, 1, -1], [0, 1, 2, 2], [0, 0, 0, 0], [0, 1, 1, 1]])
    rows = torch.arange(4)
    drawn = [loop.state_seeds(seed, step, rows, documents) for seed in (0, 1) for step in (0, 1)]
    assert len(torch.stack(drawn).unique()) == 4 * (2 + 3 + 1 + 2)
    assert torch.equal(loop.state_seeds(1, 1, rows[1::2], documents[1::2]), drawn[-1][1::2])
    config = small_config(state_init=NormalInitConfig())
    batch, found = random_batch(config, 4, 8), []
    for parts in (1, 2, 4):
        model = random_model(config, dtype=torch.float64)
        recipe = TrainConfig(max_steps=1, batch_size=4, grad_accumulation=parts)
        loop._gradients(model, batch, recipe, 3, 0.0)
        found.append(model.embed.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
