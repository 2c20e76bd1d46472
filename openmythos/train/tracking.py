"""Sending a run's rows to trackio or to Weights & Biases, which share an API.

``metrics.jsonl`` stays the record: nothing is read back from a tracker, and a run goes on without
one that fails.
"""

import hashlib
import importlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PROJECT = "openmythos"


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The names and values of a row's numbers: ``train/loss``, ``validation/accuracy/loops_4``."""
    suffix = f"/loops_{row['num_loops']}" if row["kind"] == "validation" else ""
    for name, value in row.items():
        if isinstance(value, float):
            yield f"{row['kind']}/{name}{suffix}", value


class Tracker:
    """A run in trackio or wandb; a run that goes on is found again by its folder.

    Args:
        library: ``trackio`` or ``wandb``.
        folder: The run's folder.
        config: The run's configuration.

    Raises:
        ValueError: The library is not installed or does not begin.
    """

    def __init__(self, library: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            self.library: Any = importlib.import_module(library)
        except ImportError:
            raise ValueError(
                f"train.track is {library}, which is not installed: pip install "
                f"'openmythos[{library}]', or set train.track to none"
            ) from None
        place = os.path.realpath(folder)
        name = f"{Path(place).name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
        own = {"id": name} if library == "wandb" else {}  # trackio knows a run by its name
        try:
            self.library.init(
                project=PROJECT, name=name, config=dict(config), resume="allow", **own
            )
        except Exception as error:  # of a library's own kinds, such as one without a network
            reason = " ".join(str(error).split())
            raise ValueError(f"train.track is {library}, which does not begin: {reason}") from None
        self.works = True

    def add(self, row: Mapping[str, Any]) -> None:
        """Send a row; of a step that was sent before, wandb keeps what it has."""
        self._try(lambda: self.library.log(dict(scalars(row)), step=row["step"]))

    def close(self) -> None:
        """Send what is left."""
        self._try(self.library.finish)
        self.works = False

    def _try(self, send: Any) -> None:
        if not self.works:
            return
        try:
            send()
        except Exception as error:
            self.works = False
            name, reason = self.library.__name__, " ".join(str(error).split())
            said = f"{name} failed ({reason}); the run goes on without it, metrics.jsonl has all"
            warnings.warn(said, stacklevel=4)
