"""The recurrent-depth language model: prelude -> core looped T times -> coda."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from openmythos.config import ModelConfig
from openmythos.config.schema import require
from openmythos.model.block import Block
from openmythos.model.context import ForwardContext, make_context
from openmythos.model.halting import make_halting
from openmythos.model.init import init_weights, initial_state
from openmythos.model.injection import make_injection
from openmythos.model.loop import LoopedModel, readout, start_loops, unroll
from openmythos.model.loop_signal import LoopAdapter, make_loop_adapter, make_loop_embedding
from openmythos.model.norm import RMSNorm


@dataclass(frozen=True)
class ModelOutput:
    """What a forward returns.

    ``exit_weights`` is the halting head's distribution over loops, ``ponder_cost`` its cost; both
    are None without a head. ``states`` (after each loop) are kept on request.
    """

    logits: Float[Tensor, "B T V"]
    h: Float[Tensor, "B T D"]
    exit_weights: Float[Tensor, "L B T"] | None = None
    ponder_cost: Float[Tensor, "B T"] | None = None
    states: tuple[Float[Tensor, "B T D"], ...] = ()


class RecurrentDepthLM(LoopedModel):
    """A looped language model; the depth is an argument of the call, not of the weights."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
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
        # In a state dict the adapter's weights stand under its kind.
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
            init_weights(self, dim, generator)

    @property
    def loop_adapter(self) -> LoopAdapter:
        """What each loop changes of the core's output."""
        adapter: LoopAdapter = getattr(self, self._adapter_name)
        return adapter

    def context(self, tokens: Int[Tensor, "B T"], **options: Any) -> ForwardContext:
        """The context of a batch; the options are those of ``make_context``."""
        return make_context(self.config, tokens, dtype=self.embed.weight.dtype, **options)

    # --- the waist -------------------------------------------------------------------------------

    def encode(self, tokens: Int[Tensor, "B T"], ctx: ForwardContext) -> Float[Tensor, "B T D"]:
        """e: the prelude's output, as the injection adds it at every loop."""
        x = self.embed(tokens)
        if self.config.embed_scale != 1:
            x = x * self.config.embed_scale
        for block in self.prelude:
            x = block(x, ctx)
        return self.injection(self.prelude_norm(x))

    def init_state(
        self,
        e: Float[Tensor, "B T D"],
        generator: torch.Generator | None = None,
        ctx: ForwardContext | None = None,
    ) -> Float[Tensor, "B T D"]:
        """h_0. Noise depends on (seed, position), so give ``ctx`` unless positions are 0 .. T-1."""
        if ctx is None:
            positions = torch.arange(e.shape[1], device=e.device).expand(e.shape[:2])
        else:
            positions = ctx.positions
        return initial_state(self.config.state_init, e, positions, generator)

    def step(
        self,
        h: Float[Tensor, "B T D"],
        e: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"],
        ctx: ForwardContext,
    ) -> Float[Tensor, "B T D"]:
        """One loop. Rows may be at different loops; loops count from 0."""
        y = self.injection(e, self.signal(h, loop_idx, ctx))
        for block in self.core:
            y = block(y, ctx, loop_idx)
        y = self.loop_adapter(y, loop_idx)
        return self.loop_norm(self.injection(e, h, y))

    def decode(self, h: Float[Tensor, "B T D"], ctx: ForwardContext) -> Float[Tensor, "B T V"]:
        """Logits of a state, whatever its loop."""
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
        tokens: Int[Tensor, "B T"],
        *,
        num_loops: int | Int[Tensor, "B"] | None = None,
        grad_loops: int | None = None,
        ctx: ForwardContext | None = None,
        generator: torch.Generator | None = None,
        keep_states: bool = False,
    ) -> ModelOutput:
        """Run all loops on a batch.

        Args:
            tokens: Token ids.
            num_loops: One depth for all rows, or one a row; default: the config's. Rows are aligned
                at their last loop, so a shallow row waits and costs nothing.
            grad_loops: Only the last loops get gradients (truncated back-propagation); None: all.
            ctx: Of ``context``; default: one unpadded document a row.
            generator: Seeds a random initial state.
            keep_states: Return the state after every loop.

        Raises:
            ValueError: A depth below 1, or what ``make_context`` refuses.
        """
        depths = self._depths(len(tokens), num_loops)
        if grad_loops is not None:
            require(grad_loops >= 1, "grad_loops", grad_loops, "at least 1, or None for all")
        ctx = self.context(tokens) if ctx is None else ctx
        if ctx.cache is not None and max(depths) > ctx.cache.cache.max_loops:
            allowed = f"at most the cache's max_loops={ctx.cache.cache.max_loops}"
            raise ValueError(f"num_loops is {max(depths)}; it must be {allowed}")
        e = self.encode(tokens, ctx)
        start = start_loops(self, e, ctx, depths, wait=True, generator=generator)
        states: list[Tensor] = []
        weights: list[Tensor] = []
        state = start
        for state in unroll(self, start, ctx, grad_loops):
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
                ctx.cache.fill_forward(torch.tensor(depths, device=tokens.device))
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
        """h with its loop's signal, as a loop starts from it."""
        return h if self.loop_embedding is None else self.loop_embedding(h, loop_idx, ctx.positions)

    def exit_prob(
        self,
        before: Float[Tensor, "B T D"],
        after: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"],
        ctx: ForwardContext,
    ) -> Float[Tensor, "B T"]:
        """What the halting head says of a loop, from whichever of its two states it reads."""
        assert self.halting is not None
        early = self.halting.reads_before
        return self.halting(self.signal(before, loop_idx, ctx) if early else after)

    def _depths(self, num_rows: int, num_loops: int | Int[Tensor, "B"] | None) -> list[int]:
        """Every row's depth, on the host: the loop over depths must not wait for the device."""
        given = self.config.num_loops if num_loops is None else num_loops
        depths = given.tolist() if isinstance(given, Tensor) else [given] * num_rows
        if len(depths) != num_rows or not all(type(d) is int and d >= 1 for d in depths):
            allowed = f"an integer of at least 1, or a tensor of one for each of {num_rows} rows"
            raise ValueError(f"num_loops is {given}; it must be {allowed}")
        return depths


class Embedding(nn.Embedding):
    """The table of tokens, which is the head too where the two are tied."""

    def forward(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        states: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B T _"]:
        """Of one argument: vectors of tokens, or logits of states."""
        if tokens is not None:
            return super().forward(tokens)
        assert states is not None
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(states.device.type):
            return functional.linear(states, self.weight)
        logits: Tensor = _TiedHead.apply(states, self.weight)
        return logits


class _TiedHead(torch.autograd.Function):
    """``x W^T`` whose gradient of W autograd can add the embedding's to in place.

    That of ``linear`` is a transposed view, and the sum would be one more tensor as large as W.
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
