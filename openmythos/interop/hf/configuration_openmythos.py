"""Configuration of an OpenMythos export: a looped (recurrent-depth) language model.

The parts of the model (``attention``, ``injection`` ...) are dictionaries with a ``kind``. The
names that inference engines read, ``num_hidden_layers`` above all, are derived from them.
"""

from typing import Any

from transformers import PreTrainedConfig

STAGES = ("prelude", "core", "coda")
COLUMNS = ("q_proj", "k_proj", "v_proj", "q_up_proj", "kv_up_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")
DEPTH_FIELDS = ("num_prelude_layers", "num_core_layers", "num_coda_layers", "num_loops")


def _tensor_parallel_plan() -> dict[str, str]:
    places = dict.fromkeys((*COLUMNS[:5], "o_proj"), "self_attn")
    plan = {}
    for stage in STAGES:
        for name in (*COLUMNS, *ROWS):
            style = "colwise" if name in COLUMNS else "rowwise"
            for place in (places[name],) if name in places else ("mlp", "mlp.shared_experts"):
                plan[f"{stage}.*.{place}.{name}"] = style
        plan[f"{stage}.*.mlp.experts.gate_up_proj"] = "packed_colwise"
        plan[f"{stage}.*.mlp.experts.down_proj"] = "rowwise"
        plan[f"{stage}.*.mlp.experts"] = "moe_tp_experts"
    return plan


Part = Any  # a dictionary with a kind, or None; no type of its own to check a file with


class OpenMythosConfig(PreTrainedConfig):
    """A prelude, a core that is looped ``num_loops`` times, a coda.

    ``num_hidden_layers`` counts attention slots, one a layer and loop, because every loop has keys
    and values of its own. It follows ``num_loops`` whenever that is set.

    ``state_seed`` chooses the noise of ``state_init`` kind "normal".
    """

    model_type = "openmythos"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)
    base_model_tp_plan = _tensor_parallel_plan()
    base_model_fsdp_plan = {  # noqa: RUF012
        **{f"{stage}.*": "free_full_weight" for stage in STAGES},
        "embed_tokens": "free_full_weight",
        "norm": "keep_full_weight",
    }

    vocab_size: int = 256
    hidden_size: int = 64
    num_prelude_layers: int = 1
    num_core_layers: int = 1
    num_coda_layers: int = 1
    num_loops: int = 4
    attention: Part = None
    feed_forward: Part = None
    core_feed_forward: Part = None
    max_position_embeddings: int = 2048
    rope: Part = None
    block: Part = None
    injection: Part = None
    state_init: Part = None
    loop_embedding: Part = None
    loop_adapter: Part = None
    halting: Part = None
    value_embedding: Part = None
    prelude_norm: bool = True
    loop_norm: bool = False
    readout: str = "none"
    final_norm: bool = True
    embed_scale: float = 1.0
    tie_word_embeddings: bool = True
    state_seed: int = 0
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in a small model's parts where none are given, and derive the engines' names."""
        heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
        self.attention = self.attention or {"kind": "gqa", **heads, "qk_norm": "none"}
        self.feed_forward = self.feed_forward or {"kind": "swiglu", "d_ff": 128}
        self.block = self.block or {"norm": "pre", "norm_eps": 1e-6, "layer_scale": None}
        self.injection = self.injection or {"kind": "add"}
        self.state_init = self.state_init or {"kind": "zeros"}
        part = self.attention
        self.num_attention_heads = part["num_heads"]
        self.num_key_value_heads = part.get("num_kv_heads", part["num_heads"])
        # MLA is cached expanded, keys and values padded to one width. Its latent's width stays out
        # of sight under ``attention``: engines that see it want another layout.
        key_dim = part.get("qk_nope_head_dim", 0) + part.get("qk_rope_head_dim", 0)
        self.head_dim = part.get("head_dim") or max(key_dim, part["v_head_dim"])
        self.rms_norm_eps = self.block["norm_eps"]
        experts = self.core_feed_forward or {}
        self.intermediate_size = self.feed_forward["d_ff"]
        self.num_experts = experts.get("num_experts", 0)
        self.num_experts_per_tok = experts.get("num_experts_per_token", 0)
        self.moe_intermediate_size = experts.get("d_expert", 0)
        self.norm_topk_prob = True
        self._derive_depth()
        for name in ("num_hidden_layers", *DERIVED_FIELDS):
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Overrides arrive after ``__post_init__``: keep the number of slots true to the depth."""
        super().__setattr__(name, value)
        if name in DEPTH_FIELDS:
            self._derive_depth()

    def _derive_depth(self) -> None:
        if all(name in self.__dict__ for name in DEPTH_FIELDS):  # not before the fields exist
            prelude, core, coda, loops = (self.__dict__[name] for name in DEPTH_FIELDS)
            super().__setattr__("num_hidden_layers", prelude + core * loops + coda)


DERIVED_FIELDS = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    "norm_topk_prob",
)

__all__ = ["OpenMythosConfig"]
