"""A study: its runs, what one run measures, what the results say, and how it is carried out.

``main`` is the last line of each ``experiments/NAME/run.py``; README.md of this folder says how to
write one.
"""

from __future__ import annotations

import abc
import argparse
import inspect
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO, get_args

from experiments import board
from experiments.claim import Claim, Conclusion, read_claims
from experiments.own_process import ROOT, OwnProcess
from experiments.run_store import Result, Results, Run, RunStore
from openmythos.folder import holder, in_a_sentence, locked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["smoke", "small", "fresh", "full"]
SCALES: tuple[Scale, ...] = get_args(Scale)
WORK = ROOT / "runs" / "experiments"  # what runs keep besides their result: checkpoints


class Study(abc.ABC):
    """A group of claims and the experiment that decides them.

    Attributes:
        number: Of the experiment.
        title: The question, in a few words.
        scales: Those that it has; of a scale that is not here nothing is run.
        page_scale: The one whose results decide.
        fresh_seeds: Seeds that the page's scale does not use. The scale "fresh" does its runs with
            these, at the rates that it chose, and the page says whether the verdicts are the same.
        loads: Modules that are loaded once for all runs; torch's optimisers import Dynamo.
    """

    number: ClassVar[int]
    title: ClassVar[str]
    scales: ClassVar[tuple[Scale, ...]] = ("smoke", "small")
    page_scale: ClassVar[Scale] = "small"
    fresh_seeds: ClassVar[tuple[int, ...]] = ()
    loads: ClassVar[tuple[str, ...]] = ("openmythos.train.run", "torch._dynamo")

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(inspect.getfile(type(self))).parent

    # --- what a study says ------------------------------------------------------------------------

    @abc.abstractmethod
    def runs(self, scale: str, done: Results) -> Sequence[Run]:
        """All runs that are known so far, in the order in which they should be done.

        Asked again after every run that has ended, because ``tuned`` chooses rates from results.
        """

    @abc.abstractmethod
    def measure(self, run: Run, scale: str, out: Path) -> Mapping[str, Any]:
        """Do one run and return JSON; called in a process of its own, with one thread.

        Args:
            run: One of ``runs``.
            scale: The scale.
            out: A folder that survives a kill: what was trained there goes on.

        Raises:
            TrainingStopped: The run diverged; it is stored as lost.
        """

    @abc.abstractmethod
    def conclude(self, results: Results) -> Conclusion:
        """One verdict per claim, tables and the figures' data, from stored results only.

        Called when every run has ended. Lost ones are in ``results.lost``, and lack in
        ``results.of(arm)``. At the smoke scale nobody reads the verdicts.
        """

    @abc.abstractmethod
    def draw(self, conclusion: Conclusion) -> Mapping[str, Figure]:
        """A picture for each of the conclusion's figures, by name."""

    # --- what follows from it ---------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.name

    @property
    def root(self) -> Path:
        """The folder above ``experiments``."""
        return self.folder.parent.parent

    @property
    def module(self) -> str:
        """The module that ``python -m`` runs."""
        name = type(self).__module__
        spec = sys.modules[name].__spec__
        return name if spec is None else spec.name

    @cached_property
    def claims(self) -> dict[str, Claim]:
        """The claims of ``expected.json``, by name."""
        return read_claims(self.folder / "expected.json")

    def store(self, scale: str, work: Path = WORK) -> RunStore:
        """Where the results of a scale are; those of smoke are not kept in the study's folder."""
        folder = work / self.name if scale == "smoke" else self.folder
        return RunStore(folder / "results" / scale)

    def run_folder(self, run: Run, scale: str, work: Path = WORK) -> Path:
        """What ``measure`` gets as ``out``: the same for equal arm, seed and settings."""
        return work / self.name / scale / run.name

    def current(self, scale: str, work: Path = WORK) -> tuple[list[Run], Results]:
        """The known runs, and the results of those that have ended."""
        stored = self.store(scale, work).read()
        runs = self._fresh(stored) if scale == "fresh" else list(self.runs(scale, stored))
        names = [run.name for run in runs]
        if len(set(names)) < len(names):
            twice = next(run for run in runs if names.count(run.name) > 1)
            raise ValueError(f"{self.name} has two runs of equal settings: {twice}")
        found = (stored.find(run) for run in runs)
        return runs, Results(result for result in found if result is not None)

    def _fresh(self, stored: Results) -> list[Run]:
        """The page's runs with other seeds; none before those are complete.

        A run that is lost is followed by one with the next seed, at most as many as there were to
        be: a verdict needs seeds, and what was lost stays on the page.
        """
        runs, done = self.current(self.page_scale)
        if len(done) < len(runs):
            return []
        most = 2 * len(self.fresh_seeds)
        allowed = range(min(self.fresh_seeds), min(self.fresh_seeds) + most)
        if {run.seed for run in runs} & set(allowed):
            raise ValueError(f"{self.name}: fresh_seeds {self.fresh_seeds} are used")
        plans = {Run(run.arm, 0, run.settings).name: run for run in runs if not run.tuning}
        found = []
        for run in plans.values():
            seeds = list(self.fresh_seeds)
            for seed in seeds:
                found.append(Run(run.arm, seed, run.settings))
                result = stored.find(found[-1])
                if result is not None and result.lost is not None and len(seeds) < most:
                    seeds.append(seeds[-1] + 1)
        return found


# --- carrying it out ------------------------------------------------------------------------------


def carry_out(
    study: Study,
    scale: str,
    work: Path = WORK,
    workers: int = 1,
    retry: bool = False,
    again: bool = False,
) -> Results:
    """Do every run that has no result yet, ``workers`` at once; return all results.

    Args:
        study: The study.
        scale: The scale.
        work: The folder of the runs' folders.
        workers: Processes at once.
        retry: Whether runs that are stored as lost are done again.
        again: Whether all are: stored results and what runs have kept are deleted first.

    Raises:
        ValueError: Another process carries out the same study.
    """
    store = study.store(scale, work)
    show = Progress(study.name, sys.stdout)
    with locked(work / study.name / scale):
        if again:
            store.forget(store.read())
            for folder in (work / study.name / scale).glob("*/"):
                shutil.rmtree(folder)
        if retry:
            store.forget(study.current(scale, work)[1].lost)
        running: list[OwnProcess] = []
        try:
            while True:
                runs, done = study.current(scale, work)
                ended = {result.run.name for result in done} | {p.run.name for p in running}
                waiting = [run for run in runs if run.name not in ended]
                for run in waiting[: workers - len(running)]:
                    show.started(run, runs)
                    out = study.run_folder(run, scale, work)
                    _wait_for_the_last_owner(out)
                    running.append(OwnProcess(study, run, scale, out))
                if not running:
                    show.finished(done)
                    return done
                for process, result in _next_ended(running, show):
                    running.remove(process)
                    store.add(result)
                    show.ended(result)
        finally:
            for process in running:
                process.stop()


def _next_ended(running: Sequence[OwnProcess], show: Progress) -> list[tuple[OwnProcess, Result]]:
    """Wait until at least one of the processes has ended."""
    while True:
        asked = [(process, process.ended()) for process in running]
        ended = [(process, result) for process, result in asked if result is not None]
        if ended:
            return ended
        show.waiting(running)
        time.sleep(0.1)


def _wait_for_the_last_owner(out: Path) -> None:
    """A process whose parent was killed ends by itself soon."""
    while holder(out) is not None:
        time.sleep(0.1)


class Progress:
    """Which run of how many, and seconds so far: lines, and in a terminal a line that counts."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name, self.stream, self.shown = name, stream, 0.0
        self.place: dict[str, str] = {}

    def started(self, run: Run, runs: Sequence[Run]) -> None:
        """A run begins."""
        number = [one.name for one in runs].index(run.name) + 1
        self.place[run.name] = f"{self.name}: run {number} of {len(runs)} known, {_in_words(run)}"
        self._line(self.place[run.name])

    def waiting(self, running: Sequence[OwnProcess]) -> None:
        """Some time has passed."""
        if self.stream.isatty() and time.perf_counter() - self.shown > 0.5:
            self.shown = time.perf_counter()
            said = "; ".join(f"{self.place[p.run.name]}, {p.seconds:.0f} s" for p in running)
            self.stream.write(f"\r\033[K{said}")
            self.stream.flush()

    def ended(self, result: Result) -> None:
        """A run has ended."""
        how = "done" if result.lost is None else f"LOST ({result.lost})"
        seconds = f"{result.seconds:.1f} s, {result.cpu_seconds:.1f} s of CPU"
        self._line(f"{self.place[result.run.name]}: {how}, {seconds}")

    def finished(self, results: Results) -> None:
        """Every run has ended."""
        cpu = sum(result.cpu_seconds for result in results)
        lost = f", {len(results.lost)} of them lost (again with --retry)" if results.lost else ""
        self._line(f"{self.name}: {len(results)} runs are stored{lost}, {cpu:.0f} CPU seconds")

    def _line(self, text: str) -> None:
        start = "\r\033[K" if self.stream.isatty() else ""
        print(f"{start}{text}", file=self.stream, flush=True)


def _in_words(run: Run) -> str:
    rate = f", rate {run.settings['rate']:g}" if "rate" in run.settings else ""
    return f"{run.arm} seed {run.seed}{rate}{' (tuning)' if run.tuning else ''}"


def main(study: Study) -> None:
    """Carry out a study at the scale of the command line, and write its pages."""
    parser = argparse.ArgumentParser(description=study.title)
    parser.add_argument("--scale", choices=SCALES, default="smoke")
    parser.add_argument("--workers", type=int, default=1, help="Processes at once.")
    parser.add_argument("--retry", action="store_true", help="Do lost runs again.")
    parser.add_argument("--again", action="store_true", help="Do all runs again, from nothing.")
    parser.add_argument("--work", type=Path, default=WORK, help="Folder of the runs' folders.")
    given = parser.parse_args()
    if given.workers < 1:
        parser.error(f"--workers is {given.workers}; give at least 1")
    scales = [*study.scales, *(["fresh"] if study.fresh_seeds else [])]
    if given.scale not in scales:
        print(f"{study.name}: there is no {given.scale} scale, only {', '.join(scales)}")
        return
    work = given.work.absolute()
    try:
        carry_out(study, given.scale, work, given.workers, given.retry, given.again)
        if given.scale == "smoke":
            board.try_out(study, work)
            print(f"{study.name}: a few steps of each arm ran; this scale gives no verdict")
        elif given.scale in (study.page_scale, "fresh"):
            board.write_pages(study)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {in_a_sentence(error)}", file=sys.stderr)
        sys.exit(2)
