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
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.data.packing import IGNORED_TARGET, Batch, on_device
from openmythos.model.feedforward import MoE, max_violation
from openmythos.model.init import derive
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cpu import build as native
from openmythos.ops.cpu import choice
from openmythos.train.gradients import (
    hold_gradients,
    release_gradients,
    reshard,
    scale_gradients,
    square_sum,
)
from openmythos.train.metrics import Recorder
from openmythos.train.optim import make_optimizers
from openmythos.train.ranks import Ranks
from openmythos.train.recipe import COMPILING, TrainConfig
from openmythos.train.run_folder import RunFolder, RunState
from openmythos.train.task import Task
from openmythos.train.validation import Row


class TrainingStopped(RuntimeError):
    """The run cannot go on: the message says why and which checkpoint was kept."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps and seconds done, and the signal that stopped it before its end.

    ``skipped`` of the steps changed nothing: their loss or gradients were not finite. ``signal`` is
    0 at the run's end; Ctrl-C sends SIGINT, schedulers and launchers SIGTERM.
    """

    step: int
    seconds: float
    signal: int = 0
    skipped: int = 0

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before its end."""
        return self.signal != 0


@dataclass
class Here:
    """This process's clock, and whether it was asked to stop.

    Attributes:
        before: Seconds of training before this process began.
        started: When it began.
        signal: The signal that asked it to stop; 0: none.
    """

    before: float = 0.0
    started: float = 0.0
    signal: int = 0

    @property
    def seconds(self) -> float:
        """Seconds of training until now."""
        return self.before + time.perf_counter() - self.started


@dataclass(frozen=True)
class Agreed:
    """What all ranks go by: the first one's seconds of training, and the signal to stop, or 0.

    A rank that was not asked itself takes the signal for SIGTERM.
    """

    seconds: float
    signal: int


def train(
    model: RecurrentDepthLM,
    task: Task,
    config: TrainConfig,
    run: RunFolder,
    recorder: Recorder,
    ranks: Ranks | None = None,
) -> TrainResult:
    """Train until the configured end; continue from the run folder's last checkpoint, if any.

    Every rank calls it with its part of the model and its rows of the task's batches; all take the
    same steps and stop after the same one.

    Raises:
        TrainingStopped: Too many steps running are not finite, or the loss diverged.
    """
    ranks = Ranks.alone(model.embed.weight.device) if ranks is None else ranks
    native.require_compiler("train.compile", config.compile)
    optimizers = make_optimizers(model, config.optimizer)
    state = run.resume(model, optimizers, task) or _first_state(model, task, config)
    if config.compile and ranks.mesh is None:  # over ranks, each block is compiled by itself
        model.step = torch.compile(model.step, **COMPILING)  # type: ignore[method-assign]
    own = model.embed.weight.device.type == "cpu" and not config.compile
    # Builds what is missing now, so that no step waits for it.
    keeping = choice.keeping(state.kernels) if own else nullcontext(state.kernels)
    model.train()
    batches = task.batches(state.step, config.batch_size)
    guard, saved = DivergenceGuard(state), state.step
    here = Here(state.seconds, time.perf_counter())
    done, stopping = config.progress(state.step, state.seconds), 0
    due = config.eval_loops if _evaluates(config, state.step, done) else ()
    with keeping as kernels, closing(recorder), closing(batches), _interruptible(recorder, here):
        # The run may have been killed after it had saved.
        if not ranks.on_first(lambda: recorder.start(state.step, due)):
            recorder.validation(state.step, state.seconds, _evaluate(model, task, config))
        while done < 1 and not stopping:
            step_started = time.perf_counter()
            batch = next(batches)
            metrics, agreed = _gradients(model, batch, config, state.step, done, ranks, here)
            if reason := guard.check(metrics):
                run.finish()
                kept = run.last_checkpoint() or "none was written yet"
                raise TrainingStopped(f"{reason} at step {state.step + 1}; last checkpoint: {kept}")
            metrics["lr_factor"] = config.optimizer.rate(done)
            _update(optimizers, metrics["lr_factor"], guard.skips)
            # Where only the gate or an adapter is trained, the experts' selection is frozen.
            frozen = config.objective.trains_gate_only or config.adapter or guard.skips
            metrics |= _balance_experts(model, 0.0 if frozen else config.balance_rate)
            metrics |= {"skipped_steps": float(guard.skipped)} if guard.skipped else {}
            num_tokens = batch.tokens.numel() * ranks.num_row_ranks
            metrics["tokens_per_second"] = num_tokens / (time.perf_counter() - step_started)
            step, seconds = state.step + 1, here.seconds if agreed is None else agreed.seconds
            metrics |= task.after_step(model, step)
            reshard(model)  # a task may have measured something
            state = RunState(step, seconds, kernels=kernels, **guard.state())
            done = config.progress(step, seconds)
            logged = step % config.log_every == 0 or step == 1 or done == 1
            recorder.step(step, seconds, done, metrics, logged)
            stopping = here.signal if agreed is None else agreed.signal
            # Saved first: an evaluation can fail. No checkpoint while the loss is bad, though: it
            # would push out an older, better one.
            evaluates = _evaluates(config, step, done)
            by_steps = config.save_every and step % config.save_every == 0
            is_last = done == 1 or stopping
            if is_last or ((evaluates or by_steps) and not guard.bad):
                try:
                    ranks.each(recorder.flush)  # a run that goes on from here finds its rows
                    run.save(model, optimizers, task, state, wait=bool(is_last))
                    saved = step
                except OSError as error:
                    if is_last:
                        raise
                    _warn_once(f"{error}; training goes on", ranks)
            if evaluates and (done == 1 or not stopping):  # else the next start does it
                recorder.validation(step, seconds, _evaluate(model, task, config))
                stopping = here.signal if agreed is None else stopping
        ranks.each(recorder.flush)
        if not run.finish() or state.step > saved:
            run.save(model, optimizers, task, state)
    return TrainResult(state.step, state.seconds, stopping if done < 1 else 0, state.skipped)


def _first_state(model: RecurrentDepthLM, task: Task, config: TrainConfig) -> RunState:
    """Of a run without a checkpoint; its task begins where given weights stand."""
    if config.init_from is not None:
        task.before_first_step(model)
        reshard(model)  # the task may have measured something
    return RunState(step=0, seconds=0.0)


def _warn_once(text: str, ranks: Ranks) -> None:
    if ranks.first:
        warnings.warn(text, stacklevel=3)


def _evaluates(config: TrainConfig, step: int, done: float) -> bool:
    """Whether held-out results are due after ``step``."""
    return step > 0 and (done == 1 or (config.eval_every > 0 and step % config.eval_every == 0))


def _evaluate(model: RecurrentDepthLM, task: Task, config: TrainConfig) -> list[Row]:
    """Held-out results; weights that were gathered for them are freed."""
    rows = task.evaluate(model, config)
    reshard(model)
    return rows


def _gradients(
    model: RecurrentDepthLM,
    batch: Batch,
    config: TrainConfig,
    step: int,
    progress: float,
    ranks: Ranks | None = None,
    here: Here | None = None,
) -> tuple[dict[str, float], Agreed | None]:
    """Accumulate gradients over ``grad_accumulation`` micro-batches and clip them.

    Over ranks, ``batch`` has this one's rows.

    Returns:
        The step's metrics, and what the ranks agree on; None: there is one process.
    """
    ranks = Ranks.alone(model.embed.weight.device) if ranks is None else ranks
    here = Here() if here is None else here
    num_rows = len(batch.tokens) * ranks.num_row_ranks
    rows = torch.arange(ranks.row_rank, num_rows, ranks.num_row_ranks)
    depths, grad_loops = config.depth.sample(
        seed=config.seed, step=step, progress=progress, batch_size=num_rows
    )
    total, num_bytes = max(1, int((batch.targets != IGNORED_TARGET).sum())), batch.num_bytes
    # Losses are divided by the number of targets of the whole batch. Over ranks it is known only
    # afterwards, with all other sums; until then the number of tokens stands for it.
    divisor = total if ranks.mesh is None else num_rows * batch.tokens.shape[1]
    seeds = state_seeds(config.seed, step, rows, batch.documents)
    measured = _backward(model, batch, seeds, depths[rows], grad_loops, divisor, config)
    measured[2] /= ranks.num_row_ranks
    decay = model.injection.decay()
    rho = () if decay is None else (decay.detach().max(),)
    agreed = None
    if ranks.mesh is None:
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        last = torch.stack([t.to(measured.dtype) for t in (grad_norm, *rho)])
        numbers = torch.cat((measured, last)).tolist()
    else:
        reshard(model)  # before the norm, or it misses the units that were kept
        sums = _over_ranks(model, measured, (total, num_bytes), rho, ranks, here)
        *numbers, targets, size, seconds, stops, squares = sums[:8]
        total, num_bytes = max(1, int(targets)), int(size)
        factor = divisor / total
        numbers = [numbers[0] * factor, numbers[1] * factor, numbers[2], squares**0.5 * factor]
        clip = min(1.0, config.optimizer.clip_norm / (numbers[3] + 1e-6))
        scale_gradients(model, factor * clip)
        numbers += sums[8:]
        agreed = Agreed(seconds, (here.signal or signal.SIGTERM) if stops else 0)
    names = ("loss", "nats_per_token", "state_norm", "grad_norm", "rho")
    metrics = dict(zip(names, numbers, strict=False))  # an injection without A has no rho
    metrics["num_loops"] = float(depths.float().mean())
    if num_bytes:
        metrics["bits_per_byte"] = metrics["nats_per_token"] * total / math.log(2) / num_bytes
    return metrics, agreed


def _backward(
    model: RecurrentDepthLM,
    batch: Batch,
    seeds: Int[Tensor, "B T"],
    depths: Int[Tensor, "B"],
    grad_loops: int | None,
    divisor: int,
    config: TrainConfig,
) -> Float[Tensor, "3"]:
    """Add up the gradients of all micro-batches.

    Returns:
        The sums of loss and nats over the targets, by ``divisor``, and the mean state norm. They
        stay on the device: nothing waits for it.
    """
    num_rows, device = len(batch.tokens), model.embed.weight.device
    micro_size = num_rows // config.grad_accumulation
    counted = (batch.targets != IGNORED_TARGET).sum(dim=1)
    wide = torch.promote_types(model.embed.weight.dtype, torch.float32)
    measured = torch.zeros(3, dtype=wide, device=device)
    if micro_size < num_rows:
        hold_gradients(model)
    for start in range(0, num_rows, micro_size):
        rows = slice(start, start + micro_size)
        micro, ctx = on_device(model, batch.rows(rows.start, rows.stop), seeds[rows])
        # The micro-batch's share of all tokens with a loss: the sum then equals one large batch.
        share = int(counted[rows].sum()) / divisor
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
        norm = torch.linalg.vector_norm(output.h.detach().to(wide), dim=-1).mean()
        sums = (loss.detach().to(wide) * share, nats.to(wide) * share)
        measured += torch.stack((*sums, norm * (micro_size / num_rows)))
    if micro_size < num_rows:
        release_gradients(model)
    return measured


def _over_ranks(
    model: RecurrentDepthLM,
    measured: Float[Tensor, "N"],
    counts: tuple[int, int],
    same: tuple[Float[Tensor, ""], ...],
    ranks: Ranks,
    here: Here,
) -> list[float]:
    """The one small sum of a step over all ranks; the experts' loads are replaced by theirs.

    Args:
        model: The model, with its gradients.
        measured: This rank's part of sums over rows.
        counts: The same on the host.
        same: What is the same on every rank.
        ranks: This rank's place.
        here: Its clock, and whether it was asked to stop.

    Returns:
        The sums of ``measured`` and ``counts``, the first rank's seconds, the number of ranks that
        were asked to stop, the sum of the squared gradients, and ``same``.
    """
    exact, device = torch.float64, measured.device
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    loads = [layer.load.flatten() for layer in layers]
    by_row = torch.cat([measured.to(exact), *(load.to(exact) for load in loads)])
    on_host = torch.tensor(counts, dtype=exact, device=device)
    said = torch.tensor([here.seconds * ranks.first, here.signal > 0], dtype=exact, device=device)
    counted = torch.cat((on_host, by_row)) * ranks.counts_rows
    sums = ranks.sum(torch.cat((said, square_sum(model, ranks)[None], counted)))
    said, (squares, *_), on_host, by_row = sums.split((2, 1, 2, len(by_row)))
    summed, *loads = by_row.split([len(measured), *map(len, loads)])
    for layer, load in zip(layers, loads, strict=True):
        layer.load.copy_(load.view_as(layer.load))
    last = torch.stack([squares, *(number.to(exact) for number in same)])
    numbers: list[float] = torch.cat((summed, on_host, said, last)).tolist()
    return numbers


def state_seeds(
    seed: int, step: int, rows: Int[Tensor, "B"], documents: Int[Tensor, "B T"]
) -> Int[Tensor, "B T"]:
    """Seeds of initial states: one per run, step, row of the whole batch, and document."""
    low, high = derive(seed, step, (rows[:, None] << 32) | documents.clamp(min=0))
    return torch.as_tensor(((high & 0x7FFFFFFF) << 32) | low)


def _update(optimizers: list[torch.optim.Optimizer], factor: float, skips: bool) -> None:
    """Step the optimisers at ``factor`` times their base learning rates; clear the gradients.

    A step that is skipped leaves weights and momentum as they are.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        if not skips:
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
    """Detects a lost run: too many numbers that are not finite, or a loss that stays high.

    A step whose loss or gradient is not finite is to be skipped; after ``most_skips`` of them
    running the next one ends the run. A high loss is one above the first: of the plain
    cross-entropy, because a loss with an entropy bonus may be negative.
    """

    patience = 20
    factor = 1.5
    most_skips = 10

    def __init__(self, state: RunState) -> None:
        self.first_nats, self.bad_steps = state.first_nats, state.bad_steps
        self.skipped, self.skipped_running = state.skipped, state.skipped_running

    @property
    def skips(self) -> bool:
        """Whether the step that was checked last is to be skipped."""
        return self.skipped_running > 0

    @property
    def bad(self) -> bool:
        """Whether the run may be lost: its weights are not worth a checkpoint."""
        return self.skips or self.bad_steps > 0

    def state(self) -> dict[str, Any]:
        """The guard's fields of ``RunState``."""
        names = ("first_nats", "bad_steps", "skipped", "skipped_running")
        return {name: getattr(self, name) for name in names}

    def check(self, metrics: dict[str, float]) -> str | None:
        """The reason to stop, or None."""
        loss, grad_norm, nats = (metrics[k] for k in ("loss", "grad_norm", "nats_per_token"))
        if not all(map(math.isfinite, (loss, grad_norm, nats))):
            self.skipped, self.skipped_running = self.skipped + 1, self.skipped_running + 1
            if self.skipped_running <= self.most_skips:
                return None
            skips = f"after {self.most_skips} skipped steps"
            return f"the loss is {loss} and the gradient norm {grad_norm}, {skips},"
        self.skipped_running = 0
        if self.first_nats is None:
            self.first_nats = nats
        self.bad_steps = self.bad_steps + 1 if nats > self.factor * self.first_nats else 0
        if self.bad_steps >= self.patience:
            first = f"{self.factor} x its first value {self.first_nats:.2f}"
            return f"the loss is {nats:.2f}, above {first} for {self.patience} steps,"
        return None


@contextlib.contextmanager
def _interruptible(recorder: Recorder, here: Here) -> Iterator[None]:
    """Ctrl-C and SIGTERM request that the loop saves and ends; a second Ctrl-C ends at once.

    A second SIGTERM does not: a scheduler and the launcher under it each send one.
    """

    def request(signum: int, frame: object) -> None:
        if here.signal and signum == signal.SIGINT:
            raise KeyboardInterrupt
        here.signal = here.signal or signum
        recorder.note("saving after this step; Ctrl-C again stops at once")

    kept = {}
    with contextlib.suppress(ValueError):  # only the main thread can set handlers
        for signum in (signal.SIGINT, signal.SIGTERM):
            kept[signum] = signal.signal(signum, request)
    try:
        yield
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)
