"""Everything that is read off while the loops run: the state, the blocks and the experts."""

from dataclasses import dataclass
from typing import Any

from openmythos.analysis.block_state import BlockStates, BlockStateSums
from openmythos.analysis.budget import rows_within
from openmythos.analysis.example import Examples
from openmythos.analysis.expert import ExpertOverlap, ExpertSums
from openmythos.analysis.observe import observe
from openmythos.analysis.trace import LoopTrace, TraceSums
from openmythos.config import MoEConfig
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """What one run of the loops shows of the state, the blocks and the experts."""

    trace: LoopTrace
    blocks: BlockStates
    experts: list[ExpertOverlap]

    def to_dict(self) -> dict[str, Any]:
        """The record, ready for JSON."""
        return {
            "trace": self.trace.to_dict(),
            "blocks": self.blocks.to_dict(),
            "experts": [layer.to_dict() for layer in self.experts],
        }


class DynamicsSums:
    """The sums of all three, over one pass."""

    def __init__(self, model: RecurrentDepthLM) -> None:
        part = model.config.core_ff
        num_experts = part.num_experts if isinstance(part, MoEConfig) else 0
        self._trace, self._blocks = TraceSums(), BlockStateSums()
        self._experts = ExpertSums(num_experts)

    def add(self, model: RecurrentDepthLM, examples: Examples, num_loops: int) -> None:
        """Run a batch for ``num_loops`` loops."""
        valid, ctx = examples.valid, examples.context(model)
        with inference(model):
            for loop in observe(model, examples.tokens, num_loops, ctx):
                self._trace.add(loop, valid)
                self._blocks.add(loop, valid)
                self._experts.add(loop, valid)

    def dynamics(self, model: RecurrentDepthLM) -> Dynamics:
        """The means of all that was added."""
        return Dynamics(
            trace=self._trace.trace(model),
            blocks=self._blocks.states(),
            experts=self._experts.overlaps(),
        )


def measure_dynamics(
    model: RecurrentDepthLM, examples: Examples, num_loops: int, max_bytes: int
) -> Dynamics:
    """Trace, block states and expert overlaps, in batches that fit into ``max_bytes``.

    Raises:
        OverBudget: Not even one row fits.
    """
    one = examples.rows(0, 1)
    size = rows_within(max_bytes, lambda: DynamicsSums(model).add(model, one, num_loops), model)
    sums = DynamicsSums(model)
    for part in examples.batches(size):
        sums.add(model, part, num_loops)
    return sums.dynamics(model)
