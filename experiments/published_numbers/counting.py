"""Parameters, FLOPs and cache bytes of published configurations."""

from dataclasses import replace
from typing import Any

from openmythos.config import GQAConfig, MLAConfig, ModelConfig, counts, presets

CONTEXT = 2048  # tokens of Parcae's context


def counted(name: str) -> dict[str, Any]:
    """A preset's parameters, inference FLOPs per token, and cache bytes per token by layout."""
    config = presets.preset(name)
    loops = config.num_loops
    kept = counts.loops_kept_by_layout(loops)
    return {
        "parameters": counts.total_params(config),
        "weight_bytes": counts.weight_bytes(config),
        "loops": loops,
        "flops": counts.forward_flops(config, context_length=CONTEXT, cached=True),
        "kv_bytes": {
            layout: counts.kv_bytes_per_token(config, kept_loops=kept[layout])
            for layout in ("per_loop", "last_loop")
        },
    }


def cache_by_loops(name: str, loops: tuple[int, ...] = (1, 2, 4, 8, 16, 32)) -> dict[str, Any]:
    """Cache bytes per token by loops: as the preset is, and with its full keys and values."""
    config = presets.preset(name)
    plain = replace(config, attention=uncompressed(config))
    return {
        "own": {str(n): counts.kv_bytes_per_token(config, num_loops=n) for n in loops},
        "uncompressed": {str(n): counts.kv_bytes_per_token(plain, num_loops=n) for n in loops},
    }


def uncompressed(config: ModelConfig) -> GQAConfig:
    """The attention whose keys and values MLA compresses: every head keeps its own."""
    part = config.attention
    if not isinstance(part, MLAConfig):
        return replace(part, num_kv_heads=part.num_heads)
    width = part.qk_nope_head_dim + part.qk_rope_head_dim
    return GQAConfig(num_heads=part.num_heads, num_kv_heads=part.num_heads, head_dim=width)


def sequences(memory: float, model: dict[str, Any], layout: str, tokens: int) -> int:
    """Full contexts that fit beside the weights."""
    return int((memory - model["weight_bytes"]) // (tokens * model["kv_bytes"][layout]))


def equal_tokens(small: dict[str, Any], large: dict[str, Any], layout: str) -> float | None:
    """Tokens in the cache from which the smaller model needs more memory; None: never."""
    more = small["kv_bytes"][layout] - large["kv_bytes"]["per_loop"]
    return (large["weight_bytes"] - small["weight_bytes"]) / more if more > 0 else None
