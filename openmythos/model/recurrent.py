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


class RecurrentDepthLM(nn.Module):
    """A looped language model; the depth is an argument of the call, not of the weights."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        dim, eps = config.d_model, config.block.norm_eps
        p, c = config.num_prelude_layers, config.num_core_layers
        self.embed = nn.Embedding(config.vocab_size, dim)
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
        return self.injection.drive(self.prelude_norm(x))

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
        y = self.injection.mix(self.signal(h, loop_idx, ctx), e)
        for block in self.core:
            y = block(y, ctx, loop_idx)
        y = self.loop_adapter(y, loop_idx)
        return self.loop_norm(self.injection.update(h, e, y))

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
        if self.head is not None:
            return self.head(x)
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return functional.linear(x, self.embed.weight)
        logits: Tensor = _TiedHead.apply(x, self.embed.weight)
        return logits

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
        most = max(depths)
        if ctx.cache is not None and most > ctx.cache.max_loops:
            allowed = f"at most the cache's max_loops={ctx.cache.max_loops}"
            raise ValueError(f"num_loops is {most}; it must be {allowed}")
        waits = torch.tensor([most - depth for depth in depths], device=tokens.device)
        e = self.encode(tokens, ctx)
        h = self.init_state(e, generator, ctx)
        states, weights, mixed = [], [], torch.zeros_like(h)
        tracker = None if self.halting is None else self.halting.start(h)
        grad_from = 0 if grad_loops is None else most - grad_loops
        for loop in range(most):
            loop_idx = loop - waits
            started = [row for row, depth in enumerate(depths) if most - depth <= loop]
            with torch.set_grad_enabled(torch.is_grad_enabled() and loop >= grad_from):
                before, h = h, self._step_rows(h, e, loop_idx, ctx, started)
                if self.halting is not None and tracker is not None:
                    prob = self.exit_prob(before, h, loop_idx.clamp(min=0), ctx)
                    prob = prob * (loop_idx >= 0)[:, None]
                    weight, tracker = self.halting.step(tracker, prob, last=loop == most - 1)
                    weights.append(weight)
                    if self.halting.mixes_states:
                        mixed = self.halting.mix(mixed, h, weight)
            if keep_states:
                states.append(h)
        if ctx.cache is not None and min(depths) < ctx.cache.max_loops:
            stop = ctx.start + tokens.shape[1]
            rows = torch.arange(len(tokens), device=tokens.device) if ctx.rows is None else ctx.rows
            ctx.cache.fill_forward(rows, most - waits, ctx.start, stop)
        readout = mixed if self.halting is not None and self.halting.mixes_states else h
        return ModelOutput(
            logits=self.decode(readout, ctx),
            h=h,
            exit_weights=torch.stack(weights) if weights else None,
            # A loop that a row waits gives out no mass and would count as one loop.
            ponder_cost=None if tracker is None else tracker.ponder - waits[:, None],
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

    def _step_rows(
        self,
        h: Float[Tensor, "B T D"],
        e: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"],
        ctx: ForwardContext,
        started: list[int],
    ) -> Float[Tensor, "B T D"]:
        """``step`` on the rows whose first loop has come; the others wait."""
        if len(started) == len(h):
            return self.step(h, e, loop_idx, ctx)
        rows = torch.tensor(started, device=h.device)
        stepped = self.step(h[rows], e[rows], loop_idx[rows], ctx.select(rows))
        return h.index_copy(0, rows, stepped)

    def _depths(self, num_rows: int, num_loops: int | Int[Tensor, "B"] | None) -> list[int]:
        """Every row's depth, on the host: the loop over depths must not wait for the device."""
        given = self.config.num_loops if num_loops is None else num_loops
        depths = given.tolist() if isinstance(given, Tensor) else [given] * num_rows
        if len(depths) != num_rows or not all(type(d) is int and d >= 1 for d in depths):
            allowed = f"an integer of at least 1, or a tensor of one for each of {num_rows} rows"
            raise ValueError(f"num_loops is {given}; it must be {allowed}")
        return depths


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
