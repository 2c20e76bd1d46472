"""The training loop: sample a depth, accumulate gradients, step, balance, log, save."""

import contextlib
import math
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from openmythos.data.packing import IGNORED_TARGET, Batch, on_device
from openmythos.model.feedforward import MoE, max_violation
from openmythos.model.init import derive
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cpu import build as native
from openmythos.ops.cpu import choice
from openmythos.train.metrics import Recorder
from openmythos.train.optim import make_optimizers
from openmythos.train.recipe import TrainConfig
from openmythos.train.run_folder import RunFolder, RunState
from openmythos.train.task import Task


class TrainingStopped(RuntimeError):
    """The run cannot go on: the message says why and which checkpoint was kept."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps and seconds done, and the signal that stopped it before its end.

    ``signal`` is 0 at the run's end; Ctrl-C sends SIGINT, schedulers and launchers SIGTERM.
    """

    step: int
    seconds: float
    signal: int = 0

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before its end."""
        return self.signal != 0


def train(
    model: RecurrentDepthLM,
    task: Task,
    config: TrainConfig,
    run: RunFolder,
    recorder: Recorder,
) -> TrainResult:
    """Train until the configured end; continue from the run folder's last checkpoint, if any.

    Raises:
        TrainingStopped: The loss or a gradient is not finite, or the loss diverged.
    """
    native.require_compiler("train.compile", config.compile)
    optimizers = make_optimizers(model, config.optimizer)
    state = run.resume(model, optimizers, task) or RunState(step=0, seconds=0.0)
    if config.compile:
        # A graph for one row and one for more, with and without gradients, per shape of a call:
        # with a depth per sequence more than the 8 that torch allows.
        limits: dict[str, Any] = {"recompile_limit": 64, "isolate_recompiles": True}
        model.step = torch.compile(model.step, fullgraph=True, **limits)  # type: ignore[method-assign]
    own = model.embed.weight.device.type == "cpu" and not config.compile
    # Builds what is missing now, so that no step waits for it.
    keeping = choice.keeping(state.kernels) if own else nullcontext(state.kernels)
    model.train()
    batches = task.batches(state.step, config.batch_size)
    guard = DivergenceGuard(state.first_nats, state.bad_steps)
    before, started, saved = state.seconds, time.perf_counter(), state.step
    done = config.progress(state.step, state.seconds)
    due = config.eval_loops if _evaluates(config, state.step, done) else ()
    with keeping as kernels, closing(recorder), closing(batches), _interruptible(recorder) as stop:
        if not recorder.start(state.step, due):  # the run was killed after it had saved
            recorder.validation(state.step, state.seconds, task.evaluate(model, config))
        while done < 1 and not stop.requested:
            step_started = time.perf_counter()
            batch = next(batches)
            metrics = _gradients(model, batch, config, state.step, done)
            reason = guard.check(metrics)
            if reason:
                kept = run.last_checkpoint() or "none was written yet"
                raise TrainingStopped(f"{reason} at step {state.step + 1}; last checkpoint: {kept}")
            metrics["lr_factor"] = config.optimizer.rate(done)
            _update(optimizers, metrics["lr_factor"])
            frozen = config.objective.trains_gate_only  # the experts' selection, too
            metrics |= _balance_experts(model, 0.0 if frozen else config.balance_rate)
            now = time.perf_counter()
            metrics["tokens_per_second"] = batch.tokens.numel() / (now - step_started)
            step, seconds = state.step + 1, before + now - started
            metrics |= task.after_step(model, step)
            state = RunState(step, seconds, guard.first_nats, guard.bad_steps, kernels)
            done = config.progress(step, seconds)
            logged = step % config.log_every == 0 or step == 1 or done == 1
            recorder.step(step, seconds, done, metrics, logged)
            # Saved first: an evaluation can fail. No checkpoint while the loss is bad, though: it
            # would push out an older, better one.
            evaluates = _evaluates(config, step, done)
            by_steps = config.save_every and step % config.save_every == 0
            is_last = done == 1 or stop.requested
            if is_last or ((evaluates or by_steps) and not guard.bad_steps):
                try:
                    recorder.flush()  # a run that goes on from here finds its rows
                    run.save(model, optimizers, task, state)
                    saved = step
                except OSError as error:
                    if is_last:
                        raise
                    warnings.warn(f"{error}; training goes on", stacklevel=2)
            if evaluates and (done == 1 or not stop.requested):  # else the next start does it
                recorder.validation(step, seconds, task.evaluate(model, config))
        recorder.flush()
        if state.step > saved:
            run.save(model, optimizers, task, state)
    return TrainResult(state.step, state.seconds, stop.signal if done < 1 else 0)


def _evaluates(config: TrainConfig, step: int, done: float) -> bool:
    """Whether held-out results are due after ``step``."""
    return step > 0 and (done == 1 or (config.eval_every > 0 and step % config.eval_every == 0))


def _gradients(
    model: RecurrentDepthLM, batch: Batch, config: TrainConfig, step: int, progress: float
) -> dict[str, float]:
    """Accumulate gradients over ``grad_accumulation`` micro-batches and clip them.

    Returns:
        The step's metrics.
    """
    num_rows, device = len(batch.tokens), model.embed.weight.device
    micro_size = num_rows // config.grad_accumulation
    depths, grad_loops = config.depth.sample(
        seed=config.seed, step=step, progress=progress, batch_size=num_rows
    )
    counted = (batch.targets != IGNORED_TARGET).sum(dim=1)
    total = max(1, int(counted.sum()))
    measured = torch.zeros(3, device=device)  # loss, nats, state norm; read once, at the end
    for start in range(0, num_rows, micro_size):
        rows = slice(start, start + micro_size)
        micro = batch.rows(rows.start, rows.stop)
        seeds = state_seeds(config.seed, step, start, micro.documents)
        micro, ctx = on_device(model, micro, seeds)
        # The micro-batch's share of all tokens with a loss: the sum then equals one large batch.
        share = int(counted[rows].sum()) / total
        with autocast(config, device):
            with torch.set_grad_enabled(not config.objective.trains_gate_only):
                output = model(
                    micro.tokens,
                    num_loops=depths[rows],
                    grad_loops=grad_loops,
                    ctx=ctx,
                    keep_states=config.objective.needs_states,
                    recompute=config.recompute,
                )
            loss, nats = config.objective.loss(model, output, micro.targets, ctx, depths[rows])
        (loss * share).backward()
        norm = torch.linalg.vector_norm(output.h.detach().float(), dim=-1).mean()
        measured += torch.stack(
            (loss.detach().float() * share, nats.float() * share, norm * (micro_size / num_rows))
        )
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
    decay = model.injection.decay()
    last = () if decay is None else (decay.detach().max(),)
    numbers = torch.cat((measured, torch.stack([t.float() for t in (grad_norm, *last)]))).tolist()
    names = ("loss", "nats_per_token", "state_norm", "grad_norm", "rho")
    metrics = dict(zip(names, numbers, strict=False))  # an injection without A has no rho
    metrics["num_loops"] = float(depths.float().mean())
    if batch.num_bytes:
        bits = metrics["nats_per_token"] * total / math.log(2)
        metrics["bits_per_byte"] = bits / batch.num_bytes
    return metrics


def state_seeds(
    seed: int, step: int, first_row: int, documents: Int[Tensor, "B T"]
) -> Int[Tensor, "B T"]:
    """Seeds of initial states: one per run, step, row of the whole batch, and document."""
    rows = torch.arange(first_row, first_row + len(documents))[:, None]
    low, high = derive(seed, step, (rows << 32) | documents.clamp(min=0))
    return torch.as_tensor(((high & 0x7FFFFFFF) << 32) | low)


def _update(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Step the optimisers at ``factor`` times their base learning rates; clear the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def autocast(
    config: TrainConfig, device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """The autocast context of a forward pass.

    Its weight cache is off: with truncated back-propagation, a weight that was cast under no_grad
    would be reused in the loops with gradients, and its gradient would be lost.
    """
    if config.autocast == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def _balance_experts(model: RecurrentDepthLM, rate: float) -> dict[str, float]:
    """Update every router's bias; return the worst max violation of each loop that was run."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        return {}
    loads = torch.stack([layer.load for layer in layers])
    worst = max_violation(loads.flatten(0, 1)).view(loads.shape[:2]).amax(dim=0)
    seen = loads.sum(dim=(0, 2)) > 0
    for layer in layers:
        layer.update_bias(rate)
    values = torch.where(seen, worst, torch.nan).tolist()
    return {f"max_violation_loop_{i}": v for i, v in enumerate(values) if not math.isnan(v)}


class DivergenceGuard:
    """Detects a lost run: a number that is not finite, or a loss that stays above the first one.

    The comparison is of the plain cross-entropy, because a loss with an entropy bonus may be
    negative.
    """

    patience = 20
    factor = 1.5

    def __init__(self, first_nats: float | None = None, bad_steps: int = 0) -> None:
        self.first_nats, self.bad_steps = first_nats, bad_steps

    def check(self, metrics: dict[str, float]) -> str | None:
        """The reason to stop, or None."""
        loss, grad_norm, nats = (metrics[k] for k in ("loss", "grad_norm", "nats_per_token"))
        if not all(map(math.isfinite, (loss, grad_norm, nats))):
            return f"the loss is {loss} and the gradient norm {grad_norm}"
        if self.first_nats is None:
            self.first_nats = nats
        self.bad_steps = self.bad_steps + 1 if nats > self.factor * self.first_nats else 0
        if self.bad_steps >= self.patience:
            first = f"{self.factor} x its first value {self.first_nats:.2f}"
            return f"the loss is {nats:.2f}, above {first} for {self.patience} steps,"
        return None


@dataclass
class _Stop:
    signal: int = 0

    @property
    def requested(self) -> bool:
        return self.signal != 0


@contextlib.contextmanager
def _interruptible(recorder: Recorder) -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM request that the loop saves and ends; a second Ctrl-C ends at once.

    A second SIGTERM does not: a scheduler and the launcher under it each send one.
    """
    stop = _Stop()

    def request(signum: int, frame: object) -> None:
        if stop.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or signum
        recorder.note("saving after this step; Ctrl-C again stops at once")

    kept = {}
    with contextlib.suppress(ValueError):  # only the main thread can set handlers
        for signum in (signal.SIGINT, signal.SIGTERM):
            kept[signum] = signal.signal(signum, request)
    try:
        yield stop
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)
