"""Whether a run fits into this machine's memory, said before its first step."""

from dataclasses import replace

import torch

from openmythos.config.parallel import ParallelConfig
from openmythos.plan.memory import DoesNotFitError, free_bytes, in_words
from openmythos.plan.training import Work, memory
from openmythos.train.recipe import RunConfig

MOST = 2000  # steps whose depths are drawn to find the deepest
TOLERANCE = 0.3  # of the estimate, against the measured peak
SAID = ("parameters", "gradients", "optimizer", "activations", "logits")


def needed(
    config: RunConfig,
    trained: int | None = None,
    *,
    recompute: bool | None = None,
    rows: int | None = None,
) -> dict[str, int]:
    """Bytes that a run holds in the deepest step that it draws, by what they hold.

    Args:
        config: The run's.
        trained: Parameters of its adapter; None: it trains the model.
        recompute: Whether loops run again in the backward pass; None: as the run does.
        rows: Rows of a micro-batch; None: those of the run.
    """
    train, depth = config.train, config.train.depth
    deepest = depth.deepest(
        seed=train.seed, steps=min(train.max_steps or MOST, MOST), batch_size=train.batch_size
    )
    plain = train.optimizer.muon_lr is None or trained is not None
    work = Work(
        context_length=config.data.seq_len,
        rows=rows or train.batch_size // (train.grad_accumulation * train.parallel.num_row_ranks),
        accumulation=train.grad_accumulation,
        optimizer="adamw" if plain else "muon",
        recompute=train.recompute if recompute is None else recompute,
        autocast=train.autocast != "none",
        grad_loops=depth.mean_backprop_depth,
        trained=trained,
        every_loop=train.objective.needs_states,
    )
    model = replace(config.model, num_loops=deepest)
    layout = train.parallel if train.parallel.num_ranks > 1 else ParallelConfig()
    return memory(model, layout, work)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free where the run computes; None if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_bytes() if device.type == "cpu" else None


def memory_in_words(
    config: RunConfig, device: torch.device, trained: int | None = None, held: int = 0
) -> str:
    """One line: what the deepest step takes, and what the machine has.

    Args:
        config: The run's.
        device: Where it computes.
        trained: Parameters of its adapter; None: it trains the model.
        held: Bytes of it that are allocated already: they are no longer free.

    Raises:
        DoesNotFitError: It takes more, whatever the estimate's error; says what takes less.
    """
    parts, free = needed(config, trained), free_memory(device)
    total = sum(parts.values())
    shown = ", ".join(f"{name} {in_words(parts[name])}" for name in SAID)
    said = f"memory: about {in_words(total)} in the deepest step ({shown})"
    if free is None:
        return said
    has = free + held
    said += f"; this machine has {in_words(has)}"
    if total <= has:
        return said
    said += f", which does not suffice: {_smaller(config, trained)}"
    if total * (1 - TOLERANCE) > has:
        raise DoesNotFitError(said)
    return f"{said} (the estimate may be {TOLERANCE:.0%} too high; the run begins)"


def _smaller(config: RunConfig, trained: int | None) -> str:
    """What takes less memory, each with its number."""
    train = config.train
    most = train.batch_size // train.parallel.num_row_ranks
    found = []

    def propose(said: str, recompute: bool | None, rows: int | None) -> None:
        parts = needed(config, trained, recompute=recompute, rows=rows)
        found.append(f"{said} {in_words(sum(parts.values()))}")

    if not train.recompute:
        propose("--set train.recompute=true takes", True, None)
    if train.grad_accumulation < most:
        propose(f"--set train.grad_accumulation={most} takes", None, 1)
    if len(found) == 2:
        propose("both take", True, 1)
    return ", ".join(found) or "shorten data.seq_len, or choose a smaller model"
