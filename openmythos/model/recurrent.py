"""The recurrent-depth language model: prelude -> core looped T times -> coda."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.utils._pytree import register_dataclass

from openmythos.config import ModelConfig
from openmythos.config.model import MAX_LOOPS
from openmythos.config.schema import as_integer, plain, require
from openmythos.model.block import Block
from openmythos.model.context import ForwardContext, Ids, as_tensor, make_context
from openmythos.model.halting import make_halting
from openmythos.model.init import STATE_INITS, init_weights
from openmythos.model.injection import make_injection
from openmythos.model.loop import LoopedModel, readout, start_loops, unroll
from openmythos.model.loop_signal import LoopAdapter, make_loop_adapter, make_loop_embedding
from openmythos.model.norm import RMSNorm
from openmythos.ops.cpu import build as native


@dataclass(frozen=True)
class ModelOutput:
    """What a forward returns; ``h`` is the state after the last loop.

    ``exit_weights`` is the halting head's distribution over the L loops, ``ponder_cost`` its cost;
    both are None without a head. ``states`` are those after each loop, if they were asked for.
    """

    logits: Float[Tensor, "B T V"]
    h: Float[Tensor, "B T D"]
    exit_weights: Float[Tensor, "L B T"] | None = None
    ponder_cost: Float[Tensor, "B T"] | None = None
    states: tuple[Float[Tensor, "B T D"], ...] = ()


register_dataclass(ModelOutput, serialized_type_name="openmythos.ModelOutput")


class RecurrentDepthLM(LoopedModel):
    """A looped language model; the number of loops can be chosen in each call."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        dim, eps = config.d_model, config.block.norm_eps
        p, c = config.num_prelude_layers, config.num_core_layers
        self.embed = Embedding(config.vocab_size, dim)
        self.prelude = nn.ModuleList(Block(config, "prelude", i, i) for i in range(p))
        self.prelude_norm = RMSNorm(dim, eps) if config.prelude_norm else nn.Identity()
        self.injection = make_injection(config)
        self.loop_embedding = make_loop_embedding(config)
        self.core = nn.ModuleList(Block(config, "core", i, p + i) for i in range(c))
        # The adapter's names in a state dict begin with its kind.
        adapter = config.loop_adapter
        self._adapter_name = "no_adapter" if adapter is None else adapter.kind
        self.add_module(self._adapter_name, make_loop_adapter(config))
        self.loop_norm = RMSNorm(dim, eps) if config.loop_norm else nn.Identity()
        self.halting = make_halting(config)
        self.final_norm = RMSNorm(dim, eps) if config.final_norm else nn.Identity()
        self.readout: nn.Module = nn.Identity()
        if config.readout == "linear":
            self.readout = nn.Linear(dim, dim, bias=False)
        d = config.num_coda_layers
        self.coda = nn.ModuleList(Block(config, "coda", i, p + c + i) for i in range(d))
        self.head: nn.Linear | None = None
        if not config.tie_embeddings:
            self.head = nn.Linear(dim, config.vocab_size, bias=False)
        if not self.embed.weight.is_meta:
            init_weights(self, dim, seed)

    @property
    def loop_adapter(self) -> LoopAdapter:
        """The module that changes the core's output according to the loop."""
        adapter: LoopAdapter = getattr(self, self._adapter_name)
        return adapter

    def context(self, tokens: Ids, **options: Any) -> ForwardContext:
        """The context of a batch; the options are those of ``make_context``."""
        w = self.embed.weight
        dtype = self.embed.activations or w.dtype
        return make_context(self.config, tokens, dtype=dtype, device=w.device, **options)

    # --- the model's calls -----------------------------------------------------------------------

    def encode(self, tokens: Int[Tensor, "B T"], ctx: ForwardContext) -> Float[Tensor, "B T D"]:
        """e: the prelude's output after the part of the injection that all loops share."""
        x = self.embed(tokens)
        if self.config.embed_scale != 1:
            x = x * self.config.embed_scale
        for block in self.prelude:
            x = block(x, ctx)
        return self.injection(self.prelude_norm(x))

    def init_state(self, e: Float[Tensor, "B T D"], ctx: ForwardContext) -> Float[Tensor, "B T D"]:
        """h_0: zeros, e, or noise that depends on (``ctx.seeds``, ``ctx.positions``, channel)."""
        part = self.config.state_init
        return STATE_INITS[type(part)](part, e, ctx)

    def step(
        self,
        h: Float[Tensor, "B T D"],
        e: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"],
        ctx: ForwardContext,
    ) -> Float[Tensor, "B T D"]:
        """The state after one loop; rows may be at different loops, which count from 0."""
        y = self.injection(e, self.signal(h, loop_idx, ctx))
        for block in self.core:
            y = block(y, ctx, loop_idx)
        y = self.loop_adapter(y, loop_idx)
        return self.loop_norm(self.injection(e, h, y))

    def decode(self, h: Float[Tensor, "B T D"], ctx: ForwardContext) -> Float[Tensor, "B T V"]:
        """The logits of a state after any number of loops, through readout, coda and head."""
        x = (
            self.final_norm(h)
            if self.config.readout == "final_norm"
            else self.readout(h).to(h.dtype)
        )
        for block in self.coda:
            x = block(x, ctx)
        x = self.final_norm(x)
        return self.embed(states=x) if self.head is None else self.head(x)

    def forward(
        self,
        tokens: Ids,
        *,
        num_loops: int | Sequence[int] | Int[Tensor, "*B"] | None = None,
        grad_loops: int | None = None,
        ctx: ForwardContext | None = None,
        keep_states: bool = False,
        recompute: bool = False,
    ) -> ModelOutput:
        """Run all loops on a batch.

        Args:
            tokens: Token ids, those of ``ctx`` if it is given.
            num_loops: One number for all rows, or one per row; default: the config's. Rows end at
                the same time: a row with fewer loops waits before its first, uncomputed.
            grad_loops: Number of last loops with gradients (gradient truncation); None: all.
            ctx: The result of ``context``; default: one document per row, without padding.
            keep_states: Whether to return the state after every loop.
            recompute: Activation checkpointing: for the backward pass keep each loop's state only,
                and run the loop again.

        Raises:
            ValueError: A number of loops below 1 or above the cache's ``max_loops``, an argument of
                another type, or an error of ``make_context``.
        """
        ctx = self.context(tokens) if ctx is None else ctx
        require(isinstance(ctx, ForwardContext), "ctx", ctx, "the result of model.context")
        like = ctx.tokens
        given = as_tensor("tokens", tokens, like.dtype, like.device, like.shape)
        cached = recompute and ctx.cache is not None
        require(
            not cached, "recompute", True, "False with a cache, which the second run would write"
        )
        depths = self._depths(len(given), num_loops)
        if grad_loops is not None:
            grad_loops = as_integer("grad_loops", grad_loops, 1)
        if ctx.cache is not None and max(depths) > ctx.cache.cache.max_loops:
            allowed = f"at most the cache's max_loops={ctx.cache.cache.max_loops}"
            raise ValueError(f"num_loops is {max(depths)}; it must be {allowed}")
        if ctx.cache is not None:
            ctx.cache.check()
        e = self.encode(given, ctx)
        start = start_loops(self, e, ctx, depths, wait=True)
        states: list[Tensor] = []
        weights: list[Tensor] = []
        state = start
        for state in unroll(self, start, ctx, grad_loops, recompute):
            if state.halted is not None:
                weights.append(state.halted.weight)
            if keep_states:
                states.append(state.h)
        ponder = None
        if state.halted is not None and self.halting is not None:
            weights[-1], last = state.halted.ended(self.halting)
            ponder = last.ponder
        logits = self.decode(readout(self, state), ctx)
        if ctx.cache is not None:
            if min(depths) < ctx.cache.cache.max_loops:
                ctx.cache.fill_forward(torch.tensor(depths, device=e.device))
            ctx.cache.commit()
        return ModelOutput(
            logits=logits,
            h=state.h,
            exit_weights=torch.stack(weights) if weights else None,
            ponder_cost=ponder,
            states=tuple(states),
        )

    def signal(
        self, h: Float[Tensor, "B T D"], loop_idx: Int[Tensor, "B"], ctx: ForwardContext
    ) -> Float[Tensor, "B T D"]:
        """h plus the loop embedding, if there is one: the input of a loop."""
        return h if self.loop_embedding is None else self.loop_embedding(h, loop_idx, ctx.positions)

    def exit_prob(
        self,
        before: Float[Tensor, "B T D"],
        after: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"],
        ctx: ForwardContext,
    ) -> Float[Tensor, "B T"]:
        """The halting probability of a loop, from whichever of the two states the head reads."""
        assert self.halting is not None
        early = self.halting.reads_before
        return self.halting(self.signal(before, loop_idx, ctx) if early else after)

    def _depths(self, num_rows: int, num_loops: Any) -> list[int]:
        """Every row's number of loops, on the host, so that the loop needs no device sync."""
        given = self.config.num_loops if num_loops is None else plain(num_loops)
        rows = given if isinstance(given, list | tuple) else [given] * num_rows
        depths = [plain(depth) for depth in rows]
        fits = all(type(depth) is int and 1 <= depth <= MAX_LOOPS for depth in depths)
        allowed = f"an integer of at least 1 and at most {MAX_LOOPS}, or one for each of the "
        require(fits and len(depths) == num_rows, "num_loops", given, f"{allowed}{num_rows} rows")
        return depths


class Embedding(nn.Embedding):
    """The token embedding, which is also the head if the two are tied.

    Where the weight is gathered in a lower precision, ``activations`` is that of the embeddings.
    """

    activations: torch.dtype | None = None

    def forward(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        states: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B T _"]:
        """The embeddings of ``tokens`` or, as the tied head, the logits of ``states``."""
        if tokens is not None:
            rows = super().forward(tokens)
            return rows if self.activations is None else rows.to(self.activations)
        assert states is not None
        plain = native.eager() and not torch.is_autocast_enabled(states.device.type)
        if plain and self.weight.requires_grad:
            logits: Tensor = _TiedHead.apply(states, self.weight)
            return logits
        return functional.linear(states, self.weight)


class _TiedHead(torch.autograd.Function):
    """``x W^T`` with a contiguous gradient of W.

    Autograd adds the embedding's gradient to it. It can do so in place, while the gradient of
    ``linear`` is a transposed view, whose sum would be a new tensor as large as W.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        grad_weight = grad.flatten(0, -2).mT @ x.flatten(0, -2) if wants_weight else None
        return grad @ weight if wants_x else None, grad_weight
