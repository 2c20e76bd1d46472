"""How the arms of a study match: parameters, training FLOPs and test FLOPs, and the deviations."""

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.claim import Table
from openmythos.config import ModelConfig, counts


@dataclass(frozen=True)
class Size:
    """An arm's model, and the loops that training draws on average and the test runs.

    Attributes:
        config: The model's; ``openmythos.baseline`` finds plain ones that match a looped one.
        training_loops: Mean number of loops of a training step.
        test_loops: Number of loops at the test.
        passes: Times that the whole model runs for one answer at the test.
        grad_loops: Last loops with gradients; None: all.
    """

    config: ModelConfig
    training_loops: float
    test_loops: int
    passes: int = 1
    grad_loops: int | None = None


def matching(arms: Mapping[str, Size], reference: str, context_length: int) -> Table:
    """The table of the arms; FLOPs are per token.

    Args:
        arms: The sizes by arm.
        reference: The arm that deviations are from.
        context_length: Keys that a token attends to.
    """
    found = {arm: _figures(size, context_length) for arm, size in arms.items()}
    rows = []
    for arm, figures in found.items():
        cells = [
            f"{value:,.0f} ({(value - own) / own:+.1%})" if arm != reference else f"{value:,.0f}"
            for value, own in zip(figures, found[reference], strict=True)
        ]
        rows.append([arm, *cells])
    header = ["arm", "parameters", "training FLOPs per token", "test FLOPs per token"]
    return Table(f"Arms, and how far they are from {reference}", header, rows)


def training_flops(size: Size, context_length: int) -> float:
    """Of a training step, per token, at the mean number of loops."""

    def of(loops: int) -> int:
        return counts.training_flops(
            size.config,
            num_loops=loops,
            grad_loops=size.grad_loops,
            context_length=context_length,
        )

    low = size.grad_loops or 1
    each = of(low + 1) - of(low)  # linear from here on
    return of(low) + (size.training_loops - low) * each


def _figures(size: Size, context_length: int) -> tuple[float, float, float]:
    test = counts.forward_flops(
        size.config, num_loops=size.test_loops, context_length=context_length
    )
    return (
        float(counts.total_params(size.config)),
        training_flops(size, context_length),
        float(test * size.passes),
    )
