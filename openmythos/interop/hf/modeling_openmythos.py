"""An OpenMythos export for transformers: prelude, a core looped ``num_loops`` times, coda.

The depth is an argument: ``model(ids, num_loops=2)``, ``model.generate(ids, num_loops=2)``. With a
cache it may be lower than the depth that the model was made with, not higher, and must stay the
same within a sequence; deeper runs load with ``from_pretrained(folder, num_loops=8)``.

Every loop has keys and values of its own, so the model owns one weightless attention module, a
slot, for each layer and loop: caches and engines that number attention modules need no change.
Slots are numbered prelude, coda, first loop, second loop ...: no number depends on the depth.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_openmythos import OpenMythosConfig
from .layers_openmythos import Block, make_norm, rotary_angles
from .loop_openmythos import Injection, LoopSignal, OutputLoRA, initial_state, make_halting

DEPTH_MARK = "openmythos_num_loops"  # on a cache: the depth at which it was filled


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for ``attn_implementation="eager"``."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class AttentionSlot(nn.Module):
    """Attends for one layer in one loop; has no weights, only a number of its own."""

    def __init__(self, config: OpenMythosConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        part = config.attention
        rope = part.get("qk_rope_head_dim", 0)
        self.scaling = (part["qk_nope_head_dim"] + rope if rope else config.head_dim) ** -0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # vLLM reads this source: one lookup in a local name, called once, scaling=self.scaling.
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return interface(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )


class OpenMythosPreTrainedModel(PreTrainedModel):
    """What the two models share with transformers."""

    config: OpenMythosConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own form, here and below)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": AttentionSlot}  # noqa: RUF012

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers looks for the decorator in this file; it is in ``layers_openmythos``."""
        return True

    def set_experts_implementation(self, experts_implementation: Any, *args: Any) -> None:
        """As in transformers, and an error for a model without experts: one class serves both."""
        if self.config.base_model_ep_plan is None:
            raise ValueError("this model has no experts")
        super().set_experts_implementation(experts_implementation, *args)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As in transformers; tables of value embeddings have a row per token too."""
        embeddings = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        for module in self.modules():
            table = getattr(module, "value_table", None)
            if table is not None:
                resized = self._get_resized_embeddings(
                    table, len(embeddings.weight), None, mean_resizing
                )
                module.value_table = resized.requires_grad_(table.weight.requires_grad)
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        reset = getattr(module, "reset", None)  # of our modules that hold parameters themselves
        if reset is not None:
            reset(self.config.initializer_range)


class OpenMythosModel(OpenMythosPreTrainedModel):
    """Everything below the head."""

    def __init__(self, config: OpenMythosConfig) -> None:
        super().__init__(config)
        if config.base_model_ep_plan is not None:
            self._keep_in_fp32_modules_strict = ["selection_bias"]
        dim, p, c = config.hidden_size, config.num_prelude_layers, config.num_core_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, dim)
        self.prelude = nn.ModuleList(Block(config, "prelude", i) for i in range(p))
        self.core = nn.ModuleList(Block(config, "core", p + i) for i in range(c))
        coda = range(p + c, p + c + config.num_coda_layers)
        self.coda = nn.ModuleList(Block(config, "coda", i) for i in coda)
        self.slots = nn.ModuleList(
            AttentionSlot(config, i) for i in range(config.num_hidden_layers)
        )
        self.prelude_norm = make_norm(config, config.prelude_norm)
        self.loop_norm = make_norm(config, config.loop_norm)
        self.norm = make_norm(config, config.final_norm)
        self.injection = Injection(config)
        self.loop_embedding = None if config.loop_embedding is None else LoopSignal(config)
        adapter = config.loop_adapter
        outer = adapter is not None and adapter["kind"] == "output_lora"
        self.output_lora = OutputLoRA(config) if outer else None
        self.halting = make_halting(config)
        self.readout = nn.Linear(dim, dim, bias=False) if config.readout == "linear" else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is None and self.config.value_embedding is not None:
            raise ValueError("this model's value embeddings need input_ids, not inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        loops = self._depth(num_loops, past_key_values)
        positions = position_ids
        if positions is None:
            positions = _positions(inputs_embeds, attention_mask, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=positions,
        )
        shared = {
            "rope": rotary_angles(self.config, positions),
            "attention_mask": mask,
            "past_key_values": past_key_values,
            "input_ids": input_ids,
            **kwargs,
        }
        h = self._loop(inputs_embeds * self.config.embed_scale, positions, loops, shared)
        if self.config.readout == "final_norm":
            h = self.norm(h)
        elif self.readout is not None:
            h = self.readout(h)
        h = self._run(self.coda, h, len(self.prelude), None, shared)
        h = h if self.norm is None else self.norm(h)
        return BaseModelOutputWithPast(last_hidden_state=h, past_key_values=past_key_values)

    def _run(
        self, blocks: nn.ModuleList, x: Tensor, slot: int, loop: int | None, shared: dict[str, Any]
    ) -> Tensor:
        for block in blocks:
            x = block(x, loop, slot=self.slots[slot], **shared)
            slot += 1
        return x

    def _loop(self, x: Tensor, position_ids: Tensor, loops: int, shared: dict[str, Any]) -> Tensor:
        """The prelude and all loops; the state that the coda reads."""
        x = self._run(self.prelude, x, 0, None, shared)
        e = self.injection(x if self.prelude_norm is None else self.prelude_norm(x))
        h = initial_state(self.config, e, position_ids)
        halting = self.config.halting
        act = halting if halting is not None and halting["kind"] == "act" else None
        mixed, mass = torch.zeros_like(h), torch.zeros_like(h[..., 0]).float()
        running = torch.ones_like(mass, dtype=torch.bool)
        outer, owned = self.outer_slots(), self._loops_of(len(self.slots))
        for loop in range(loops):
            signalled = h if self.loop_embedding is None else self.loop_embedding(h, loop)
            # Without a cache a loop past the last slots has none of its own and needs none.
            slot = outer + min(loop, owned - 1) * len(self.core)
            y = self._run(self.core, self.injection(e, signalled), slot, loop, shared)
            y = y if self.output_lora is None else self.output_lora(y, loop)
            h = self.injection(e, h, y)
            h = h if self.loop_norm is None else self.loop_norm(h)
            if act is not None:
                prob = self.halting(h)[..., 0].float().sigmoid()
                halts = running & (mass + prob >= act["threshold"])
                if loop == loops - 1 and act["keep_remainder"]:
                    halts = running
                weight = torch.where(halts, (1 - mass).clamp(min=0), prob) * running
                mass, running = mass + weight, running & ~halts
                mixed = mixed + weight[..., None].to(h.dtype) * h
        return h if act is None else mixed

    def outer_slots(self) -> int:
        """The number of slots outside the core."""
        return len(self.prelude) + len(self.coda)

    def _loops_of(self, num_slots: int) -> int:
        """The number of loops that so many slots are enough for."""
        return (num_slots - self.outer_slots()) // len(self.core)

    def _depth(self, num_loops: int | None, cache: Cache | None) -> int:
        """The number of loops, refused where the cache could not be true to it.

        The config only carries the default, and may have been changed since the model was made; the
        limit is what the model owns, and what the cache has room for.
        """
        loops = self._loops_of(self.config.num_hidden_layers) if num_loops is None else num_loops
        if loops < 1:
            raise ValueError(f"num_loops is {loops}; it must be at least 1")
        if cache is None:
            return loops
        most = self._loops_of(len(self.slots))
        if loops > most:
            raise ValueError(
                f"num_loops is {loops}; with a cache it must be at most the {most} that this model "
                f"was made with: load with from_pretrained(folder, num_loops={loops}), or pass "
                "use_cache=False"
            )
        room = len(cache.layers)
        if cache.layer_class_to_replicate is None and self._loops_of(room) < loops:
            raise ValueError(
                f"num_loops is {loops}, but the cache has {room} layers, room for "
                f"{self._loops_of(room)}: make it when config.num_loops is {loops}"
            )
        filled_at = getattr(cache, DEPTH_MARK, None)
        if filled_at != loops:
            if filled_at is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    f"num_loops is {loops}, but the cache was filled at {filled_at}; the depth "
                    "must stay the same within a sequence"
                )
            setattr(cache, DEPTH_MARK, loops)
        return loops


def _positions(embeds: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """Counted over real tokens where a 2-D mask tells them from padding."""
    length = embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    seen = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(length, device=embeds.device) + seen)[None]


class OpenMythosForCausalLM(OpenMythosPreTrainedModel, GenerationMixin):
    """The model with its head; ``labels`` are shifted by the loss, as transformers does."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: OpenMythosConfig) -> None:
        super().__init__(config)
        self.model = OpenMythosModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """A generation config may carry ``num_loops``; the argument of the call comes first."""
        settings, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        num_loops = getattr(settings, "num_loops", None)
        if num_loops is not None:
            model_kwargs.setdefault("num_loops", num_loops)
        if settings.assistant_early_exit is not None:
            self._check_early_exit(settings.assistant_early_exit, model_kwargs.get("num_loops"))
        return settings, model_kwargs

    def _check_early_exit(self, num_layers: int, num_loops: int | None) -> None:
        """transformers drafts with the first layers, which here means with fewer loops."""
        outer, core = self.model.outer_slots(), self.config.num_core_layers
        allowed = [outer + loops * core for loops in range(1, self.config.num_loops)]
        if num_layers not in allowed:
            raise ValueError(
                f"assistant_early_exit is {num_layers}; for a draft of one loop, two ... it is one "
                f"of {allowed or 'none, as the model runs one loop'}"
            )
        if num_loops is not None:
            raise ValueError(
                "assistant_early_exit and num_loops do not go together: set model.config.num_loops"
            )

    def generate_batch(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which drops arguments that it does not know: here they are errors."""
        self._check_batch_depth(kwargs.pop("num_loops", None))
        known = inspect.signature(super().generate_batch).parameters
        if unknown := set(kwargs) - set(known) - {"max_new_tokens"}:
            raise ValueError(f"generate_batch takes no {', '.join(sorted(unknown))}")
        return super().generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        settings = self.generation_config if generation_config is None else generation_config
        self._check_batch_depth(getattr(settings, "num_loops", None))
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def _check_batch_depth(self, num_loops: int | None) -> None:
        if num_loops not in (None, self.config.num_loops):
            raise ValueError(
                f"num_loops is {num_loops}, but continuous batching runs every request at the "
                f"config's {self.config.num_loops}: set model.config.num_loops = {num_loops} before"
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_loops: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_loops=num_loops,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["OpenMythosForCausalLM", "OpenMythosModel", "OpenMythosPreTrainedModel"]
