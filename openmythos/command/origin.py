"""Where a checkpoint comes from: its run, the data or puzzle of that run, and what goes with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmythos.folder import DEPTH_FILE, PUZZLE_FILE, WALKS_FILE, run_of
from openmythos.terminal import note

if TYPE_CHECKING:
    from openmythos.data.puzzle import Puzzle


def require_text(checkpoint: Path) -> None:
    """Check that a folder holds a checkpoint with a tokenizer.

    Raises:
        ValueError: It holds no checkpoint, one of a run on a puzzle, or one without a tokenizer.
    """
    from openmythos.checkpoint.load import read_config
    from openmythos.checkpoint.weights import ADAPTER_CONFIG
    from openmythos.tokenizer_folder import TOKENIZER_FILE, has_tokenizer

    if has_tokenizer(checkpoint):
        return
    if (checkpoint / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{checkpoint} is an adapter without a tokenizer, so it reads no text: copy its base's "
            f"{TOKENIZER_FILE} and what belongs to it there"
        )
    read_config(checkpoint)  # refuses what is no checkpoint
    puzzle = puzzle_of(checkpoint)
    if puzzle is not None:
        raise ValueError(
            f"{checkpoint} is of a run on a puzzle ({puzzle.kind}): it reads {puzzle.words[0]}, "
            f"{puzzle.words[1]} ... and no text; openmythos eval {run_of(checkpoint)} asks it"
        )
    raise ValueError(
        f"{checkpoint} is a checkpoint without a tokenizer, so it reads no text: put its "
        f"{TOKENIZER_FILE} beside its weights"
    )


def run_config(folder: Path) -> Mapping[str, Any]:
    """The configuration of the run of a folder; empty if there is none that can be read."""
    run = run_of(folder)
    for path, part in (
        (folder, "training_state.json"),  # a checkpoint's own, which has a checksum
        (folder if run is None else run, "config.json"),
    ):
        try:
            stored = json.loads((path / part).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        stored = stored.get("run") if part == "training_state.json" else stored
        if isinstance(stored, dict) and isinstance(stored.get("data"), dict):
            return stored
    return {}


def data_of(folder: Path) -> Path:
    """The prepared data of a folder: itself, or that of its run.

    Raises:
        ValueError: There is none at the places where a run keeps it.
    """
    if (folder / "index.json").is_file():
        return folder
    run, data = run_of(folder), run_config(folder).get("data", {})
    source, mixed = data.get("source"), data.get("sources")
    if run is not None and mixed:
        each = ", ".join(f"{run / 'data' / str(i)} ({s['source']})" for i, s in enumerate(mixed))
        raise ValueError(f"{run} is of {len(mixed)} sources; give one of them as --data: {each}")
    places = [] if run is None else [run / "data"]
    places += [Path(source)] if isinstance(source, str) else []
    for place in places:
        if (place / "index.json").is_file():
            return place
    if not places:
        raise ValueError(
            f"{folder} belongs to no run, so its held-out text is not known: give the run, "
            "prepared data, or zoo:text, as --data"
        )
    raise ValueError(
        f"the data of {folder if run is None else run} is gone: there is none in "
        f"{', '.join(map(str, places))}; prepare it again and give it as --data"
    )


def data_source(given: Path) -> Path:
    """The folder that ``--data`` names: prepared data, a run, a checkpoint, or ``zoo:NAME``.

    Raises:
        ValueError: There is no such folder.
    """
    from openmythos.interop.hub import ZOO, zoo_folder

    if given.is_dir():
        return given
    if str(given).startswith(ZOO):
        return zoo_folder(str(given))
    if given.exists():
        raise ValueError(
            f"--data {given} is a file; openmythos prepare {given} --out FOLDER makes one of it"
        )
    raise ValueError(
        f"--data {given} does not exist; give prepared data, a run, or zoo:NAME for what "
        "that model is asked"
    )


def puzzle_for(folder: Path, source: Path) -> "Puzzle | None":
    """The puzzle of a source of data; None if it is of text.

    Raises:
        ValueError: It is a puzzle, and the model reads text.
    """
    from openmythos.tokenizer_folder import has_tokenizer

    puzzle = puzzle_of(source)
    if puzzle is not None and has_tokenizer(folder):
        raise ValueError(
            f"{source} is of {puzzle.kind}, and {folder} reads text; give text as --data"
        )
    return puzzle


def puzzle_of(folder: Path) -> "Puzzle | None":
    """The puzzle that a checkpoint or a run trains on; None if it is of text.

    A checkpoint of an older version does not hold them: its run's configuration does.
    """
    from openmythos.data.puzzle_table import read_puzzle

    own, stored = read_puzzle(folder), run_config(folder)
    if own is not None:
        return own
    if stored.get("data", {}).get("kind", "text") in ("text", "mixture"):
        return None
    from openmythos.config.schema import from_dict
    from openmythos.train.recipe import MixtureData, RunConfig, TextData
    from openmythos.train.run import puzzle_task

    config = from_dict(RunConfig, stored)
    assert not isinstance(config.data, TextData | MixtureData)
    return puzzle_task(config.data, config.train.seed).puzzle


def companions_of(folder: Path, *, measured: bool) -> dict[str, bytes]:
    """The files that go with a checkpoint which is written elsewhere, as ``read_companions``.

    A checkpoint of an older version, whose puzzle its run knows, gets their settings now, and that
    of a run the depths of its training. A note says if what was measured stays behind.
    """
    from openmythos.checkpoint.save import EXIT_FILE, read_companions

    found, puzzle = read_companions(folder, measured=measured), puzzle_of(folder)
    if puzzle is not None:
        found.pop(WALKS_FILE, None)  # from here on as it is written now
        found[PUZZLE_FILE] = (json.dumps(puzzle.settings, indent=2) + "\n").encode()
    depth = run_config(folder).get("train", {}).get("depth")
    if depth is not None:
        found[DEPTH_FILE] = (json.dumps(depth, indent=2) + "\n").encode()
    if not measured and (folder / EXIT_FILE).is_file():
        note(f"note: {EXIT_FILE} is left out: it was measured before this change; measure again")
    return found
