"""Runs and their stored results: one JSON file per run, named by everything that determines it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openmythos.folder import write_whole

NUMBERS = re.compile(r"\[\n[-+.\deEnul,\s]*\]")  # a line break cannot be inside of a string


def canonical(data: object) -> str:
    """The one JSON text of equal data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(data: object) -> str:
    """SHA-256 of the data's canonical JSON, its first 12 hexadecimal digits."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """One training or measurement; arm, seed and settings are all that determines its result.

    Attributes:
        arm: What is compared, in small letters, digits and underscores.
        seed: Of everything that is random.
        settings: JSON: rate, steps, sizes.
        tuning: Whether it only helps to choose the rate; it never counts for a verdict.
    """

    arm: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    tuning: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_]+", self.arm):
            raise ValueError(f"the arm is {self.arm!r}; give small letters, digits, underscores")
        # As it will be read back: tuples are lists, keys are strings.
        object.__setattr__(self, "settings", json.loads(canonical(dict(self.settings))))

    @property
    def name(self) -> str:
        """Equal for runs of equal arm, seed and settings; the name of its file and folder."""
        return f"{self.arm}-{self.seed}-{digest([self.arm, self.seed, self.settings])}"


@dataclass(frozen=True)
class Result:
    """A run that has ended: with data, or lost.

    Attributes:
        run: The run.
        data: What ``Study.measure`` returned; empty if the run is lost.
        lost: Why there is no data: it diverged, was killed or failed; None if it was completed.
        seconds: Of the process that ended the run.
        cpu_seconds: Processor time of the same process.
        processor: Its name.
        torch: Version.
    """

    run: Run
    data: Mapping[str, Any]
    lost: str | None
    seconds: float
    cpu_seconds: float
    processor: str
    torch: str


class Results(list[Result]):
    """Results of one study at one scale."""

    def find(self, run: Run) -> Result | None:
        """The result of the run with this one's arm, seed and settings."""
        return next((result for result in self if result.run.name == run.name), None)

    def of(self, arm: str) -> list[Result]:
        """The arm's results that a verdict may count, by seed; no tuning runs, no lost ones."""
        own = [r for r in self if r.run.arm == arm and not r.run.tuning and r.lost is None]
        return sorted(own, key=lambda result: result.run.seed)

    def values(self, arm: str, value: Callable[[Mapping[str, Any]], float]) -> list[float]:
        """A number of every one of the arm's results that may count, by seed, from its data."""
        return [value(result.data) for result in self.of(arm)]

    @property
    def arms(self) -> list[str]:
        """Every arm once, in the order of the runs."""
        return list(dict.fromkeys(result.run.arm for result in self))

    @property
    def lost(self) -> list[Result]:
        """The runs without data, tuning runs included."""
        return [result for result in self if result.lost is not None]


class RunStore:
    """The folder of a study's results at one scale."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: Run) -> Path:
        """The file of a run's result."""
        return self.folder / f"{run.name}.json"

    def add(self, result: Result) -> None:
        """Write a result, atomically; each list of numbers is one line."""
        text = json.dumps(asdict(result), indent=1) + "\n"
        write_whole(self.path(result.run), NUMBERS.sub(_on_one_line, text))

    def tidy(self) -> None:
        """Write every result in the form of ``add``."""
        for result in self.read():
            self.add(result)

    def read(self) -> Results:
        """Every stored result, ordered by file name.

        Raises:
            ValueError: A file is damaged, or its name is not that of its content.
        """
        return Results(_read(path) for path in sorted(self.folder.glob("*.json")))

    def forget(self, results: Iterable[Result]) -> None:
        """Delete the files of these results."""
        for result in results:
            self.path(result.run).unlink()

    def strangers(self, runs: Iterable[Run]) -> Iterator[Path]:
        """Files that belong to none of the runs."""
        own = {self.path(run) for run in runs}
        return (path for path in sorted(self.folder.glob("*.json")) if path not in own)


def _on_one_line(numbers: re.Match[str]) -> str:
    return "[" + ", ".join(part.strip() for part in numbers[0][1:-1].split(",")) + "]"


def _read(path: Path) -> Result:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        result = Result(**{**stored, "run": Run(**stored["run"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a stored result: {error}") from None
    if path.stem != result.run.name:
        raise ValueError(
            f"{path} holds the run {result.run.name}: its arm, seed or settings were changed"
        )
    return result
