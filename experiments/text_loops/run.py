"""Experiment 6: loops on text.

``python -m experiments.text_loops.run --scale small`` trains five arms on Python's documentation.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.claim import Conclusion
from experiments.equal_accuracy import course
from experiments.run_store import Result, Results, Run
from experiments.study import ROOT, Study, main
from experiments.text_loops import verdicts
from experiments.text_loops.arm import (
    ARMS,
    LEVELS,
    MOE,
    SEQ_LEN,
    STACKS,
    TRAINED_LOOPS,
    ZOO,
    run_config,
)
from experiments.tuning import tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from openmythos.model.recurrent import RecurrentDepthLM
    from openmythos.train.run import Run as Training
    from openmythos.train.task import TextTask

SEEDS, RATES = (0, 1, 2), (0.01, 0.02, 0.04)
SIZES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {
        "steps": 2,
        "batch_size": 2,
        "seq_len": 64,
        "held_out_batches": 1,
        "cache_batches": 1,
    },
    "small": {
        "steps": 200,
        "batch_size": 12,
        "seq_len": SEQ_LEN,
        "held_out_batches": 8,
        "cache_batches": 4,
    },
}
DEPTHS = (*verdicts.FITTED, 12, 16, verdicts.FAR)
TEXT = "python-docs"
EXPERT_LOOPS = max(verdicts.CLAIMED)


class TextLoops(Study):
    """Five arms, trained alike."""

    number, title = 6, "Text: loops against plain stacks, and what each loop adds"

    def runs(self, scale: str, done: Results) -> list[Run]:
        """Three seeds per arm, after the rate was chosen."""
        settings = SIZES[scale]
        if scale == "smoke":
            return [Run(arm, 0, {**settings, "rate": RATES[1]}) for arm in ARMS]
        found = [Run(ZOO, 0, {"held_out_batches": settings["held_out_batches"]})]
        for arm in ARMS:
            choice = tuned(done, arm, settings, RATES, _score)
            found += choice.then(arm, settings, SEEDS)
        return found

    def measure(self, run: Run, scale: str, out: Path) -> dict[str, Any]:
        """Train, then measure on held-out text."""
        if run.arm == ZOO:
            return measure_zoo(run, out)
        from experiments.text_loops import held_out
        from experiments.text_loops.bigram import Bigrams
        from openmythos.train.metrics import read_metrics
        from openmythos.train.run import set_up
        from openmythos.train.task import TextTask

        source = str(ROOT / "docs" / "families") if scale == "smoke" else TEXT
        trained = set_up(run_config(run.arm, run.seed, run.settings, source), out / "model")
        if trained.train().interrupted:
            raise KeyboardInterrupt
        model, task, batches = trained.model, trained.task, run.settings["held_out_batches"]
        assert isinstance(task, TextTask) and task.validation is not None
        loops = 1 if run.arm in STACKS else TRAINED_LOOPS
        depths = (loops,) if run.tuning or run.arm in STACKS else DEPTHS
        losses = held_out.token_losses(
            model, task.validation, depths, max(verdicts.FITTED), batches
        )
        rows = [
            row for row in read_metrics(out / "model" / "metrics.jsonl") if row["kind"] == "train"
        ]
        last = [row["bits_per_byte"] for row in rows[-max(1, len(rows) // 10) :]]
        found: dict[str, Any] = {
            "text": {
                "python": platform.python_version(),
                "tokenizer": task.train.tokenizer.fingerprint[:12],
                "training_tokens": task.train.num_tokens,
                "held_out_tokens": len(losses.targets),
            },
            "training_bits": float(np.mean(last)),
            "held_out": losses.bits_per_byte(loops),
        }
        if not run.tuning:
            found |= at_equal_loss(trained, out, task, loops, batches)
        if len(depths) == 1:
            return found
        found["by_loops"] = {str(n): losses.bits_per_byte(n) for n in depths}
        bigrams = Bigrams.of(task.train)
        found["surprisal"] = held_out.by_surprisal(losses, bigrams, 1, TRAINED_LOOPS)
        found["cache"] = held_out.cache_losses(
            model, task.validation, TRAINED_LOOPS, run.settings["cache_batches"]
        )
        if run.arm == MOE:
            found["experts"] = held_out.expert_sets(model, task.validation, EXPERT_LOOPS, batches)
        return found

    def conclude(self, results: Results) -> Conclusion:
        """See ``verdicts``."""
        return verdicts.conclude(self.claims, results)

    def draw(self, conclusion: Conclusion) -> dict[str, Figure]:
        """See ``picture``."""
        from experiments.text_loops import picture

        data = conclusion.figures
        return {
            "bits_by_loops": picture.bits_by_loops(data["bits_by_loops"]),
            "surprisal": picture.surprisal(data["surprisal"]),
            "experts": picture.experts(data["experts"]),
        }


def at_equal_loss(
    trained: Training, out: Path, task: TextTask, loops: int, batches: int
) -> dict[str, Any]:
    """Training text at every checkpoint; held-out text at the first below each of ``LEVELS``."""
    from openmythos.data.loader import TokenLoader
    from openmythos.train.validation import held_out_bits_per_byte

    assert isinstance(task.train, TokenLoader) and task.validation is not None
    seen, unseen = task.train, task.validation

    def bits(model: RecurrentDepthLM) -> float:
        return held_out_bits_per_byte(model, seen, loops, max(1, batches // 4))

    def held_out(model: RecurrentDepthLM) -> dict[str, Any]:
        by_loops = {n: held_out_bits_per_byte(model, unseen, n, batches) for n in (1, loops)}
        return {"training": bits(model), "held_out": by_loops[loops], "one_loop": by_loops[1]}

    way = course(trained, out, [-level for level in LEVELS], lambda model: -bits(model))
    return {
        "by_step": [(step, -score) for step, score in way.by_step],
        "equal_loss": {str(level): way.at(-level, held_out) for level in LEVELS},
    }


def measure_zoo(run: Run, out: Path, source: str = TEXT) -> dict[str, Any]:
    """The curve of zoo:text, which was trained eight times as long, on text held out from it."""
    from experiments.text_loops.held_out import token_losses
    from openmythos import load_pretrained
    from openmythos.data.loader import TokenLoader
    from openmythos.data.prepare import prepare
    from openmythos.interop.hub import local_folder
    from openmythos.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(local_folder("zoo:text"))
    prepare(source, out / "data", tokenizer=tokenizer)
    loader = TokenLoader(out / "data", "val", seq_len=SEQ_LEN, batch_size=12)
    batches = run.settings["held_out_batches"]
    most = max(verdicts.FITTED)
    losses = token_losses(load_pretrained("zoo:text"), loader, DEPTHS, most, batches)
    return {"by_loops": {str(n): losses.bits_per_byte(n) for n in DEPTHS}}


def _score(result: Result) -> float:
    return -float(result.data["held_out"])


STUDY = TextLoops()

if __name__ == "__main__":
    main(STUDY)
