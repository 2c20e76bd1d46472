"""Small made-up results, for every test of the report."""

from dataclasses import replace
from typing import Any

import numpy as np

from openmythos.analysis.trace import LoopTrace
from openmythos.demo.result import DemoResults, HopsResult, TextResult
from openmythos.eval.score import Outcomes
from openmythos.report.page import Piece, Sample


def loop_trace(num_loops: int = 4, **changes: Any) -> LoopTrace:
    steps = tuple(4.0 * 0.5**t for t in range(num_loops))
    trace = LoopTrace(
        num_tokens=32,
        initial_norm=0.0,
        state_norm=tuple(float(t + 1) for t in range(num_loops)),
        step_norm=steps,
        relative_step=tuple(step / (t + 1) for t, step in enumerate(steps)),
        step_ratio=(None, *(0.5 for _ in range(num_loops - 1))),
        turn=(None, *(0.6 for _ in range(num_loops - 1))),
        radial_fraction=tuple(0.2 for _ in range(num_loops)),
        acceleration=(None, *steps[1:]),
        token_correlation=tuple(0.1 for _ in range(num_loops)),
        rho=0.45,
    )
    return replace(trace, **changes)


VALIDATION = {1: 2.5, 2: 2.2, 4: 2.0, 8: 1.98, 16: 1.99}
NUM_DOCUMENTS, NUM_WALKS = 40, 100


def documents(bits_per_byte: float, jitter: float = 0.0) -> Outcomes:
    """Bits and bytes of documents that differ by far more than two depths do on one of them.

    Args:
        bits_per_byte: Of all of them together.
        jitter: How far a document's own change may be from the change of the others.
    """
    odd = [(-1) ** n * 0.3 + (-1) ** (n // 2) * jitter for n in range(NUM_DOCUMENTS)]
    return [(1000 * (bits_per_byte + part), 1000.0) for part in odd]


def answers(accuracy: Any) -> Any:
    """Walks of which these shares are right: the easy ones first."""
    limits = np.rint(np.asarray(accuracy) * NUM_WALKS)[..., None]
    return np.arange(NUM_WALKS) < limits


def loops_taken(means: list[float]) -> Any:
    """Loops of walks with about these means."""
    spread = np.arange(NUM_WALKS) / NUM_WALKS
    return np.floor(np.asarray(means)[:, None] + spread).astype(int)


def text_result(validation: dict[int, float] | None = None, **changes: Any) -> TextResult:
    pieces = [Piece(" a", 1), Piece(" <script>alert(1)</script>", 4), Piece("\n\x1b[31m &", 16)]
    fields: dict[str, Any] = {
        "train_curve": [(float(t), 2.0 + 4.0 / t) for t in range(1, 40)],
        "held_out_curve": [(20.0, 2.3), (39.0, 2.0)],
        "held_out": {n: documents(value) for n, value in (validation or VALIDATION).items()},
        "mean_recurrence": 4.0,
        "sampled_loops": (1, 9),
        "depth_sampling": "Poisson",
        "num_params": 1_300_000,
        "tokens_seen": 900_000,
        "seconds": 39.0,
        "samples": [Sample("Once <b>upon</b>", pieces)],
        "max_loops": 16,
        "exit_rule": "latent difference < 0.03",
        "trace": loop_trace(),
        "marks": {"xz -9": 1.81},
    }
    return TextResult(**{**fields, **changes})


ACCURACY = [
    [0.9, 1.0, 1.0, 1.0, 1.0],
    [0.2, 0.9, 1.0, 1.0, 1.0],
    [0.06, 0.1, 0.85, 0.9, 0.9],
    [0.06, 0.07, 0.6, 0.8, 0.8],
    [0.06, 0.06, 0.1, 0.5, 0.6],
]
EXIT_LOOPS, EXIT_ACCURACY = [1.5, 2.2, 4.1, 5.0, 7.7], [1.0, 0.98, 0.9, 0.8, 0.5]


def hops_result(
    accuracy: Any = ACCURACY,
    exit_loops: Any = EXIT_LOOPS,
    exit_accuracy: Any = EXIT_ACCURACY,
    **changes: Any,
) -> HopsResult:
    fields: dict[str, Any] = {
        "exit_rule": "argmax stable for 2 loops",
        "hops": [1, 2, 4, 5, 8],
        "loops": [1, 2, 4, 8, 16],
        "right": answers(accuracy),
        "max_train_hops": 4,
        "trained_loops": (2, 8),
        "taken": loops_taken(exit_loops),
        "taken_right": answers(exit_accuracy),
        "rank_correlation": 0.97,
        "leak_baselines": {n: {"majority": 0.07, "suffix": 0.08} for n in (1, 2, 4, 5, 8)},
        "chance": 0.0625,
        "stage_curve": [(0, 1), (50, 2), (90, 4), (200, 4)],
        "trace": loop_trace(),
        "seconds": 60.0,
        "steps": 200,
    }
    return HopsResult(**{**fields, **changes})


def halted_result() -> HopsResult:
    """Loops that never help, as the original's halting gives."""
    return hops_result(
        name="The original's halting",
        decider="ACT",
        accuracy=[[value] * 5 for value in (0.9, 0.3, 0.1, 0.08, 0.06)],
        exit_loops=[1.1] * 5,
        exit_accuracy=[0.9, 0.3, 0.1, 0.08, 0.06],
        rank_correlation=None,
    )


def demo_results(**changes: Any) -> DemoResults:
    fields: dict[str, Any] = {
        "text": text_result(),
        "hops": hops_result(),
        "original_halting": halted_result(),
        "total_seconds": 130.0,
        "machine": "2 <fast> cores",
        "version": "0.0.0",
        "command": "openmythos demo --out 'a & b'",
    }
    return DemoResults(**{**fields, **changes})
