"""``exit.json``: what was chosen comes back; what is damaged is refused in one line."""

import json
from pathlib import Path

import pytest
import torch

from openmythos.checkpoint.save import EXIT_FILE
from openmythos.eval.calibration import Point, Setting, choose
from openmythos.eval.exit_choice import ExitChoice, processor_name, read_choice, write_choice
from openmythos.model.exit import KLExit, Rule


def write(folder: Path, rule: Rule | None) -> None:
    points = [
        Point(Setting(4), [(1.0, 1.0), (0.5, 1.0)], 10, 40, (10.0, 10.0, 10.0)),
        Point(Setting(4, rule), [(1.0, 1.0), (0.5, 1.0)], 10, 20, (20.0, 20.0, 2.0)),
    ]
    found = choose(points, "accuracy", 0.1)
    write_choice(found, folder / EXIT_FILE, "a processor", {"max_rows": 2})


def test_a_rule_and_what_was_measured(tmp_path: Path) -> None:
    assert read_choice(tmp_path) is None
    rule = KLExit(threshold=0.1, check_every=2)
    write(tmp_path, rule)
    assert read_choice(tmp_path) == ExitChoice(4, rule, "a processor")
    stored = json.loads((tmp_path / EXIT_FILE).read_text())
    assert stored["chosen"]["quality"]["value"] == 0.75 and stored["metric"] == "accuracy"
    assert stored["chosen"]["tokens_per_s"] == 20 and stored["shallowest_fixed"]["mean_loops"] == 4
    assert len(stored["points"]) == 2 and stored["settings"] == {"max_rows": 2}


def test_a_depth_alone(tmp_path: Path) -> None:
    write(tmp_path, None)
    choice = read_choice(tmp_path)
    assert choice == ExitChoice(4, None, "a processor")
    assert str(choice) == "4 loops per token"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "Expecting value"),
        ({"version": 2}, "version is 2; it must be 1"),
        ({"num_loops": 0}, "num_loops is 0"),
        ({"num_loops": "4"}, "num_loops is '4'"),
        ({"exit_rule": {"kind": "never"}}, "'never'"),
        ({"exit_rule": {"threshold": 1}}, "kind"),
        ({"exit_rule": 3}, ""),
        ({"processor": None}, "processor is None"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, object] | None, said: str
) -> None:
    write(tmp_path, KLExit())
    path = tmp_path / EXIT_FILE
    stored = json.loads(path.read_text())
    path.write_text("nothing" if change is None else json.dumps(stored | change))
    with pytest.raises(ValueError, match="run openmythos calibrate-exit again") as caught:
        read_choice(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    for name in ("num_loops", "processor", "version", "exit_rule"):
        path.write_text(json.dumps({key: value for key, value in stored.items() if key != name}))
        with pytest.raises(ValueError, match=f"it has no '{name}'"):
            read_choice(tmp_path)


def test_the_processor_has_a_name() -> None:
    name = processor_name(torch.device("cpu"))
    assert name and "\n" not in name
    assert processor_name(torch.device("meta")) == f"{name} (meta)"
