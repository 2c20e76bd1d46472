"""What training a looped model needs on each device: memory, exchanges, FLOPs, time. No torch.

Per device, in bytes, with ``train.autocast=bfloat16``: parameters, gradients, moments and states in
float32, products in bfloat16.

- What is sharded (parameters, gradients, moments) is held in equal cuts; see ``plan.placement``.
- The core's weights are gathered once per step and kept, or again in every loop of the forward and
  of the backward pass (``core_gather``). A looped core keeps the whole gradients of all its layers
  in either case: none is complete before the first loop's backward.
- Embedding and head are gathered once per micro-batch, for the time that they are used.
- What is left outside the blocks is gathered in float32 and kept, gradients as well.
- A unit's gradients are reduced through one float32 buffer. With accumulation they are added up in
  float32 before, those of every unit.
- Activations are those of uncompiled blocks. With ``recompute`` the forward keeps the states
  between loops and the activations of one loop at a time.

Of exchanges, bytes are those of the gathered or not yet reduced tensor, the number is per device.
Seconds are bytes and FLOPs over what the machine could do at best.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from openmythos.config import ModelConfig, counts
from openmythos.config.parallel import ParallelConfig
from openmythos.config.schema import as_integer, as_number, require, require_literals
from openmythos.plan.placement import (
    TABLES,
    Unit,
    check_layout,
    in_block,
    place,
    tensor_dim,
    units,
)
from openmythos.plan.serving import Machine

LOGIT_BYTES = 4  # of one logit: itself and its gradient in bfloat16
LOSS_BYTES = 12  # of one logit in the loss: float32, its logarithm, its gradient
LOSS_CHUNK = 2**26  # logits whose loss is computed at once; as in ops/cross_entropy.py
UNMUON = (
    "router.weight",
    "value_gate.weight",
    "value_table.weight",
    "lora_down",
    "lora_up",
    "qk_bias",
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one device trains in a step.

    Attributes:
        context_length: Tokens of a row.
        rows: Rows at once, on the ranks that share them by ``tp``.
        accumulation: Micro-batches of a step.
        optimizer: muon: Muon for the blocks' matrices and AdamW for all else. adamw: AdamW alone.
        recompute: Whether the backward pass runs every loop again (``train.recompute``).
        autocast: Whether products are in bfloat16 (``train.autocast``); else all is in float32.
        grad_loops: Last loops with gradients; None: all.
        trained: Parameters that are trained, those of an adapter; None: all of the model.
        every_loop: Whether the loss reads every loop, so that the logits of each are kept.
    """

    context_length: int
    rows: int = 1
    accumulation: int = 1
    optimizer: Literal["muon", "adamw"] = "muon"
    recompute: bool = False
    autocast: bool = True
    grad_loops: int | None = None
    trained: int | None = None
    every_loop: bool = False

    def __post_init__(self) -> None:
        for name in ("context_length", "rows", "accumulation"):
            as_integer(name, getattr(self, name), 1)
        if self.grad_loops is not None:
            as_integer("grad_loops", self.grad_loops, 1)
        require_literals(self)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.context_length * self.rows


# --- memory ---------------------------------------------------------------------------------------


def memory(config: ModelConfig, layout: ParallelConfig, work: Work) -> dict[str, int]:
    """Bytes of the fullest device, by what they hold, at the fuller of two moments.

    At the loss there are logits, and the head with its gradient; in the loops' backward passes the
    whole gradients of the core.
    """
    moments = (_memory(config, layout, work, at_loss=each) for each in (False, True))
    return max(moments, key=lambda found: sum(found.values()))


def core_gradients(config: ModelConfig, layout: ParallelConfig, work: Work) -> int:
    """Bytes of the whole gradients of a looped core, which stay until its first loop's backward."""
    found = _memory(config, layout, work, at_loss=False)
    return found["core_gradients"]


def _memory(
    config: ModelConfig, layout: ParallelConfig, work: Work, *, at_loss: bool
) -> dict[str, int]:
    held = place(config, layout)
    every, alone = units(config, layout), layout.num_ranks == 1
    size = {unit.name: unit.gathered * unit.weight_bytes for unit in every}
    core = [size[unit.name] for unit in every if unit.in_core]
    once = [size[u.name] for u in every if not (u.in_core or _is_kept(u) or u.name in TABLES)]
    # One block computes, the next one is on its way. Alone, autocast casts the weights instead, and
    # keeps them for every use that has a backward.
    weights = sum(sorted(core)[-2:] if layout.core_gather == "loop" else core)
    weights *= _grad_loops(config, work) if alone and not work.recompute else 1
    weights *= not (alone and not work.autocast)
    stored, adapter = sum(each.stored for each in held), work.trained
    moments = sum(4 * each.stored * _moments(each.name, each.shape, work) for each in held)
    found = {
        "parameters": 4 * (stored + (adapter or 0)),
        "gradients": 4 * (stored if adapter is None else adapter),
        "optimizer": moments if adapter is None else 8 * adapter,
        "core_weights": weights,
        "core_gradients": 0,
        "other_weights": (sum(sorted(once)[-2:]) + _cast_bytes(config, alone)) * work.autocast,
        "other_gradients": 0,
        "reduce_buffer": 0,
        "activations": activation_bytes(config, layout, work),
        "logits": _logit_bytes(config, work, at_loss),
    }
    if alone:
        return found
    kept = sum(size[unit.name] for unit in every if _is_kept(unit))
    head = size["embed" if config.tie_embeddings else "head"]
    buffers = {unit.name: 4 * sum(each.gathered for each in unit.held) for unit in every}
    used = [u.name for u in every if not u.wide and (u.name not in TABLES or at_loss)]
    found["core_gradients"] = 0 if at_loss else sum(core)
    found["other_weights"] += kept + at_loss * head
    # The gradient of a tied table is whole when its first use has one, too.
    found["other_gradients"] = kept + (at_loss or config.tie_embeddings) * head
    found["reduce_buffer"] = max(buffers[name] for name in used)
    if work.accumulation > 1:
        for unit in every:
            where = "core_gradients" if unit.in_core else "other_gradients"
            found[where] += 0 if unit.wide else 4 * unit.gathered
    return found


def _moments(name: str, shape: tuple[int, ...], work: Work) -> int:
    """Numbers that the optimiser keeps per parameter."""
    matrix = in_block(name) and len(shape) > 1 and not name.endswith(UNMUON)
    return 1 if work.optimizer == "muon" and matrix else 2


def _is_kept(unit: Unit) -> bool:
    """Whether a unit outside the core is gathered once per step."""
    return unit.wide and not unit.in_core


def _learns(unit: Unit, config: ModelConfig) -> bool:
    """Whether the last loop's loss has a gradient for a unit; a gate beside the states has none."""
    halting = config.halting
    return unit.name != "halting.proj" or (halting is not None and halting.mixes_states)


def _cast_bytes(config: ModelConfig, alone: bool) -> int:
    """The matrices outside the blocks, which autocast casts to bfloat16 and keeps.

    Over ranks, embedding and head are in bfloat16 already.
    """
    shapes = counts.parameter_shapes(config)
    cast_table = "embed" if config.tie_embeddings else "head"
    skipped = {*TABLES} - ({cast_table} if alone else set())
    cast = (
        math.prod(shape)
        for name, shape in shapes.items()
        if not in_block(name) and len(shape) == 2 and name.partition(".")[0] not in skipped
    )
    return 2 * sum(cast)


def activation_bytes(config: ModelConfig, layout: ParallelConfig, work: Work) -> int:
    """Bytes that the forward keeps for the backward pass, up to the last state."""

    def of_block(stage: str) -> int:
        part = config.core_ff if stage == "core" else config.feed_forward
        dim = config.d_model
        norms, products = config.block.kept_bytes(dim), config.attention.kept_bytes(layout.tp)
        products += part.kept_bytes(dim, layout.tp, layout.ep)
        # Of a norm's three numbers in six bytes, one is a product's input.
        return norms + products if work.autocast else norms * 4 // 3 + 2 * products

    dim, loops = config.d_model, _grad_loops(config, work)
    state = (6 if config.loop_norm else 4) * dim
    one_loop = config.num_core_layers * of_block("core")
    kept = loops * state
    kept += one_loop * (1 if work.recompute else loops)
    for stage, layers in (("prelude", config.num_prelude_layers), ("coda", config.num_coda_layers)):
        kept += layers * of_block(stage)
    return work.tokens * kept


def _grad_loops(config: ModelConfig, work: Work) -> int:
    """Loops of which something is kept for the backward pass."""
    loops = config.num_loops
    return loops if work.grad_loops is None else min(loops, work.grad_loops)


def _logit_bytes(config: ModelConfig, work: Work, at_loss: bool) -> int:
    number = work.tokens * config.vocab_size
    one = LOGIT_BYTES if work.autocast else 2 * LOGIT_BYTES
    others = _grad_loops(config, work) - 1 if work.every_loop else 0
    if not at_loss:  # their gradient is gone
        return one // 2 * number * (1 + others)
    return one * number + one // 2 * number * others + LOSS_BYTES * min(number, LOSS_CHUNK)


# --- exchanges ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """Exchanges of one kind in a step: how many, and their bytes on one device.

    Attributes:
        kind: What torch calls it.
        what: What is exchanged.
        number: How many there are.
        num_bytes: Of all of them, of the whole tensor.
        ranks: How many devices take part in each.
        span: Consecutive ranks among which these are.
    """

    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
    what: str
    number: int
    num_bytes: int
    ranks: int
    span: int

    @property
    def sent(self) -> float:
        """Bytes that leave a device."""
        share = (self.ranks - 1) / self.ranks
        return self.num_bytes * share * (2 if self.kind == "all_reduce" else 1)


@dataclass(frozen=True, kw_only=True)
class Links:
    """What a device can send.

    Attributes:
        inside: Bytes per second to devices of the same machine.
        between: Bytes per second to those of others.
        devices: Devices of a machine.
    """

    inside: float = 450e9
    between: float = 50e9
    devices: int = 8

    def __post_init__(self) -> None:
        for name in ("inside", "between"):
            number = as_number(name, getattr(self, name), "a number")
            require(number > 0, name, number, "above 0")
        as_integer("devices", self.devices, 1)

    def seconds(self, exchange: Exchange) -> float:
        """The least time of an exchange."""
        inside = exchange.span <= self.devices
        return exchange.sent / (self.inside if inside else self.between)


def exchanges(config: ModelConfig, layout: ParallelConfig, work: Work) -> tuple[Exchange, ...]:
    """The exchanges of a step with the last loop's loss, without the numbers that are logged."""
    found = [*_sharding(config, layout, work), *_experts(config, layout, work)]
    return tuple(each for each in [*found, *_tensor(config, layout, work)] if each.ranks > 1)


def _passes(config: ModelConfig, work: Work) -> tuple[int, int]:
    """How often a micro-batch runs the core forward, and backward."""
    grads = _grad_loops(config, work)
    return config.num_loops + (grads if work.recompute else 0), grads


def gathers(unit: Unit, config: ModelConfig, layout: ParallelConfig, work: Work) -> int:
    """How often a unit is gathered in a micro-batch."""
    if not unit.in_core:
        return 1 if _is_kept(unit) or unit.name in TABLES else 2
    # What runs again in the backward pass keeps what it has gathered for that.
    return 1 if layout.core_gather == "step" else config.num_loops + _grad_loops(config, work)


def _sharding(config: ModelConfig, layout: ParallelConfig, work: Work) -> Iterator[Exchange]:
    """FSDP's exchanges, by what is gathered."""
    for what, mine in (("core", True), ("other", False)):
        by_ranks: dict[int, list[int]] = {}
        for unit in units(config, layout):
            for group in unit.groups if unit.in_core is mine else ():
                times = gathers(unit, config, layout, work)
                kept = _is_kept(unit) or (mine and layout.core_gather == "step")
                times *= 1 if kept else work.accumulation
                size = sum(each.gathered for each in group)
                row = by_ranks.setdefault(group[0].ranks, [0, 0, 0, 0, 0])
                learns = int(_learns(unit, config))
                reduced = [1, 4 * size, 4 * sum(each.stored for each in group)]
                add = [times, times * size * unit.weight_bytes, *(learns * n for n in reduced)]
                row[:] = [a + b for a, b in zip(row, add, strict=True)]
        for ranks, (number, size, units_, total, stored) in by_ranks.items():
            span = layout.dp_shard * layout.tp
            yield Exchange("all_gather", f"{what} weights", number, size, ranks, span)
            yield Exchange("reduce_scatter", f"{what} gradients", units_, total, ranks, span)
            copies, all_ranks = layout.dp_replicate, layout.num_ranks
            yield Exchange("all_reduce", f"{what} gradients", units_, stored, copies, all_ranks)


def _experts(config: ModelConfig, layout: ParallelConfig, work: Work) -> Iterator[Exchange]:
    """Pairs that travel to the owners of their experts and back, if all experts get as many."""
    chosen = getattr(config.core_ff, "num_experts_per_token", None)
    if chosen is None or layout.ep == 1:
        return
    forward, backward = _passes(config, work)
    layers = config.num_core_layers * work.accumulation
    size = 2 * work.tokens * chosen * config.d_model // layout.tp
    there = 2 * layers * (forward + backward)
    span = layout.ep * layout.tp
    yield Exchange("all_to_all", "tokens to experts and back", there, there * size, layout.ep, span)
    numbers = layers * forward
    experts = 8 * config.core_ff.num_experts  # type: ignore[union-attr]
    yield Exchange("all_to_all", "their numbers", numbers, numbers * experts, layout.ep, span)


def _tensor(config: ModelConfig, layout: ParallelConfig, work: Work) -> Iterator[Exchange]:
    """Sums over the ranks that share a layer: of its outputs, and of its inputs' gradients."""
    if layout.tp == 1:
        return
    forward, backward = _passes(config, work)
    number = size = 0
    for name, shape in counts.parameter_shapes(config).items():
        divided, in_core = tensor_dim(name), name.startswith("core.")
        if divided == 1 and name.endswith(("out.weight", "down.weight")):
            times, width = forward if in_core else 1, 2 * config.d_model
        elif divided == 0 and name.endswith(("qkv.weight", "up.weight", "value_gate.weight")):
            times, width = backward if in_core else 1, _input_bytes(config, name, shape[1])
        else:
            continue
        number, size = number + times, size + times * width
    chosen = getattr(config.core_ff, "num_experts_per_token", 0)
    if chosen and layout.ep > 1:  # each rank sends its share of the tokens
        dim = config.d_model
        number += config.num_core_layers * (forward + 2 * backward)
        size += config.num_core_layers * (2 * dim * forward + 4 * (dim + chosen) * backward)
    if work.recompute and _ends_with_a_sum(config):  # nothing needs a loop's last sum again
        again = _grad_loops(config, work)
        number, size = number - again, size - again * 2 * config.d_model
    number, size = number * work.accumulation, size * work.accumulation * work.tokens
    yield Exchange("all_reduce", "states and gradients", number, size, layout.tp, layout.tp)


def _input_bytes(config: ModelConfig, name: str, width: int) -> int:
    """Bytes per token of a first layer's input, whose gradient is summed."""
    if name.endswith("kv_up.weight"):  # MLA's latents come with the rotary key
        width += config.attention.rope_dim
    return (2 if name.endswith(("q_up.weight", "kv_up.weight")) else 4) * width  # or the state


def _ends_with_a_sum(config: ModelConfig) -> bool:
    """Whether no product of a loop comes after the sum of its last layer's outputs."""
    plain = config.loop_adapter is None and config.halting is None and not config.loop_norm
    return plain and config.block.norm == "pre" and not config.injection.has_update


# --- time -----------------------------------------------------------------------------------------


def step_flops(config: ModelConfig, layout: ParallelConfig, work: Work) -> int:
    """FLOPs of a step on one device, what is run again included."""
    keys = (work.context_length + 1) // 2
    flops = counts.training_flops(config, grad_loops=work.grad_loops, context_length=keys)
    if work.recompute:
        whole, none = (
            counts.forward_flops(config, num_loops=n, context_length=keys)
            for n in (_grad_loops(config, work), 0)
        )
        flops += whole - none
    return flops * work.tokens * work.accumulation // layout.tp


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one layout costs.

    Attributes:
        layout: How the ranks are laid out.
        work: What each trains.
        memory: Bytes by what they hold, at the fuller moment.
        core_gradients: Bytes of the core's whole gradients, at the other one if they are not there.
        exchanges: Those of a step.
        flops: FLOPs of a step on one device.
        compute_seconds: The least time for these.
        exchange_seconds: The least time for the exchanges.
    """

    layout: ParallelConfig
    work: Work
    memory: dict[str, int]
    core_gradients: int
    exchanges: tuple[Exchange, ...]
    flops: int
    compute_seconds: float
    exchange_seconds: float

    @property
    def num_bytes(self) -> int:
        """All memory of a device."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """The least time of a step, if exchanges do not wait for products or products for them."""
        return max(self.compute_seconds, self.exchange_seconds)

    @property
    def tokens(self) -> int:
        """Tokens of a step, of all devices."""
        return self.work.tokens * self.work.accumulation * self.layout.num_row_ranks

    @property
    def tokens_per_second(self) -> float:
        """The most tokens per second, of all devices."""
        return self.tokens / self.seconds

    @property
    def limit(self) -> str:
        """What bounds the time of a step."""
        return "compute" if self.compute_seconds >= self.exchange_seconds else "exchange"

    @property
    def largest(self) -> str:
        """What most of the memory holds."""
        return max(self.memory, key=lambda name: self.memory[name])

    @property
    def in_words(self) -> str:
        """The layout in words."""
        at = self.layout
        copies = f"{at.dp_replicate} copies, " if at.dp_replicate > 1 else ""
        again = ", loops recomputed" if self.work.recompute else ""
        return (
            f"{copies}dp_shard {at.dp_shard}, ep {at.ep}, tp {at.tp}, "
            f"core gathered per {at.core_gather}{again}"
        )


def cost_of(
    config: ModelConfig,
    layout: ParallelConfig,
    work: Work,
    machine: Machine,
    links: Links,
) -> Cost:
    """What one layout costs on one device.

    Raises:
        ValueError: The model cannot be laid out so.
    """
    check_layout(config, layout)
    found, flops = exchanges(config, layout, work), step_flops(config, layout, work)
    return Cost(
        layout=layout,
        work=work,
        memory=memory(config, layout, work),
        core_gradients=core_gradients(config, layout, work),
        exchanges=found,
        flops=flops,
        compute_seconds=flops / machine.flops_per_second,
        exchange_seconds=math.fsum(map(links.seconds, found)),
    )
