"""The same tasks through the harness' own Hugging Face backend and through our adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from openmythos.eval.harness import HarnessModel, read_task
from openmythos.eval.scoring import Scorer


def through_hf(
    folder: Path, tasks: Path, apply_chat_template: bool = False, **model_args: Any
) -> dict[str, Any]:
    """Results of the stock ``hf`` model on a folder with a tokenizer, such as an export.

    For an export give ``trust_remote_code=True, num_loops=4, dtype="float32"``.
    """
    # Neither side adds a begin token of its own accord: in the harness that is up to the tokenizer.
    given = {"pretrained": str(folder), "add_bos_token": False, **model_args}
    chat = {"apply_chat_template": apply_chat_template}
    return _evaluated(tasks, model="hf", model_args=given, device="cpu", batch_size=4, **chat)


def through_ours(scorer: Scorer, tasks: Path, apply_chat_template: bool = False) -> dict[str, Any]:
    """Results of our adapter, told to add no begin token either."""
    assert not scorer.add_bos
    chat = {"apply_chat_template": apply_chat_template}
    return _evaluated(tasks, model=HarnessModel(scorer), **chat)


def _evaluated(tasks: Path, **options: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        # Describing the machine starts a dozen programs and takes longer than the evaluation.
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        found = evaluator.simple_evaluate(
            tasks=[read_task(path) for path in sorted(tasks.glob("*.yaml"))],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=10,
            **options,
        )
    assert found is not None
    return found


def assert_equal_scores(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """Every metric, and every answer to every request."""
    assert ours["results"].keys() == theirs["results"].keys()
    for task, metrics in theirs["results"].items():
        assert ours["results"][task].keys() == metrics.keys()
        for name, value in metrics.items():
            if isinstance(value, float):
                value = pytest.approx(value, abs=tolerance, rel=tolerance)
            assert ours["results"][task][name] == value, f"{task} {name}"
    for task, rows in theirs["samples"].items():
        for mine, row in zip(ours["samples"][task], rows, strict=True):
            assert mine["arguments"] == row["arguments"]
            assert_equal_answers(mine["resps"], row["resps"], tolerance)


def assert_equal_answers(ours: Sequence[Any], theirs: Sequence[Any], tolerance: float) -> None:
    for (mine,), (other,) in zip(ours, theirs, strict=True):
        mine, other = (x if isinstance(x, tuple) else (x,) for x in (mine, other))
        for one, two in zip(mine, other, strict=True):
            if isinstance(two, float):
                two = pytest.approx(two, abs=tolerance, rel=tolerance)
            assert one == two
