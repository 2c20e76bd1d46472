import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

FOLDER = Path(__file__).parents[2] / "experiments" / "00_minimal_loop"


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    path = FOLDER / "minimal_loop.py"
    spec = importlib.util.spec_from_file_location("minimal_loop", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Relay:
    """Follows two relations per loop; a state is an entity, and the number of loops so far."""

    def __init__(self, relations: Tensor, hops: int) -> None:
        self.relations, self.hops = relations, hops

    def encode(self, walks: Tensor) -> Tensor:
        return F.one_hot(walks, 20).float()

    def states(self, e: Tensor, loops: int) -> list[Tensor]:
        found = [torch.zeros(*e.shape[:2], 17)]
        for _ in range(loops):
            found.append(self.loop(found[-1], e))
        return found

    def loop(self, h: Tensor, e: Tensor) -> Tensor:
        done, tokens = int(h[0, -1, 16]), e.argmax(dim=-1)
        entity = tokens[:, 0] if done == 0 else h[:, -1, :16].argmax(dim=-1)
        first = max(1, 2 * done)
        for place in range(first, min(2 * done + 2, self.hops + 1)):
            entity = self.relations[tokens[:, place] - 16, entity]
        new = torch.cat([F.one_hot(entity, 16), torch.full((len(h), 1), done + 1)], dim=-1)
        return new[:, None].expand(-1, h.shape[1], -1).float()

    def decode(self, h: Tensor) -> Tensor:
        return 8 * h[:, -1, :16]


def test_the_map_of_a_planted_relay_shows_what_was_planted(minimal: ModuleType) -> None:
    walks = minimal.Walks(seed=3)
    shares = minimal.reading_map(Relay(walks.relations, hops=6), walks, 6, 4, number=200)
    expected = torch.zeros(4, 6)
    for loop in range(3):
        expected[loop, 2 * loop : 2 * loop + 2] = 1
    torch.testing.assert_close(shares, expected)
    bits = minimal.bits_between_loops(shares[:3])
    torch.testing.assert_close(bits, torch.ones(2), atol=1e-5, rtol=0)
    same = minimal.bits_between_loops(torch.full((3, 6), 0.2))
    torch.testing.assert_close(same, torch.zeros(2))


def test_corrupted_walks_differ_at_one_place_by_a_token_of_its_kind(minimal: ModuleType) -> None:
    walks = minimal.Walks(seed=0)
    clean = walks.draw(300, 5)
    for place in range(6):
        differs = walks.corrupted(clean, place) != clean
        assert differs[:, place].all() and differs.sum() == len(clean)
        changed = walks.corrupted(clean, place)[:, place]
        assert ((changed < 16) == (place == 0)).all()
    for relation in walks.relations:
        assert sorted(relation.tolist()) == list(range(16))
    by_hand = clean[:, 0]
    for column in range(1, 6):
        by_hand = walks.relations[clean[:, column] - 16, by_hand]
    assert torch.equal(walks.answers(clean), by_hand)


def test_smoke_prints_the_training_the_answers_and_the_map(
    minimal: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = minimal.main(["--smoke"])
    said = capsys.readouterr().out
    assert "step   25" in said and "right answers" in said and "10 hops" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("loop ")]
    assert len(rows) == len(shares) and all(len(row) == 2 + 10 for row in rows)
    torch.testing.assert_close(shares.sum(), shares.nansum())


def test_a_step_of_training_changes_every_weight(minimal: ModuleType) -> None:
    torch.manual_seed(0)
    model, walks = minimal.LoopedModel(), minimal.Walks(seed=0)
    before = {name: param.clone() for name, param in model.named_parameters()}
    minimal.train(model, walks, steps=3)
    assert all(not torch.equal(param, before[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [("00_minimal_loop", {"argparse", "time", "torch"}), ("01_with_the_library", {"openmythos"})],
)
def test_what_is_imported(folder: str, allowed: set[str]) -> None:
    (path,) = (FOLDER.parent / folder).glob("*.py")
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    roots = {name.split(".")[0] for name in names}
    assert roots - set(sys.stdlib_module_names) == allowed - set(sys.stdlib_module_names)
