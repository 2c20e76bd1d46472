"""Configuration of an OpenMythos export: a looped (recurrent-depth) language model.

The parts of the model (``attention``, ``injection`` ...) are dictionaries with a ``kind``. The
names that inference engines read, ``num_hidden_layers`` above all, are derived from them.
"""

from typing import Any

from transformers import PreTrainedConfig

STAGES = ("prelude", "core", "coda")
DEPTH_FIELDS = ("num_prelude_layers", "num_core_layers", "num_coda_layers", "num_loops")


Part = Any  # a dictionary with a kind, or None; no type of its own to check a file with


class OpenMythosConfig(PreTrainedConfig):
    """A prelude, a core that is looped ``num_loops`` times, a coda.

    ``num_hidden_layers`` counts attention slots, one a layer and loop, because every loop has keys
    and values of its own. It follows ``num_loops`` whenever that is set.

    ``state_seed`` chooses the noise of ``state_init`` kind "normal".
    """

    model_type = "openmythos"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)
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
        self.base_model_tp_plan = self._tensor_parallel_plan()  # transformers 5.19 adds to it
        self._derive_depth()
        for name in ("num_hidden_layers", *DERIVED_FIELDS):
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Overrides arrive after ``__post_init__``: keep the number of slots true to the depth."""
        super().__setattr__(name, value)
        if name in DEPTH_FIELDS:
            self._derive_depth()

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How each matrix that this kind of model has is split over ranks.

        What a loop adds to a projection and value embeddings are as wide as all heads, and one head
        of keys cannot be split: such attention is whole on every rank.
        """
        plan = {"embed_tokens": "embedding_rowwise"}
        part = self.attention
        adapted = self.loop_adapter is not None and self.loop_adapter["kind"] == "weight_lora"
        whole = adapted or self.value_embedding is not None or self.num_key_value_heads == 1
        attention = {"o_proj": "rowwise"}
        if part["kind"] == "gqa":
            attention |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise")
            if part["qk_norm"] == "weighted":  # each rank sees the norms of its own heads
                attention |= dict.fromkeys(("q_norm", "k_norm"), "replicated_with_grad_allreduce")
        else:
            attention |= dict.fromkeys(("q_up_proj", "kv_up_proj"), "colwise")
            attention["qkv_down_proj"] = "mla_kv_a_proj"
        for stage in self._stages():
            if not whole:
                plan |= {f"{stage}.*.self_attn.{name}": style for name, style in attention.items()}
            mlp = self._feed_forward_of(stage)
            place, columns = f"{stage}.*.mlp", ["gate_proj", "up_proj"]
            if mlp["kind"] == "moe":
                plan |= {
                    f"{place}.experts.gate_up_proj": "packed_colwise",
                    f"{place}.experts.down_proj": "rowwise",
                    f"{place}.experts": "moe_tp_experts",
                }
                if mlp["num_shared_experts"] == 0:
                    continue
                place += ".shared_experts"
            elif mlp["kind"] == "relu_squared":
                columns = ["up_proj"]
            if not (adapted and stage == "core"):
                plan |= {f"{place}.{name}": "colwise" for name in columns}
                plan[f"{place}.down_proj"] = "rowwise"
        return plan

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:
        """How routed experts are spread over ranks; None without any."""
        plan: dict[str, str] = {}
        for stage in self._stages():
            if self._feed_forward_of(stage)["kind"] == "moe":
                plan |= {
                    f"{stage}.*.mlp.experts.gate_up_proj": "grouped_gemm",
                    f"{stage}.*.mlp.experts.down_proj": "grouped_gemm",
                    f"{stage}.*.mlp.experts": "ep_dispatch_experts",
                }
        return plan or None

    def _stages(self) -> list[str]:
        return [stage for stage in STAGES if getattr(self, f"num_{stage}_layers")]

    def _feed_forward_of(self, stage: str) -> dict[str, Any]:
        core = self.core_feed_forward if stage == "core" else None
        return core or self.feed_forward

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
