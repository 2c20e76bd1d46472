import json
from typing import Any

import pytest

from openmythos.config.presets import preset
from openmythos.plan.choice import plan_training
from openmythos.plan.serving import GPUS
from openmythos.plan.training import Work
from tests.command.conftest import Invoke, refused

TABLE_WIDTH = 120
ONE_T = ("plan", "mythos-1t", "--devices", 1024, "--memory-gib", 80, "--optimizer", "adamw")


def planned(invoke: Invoke, *arguments: object) -> dict[str, Any]:
    return json.loads(invoke("plan", *arguments, "--json"))


def test_a_plan_shows_memory_exchanges_and_what_was_refused(invoke: Invoke) -> None:
    output = invoke(*ONE_T, "--context-length", 1024, "--ep", 128, "--tp", 1)
    lines = output.splitlines()
    tables = [line for line in lines if not line.startswith(("A step", "No lay", "Refused"))]
    assert max(map(len, tables)) <= TABLE_WIDTH, output
    text = " ".join(output.split())
    assert "80.0 GiB, of them 72.0 used" in text
    assert "parameters 3.67 3.67 3.67 3.67" in text and "optimizer 7.34 7.34 7.34 7.34" in text
    assert "core gradients 25.90 25.90 25.90 25.90" in text
    assert "tokens to experts and back all to all 128" in text
    assert "No layout fits. The smallest is dp_shard 1024, ep 128, tp 1" in text
    assert output.count("Refused: ") == 2 and "exchange limits it" in text


def test_json_is_what_the_plan_computes(invoke: Invoke) -> None:
    options = ("--devices", 8, "--gpu", "h200", "--context-length", 2048, "--rows", 2)
    report = planned(invoke, "mythos-3b", *options)
    work = Work(context_length=2048, rows=2)
    plan = plan_training(preset("mythos-3b"), 8, GPUS["h200"], work)
    assert report["fits"] is plan.fits is True and report["dry_run"] is None
    assert report["chosen"]["memory"] == plan.chosen.memory
    assert report["chosen"]["num_bytes"] == sum(plan.chosen.memory.values())
    # Those of the moment that is not shown, too: every weight of the core in bfloat16.
    assert report["chosen"]["core_gradients"] == plan.chosen.core_gradients > 0
    assert report["chosen"]["core_gradients"] == plan.chosen.memory["core_weights"]
    assert [row["reason"] for row in report["refused"]] == [each.reason for each in plan.refused]
    ways = [(row["layout"]["core_gather"], row["recompute"]) for row in report["variants"]]
    assert ways == [("step", False), ("step", True), ("loop", False), ("loop", True)]
    by_step, _, by_loop, _ = report["variants"]
    gathered = lambda row: sum(  # noqa: E731
        each["num_bytes"] for each in row["exchanges"] if each["what"] == "core weights"
    )
    assert gathered(by_loop) == 16 * gathered(by_step)  # 8 loops, forward and backward
    given = planned(invoke, "mythos-3b", *options, "--tp", 2, "--core-gather", "loop")
    assert given["chosen"]["layout"]["tp"] == 2
    assert given["chosen"]["layout"]["core_gather"] == "loop"


def test_one_device_has_no_table_of_exchanges(invoke: Invoke) -> None:
    output = invoke("plan", "tiny", "--devices", 1, "--no-recompute")
    assert "Exchanges" not in output and "Chosen: dp_shard 1" in output
    assert "whole gradients" not in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tiny", "--serve", "--devices", 2), "say what to plan: its serving with --serve, or its"),
        (("tiny", "--devices", 2, "--rate", 3), "--rate belongs to a plan with --serve"),
        (("tiny", "--serve", "--tp", 2), "--tp belongs to a plan with --devices"),
        (("tiny", "--devices", 2, "--optimizer", "sgd"), "--optimizer is 'sgd'; it must be one of"),
        (("tiny", "--devices", 2, "--core-gather", "x"), "--core-gather is 'x'; it must be one of"),
        (("tiny", "--devices", 2, "--dry-run", "x"), "--dry-run is 'x'; it must be one of shards"),
        (("tiny", "--devices", 2, "--tp", 3), "2 devices have no layout with tp 3"),
        (("tiny", "--devices", 2, "--ep", 2), "the model has no experts"),
        (("tiny", "--devices", 2, "--network-gb", 0), "--network-gb is 0.0; it must be above 0"),
        (("tiny", "--devices", 2, "--link-gb", "nan"), "--link-gb is nan; it must be a number ab"),
        (("tiny", "--devices", 2, "--memory-gib", -80), "--memory-gib is -80.0; it must be above"),
        (
            ("tiny", "--devices", 2, "--memory-gib", 80, "--memory-gb", 80),
            "--memory-gb 80.0 and --memory-gib 80.0: give one of them",
        ),
    ],
)
def test_refusals_in_one_line(invoke: Invoke, arguments: tuple[Any, ...], said: str) -> None:
    message = refused(invoke, "plan", *arguments)
    assert said in message and "\n" not in message


def test_a_dry_run_builds_what_was_planned(invoke: Invoke) -> None:
    text = invoke("plan", "tiny", "--devices", 8, "--context-length", 64, "--dry-run", "step")
    assert text.count("0 bytes off") == 3 and "Shards of rank 7:" in text
    assert "Exchanges of a step, all gather: 8, 5.53 MiB, as planned" in text
    report = planned(invoke, "tiny", "--devices", 1, "--dry-run", "shards")
    (alone,) = report["dry_run"]["shards"]
    assert alone["built"] == alone["planned"] == report["chosen"]["memory"]["parameters"]


def test_a_difference_ends_with_status_1(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from openmythos.train import dry_run

    planned_shapes = dry_run.local_shapes
    monkeypatch.setattr(
        dry_run, "local_shapes", lambda *of: {**planned_shapes(*of), "final_norm.weight": (7,)}
    )
    options = ("plan", "tiny", "--devices", 1, "--dry-run", "shards")
    output = invoke(*options, status=1)
    assert "Shards of rank 0:" in output and "+612 bytes off: final_norm.weight" in output
    (row,) = json.loads(invoke(*options, "--json", status=1))["dry_run"]["shards"]
    assert row["built"] - row["planned"] == 4 * (160 - 7)
    assert list(row["differing"]) == ["final_norm.weight"]
