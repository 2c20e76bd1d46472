"""Plain (unlooped) models that match a looped one in parameters, in compute or in memory. No torch.

A looped model should be compared with all three: a plain model of equal parameters needs less
compute, and one of equal compute has more parameters.

Source: Saunshi et al. 2025 (arXiv 2502.17416), section 3, for the first two.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from openmythos.config import ModelConfig, ValueEmbeddingConfig, counts
from openmythos.config.schema import as_integer, require

Match = Literal["parameters", "flops", "memory"]
MATCHES: tuple[Match, ...] = ("parameters", "flops", "memory")
WIDTH_STEP = 8  # feed-forward widths are multiples of this
DTYPE_BYTES = 2  # bytes per weight and per cached number: bfloat16


@dataclass(frozen=True)
class Baseline:
    """A plain model and how well it matches.

    Args:
        config: The plain model's.
        match: The quantity that was matched.
        context_length: Tokens of context at which compute and memory were compared.
        target: The looped model's parameters, FLOPs per token, or bytes.
        value: The same quantity of the plain model.
    """

    config: ModelConfig
    match: Match
    context_length: int
    target: int
    value: int

    @property
    def deviation(self) -> float:
        """(value - target) / target."""
        return (self.value - self.target) / self.target


def baseline(config: ModelConfig, *, match: Match, context_length: int | None = None) -> Baseline:
    """The plain model that matches a looped one at its ``num_loops``.

    Kept: vocabulary, width, attention, kind of feed-forward and experts, norms, positions, the
    layers of prelude and coda, tied or untied head, and which of the core's layers have value
    embeddings (the core's pattern is repeated over the new layers, as if the loop were unrolled).

    Changed: the model runs once, without the parts that only a loop needs
    (``ModelConfig.unlooped``). The number of core layers is then chosen to match; the difference
    that whole layers leave is reduced through the width of the feed-forward (the core's, if it has
    its own; for MoE that of an expert), in steps of 8.

    Args:
        config: The looped model's.
        match: ``"parameters"``: all parameters. ``"flops"``: FLOPs to decode a token at
            ``context_length``. ``"memory"``: bytes of all weights and of the per-loop cache of one
            sequence of ``context_length``, in bfloat16.
        context_length: Tokens; default: the model's ``max_seq_len``.

    Raises:
        ValueError: An unknown ``match``, or a context length that the model does not allow.
    """
    require(match in MATCHES, "match", match, "one of " + ", ".join(map(repr, MATCHES)))
    length = config.max_seq_len if context_length is None else context_length
    length = as_integer("context_length", length, 1, config.max_seq_len)

    def size(candidate: ModelConfig) -> int:
        return _size(candidate, match, length)

    target = size(config)
    number = _nearest(lambda n: size(plain_model(config, n)), target)
    rough = plain_model(config, number)
    steps = _nearest(lambda n: size(_with_width(rough, WIDTH_STEP * n)), target)
    fine = _with_width(rough, WIDTH_STEP * steps)
    found = min(rough, fine, key=lambda candidate: abs(size(candidate) - target))
    return Baseline(found, match, length, target, size(found))


def _size(config: ModelConfig, match: Match, context_length: int) -> int:
    if match == "parameters":
        return counts.total_params(config)
    if match == "flops":
        return counts.forward_flops(config, context_length=context_length, cached=True)
    cache = counts.kv_bytes_per_token(config, dtype_bytes=DTYPE_BYTES) * context_length
    return counts.weight_bytes(config, DTYPE_BYTES) + cache


def plain_model(config: ModelConfig, num_core_layers: int) -> ModelConfig:
    """The unlooped model with another number of core layers."""
    return replace(
        config.unlooped(),
        num_core_layers=num_core_layers,
        value_embedding=_unrolled(config, num_core_layers),
    )


def _unrolled(config: ModelConfig, num_core_layers: int) -> ValueEmbeddingConfig | None:
    """The value embeddings' layers when the core's pattern is repeated over ``num_core_layers``."""
    table = config.value_embedding
    if table is None:
        return None
    start, old = config.num_prelude_layers, config.num_core_layers
    core = [start + i for i in range(num_core_layers) if start + i % old in table.layers]
    outside = [layer for layer in table.layers if layer < start]
    shift = num_core_layers - old
    outside += [layer + shift for layer in table.layers if layer >= start + old]
    layers = tuple(sorted({*outside, *core}))
    return replace(table, layers=layers) if layers else None


def _with_width(config: ModelConfig, width: int) -> ModelConfig:
    """The model with another width of the core's feed-forward, or of all if the core shares it."""
    core = config.core_feed_forward
    if core is None:
        return replace(config, feed_forward=config.feed_forward.with_width(width))
    return replace(config, core_feed_forward=core.with_width(width))


def _nearest(size: Callable[[int], int], target: int) -> int:
    """The number, at least 1, whose size is nearest to the target; sizes grow with the number."""
    high = 1
    while size(high) < target:
        high *= 2
    low = max(1, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if size(middle) < target else (low, middle)
    return min({max(1, low - 1), low}, key=lambda number: (abs(size(number) - target), number))
