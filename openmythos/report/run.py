"""A run's folder as one self-contained page, also while it trains and after it was stopped."""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from openmythos.analysis import picture as style
from openmythos.config import ModelConfig
from openmythos.config.counts import count
from openmythos.config.schema import from_dict
from openmythos.folder import holder, write_whole
from openmythos.report import page as kit
from openmythos.report import picture
from openmythos.report.page import LoopScale, Piece, Sample
from openmythos.report.picture import Curve
from openmythos.train.metrics import read_metrics

PAGE_FILE = "report.html"
HELD_OUT = {"bits_per_byte": "held-out bits per byte", "accuracy": "held-out accuracy"}
PANELS = {  # numbers of a training step, in the order of the page
    "lr_factor": "Learning rates, share of the full ones",
    "num_loops": "Loops drawn",
    "stage": "Longest walks, in hops",
    "state_norm": "State norm |h|",
    "rho": "rho(A)",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
LOAD = "max_violation_loop_"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run's folder holds, as it is at one moment.

    Attributes:
        config: The resolved configuration.
        train: The logged training steps; a number that was not finite is NaN.
        validation: The held-out results, one row per step and number of loops.
        samples: The newest continuations.
        holder: The process that trains in the folder now; None if there is none.
    """

    folder: Path
    config: dict[str, Any]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    samples: list[Sample]
    holder: str | None

    @property
    def step(self) -> int:
        """The last step of which anything is logged."""
        return max((row["step"] for row in (*self.train, *self.validation)), default=0)

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        rows = (*self.train, *self.validation)
        return float(max((row.get("seconds") or 0.0 for row in rows), default=0.0))

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0..1."""
        done = {"max_steps": self.step, "max_seconds": self.seconds}
        shares = [
            value / self.settings[name] for name, value in done.items() if self.settings.get(name)
        ]
        return min(1.0, max(shares, default=0.0))

    @property
    def status(self) -> str:
        """How far the run is, in words."""
        most = self.settings.get("max_steps")
        steps = f"step {self.step:,}" + (f" of {most:,}" if most else "")
        if self.progress >= 1:
            return f"done, {self.step:,} steps"
        if self.holder is not None:
            return f"training now, {steps}"
        return f"stopped at {steps}; the same command goes on"

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration of the training."""
        return dict(self.config.get("train") or {})

    @property
    def metric(self) -> str | None:
        """The number that is measured on what is held out; None if nothing was measured."""
        return next(
            (name for name in HELD_OUT if self.validation and name in self.validation[0]), None
        )

    def curve(self, name: str) -> Curve:
        """A number of the training steps."""
        return [(float(row["step"]), number(row[name])) for row in self.train if name in row]

    def held_out(self) -> dict[int, list[tuple[float, float]]]:
        """The held-out number over steps, by number of loops."""
        curves: dict[int, list[tuple[float, float]]] = {}
        for row in self.validation:
            if self.metric in row and "num_loops" in row:
                point = (float(row["step"]), number(row[self.metric]))
                curves.setdefault(row["num_loops"], []).append(point)
        return curves

    def newest(self) -> dict[int, float]:
        """The newest held-out number by number of loops."""
        last = max((row["step"] for row in self.validation), default=0)
        return {n: curve[-1][1] for n, curve in self.held_out().items() if curve[-1][0] == last}


def read_run(folder: Path) -> RunRecord:
    """What a run's folder holds; a folder in use may be read too.

    Raises:
        ValueError: It is no run's folder.
    """
    path = folder / "config.json"
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
        runs = [name for name in inside if (folder / name / "checkpoints").is_dir()]
        hint = f"give one of the runs in it: {', '.join(runs)}" if runs else "give a run's folder"
        raise ValueError(f"{folder} holds no config.json; {hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("train"), dict):
        raise ValueError(f"{folder} is not the folder of a run: its config.json has no 'train'")
    metrics = folder / "metrics.jsonl"
    rows = list(read_metrics(metrics)) if metrics.exists() else []
    return RunRecord(
        folder=folder,
        config=config,
        train=[row for row in rows if row["kind"] == "train"],
        validation=[row for row in rows if row["kind"] == "validation"],
        samples=read_samples(folder / "samples"),
        holder=holder(folder),
    )


def read_samples(folder: Path) -> list[Sample]:
    """The samples of the newest file of a folder; none if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        newest = max(folder.glob("step-*.json"), default=None)
        stored = [] if newest is None else json.loads(newest.read_text(encoding="utf-8"))
        return [
            Sample(each["prompt"], [Piece(p["text"], int(p["loops"])) for p in each["pieces"]])
            for each in stored
        ]
    return []


def number(value: Any) -> float:
    """A logged number; NaN for null, which stands for one that was not finite."""
    return float(value) if isinstance(value, int | float) else math.nan


def write_run_page(folder: Path, path: Path | None = None) -> Path:
    """Write the page of a run's folder, by default to ``report.html`` in it.

    Raises:
        ValueError: It is no run's folder, or matplotlib is not installed.
    """
    style.require_matplotlib()
    target = folder / PAGE_FILE if path is None else path
    write_whole(target, render_run(read_run(folder)))
    return target


def render_run(run: RunRecord) -> str:
    """The page as HTML; it refers to nothing outside itself."""
    name = run.folder.resolve().name
    parts = [
        "<header>",
        '<p class="eyebrow">OpenMythos run</p>',
        f"<h1>{escape(name)}</h1>",
        f'<p class="lead">{escape(run.status)}.</p>',
        kit.facts(_facts(run)),
        "</header>",
        "<main>",
        *_learning(run),
        *_depth(run),
        *_steps(run),
        *_samples(run),
        *_config(run),
        "</main>",
    ]
    return kit.page(f"{name}: an OpenMythos run", "\n".join(parts) + "\n")


# --- parts of the page ---------------------------------------------------------------------------


def _facts(run: RunRecord) -> dict[str, str]:
    facts: dict[str, str] = {}
    newest = {n: value for n, value in run.newest().items() if math.isfinite(value)}
    if newest:
        better = max if run.metric == "accuracy" else min
        best = better(newest, key=lambda n: newest[n])
        unit = "accuracy" if run.metric == "accuracy" else "bits/byte"
        facts[f"{unit}, {best} loop{'' if best == 1 else 's'}"] = f"{newest[best]:.3f}"
    elif run.train and "loss" in run.train[-1]:
        facts["loss"] = f"{number(run.train[-1]['loss']):.3f}"
    with contextlib.suppress(ValueError, TypeError, KeyError):  # of another version
        model = from_dict(ModelConfig, run.config["model"])
        facts["parameters"] = kit.large_count(count(model).total_params)
    data = run.config.get("data") or {}
    length = data.get("seq_len")
    if isinstance(length, int):
        facts["tokens seen"] = kit.large_count(
            run.step * run.settings.get("batch_size", 1) * length
        )
    facts["training time"] = kit.duration(run.seconds)
    speeds = sorted(v for _, v in run.curve("tokens_per_second") if math.isfinite(v))
    if speeds:
        facts["tokens per second"] = f"{speeds[len(speeds) // 2]:,.0f}"
    return facts


def _learning(run: RunRecord) -> list[str]:
    if not run.train:
        return ["<section><h2>How it learnt</h2><p>No step is logged yet.</p></section>"]
    parts = ["<section>", "<h2>How it learnt</h2>"]
    names = {"loss": "Loss while training", "bits_per_byte": "Bits per byte while training"}
    for name, title in names.items():
        curve = run.curve(name)
        if not any(math.isfinite(value) for _, value in curve):
            continue
        ends = f"from {curve[0][1]:.3f} to {curve[-1][1]:.3f} at step {curve[-1][0]:,.0f}"
        parts.append(
            kit.figure(
                style.to_svg(picture.loss_curve(curve, title)),
                name,
                f"Line chart: {title.lower()}, {ends}.",
                "Line: smoothed; behind it every logged step, at the depth that it drew. The axis "
                "leaves out the first steps where they are higher, and does not begin at zero.",
            )
        )
    return [*parts, "</section>"]


def _depth(run: RunRecord) -> list[str]:
    curves, metric = run.held_out(), run.metric
    if not curves or metric is None:
        return []
    title = HELD_OUT[metric].capitalize()
    better = "higher" if metric == "accuracy" else "lower"
    said = ", ".join(f"{value:.3f} at {n}" for n, value in sorted(run.newest().items()))
    drawn = [value for _, value in run.curve("num_loops") if math.isfinite(value)]
    mean = sum(drawn) / len(drawn) if drawn else None
    parts = ["<section>", "<h2>What loops buy</h2>"]
    if all(math.isfinite(value) for value in run.newest().values()):
        chart = picture.depth_curve(run.newest(), mean, f"{title}, {better} is better")
        alt = f"Line chart of {HELD_OUT[metric]} by loops: {said}."
        caption = "The newest result. The weights are the same at every point."
        parts.append(kit.figure(style.to_svg(chart), "depth", alt, caption))
    if any(len(curve) > 1 for curve in curves.values()):
        chart = picture.held_out_curves(curves, f"{title} while training")
        alt = f"Line chart of {HELD_OUT[metric]} over steps by loops; at the end {said}."
        parts.append(kit.figure(style.to_svg(chart), "held-out", alt, "Darker: more loops."))
    steps = sorted({step for curve in curves.values() for step, _ in curve})
    by_step = {n: dict(curve) for n, curve in curves.items()}
    head = ["step", *(f"{n} loop{'' if n == 1 else 's'}" for n in sorted(curves))]
    rows = (
        [f"{step:,.0f}", *(_three(by_step[n].get(step)) for n in sorted(curves))] for step in steps
    )
    parts.append(f"<details><summary>As a table</summary>{kit.table(head, rows)}</details>")
    return [*parts, "</section>"]


def _steps(run: RunRecord) -> list[str]:
    charts: dict[str, Mapping[str, Curve]] = {}
    for name, title in PANELS.items():
        curve = run.curve(name)
        if any(math.isfinite(value) for _, value in curve):
            charts[title] = {"": curve}
    loads = _loads(run.train)
    caption = "Over training steps; lines are smoothed where there are many steps."
    if loads:
        charts["Load of the fullest expert"] = loads
        caption += (
            " Load: tokens of the fullest expert over the mean, minus 1 (0 is balanced), per loop, "
            "named at the ends."
        )
    if not charts:
        return []
    alt = "Small line charts over training steps: " + ", ".join(charts) + "."
    chart = kit.figure(style.to_svg(picture.panels(charts)), "steps", alt, caption)
    return ["<section>", "<h2>Step by step</h2>", chart, "</section>"]


def _loads(rows: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    """The experts' load of each loop; of many loops the first, the middle and the last."""
    curves: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(LOAD) and isinstance(value, int | float):
                curves.setdefault(int(name.removeprefix(LOAD)), []).append(
                    (float(row["step"]), float(value))
                )
    loops = sorted(curves)
    shown = loops if len(loops) <= 3 else [loops[0], loops[len(loops) // 2], loops[-1]]
    return {f"loop {loop + 1}": curves[loop] for loop in shown}


def _samples(run: RunRecord) -> list[str]:
    if not run.samples:
        return []
    scale = LoopScale.of(piece.loops for sample in run.samples for piece in sample.pieces)
    said = "<p>Bold is the prompt. Each token is tinted by the loops that it took.</p>"
    pages = [kit.render_html(sample, scale) for sample in run.samples]
    return ["<section>", "<h2>What it writes</h2>", said, kit.legend(scale), *pages, "</section>"]


def _config(run: RunRecord) -> list[str]:
    text = escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    said = "<p>As <code>--config</code> reads it.</p>"
    whole = f"<details><summary>The resolved configuration</summary><pre>{text}</pre></details>"
    return ["<section>", "<h2>Configuration</h2>", said, whole, "</section>"]


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
