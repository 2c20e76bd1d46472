"""The layout of a training: the quickest that fits, and two that were refused. No torch."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from openmythos.config import ModelConfig, counts
from openmythos.config.parallel import ParallelConfig
from openmythos.config.schema import as_integer
from openmythos.plan.memory import in_words
from openmythos.plan.serving import Machine
from openmythos.plan.training import Cost, Links, Work, cost_of


@dataclass(frozen=True)
class Refused:
    """A layout that was not chosen, and why."""

    cost: Cost
    reason: str


@dataclass(frozen=True)
class Plan:
    """The layout chosen for a model on a number of devices.

    Attributes:
        chosen: The quickest of those that fit, or the smallest if none does.
        fits: Whether it fits.
        refused: The two layouts that come nearest to it by being simpler or quicker.
    """

    chosen: Cost
    fits: bool
    refused: tuple[Refused, ...]


def plan_training(
    config: ModelConfig,
    devices: int,
    machine: Machine,
    work: Work,
    *,
    links: Links | None = None,
    fixed: dict[str, int | str | bool] | None = None,
) -> Plan:
    """Choose a layout.

    Args:
        config: The model's.
        devices: How many there are.
        machine: One of them.
        work: What each trains; whether loops are recomputed is chosen, too, unless ``fixed``.
        links: What one of them can send.
        fixed: Fields of the layout, and ``recompute``, that are given.

    Raises:
        ValueError: No layout has the given fields; says why.
    """
    as_integer("devices", devices, 1)
    links = Links() if links is None else links
    costs, errors = [], []
    parameters = 4 * counts.total_params(config)
    copies = max(1, int(devices * machine.usable_bytes // parameters))  # that devices can hold
    for layout, recompute in _layouts(config, devices, links.devices, copies, fixed or {}):
        try:
            each = replace(work, recompute=recompute)
            costs.append(cost_of(config, layout, each, machine, links))
        except ValueError as error:
            errors.append(error)
    if not costs:
        given = ", ".join(f"{name} {value}" for name, value in (fixed or {}).items())
        raise errors[0] if errors else ValueError(f"{devices} devices have no layout with {given}")
    fitting = [each for each in costs if each.num_bytes <= machine.usable_bytes]
    chosen = min(fitting, key=_order) if fitting else min(costs, key=lambda each: each.num_bytes)
    others = sorted((each for each in costs if each is not chosen), key=lambda c: _near(c, chosen))
    refused = tuple(Refused(each, _reason(each, chosen, machine)) for each in others[:2])
    return Plan(chosen, bool(fitting), refused)


def _layouts(
    config: ModelConfig,
    devices: int,
    per_machine: int,
    most_copies: int,
    fixed: dict[str, int | str | bool],
) -> Iterator[tuple[ParallelConfig, bool]]:
    """All layouts that are tried, the simplest first; what is given is tried alone."""
    experts = getattr(config.core_ff, "num_experts", 1)

    def numbers(name: str, whole: int, most: int) -> list[int]:
        tried = [fixed[name]] if name in fixed else range(1, most + 1)
        return [n for n in map(int, tried) if n > 0 and whole % n == 0]

    gathers: tuple[Literal["step", "loop"], ...] = ("step", "loop") if devices > 1 else ("step",)
    # Tensor parallel exchanges in every layer: only within a machine.
    for tp in numbers("tp", devices, per_machine):
        for copies in numbers("dp_replicate", devices // tp, min(devices, most_copies)):
            shard = devices // tp // copies
            for ep in numbers("ep", shard, experts):
                for gather, recompute in itertools.product(gathers, (False, True)):
                    layout = ParallelConfig(
                        dp_replicate=copies, dp_shard=shard, ep=ep, tp=tp, core_gather=gather
                    )
                    other = {"core_gather": gather, "recompute": recompute}
                    if all(fixed.get(name, value) == value for name, value in other.items()):
                        yield layout, recompute


def _order(cost: Cost) -> tuple[float, ...]:
    """The quickest first; of those that are as quick, the one with fewer divisions."""
    at, seconds = cost.layout, 1 / cost.tokens_per_second
    # To two digits: more is not known of it.
    rounded = round(seconds, 1 - math.floor(math.log10(seconds)))
    choices = (cost.work.recompute, at.core_gather == "loop", at.tp, at.ep, at.dp_replicate)
    return (rounded, *map(float, choices), float(cost.num_bytes))


def _near(cost: Cost, chosen: Cost) -> tuple[int, float]:
    """How many choices differ; first what needs one step, and of these the quickest."""
    names = ("dp_replicate", "tp", "ep", "core_gather")
    apart = sum(getattr(cost.layout, name) != getattr(chosen.layout, name) for name in names)
    return apart + (cost.work.recompute != chosen.work.recompute), -cost.tokens_per_second


def _reason(cost: Cost, chosen: Cost, machine: Machine) -> str:
    if cost.num_bytes > machine.usable_bytes:
        return (
            f"needs {in_words(cost.num_bytes)}, {in_words(cost.memory[cost.largest])} of them for "
            f"{cost.largest.replace('_', ' ')}"
        )
    longer = chosen.tokens_per_second / cost.tokens_per_second
    if longer > 1:
        by = f"{_per_token(cost)} per token instead of {_per_token(chosen)}"
        return f"takes {longer:.2f} times as long, bound by {cost.limit}: {by}"
    return "no quicker"


def _per_token(cost: Cost) -> str:
    """What one token of one device takes of what bounds the time."""
    tokens = cost.work.tokens * cost.work.accumulation / cost.layout.tp
    if cost.limit == "compute":
        return f"{cost.flops / tokens:.3g} FLOP"
    return f"{in_words(round(sum(each.sent for each in cost.exchanges) / tokens))} sent"
