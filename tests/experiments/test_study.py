import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import board, check, study
from experiments.own_process import RESULT_FILE, ROOT, OwnProcess
from experiments.run_store import Result, Run
from experiments.study import Study, carry_out
from tests.experiments.planted_study import Planted

EXPECTED = {
    "claims": [
        {
            "name": "wins",
            "article": "a.txt",
            "quote": "Good wins.",
            "rule": "Good is above poor by least_gap.",
            "thresholds": {"least_gap": 0.2},
            "would_change": "Other seeds.",
        }
    ]
}


class Inside(Planted):
    """In a folder of its own."""

    module = Planted.__module__  # type: ignore[assignment]  # which its processes run


class Here:
    """``OwnProcess`` without the process."""

    def __init__(self, study: Study, run: Run, scale: str, out: Path) -> None:
        self.run, self.result = run, study.measure(run, scale, out)

    def ended(self) -> Result:
        return Result(self.run, self.result, None, 1.0, 2.0, "a processor", "2")

    def stop(self) -> None: ...


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inside:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "experiments" / "planted"
    folder.mkdir(parents=True)
    (folder / "expected.json").write_text(json.dumps(EXPECTED))
    (folder / "README.md").write_text(f"# Planted\n\n{board.BEGIN}\n{board.END}\nafter\n")
    (tmp_path / "README.md").write_text(f"# Front\n\n{board.BEGIN}\n{board.END}\nmore\n")
    found = Inside(folder)
    monkeypatch.setattr(board, "studies", lambda folder: [found])
    return found


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "OwnProcess", Here)


def test_processes_lost_runs_and_retries(
    planted: Inside, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    done = carry_out(planted, "smoke", work, workers=2)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "planted: run 1 of 3 known, good seed 0, rate 0.1"
    by_fate = {result.run.settings["fate"]: result for result in done}
    assert by_fate["none"].data["threads"] == "1" and by_fate["none"].lost is None
    assert by_fate["diverges"].lost == "RuntimeError: the loss is nan; kept: step-1"
    assert by_fate["killed"].lost == "killed by signal 9" and by_fate["none"].cpu_seconds > 0
    assert said[-1].startswith("planted: 3 runs are stored, 2 of them lost (again with --retry)")
    store = planted.store("smoke", work)
    before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    assert len(carry_out(planted, "smoke", work)) == 3
    assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before
    store.forget([by_fate["killed"]])
    planted.measure = None  # type: ignore[assignment]  # measured by another process
    carry_out(planted, "smoke", work, retry=True)
    kept = store.path(by_fate["none"].run)
    again = {path for path in store.folder.iterdir() if path.stat().st_mtime_ns != before[path]}
    assert again == set(before) - {kept}


def test_a_result_whose_parent_was_killed_is_taken(planted: Inside, tmp_path: Path) -> None:
    run = planted.runs("smoke", planted.store("smoke", tmp_path).read())[0]
    out = planted.run_folder(run, "smoke", tmp_path)
    out.mkdir(parents=True)
    found = {"data": {"x": 1}, "lost": None, "seconds": 1.0, "cpu_seconds": 2.0}
    found |= {"processor": "p", "torch": "t"}
    (out / RESULT_FILE).write_text(json.dumps(found))
    process = OwnProcess(planted, run, "smoke", out)
    assert process.process is None
    assert process.ended() == Result(run, **found) and not (out / RESULT_FILE).exists()


WAITS = """
import sys, time
from pathlib import Path
from experiments.own_process import OwnProcess
from tests.experiments.planted_study import STUDY

out = Path(sys.argv[1])
OwnProcess(STUDY, STUDY.runs("smoke", [])[-1], "waits", out)
while not (out / "started").exists():
    time.sleep(0.05)
"""


def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITS + "import os; os.kill(os.getpid(), 9)", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=60).returncode == -9
    for _ in range(400):
        if (tmp_path / "ended").exists():
            break
        time.sleep(0.05)
    assert (tmp_path / "ended").read_text() == "15"


@pytest.mark.usefixtures("here")
def test_rates_are_tuned_and_pages_written(planted: Inside, tmp_path: Path) -> None:
    assert board.Finding(planted).conclusion is None
    carry_out(planted, "small", tmp_path / "work")
    results = planted.store("small").read()
    assert [r.run.settings["rate"] for r in results.of("good")] == [0.1] * 3
    assert [r.run.settings["rate"] for r in results.of("poor")] == [10.0] * 3  # beyond the edge
    assert len([r for r in results if r.run.tuning]) == 3 + 4
    board.write_pages(planted)
    page = (planted.folder / "README.md").read_text()
    assert "**Holds.** By so much. The number that decides: 0.4," in page
    assert "> Good wins." in page and page.endswith("\nafter\n")
    assert "| poor | 10 | 0.01, 0.1, 1, 10 | 3 | 0 | 2 | 14 |" in page
    row = "  By so much. Decided by [0.4](../experiments/planted/results/small)"
    assert row in (tmp_path / "docs" / "scoreboard.md").read_text()
    assert check.complaints([planted], tmp_path) == []


@pytest.mark.usefixtures("here")
def test_fresh_seeds_are_concluded_from_beside_the_others(
    planted: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planted.current("fresh")[0] == []  # the others come first
    carry_out(planted, "small", tmp_path / "work")
    carry_out(planted, "fresh", tmp_path / "work")
    fresh = planted.store("fresh").read()
    assert sorted((r.run.arm, r.run.seed) for r in fresh) == [
        *(("good", seed) for seed in (3, 4)),
        *(("poor", seed) for seed in (3, 4)),
    ]
    board.write_pages(planted)
    page = (planted.folder / "README.md").read_text()
    assert "with seeds 3, 4, which nothing was chosen by: 1 of 1 verdicts are the same." in page
    assert "| wins | holds | holds | By so much. |" in page and "Lost:" not in page
    assert check.complaints([planted], planted.root) == []
    (stored,) = planted.store("fresh").folder.glob("poor-4-*.json")
    lost = json.loads(stored.read_text()) | {"lost": "it diverged"}
    stored.write_text(json.dumps(lost))
    (missing,) = {run.name for run in planted.current("fresh")[0]} - {r.run.name for r in fresh}
    assert missing.startswith("poor-5-")  # followed by the next seed
    carry_out(planted, "fresh", tmp_path / "work")
    assert len(planted.store("fresh").read().of("poor")) == 2
    board.write_pages(planted)
    assert "\nLost: poor, seed 4, " in (planted.folder / "README.md").read_text()
    monkeypatch.setattr(Planted, "fresh_seeds", (2, 3))
    with pytest.raises(ValueError, match="are used"):
        planted.current("fresh")


@pytest.mark.usefixtures("here")
def test_one_altered_number_fails_the_check_or_flips_a_verdict(
    planted: Inside, tmp_path: Path
) -> None:
    carry_out(planted, "small", tmp_path / "work")
    board.write_pages(planted)
    store = planted.store("small")
    some = store.path(store.read().of("good")[0].run)
    stored = json.loads(some.read_text())
    unread = json.dumps(stored | {"data": stored["data"] | {"nobody_reads_this": 1}})
    before = some.read_text()
    some.write_text(unread)
    assert check.complaints([planted], tmp_path)[0].startswith("planted/README.md")
    some.write_text(before)
    assert check.complaints([planted], tmp_path) == []
    stored["data"]["accuracy"] -= 0.001
    some.write_text(json.dumps(stored))
    said = check.complaints([planted], tmp_path)
    assert [line.split()[0] for line in said] == [
        "planted/README.md",
        "planted:",
        "docs/scoreboard.md",
    ]
    for seed in range(3):
        path = store.path(store.read().of("good")[seed].run)
        stored = json.loads(path.read_text())
        stored["data"]["accuracy"] = 0.55 + 0.001 * seed
        path.write_text(json.dumps(stored))
    ((_, found),) = board.Finding(planted).verdicts
    assert found is not None and found.decision == "fails"
    (store.folder / "x.json").write_text(some.read_text())
    assert "holds the run" in check.complaints([planted], tmp_path)[0]


@pytest.mark.usefixtures("here")
def test_a_rule_must_be_older_than_its_results(
    planted: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "x")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "x@example.org")

    def commit(*names: str) -> None:
        for words in (["add", *names], ["commit", "-q", "-m", "x"]):
            subprocess.run(["git", "-C", str(planted.folder), *words], check=True)

    rule = planted.folder / "expected.json"
    carry_out(planted, "small", tmp_path / "work")
    assert check.history_complaints(planted) == []  # no checkout
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert "not committed" in check.history_complaints(planted)[0]
    commit("expected.json")
    assert check.history_complaints(planted) == []
    commit("results")
    assert check.history_complaints(planted) == []
    claims = json.loads(rule.read_text())["claims"]
    more = [*claims, {**claims[0], "name": "another"}]
    rule.write_text(json.dumps({"claims": more}))
    assert "not committed" in check.history_complaints(planted)[0]
    commit("expected.json")
    (said,) = check.history_complaints(planted)
    assert "the claim another was added" in said and "after results of every arm" in said
    (planted.folder / "results" / "small" / "later-0-0.json").write_text("{}")
    commit("results")
    assert check.history_complaints(planted) == []  # an arm that ran after the claim
    more[0]["rule"] += " Not so."
    rule.write_text(json.dumps({"claims": more}))
    commit("expected.json")
    assert "which is not before" in check.history_complaints(planted)[0]


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.experiments.planted_study", "--work", str(tmp_path)]
    ran = subprocess.run(
        [*command, "--scale", "full"], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ,
    )  # fmt: skip
    assert ran.stdout.endswith("there is no full scale, only smoke, small, fresh\n")


@pytest.mark.usefixtures("here")
def test_a_figure_leads_the_scoreboard_and_the_front_page(
    planted: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "LEADS", {("planted", "accuracy"): "Good beside poor."})
    board.write_scoreboard(tmp_path)
    front, page = tmp_path / "README.md", tmp_path / "docs" / "scoreboard.md"
    assert (
        "<img" not in front.read_text()
        and "[The scoreboard](docs/scoreboard.md)" in front.read_text()
    )
    carry_out(planted, "small", tmp_path / "work")
    board.write_pages(planted)
    place = "experiments/planted/results/small/accuracy.png"
    picture = f'<img src="{place}" alt="Good beside poor." width="560">'
    assert f"[{picture}](docs/scoreboard.md)" in front.read_text()
    assert front.read_text().endswith("\nmore\n") and (tmp_path / place).is_file()
    said = page.read_text()
    assert said.index(f'<img src="../{place}"') < said.index("- **Holds**: “Good wins.”")
    assert "Again: `openmythos reproduce planted --scale small --again` (26 CPU seconds)" in said
    assert "\n1 claims: 1 holds. They rest on 13 runs of one thread, 0.0 CPU hours" in said
    assert "the longest took 2 CPU seconds. 0 were lost" in said
    assert "\n## 1. A planted answer\n" in said
    assert check.complaints([planted], tmp_path) == []
    front.write_text(front.read_text().replace("Good beside poor.", "Poor beside good."))
    assert [line.split()[0] for line in check.complaints([planted], tmp_path)] == ["README.md"]
    monkeypatch.setattr(board, "LEADS", {("planted", "other"): "Nothing."})
    with pytest.raises(ValueError, match="planted has no figure other"):
        board.write_scoreboard(tmp_path)


@pytest.mark.usefixtures("here")
def test_again_starts_from_nothing(planted: Inside, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = carry_out(planted, "small", work)
    store, out = planted.store("small"), planted.run_folder(first[0].run, "small", work)
    out.mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in store.folder.glob("*.json")}
    carry_out(planted, "small", work, again=True)
    after = {path: path.stat().st_mtime_ns for path in store.folder.glob("*.json")}
    assert after.keys() == before.keys() and not out.exists()
    assert all(after[path] != before[path] for path in before)
