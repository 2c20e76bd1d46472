"""What a loop does inside: the core's input, its blocks' outputs, the experts that were chosen.

The loops run in ``model.loop.advance`` as in every forward, and hooks watch the modules of the
core. So every family and every member of a seam is observed alike, and the states are bit for bit
those of a plain forward.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.model.context import ForwardContext
from openmythos.model.feedforward import MoE
from openmythos.model.loop import LoopState, advance, start_loops
from openmythos.model.recurrent import RecurrentDepthLM

State = Float[Tensor, "B T D"]


@dataclass(frozen=True)
class Loop:
    """One loop of a batch, as it ran.

    Attributes:
        number: Counted from 1.
        before: The state before it.
        state: The rows after it.
        places: The core's input, then the output of each of its blocks.
        experts: The experts that each token was routed to, by core layer; only layers with experts.
        earlier: The loop before; None at the first. It knows no loop before itself.
    """

    number: int
    before: State
    state: LoopState
    places: tuple[State, ...]
    experts: dict[int, Int[Tensor, "B T K"]]
    earlier: "Loop | None" = None

    @property
    def update(self) -> State:
        """What the loop added to the state."""
        return wide(self.state.h) - wide(self.before)


def observe(
    model: RecurrentDepthLM, tokens: Int[Tensor, "B T"], num_loops: int, ctx: ForwardContext
) -> Iterator[Loop]:
    """Run ``num_loops`` loops and yield each with what happened inside.

    Args:
        model: Any recurrent-depth model; see ``model.inference`` for its mode.
        tokens: Token ids.
        num_loops: Loops to run; more than the model was trained with is fine.
        ctx: The context of the tokens, without a cache.

    Raises:
        ValueError: ``num_loops`` is below 1, or the context has a cache.
    """
    if num_loops < 1:
        raise ValueError(f"num_loops is {num_loops}; it must be at least 1")
    if ctx.cache is not None:
        raise ValueError("ctx has a cache, which an observed loop would write to; make it without")
    e = model.encode(tokens, ctx)
    state = start_loops(model, e, ctx, [num_loops] * len(tokens))
    earlier: Loop | None = None
    for number in range(1, num_loops + 1):
        with _watched(model) as seen:
            after = advance(model, state, ctx)
        loop = Loop(number, state.h, after, tuple(seen.places), seen.experts, earlier)
        yield loop
        earlier, state = replace(loop, earlier=None), after


def wide(x: Tensor) -> Tensor:
    """The tensor in at least fp32, in which lengths and angles are measured."""
    return x if x.element_size() > 4 else x.float()


@dataclass
class _Seen:
    places: list[Tensor] = field(default_factory=list)
    experts: dict[int, Tensor] = field(default_factory=dict)

    def enter(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.places.append(inputs[0])

    def leave(self, block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.places.append(output)


@contextmanager
def _watched(model: RecurrentDepthLM) -> Iterator[_Seen]:
    """What the core's modules compute inside of the context."""
    seen = _Seen()

    def route(layer: int) -> Any:
        def ask_again(moe: MoE, inputs: tuple[Any, ...]) -> None:
            x, loop_idx, ctx = inputs
            row = loop_idx.clamp(max=moe.config.bias_loops - 1).repeat_interleave(x.shape[1])
            chosen, _, _ = moe.route(x.flatten(0, 1), row, ctx)
            seen.experts[layer] = chosen.view(*x.shape[:2], -1)

        return ask_again

    with ExitStack() as hooks:
        for layer, block in enumerate(model.core):
            if layer == 0:
                hooks.callback(block.register_forward_pre_hook(seen.enter).remove)
            hooks.callback(block.register_forward_hook(seen.leave).remove)
            feed_forward = block.get_submodule("feed_forward")
            if isinstance(feed_forward, MoE):
                handle = feed_forward.register_forward_pre_hook(route(layer))
                hooks.callback(handle.remove)
        yield seen
