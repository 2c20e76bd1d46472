"""All puzzles by their configurations, and the one that a checkpoint was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openmythos.config.schema import as_seed, from_dict, require
from openmythos.data.addition import Addition, AdditionConfig
from openmythos.data.induction import Induction, InductionConfig
from openmythos.data.products import Products, ProductsConfig
from openmythos.data.puzzle import Puzzle
from openmythos.data.recall import Facts, FactsConfig, Recall, RecallConfig
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.folder import PUZZLE_FILE, WALKS_FILE

SeededConfig = ProductsConfig | RecallConfig | FactsConfig | InductionConfig | AdditionConfig
PUZZLES: dict[type[SeededConfig], Callable[[Any, int], Puzzle]] = {
    ProductsConfig: Products,
    RecallConfig: Recall,
    FactsConfig: Facts,
    InductionConfig: Induction,
    AdditionConfig: Addition,
}
CONFIGS = {config.kind: config for config in PUZZLES}


def make_puzzle(config: SeededConfig, seed: int) -> Puzzle:
    """The puzzle of a configuration."""
    return PUZZLES[type(config)](config, seed)


def read_puzzle(folder: Path) -> Puzzle | None:
    """The puzzle that a checkpoint was trained on, as its folder says; None if it does not say.

    Raises:
        ValueError: The file is damaged.
    """
    found = [path for name in (PUZZLE_FILE, WALKS_FILE) if (path := folder / name).is_file()]
    if not found:
        return None
    path = found[0]
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        require(isinstance(stored, dict), "the content", type(stored).__name__, "an object")
        kind = stored.get("kind", HopsConfig.kind)
        if kind == HopsConfig.kind:
            return Walks(from_dict(HopsConfig, stored))
        require(
            kind in [*CONFIGS], "kind", kind, f"one of {', '.join([HopsConfig.kind, *CONFIGS])}"
        )
        seed = as_seed("seed", stored.pop("seed", None))
        return PUZZLES[CONFIGS[kind]](from_dict(CONFIGS[kind], stored), seed)
    except ValueError as error:  # of JSON, of UTF-8 or of a field
        raise ValueError(f"{path} does not describe a puzzle: {error}") from None
