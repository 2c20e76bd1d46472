"""How many loops the answers need: accuracy by loops, and the fewest loops that are enough."""

from dataclasses import asdict, dataclass
from typing import Any

from openmythos.analysis.budget import rows_within
from openmythos.analysis.example import Examples
from openmythos.analysis.trace import Mean, number
from openmythos.model.inference import inference
from openmythos.model.loop import readout, start_loops, unroll
from openmythos.model.recurrent import RecurrentDepthLM

POINT = 0.01


@dataclass(frozen=True, kw_only=True)
class DepthCurve:
    """How good the answers are after each number of loops, from 1.

    Surplus loops hide what a loop does, because they repair what is missing. So instruments measure
    at ``fewest``.

    Attributes:
        trained: The loops of the model's configuration.
        of_text: Whether next tokens of text were asked for.
        num_positions: Positions where something is asked.
        accuracy: By loops: the share of positions whose most likely token is right.
        log_prob: By loops: the mean log-probability of the right token, in nats.
    """

    trained: int
    of_text: bool
    num_positions: int
    accuracy: tuple[float, ...]
    log_prob: tuple[float, ...]

    @property
    def fewest(self) -> int:
        """T*: the fewest loops within one point of the best.

        Points are those of accuracy. Of text, whose next token is often open, the log-probability
        must be within one per cent of the best.
        """
        found = self.log_prob if self.of_text else self.accuracy
        best = max(found)
        enough = best - (POINT * abs(best) if self.of_text else POINT) - 1e-9
        return 1 + next(i for i, value in enumerate(found) if value >= enough)

    def to_dict(self) -> dict[str, Any]:
        """The record, ready for JSON."""
        return {**asdict(self), "fewest": self.fewest}


class DepthSums:
    """Sums over positions from which the curve follows; batches are added one after the other."""

    def __init__(self, num_loops: int) -> None:
        self._loops = [Mean(2) for _ in range(num_loops)]
        self._num_positions = 0

    def add(self, model: RecurrentDepthLM, examples: Examples) -> None:
        """Answer a batch after every loop."""
        asked, ctx = examples.asked, examples.context(model)
        answers = examples.answers[asked]
        self._num_positions += len(answers)
        with inference(model):
            e = model.encode(examples.tokens, ctx)
            start = start_loops(model, e, ctx, [len(self._loops)] * len(examples))
            for mean, state in zip(self._loops, unroll(model, start, ctx), strict=True):
                logits = model.decode(readout(model, state), ctx)[asked]
                right = (logits.argmax(dim=-1) == answers).float()
                chances = logits.float().log_softmax(dim=-1)
                mean.add([right, chances.gather(1, answers[:, None])[:, 0]])

    def curve(self, trained: int, of_text: bool) -> DepthCurve:
        """The means of all that was added."""
        accuracy, log_prob = zip(*(map(number, mean.values()) for mean in self._loops), strict=True)
        return DepthCurve(
            trained=trained,
            of_text=of_text,
            num_positions=self._num_positions,
            accuracy=accuracy,
            log_prob=log_prob,
        )


def measure_depth(
    model: RecurrentDepthLM, examples: Examples, num_loops: int, max_bytes: int
) -> DepthCurve:
    """The curve of 1 to ``num_loops`` loops, in batches that fit into ``max_bytes``.

    Raises:
        OverBudget: Not even one row fits.
    """
    one = examples.rows(0, 1)
    size = rows_within(max_bytes, lambda: DepthSums(num_loops).add(model, one), model)
    sums = DepthSums(num_loops)
    for part in examples.batches(size):
        sums.add(model, part)
    return sums.curve(model.config.num_loops, examples.is_text)
