"""Parameters, FLOPs, cache and memory of a model by its number of loops. No torch, no weights.

``parts`` lists everything that has weights; the sums are over it. ``parameter_shapes`` lists the
model's parameters by name.

Conventions:

- ``params`` are what ``sum(p.numel() for p in model.parameters())`` gives: a tied embedding counts
  once, buffers (the balancing bias of MoE) do not count.
- ``active_params`` are the parameters that one token uses, each counted once however often it is
  looped. Of the routed experts, ``num_experts_per_token`` count. Of a lookup table (untied
  embedding, value embedding, learned loop vectors, the loops of LoRA), one row counts. A tied
  embedding counts in full, because it is also the head.
- A FLOP is a multiplication or an addition: ``y = x W`` costs 2 per weight and token. Products with
  weights and attention's score and value products are counted, in every loop. Table lookups, norms,
  rotations, softmax, activations, residuals, the optimiser and recomputation in the backward pass
  are not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from openmythos.config import ModelConfig
from openmythos.config.schema import as_integer
from openmythos.config.weights import Shapes, Weights, matrix, table, vector, within

# Per product in the forward, the backward has two: the gradients of the input and of the weight.
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Part:
    """A named part of the model; ``looped`` parts are applied once per loop, the others once."""

    name: str
    weights: Weights
    looped: bool = False


@dataclass(frozen=True)
class Counts:
    """The figures of a model at one number of loops; see ``count``."""

    total_params: int
    active_params: int
    num_loops: int
    effective_depth: int
    inference_flops_per_token: int
    training_flops_per_token: int
    kv_bytes_per_token: int


# --- the walk -------------------------------------------------------------------------------------


def _walk(config: ModelConfig) -> Iterator[Part]:
    dim, tied = config.d_model, config.tie_embeddings
    core_start = config.num_prelude_layers
    coda_start = core_start + config.num_core_layers
    embedding, head = table(config.vocab_size, dim), matrix(dim, config.vocab_size)
    # If tied, the parameters are counted at the embedding, all as active, and the head adds only
    # the multiplications.
    yield Part("embedding", Weights(embedding.params, embedding.params) if tied else embedding)
    yield from _blocks(config, "prelude", range(core_start))
    yield Part("prelude_norm", vector(dim if config.prelude_norm else 0))
    yield Part("injection.drive", config.injection.drive_weights(dim))
    yield Part("injection.mix", config.injection.weights(dim), looped=True)
    if config.loop_embedding is not None:
        yield Part("loop_embedding", config.loop_embedding.weights(dim), looped=True)
    yield from _blocks(config, "core", range(core_start, coda_start))
    if config.loop_adapter is not None:
        yield Part("loop_adapter", config.loop_adapter.weights(dim), looped=True)
    yield Part("loop_norm", vector(dim if config.loop_norm else 0), looped=True)
    if config.halting is not None:
        yield Part("halting", config.halting.weights(dim), looped=True)
    yield Part("readout", matrix(dim, dim) if config.readout == "linear" else Weights())
    yield from _blocks(config, "coda", range(coda_start, config.num_layers))
    yield Part("final_norm", vector(dim if config.final_norm else 0))
    yield Part("head", Weights(macs=head.macs) if tied else head)


def _blocks(config: ModelConfig, stage: str, layers: range) -> Iterator[Part]:
    """The layers of one stage; ``layers`` are their global numbers."""
    looped, dim, lora = stage == "core", config.d_model, config.lora(stage)
    feed_forward = config.core_ff if looped else config.feed_forward
    each = {
        "attention": config.attention.weights(dim, lora),
        **feed_forward.weights(dim, lora),
        "norms": config.block.weights(dim),
    }
    for name, weights in each.items():
        yield Part(f"{stage}.{name}", weights * len(layers), looped)
    values = config.value_embedding
    if values is not None:
        _, value_shape = config.attention.cache_shapes
        num_tables = len(set(values.layers) & set(layers))
        weights = values.weights(config.vocab_size, *value_shape) * num_tables
        yield Part(f"{stage}.value_embedding", weights, looped)


def parameter_shapes(config: ModelConfig) -> Shapes:
    """The shape of every parameter, by the name that it has in the model."""
    dim, core_start = config.d_model, config.num_prelude_layers
    coda_start, halting = core_start + config.num_core_layers, config.halting
    shapes: Shapes = {"embed.weight": (config.vocab_size, dim)}
    shapes |= _block_shapes(config, "prelude", range(core_start))
    shapes |= within("injection", config.injection.shapes(dim))
    if config.loop_embedding is not None:
        shapes |= within("loop_embedding", config.loop_embedding.shapes(dim))
    shapes |= _block_shapes(config, "core", range(core_start, coda_start))
    if config.loop_adapter is not None:
        shapes |= within(config.loop_adapter.kind, config.loop_adapter.shapes(dim))
    shapes |= {} if halting is None else within("halting", halting.shapes(dim))
    shapes |= _block_shapes(config, "coda", range(coda_start, config.num_layers))
    for norm in ("prelude_norm", "loop_norm", "final_norm"):
        if getattr(config, norm):
            shapes[f"{norm}.weight"] = (dim,)
    if config.readout == "linear":
        shapes["readout.weight"] = (dim, dim)
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, dim)
    return shapes


def _block_shapes(config: ModelConfig, stage: str, layers: range) -> Shapes:
    """Those of one stage; ``layers`` are their global numbers."""
    dim, lora, values = config.d_model, config.lora(stage), config.value_embedding
    feed_forward = config.core_ff if stage == "core" else config.feed_forward
    block = {
        **within("attention", config.attention.shapes(dim, lora)),
        **within("feed_forward", feed_forward.shapes(dim, lora)),
        **config.block.shapes(dim),
    }
    shapes: Shapes = {}
    for index, layer in enumerate(layers):
        shapes |= within(f"{stage}.{index}", block)
        if values is not None and layer in values.layers:
            table_shapes = values.shapes(config.vocab_size, *config.attention.cache_shapes[1])
            shapes |= within(f"{stage}.{index}.attention", table_shapes)
    return shapes


# --- the sums -------------------------------------------------------------------------------------


def parts(config: ModelConfig) -> tuple[Part, ...]:
    """Every part that has weights, in the order of the forward."""
    return tuple(part for part in _walk(config) if part.weights != Weights())


def total_params(config: ModelConfig) -> int:
    """All parameters."""
    return sum(part.weights.params for part in parts(config))


def active_params(config: ModelConfig) -> int:
    """Parameters that one token uses, looped ones counted once (see the module's conventions)."""
    return sum(part.weights.active for part in parts(config))


def _loops(config: ModelConfig, num_loops: int | None) -> int:
    return config.num_loops if num_loops is None else as_integer("num_loops", num_loops, 0)


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
        context_length: Keys that a token attends to, itself included; those of depth attention are
            added to them. In a causal sequence of T tokens the average is (T + 1) / 2, but T for
            kernels that compute all T x T scores.
        cached: Count one token decoded after a KV cache, where MLA is absorbed.
    """
    loops = _loops(config, num_loops)
    macs = sum(part.weights.macs * (loops if part.looped else 1) for part in parts(config))
    keys = context_length * config.effective_depth(loops)
    keys += config.num_recent_loops * config.num_core_layers * loops  # masked ones as well
    return 2 * (macs + config.attention.macs_per_key(cached=cached) * keys)


def training_flops(
    config: ModelConfig,
    *,
    num_loops: int | None = None,
    grad_loops: int | None = None,
    context_length: int = 0,
) -> int:
    """FLOPs of a forward and backward, per token.

    Each part counts as 3 forwards; a loop without gradient counts as 1. A few small gradient
    products that need not be computed are counted too: those of the state before the first loop
    with gradient (in a linear injection, a ``universal_act`` head and depth attention).

    Args:
        config: The model's.
        num_loops: Default: the config's.
        grad_loops: Number of last loops with gradient (gradient truncation); None: all.
        context_length: As in ``forward_flops``.

    Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1, per loop; Parcae (arXiv 2604.12946),
        appendix D, C = (2 N_1 + 6 N_2) D.
    """
    loops = _loops(config, num_loops)
    with_grad = loops if grad_loops is None else min(grad_loops, loops)

    def forward(num: int) -> int:
        return forward_flops(config, num_loops=num, context_length=context_length)

    one_loop = forward(1) - forward(0)
    once = FORWARD_AND_BACKWARD * forward(0)
    # If e is added at every loop, one loop with gradient is enough to reach the prelude; otherwise
    # gradients reach it only through h_0, which takes all loops.
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
    """Bytes that the KV cache keeps for one token of one sequence.

    Args:
        config: The model's.
        num_loops: The most loops that may run; default: the config's.
        kept_loops: Loops of the core that the cache layout keeps (``loops_kept_by_layout``);
            default: all.
        dtype_bytes: Bytes per cached number; 2 is bfloat16.
    """
    loops = _loops(config, num_loops)
    slots = config.effective_depth(loops if kept_loops is None else kept_loops)
    return slots * dtype_bytes * sum(heads * dim for heads, dim in config.attention.cache_shapes)


def loops_kept_by_layout(num_loops: int) -> dict[str, int]:
    """Number of the core's loops that each cache layout keeps, by the layout's name."""
    return {
        "per_loop": num_loops,
        "every_2": -(-num_loops // 2),
        "every_4": -(-num_loops // 4),
        "last_loop": 1,
        "first_loop": 1,
    }


def weight_bytes(config: ModelConfig, dtype_bytes: int = 2) -> int:
    """Bytes of all parameters; 2 bytes per parameter is bfloat16."""
    return total_params(config) * dtype_bytes


def training_bytes(
    config: ModelConfig, *, param_bytes: int = 4, grad_bytes: int = 4, moment_bytes: int = 4
) -> int:
    """Bytes of parameters, gradients and Adam's two moments; activations are not counted.

    Args:
        config: The model's.
        param_bytes: Bytes per parameter in the copy that the optimiser updates.
        grad_bytes: Bytes per gradient.
        moment_bytes: Bytes per parameter in each moment.
    """
    return total_params(config) * (param_bytes + grad_bytes + 2 * moment_bytes)


def count(config: ModelConfig, *, num_loops: int | None = None, context_length: int = 0) -> Counts:
    """The figures of one report.

    Args:
        config: The model's.
        num_loops: Default: the config's.
        context_length: Tokens. Inference decodes the last of them with a KV cache; training uses
            causal sequences of this length, with gradients in all loops.
    """
    loops = _loops(config, num_loops)
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


def _encode_flops(config: ModelConfig, context_length: int) -> int:
    """FLOPs per token of a forward before the first loop."""
    before = [
        part for part in parts(config) if part.name.startswith(("prelude.", "injection.drive"))
    ]
    per_key = config.attention.macs_per_key(cached=False) * config.num_prelude_layers
    return 2 * (sum(part.weights.macs for part in before) + per_key * context_length)
