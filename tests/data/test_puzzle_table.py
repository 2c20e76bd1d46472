import json
from pathlib import Path

import numpy as np
import pytest
import torch

from openmythos.config.schema import to_dict
from openmythos.data.puzzle_table import CONFIGS, PUZZLES, make_puzzle, read_puzzle
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.eval.task_name import KINDS
from openmythos.folder import PUZZLE_FILE, WALKS_FILE


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_puzzle_lies_beside_weights(kind: str, tmp_path: Path) -> None:
    assert read_puzzle(tmp_path) is None
    puzzle = make_puzzle(CONFIGS[kind](), seed=9)
    puzzle.save(tmp_path)
    again = read_puzzle(tmp_path)
    assert again is not None and type(again) is type(puzzle)
    assert (again.kind, again.seed) == (kind, 9)
    size = puzzle.max_train_size
    expected = puzzle.held_out_batch(size, 8).tokens
    assert torch.equal(again.held_out_batch(size, 8).tokens, expected)


def test_every_kind_has_a_name_for_tasks() -> None:
    assert ("hops", *CONFIGS) == KINDS
    assert [puzzle.kind for puzzle in PUZZLES.values()] == list(CONFIGS)  # type: ignore[attr-defined]


def test_walks_of_older_checkpoints_are_read(tmp_path: Path) -> None:
    walks = Walks(HopsConfig(num_entities=5, num_relations=3, max_train_hops=4, seed=9))
    stored = to_dict(walks.config)
    del stored["kind"]
    (tmp_path / WALKS_FILE).write_text(json.dumps(stored))
    for _ in range(2):
        again = read_puzzle(tmp_path)
        assert isinstance(again, Walks) and again.config == walks.config
        assert np.array_equal(again.relations, walks.relations)
        walks.save(tmp_path)  # from here on as it is written now


@pytest.mark.parametrize(
    "damaged",
    [
        *('{"num_entities": 1}', "{", '{"entities": 5}', "[]", '{"kind": "chess"}'),
        *('{"kind": "products"}', '{"kind": "products", "seed": -1}', '{"kind": ["a"]}'),
    ],
)
def test_damaged_settings(damaged: str, tmp_path: Path) -> None:
    (tmp_path / PUZZLE_FILE).write_text(damaged)
    with pytest.raises(ValueError, match=r"puzzle\.json does not describe a puzzle: ."):
        read_puzzle(tmp_path)
