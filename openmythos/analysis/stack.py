"""An untied stack seen as loops: groups of its layers in place of the repeated core."""

from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.model.context import ForwardContext
from openmythos.model.recurrent import RecurrentDepthLM


class LayersAsLoops(RecurrentDepthLM):
    """A model whose core runs once; each loop of this view runs the next layers of it.

    All weights are the model's own. The first loop mixes e in and the last one makes the update, so
    that all loops together are exactly one loop of the model. Between them the state is what passes
    from layer to layer.
    """

    def __init__(self, model: RecurrentDepthLM, num_loops: int) -> None:
        """Present the core's layers in ``num_loops`` groups of equal size.

        Raises:
            ValueError: The number of core layers is not a multiple, or the model has depth
                attention.
        """
        layers, depth_attention = len(model.core), model.config.depth_attention
        if num_loops < 1 or layers % num_loops:
            raise ValueError(
                f"num_loops is {num_loops}; it must divide the number of core layers, {layers}"
            )
        if depth_attention is not None:
            raise ValueError(
                "the model has depth_attention, which reads earlier loops; layers of one loop have "
                "none, so measure its loops instead"
            )
        nn.Module.__init__(self)
        vars(self).update(vars(model))
        self._modules = dict(model._modules)  # so that the model keeps its halting head
        self.config = replace(model.config, num_loops=num_loops)
        self.halting = None  # of one loop the weight is 1, whatever the head says
        self.num_loops, self.group_size = num_loops, layers // num_loops

    def step(
        self,
        h: Float[Tensor, "B T D"],
        e: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"],
        ctx: ForwardContext,
    ) -> Float[Tensor, "B T D"]:
        """The state after each row's next group of layers."""
        groups = loop_idx.unique().tolist()
        if len(groups) == 1:
            return self._run_group(groups[0], h, e, ctx)
        after = h.clone()
        for group in groups:
            rows = (loop_idx == group).nonzero()[:, 0]
            after[rows] = self._run_group(group, h[rows], e[rows], ctx.select(rows))
        return after

    def _run_group(
        self, group: int, y: Float[Tensor, "B T D"], e: Float[Tensor, "B T D"], ctx: ForwardContext
    ) -> Float[Tensor, "B T D"]:
        if group >= self.num_loops:
            raise ValueError(
                f"loop {group + 1} of a stack of {self.num_loops} groups of layers; it has no more"
            )
        first_loop = ctx.tokens.new_zeros(len(y))
        if group == 0:
            y = self.injection(e, self.signal(y, first_loop, ctx))
        for block in self.core[group * self.group_size : (group + 1) * self.group_size]:
            y = block(y, ctx, first_loop)
        if group == self.num_loops - 1:
            y = self.loop_adapter(y, first_loop)
            y = self.loop_norm(self.injection(e, self.init_state(e, ctx), y))
        return y
