import subprocess
import sys
from pathlib import Path

import pytest

from openmythos.eval import task_name
from openmythos.eval.task import TEXT_TASKS
from openmythos.eval.task_name import TEXT_NAMES, did_you_mean, require_harness, require_names


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A harness with the tasks near_one, quoted and a group, which has a tag."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.yaml").write_text("task: near_one\ntag:\n  - some_tag\n")
    (tmp_path / "b.yaml").write_text("group: 'a_group'\ntask:\n  - near_one\n")
    monkeypatch.setattr(task_name, "require_harness", lambda: tmp_path)
    return tmp_path


def test_names_that_may_be_tasks_pass(harness: Path) -> None:
    require_names([*TEXT_NAMES, "hops_1", "hops_12", "near_one", "a_group", "some_tag"])
    require_names(["x.yaml", str(harness)])  # the path is looked at later


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("nope", None),
        ("near_two", "near_one"),
        ("agroup", "a_group"),
        ("python_docs_choices", "python_docs_choice"),
        ("hop_4", "hops_4"),
        ("hops_0", "hops_1"),
        ("hops_", "hops_1"),
        ("hops", "hops_1"),
    ],
)
def test_other_names_are_refused_with_the_nearest(
    harness: Path, name: str, near: str | None
) -> None:
    with pytest.raises(ValueError, match=rf"^no task '{name}'") as caught:
        require_names(["near_one", name])
    hint = "; give" if near is None else f"; did you mean {near!r}? Give"
    said = f"no task {name!r}{hint} a name of lm-evaluation-harness, one of python_docs_choice"
    assert str(caught.value).startswith(said)


def test_ours_need_no_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_name.importlib.util, "find_spec", lambda _: None)
    require_names([*TEXT_NAMES, "hops_3"])
    with pytest.raises(ValueError, match=r"no task 'hop_3' ships; did you mean 'hops_3'.*eval\]"):
        require_names(["hop_3"])
    with pytest.raises(ValueError, match="only the tasks that ship"):
        require_harness()
    assert did_you_mean("zzz", []) == ""
    assert tuple(TEXT_TASKS) == TEXT_NAMES


def test_names_are_checked_without_torch() -> None:
    program = (
        "import sys\n"
        "from openmythos.eval.task_name import require_names\n"
        "try:\n    require_names(['nope'])\nexcept ValueError as error:\n    print(error)\n"
        "print([name for name in ('torch', 'lm_eval', 'numpy') if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", program]
    root = Path(task_name.__file__).parents[2]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert ran.stdout.startswith("no task 'nope'") and ran.stdout.endswith("[]\n")
