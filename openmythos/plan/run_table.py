"""Finished runs as columns: read from run folders, or from a CSV or JSONL table. No torch."""

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from openmythos.config import ModelConfig
from openmythos.config.schema import from_dict, shown
from openmythos.folder import in_a_sentence
from openmythos.plan.scaling_law import sizes

COLUMNS = ("once", "loop", "num_loops", "tokens", "test_loops", "loss")
MAX_LOSSES = 5000  # the search holds all of them at every exponent that it tries

Row = dict[str, float]


def read_runs(paths: list[Path]) -> dict[str, np.ndarray]:
    """The columns of runs; those that not every run has are left out.

    A run folder gives its newest held-out losses, in bits per byte: a row per number of loops.

    Raises:
        ValueError: A file or folder is none of these, or a value is no positive number.
    """
    tables = [path for path in paths if not path.is_dir()]
    if tables and len(paths) > 1:
        raise ValueError(f"{tables[0]} is a table; give it alone, or give run folders")
    rows = read_table(tables[0]) if tables else [row for path in paths for row in _of_run(path)]
    if len(rows) > MAX_LOSSES:
        raise ValueError(f"these are {len(rows):,} losses; a fit takes at most {MAX_LOSSES:,}")
    names = [name for name in COLUMNS if all(name in row for row in rows)]
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}


def read_table(path: Path) -> list[Row]:
    """The rows of a .csv or .jsonl file; columns of other names are not read.

    Raises:
        ValueError: It is another file, has no rows, or holds what is no positive number.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path} is no run folder and no .csv or .jsonl table")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows: Iterable[Any] = (
            csv.DictReader(lines)
            if path.suffix == ".csv"
            else [json.loads(line) for line in lines if line.strip()]
        )
        found = [_row(f"{path}, row {i}", row) for i, row in enumerate(rows, start=1)]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from None
    if not found or "loss" not in found[0]:
        raise ValueError(f"{path} holds no runs with a loss; its columns are {', '.join(COLUMNS)}")
    return found


def _row(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {shown(row)}; give an object with {', '.join(COLUMNS)}")
    numbers = {}
    for name in COLUMNS:
        if name not in row:
            continue
        try:
            value = float(row[name])
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value < math.inf or (value == 0 and name not in ("once", "loop")):
            raise ValueError(f"{where}: {name} is {shown(row[name])}; give a number above 0")
        numbers[name] = value
    return numbers


def _of_run(folder: Path) -> list[Row]:
    """The newest held-out losses of a run's folder, one row per number of loops."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows, length = config["train"]["batch_size"], config["data"]["seq_len"]
        sampling = config["train"]["depth"]["sampling"]
        once, loop = sizes(from_dict(ModelConfig, config["model"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder} is not the folder of a run on text: {in_a_sentence(error)}"
        ) from None
    logged = list(_rows(lines))
    measured = [row for row in logged if row.get("kind") == "validation"]
    last = max((row["step"] for row in measured), default=0)
    losses = {
        row["num_loops"]: row["bits_per_byte"]
        for row in measured
        if row["step"] == last and row.get("bits_per_byte")
    }
    if not losses or not last:
        raise ValueError(f"{folder} has no held-out bits per byte in metrics.jsonl")
    tokens = float(last * rows * length)
    trained = [
        row["num_loops"] for row in logged if row.get("kind") == "train" and "num_loops" in row
    ]
    mean = fmean(trained) if trained else _mean_loops(sampling)
    return [
        {
            "once": float(once),
            "loop": float(loop),
            "num_loops": mean,
            "tokens": tokens,
            "test_loops": float(loops),
            "loss": float(loss),
        }
        for loops, loss in sorted(losses.items())
    ]


def _rows(lines: list[str]) -> Iterable[dict[str, Any]]:
    """The rows of metrics.jsonl; a last one that was cut is left out."""
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield row


def _mean_loops(sampling: dict[str, Any]) -> float:
    """The mean depth that a run's configuration asks for, before limits and ramps."""
    if "mean_recurrence" in sampling:
        return float(sampling["mean_recurrence"])
    return (sampling["low"] + sampling["high"]) / 2
