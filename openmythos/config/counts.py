"""Parameters, FLOPs, cache and memory of a model by its number of loops. No torch, no weights.

One walk, ``parts``, lists everything that has weights; all other functions are sums over it.

Conventions:

- ``params`` are what ``sum(p.numel() for p in model.parameters())`` gives: a tied embedding counts
  once, buffers (the balancing bias of MoE) do not count.
- ``active_params`` are what one token reads, each weight once however often it is looped: of the
  routed experts only ``num_experts_per_token``; of a table that is looked up (untied embedding,
  value embedding, learned loop vectors, LoRA's loops) one row; of a tied embedding all of it,
  because it is the head.
- A FLOP is a multiplication or an addition: ``y = x W`` costs 2 a weight and token. Counted are the
  products with weights and attention's score and value products, every loop of each. Not counted:
  looked-up tables, norms, rotations, softmax, activations, residuals, the optimiser, and what a
  kernel computes again in its backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from openmythos.config import (
    AddInjectionConfig,
    FeedForwardConfig,
    GateInjectionConfig,
    GQAConfig,
    LearnedLoopConfig,
    LinearInjectionConfig,
    LTIInjectionConfig,
    ModelConfig,
    MoEConfig,
    NoInjectionConfig,
    OriginalLTIInjectionConfig,
    OutputLoRAConfig,
    SwiGLUConfig,
    WeightLoRAConfig,
)

FORWARD_AND_BACKWARD = 3  # backward is two products a product: by the input and by the weight


@dataclass(frozen=True)
class Weights:
    """A sum of weights.

    Args:
        params: All of them.
        active: Those that one token reads.
        macs: Multiply-adds with them, for one token and one application.
    """

    params: int = 0
    active: int = 0
    macs: int = 0

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(
            self.params + other.params, self.active + other.active, self.macs + other.macs
        )

    def __mul__(self, times: int) -> "Weights":
        return Weights(self.params * times, self.active * times, self.macs * times)


@dataclass(frozen=True)
class Part:
    """A named part of the model; ``looped`` parts are applied once a loop, the others once."""

    name: str
    weights: Weights
    looped: bool = False


@dataclass(frozen=True)
class Counts:
    """What a report says of a model at one number of loops; see ``count``."""

    total_params: int
    active_params: int
    num_loops: int
    effective_depth: int
    inference_flops_per_token: int
    training_flops_per_token: int
    kv_bytes_per_token: int


# --- the pieces -----------------------------------------------------------------------------------


def _matrix(num_in: int, num_out: int) -> Weights:
    return Weights(num_in * num_out, num_in * num_out, num_in * num_out)


def _vector(size: int) -> Weights:
    return Weights(size, size)


def _table(rows: int, width: int) -> Weights:
    return Weights(rows * width, width)


def _linear(num_in: int, num_out: int, lora: WeightLoRAConfig | None) -> Weights:
    plain = _matrix(num_in, num_out)
    if lora is None:
        return plain
    row = lora.rank * (num_in + num_out)
    return plain + Weights(lora.num_loops * row, row, row)


def _swiglu(d_model: int, width: int, lora: WeightLoRAConfig | None) -> Weights:
    return _linear(d_model, 2 * width, lora) + _linear(width, d_model, lora)


def _gqa(config: ModelConfig, part: GQAConfig, lora: WeightLoRAConfig | None) -> Weights:
    dim, heads, kv_heads = config.d_model, part.num_heads, part.num_kv_heads
    result = _linear(dim, (heads + 2 * kv_heads) * part.head_dim, lora)
    result += _linear(heads * part.head_dim, dim, lora)
    if part.qk_bias:
        result += _vector((heads + kv_heads) * part.head_dim)
    if part.qk_norm == "weighted":
        result += _vector(2 * part.head_dim)
    return result


def _attention(config: ModelConfig, lora: WeightLoRAConfig | None) -> Weights:
    part, dim = config.attention, config.d_model
    if isinstance(part, GQAConfig):
        return _gqa(config, part, lora)
    key_width = part.qk_nope_head_dim + part.qk_rope_head_dim
    return (
        _linear(dim, part.q_lora_rank + part.kv_lora_rank + part.qk_rope_head_dim, lora)
        + _vector(part.q_lora_rank + part.kv_lora_rank)
        + _linear(part.q_lora_rank, part.num_heads * key_width, lora)
        # Whether it expands the latents or is absorbed, it costs the same a token.
        + _matrix(part.kv_lora_rank, part.num_heads * (part.qk_nope_head_dim + part.v_head_dim))
        + _linear(part.num_heads * part.v_head_dim, dim, lora)
    )


def _value_embedding(config: ModelConfig, layers: range) -> Weights:
    table, part = config.value_embedding, config.attention
    if table is None or not isinstance(part, GQAConfig):
        return Weights()
    one = _table(config.vocab_size, part.num_kv_heads * part.head_dim)
    one += _matrix(table.gate_channels, part.num_kv_heads)
    return one * len(set(table.layers) & set(layers))


def _feed_forward(
    d_model: int, part: FeedForwardConfig, lora: WeightLoRAConfig | None
) -> dict[str, Weights]:
    if isinstance(part, MoEConfig):
        expert = _swiglu(d_model, part.d_expert, None)
        active = expert * part.num_experts_per_token
        shared = part.num_shared_experts * part.shared_width
        return {
            "router": _matrix(d_model, part.num_experts),
            "routed_experts": Weights(expert.params * part.num_experts, active.active, active.macs),
            "shared_experts": _swiglu(d_model, shared, lora) if shared else Weights(),
        }
    if isinstance(part, SwiGLUConfig):
        return {"feed_forward": _swiglu(d_model, part.d_ff, lora)}
    up, down = _linear(d_model, part.d_ff, lora), _linear(part.d_ff, d_model, lora)
    return {"feed_forward": up + down}


def _blocks(config: ModelConfig, stage: str, layers: range) -> Iterator[Part]:
    """The layers of one stage; ``layers`` are their global numbers."""
    looped, dim, block = stage == "core", config.d_model, config.block
    adapter = config.loop_adapter
    lora = adapter if looped and isinstance(adapter, WeightLoRAConfig) else None
    num_vectors = (2 if block.norm == "pre" else 4) + (0 if block.layer_scale is None else 2)
    each = {
        "attention": _attention(config, lora),
        **_feed_forward(dim, config.core_ff if looped else config.feed_forward, lora),
        "norms": _vector(num_vectors * dim),
    }
    for name, weights in each.items():
        yield Part(f"{stage}.{name}", weights * len(layers), looped)
    yield Part(f"{stage}.value_embedding", _value_embedding(config, layers), looped)


def _injection(config: ModelConfig) -> tuple[Weights, Weights]:
    """What runs once a forward (``drive``) and what runs every loop (``mix`` and ``update``)."""
    part, dim = config.injection, config.d_model
    if isinstance(part, LTIInjectionConfig):
        return _matrix(dim, dim), _vector(2 * dim)
    if isinstance(part, OriginalLTIInjectionConfig):
        return Weights(), _vector(3 * dim + 1)
    if isinstance(part, LinearInjectionConfig):
        return _matrix(dim, dim), _matrix(dim, dim)
    if isinstance(part, GateInjectionConfig):
        return Weights(), _matrix(2 * dim, dim) + _vector(dim)
    assert isinstance(part, AddInjectionConfig | NoInjectionConfig)
    return Weights(), Weights()


def _walk(config: ModelConfig) -> Iterator[Part]:
    dim, loop, adapter = config.d_model, config.loop_embedding, config.loop_adapter
    core_start = config.num_prelude_layers
    coda_start = core_start + config.num_core_layers
    table, head = _table(config.vocab_size, dim), _matrix(dim, config.vocab_size)
    # Tied: the weights belong to the embedding, all of them are read, the head multiplies by them.
    tied = config.tie_embeddings
    yield Part("embedding", Weights(table.params, table.params) if tied else table)
    yield from _blocks(config, "prelude", range(core_start))
    yield Part("prelude_norm", _vector(dim if config.prelude_norm else 0))
    drive, mix = _injection(config)
    yield Part("injection.drive", drive)
    yield Part("injection.mix", mix, looped=True)
    if isinstance(loop, LearnedLoopConfig):
        yield Part("loop_embedding", _table(loop.num_loops, dim), looped=True)
    yield from _blocks(config, "core", range(core_start, coda_start))
    if isinstance(adapter, OutputLoRAConfig):
        pair = _matrix(dim, adapter.rank) * 2
        yield Part("loop_adapter", pair + _table(adapter.num_loops, adapter.rank), looped=True)
    yield Part("loop_norm", _vector(dim if config.loop_norm else 0), looped=True)
    if config.halting is not None:
        yield Part("halting", _matrix(dim, 1) + _vector(1), looped=True)
    yield Part("readout", _matrix(dim, dim) if config.readout == "linear" else Weights())
    yield from _blocks(config, "coda", range(coda_start, config.num_layers))
    yield Part("final_norm", _vector(dim if config.final_norm else 0))
    yield Part("head", Weights(macs=head.macs) if tied else head)


# --- the sums -------------------------------------------------------------------------------------


def parts(config: ModelConfig) -> tuple[Part, ...]:
    """Everything that has weights, in the order in which a token meets it."""
    return tuple(part for part in _walk(config) if part.weights != Weights())


def total_params(config: ModelConfig) -> int:
    """All parameters."""
    return sum(part.weights.params for part in parts(config))


def active_params(config: ModelConfig) -> int:
    """Parameters that one token reads, the loop's counted once (see the module's conventions)."""
    return sum(part.weights.active for part in parts(config))


def forward_flops(
    config: ModelConfig,
    *,
    num_loops: int | None = None,
    context_length: int = 0,
    cached: bool = False,
) -> int:
    """FLOPs of a forward, per token.

    Args:
        config: The model's.
        num_loops: Default: the config's.
        context_length: Keys that a token attends to, itself included; those of depth attention come
            on top. A causal sequence of T tokens attends to (T + 1) / 2 on average, while kernels
            that compute the whole square take T.
        cached: One token decoded after a cache, where MLA attends to the latents themselves.
    """
    loops = config.num_loops if num_loops is None else num_loops
    macs = sum(part.weights.macs * (loops if part.looped else 1) for part in parts(config))
    keys = context_length * config.effective_depth(loops)
    keys += config.num_recent_loops * config.num_core_layers * loops  # hidden ones as well
    return 2 * (macs + _attention_macs_per_key(config, cached) * keys)


def training_flops(
    config: ModelConfig,
    *,
    num_loops: int | None = None,
    grad_loops: int | None = None,
    context_length: int = 0,
) -> int:
    """FLOPs of a forward and backward, per token: 3 forwards, 1 for a loop without gradient.

    Small products are counted though nothing needs their gradient. Before the first loop with
    gradient: a linear injection's and a ``universal_act`` head's by the state, depth attention's by
    earlier loops. At the last loop: a geometric halting head's.

    Args:
        config: The model's.
        num_loops: Default: the config's.
        grad_loops: Loops with gradient, at the end (truncated back-propagation); None: all.
        context_length: As in ``forward_flops``.

    Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1, per loop; Parcae (arXiv 2604.12946),
        appendix D, C = (2 N_1 + 6 N_2) D.
    """
    loops = config.num_loops if num_loops is None else num_loops
    with_grad = loops if grad_loops is None else min(grad_loops, loops)

    def forward(num: int) -> int:
        return forward_flops(config, num_loops=num, context_length=context_length)

    one_loop = forward(1) - forward(0)
    once = FORWARD_AND_BACKWARD * forward(0)
    # Gradients reach the prelude through e at every loop, or else through h_0 and all loops.
    loops_to_reach = 1 if config.adds_e else loops
    if with_grad < loops_to_reach:
        once -= (FORWARD_AND_BACKWARD - 1) * _encode_flops(config, context_length)
    return once + one_loop * (loops - with_grad + FORWARD_AND_BACKWARD * with_grad)


def kv_bytes_per_token(
    config: ModelConfig,
    *,
    num_loops: int | None = None,
    kept_loops: int | None = None,
    dtype_bytes: int = 2,
) -> int:
    """Bytes that the cache keeps for one token of one sequence.

    Args:
        config: The model's.
        num_loops: Deepest loop that may run; default: the config's.
        kept_loops: Loops of the core that the cache layout keeps (``loops_kept_by_layout``);
            default: all.
        dtype_bytes: Of one cached number; 2 is bfloat16.
    """
    loops = config.num_loops if num_loops is None else num_loops
    slots = config.effective_depth(loops if kept_loops is None else kept_loops)
    return slots * dtype_bytes * sum(heads * dim for heads, dim in config.attention.cache_shapes)


def loops_kept_by_layout(num_loops: int) -> dict[str, int]:
    """Loops of the core that each cache layout keeps, by layout."""
    return {
        "per_loop": num_loops,
        "every_2": -(-num_loops // 2),
        "every_4": -(-num_loops // 4),
        "last_loop": 1,
        "first_loop": 1,
    }


def weight_bytes(config: ModelConfig, dtype_bytes: int = 2) -> int:
    """Bytes of all parameters; 2 a number is bfloat16."""
    return total_params(config) * dtype_bytes


def training_bytes(
    config: ModelConfig, *, param_bytes: int = 4, grad_bytes: int = 4, moment_bytes: int = 4
) -> int:
    """Bytes of parameters, gradients and Adam's two moments; activations are not counted.

    Args:
        config: The model's.
        param_bytes: Of one parameter, as the optimiser updates it.
        grad_bytes: Of one gradient.
        moment_bytes: Of one moment.
    """
    return total_params(config) * (param_bytes + grad_bytes + 2 * moment_bytes)


def count(config: ModelConfig, *, num_loops: int | None = None, context_length: int = 0) -> Counts:
    """The figures of one report.

    Args:
        config: The model's.
        num_loops: Default: the config's.
        context_length: Tokens. Inference decodes the last of them after a cache; training is on
            causal sequences of this length, all loops with gradient.
    """
    loops = config.num_loops if num_loops is None else num_loops
    return Counts(
        total_params=total_params(config),
        active_params=active_params(config),
        num_loops=loops,
        effective_depth=config.effective_depth(loops),
        inference_flops_per_token=forward_flops(
            config, num_loops=loops, context_length=context_length, cached=True
        ),
        training_flops_per_token=training_flops(
            config, num_loops=loops, context_length=(context_length + 1) // 2
        ),
        kv_bytes_per_token=kv_bytes_per_token(config, num_loops=loops),
    )


def _attention_macs_per_key(config: ModelConfig, cached: bool) -> int:
    part = config.attention
    if isinstance(part, GQAConfig):
        return part.num_heads * 2 * part.head_dim
    if cached:
        # The cached rows serve as keys and, whole, as values: a slice would have to be copied.
        return 2 * part.num_heads * (part.kv_lora_rank + part.qk_rope_head_dim)
    return part.num_heads * (part.qk_nope_head_dim + part.qk_rope_head_dim + part.v_head_dim)


def _encode_flops(config: ModelConfig, context_length: int) -> int:
    """What of a forward comes before the first loop."""
    before = [
        part for part in parts(config) if part.name.startswith(("prelude.", "injection.drive"))
    ]
    per_key = _attention_macs_per_key(config, cached=False) * config.num_prelude_layers
    return 2 * (sum(part.weights.macs for part in before) + per_key * context_length)
