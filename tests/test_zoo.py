"""The models that ship: what is in the package, and that they score what their cards say."""

import json
import math
from pathlib import Path

import pytest
import torch

import openmythos
from benchmarks import zoo
from openmythos.checkpoint.load import checkpoint_damage
from openmythos.command.demo import configs
from openmythos.command.origin import puzzle_of
from openmythos.config import ModelConfig
from openmythos.config.schema import apply_overrides, from_dict, to_dict
from openmythos.data.addition import AdditionConfig
from openmythos.data.file import Document
from openmythos.data.puzzle_table import make_puzzle
from openmythos.data.source import load_documents
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.demo.text import marks
from openmythos.eval.python_docs import held_out
from openmythos.folder import HELD_OUT_FILE
from openmythos.interop.hub import ZOO_FOLDER, local_folder, zoo_names
from openmythos.interop.loading import load_config
from openmythos.tokenizer_folder import has_tokenizer
from openmythos.train.run import set_up

NAMES = zoo_names()
PUZZLES = [name for name in NAMES if puzzle_of(local_folder(name)) is not None]
MOST_BYTES, MOST_BYTES_OF_A_PUZZLE = 8_000_000, 1_000_000


def card(name: str) -> str:
    return (local_folder(name) / "README.md").read_text(encoding="utf-8")


def stored_scores(name: str) -> dict[str, dict[str, dict[str, float]]]:
    return json.loads((local_folder(name) / zoo.SCORES).read_text(encoding="utf-8"))


def test_what_ships_is_small_and_whole() -> None:
    assert {"zoo:walks", "zoo:text"} <= set(NAMES) <= {f"zoo:{name}" for name in zoo.recipes()}
    files = [path for path in ZOO_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    for name in NAMES:
        folder = local_folder(name)
        assert checkpoint_damage(folder) is None
        assert (puzzle_of(folder) is None) == has_tokenizer(folder)
        assert "## Limits" in card(name) and "make zoo" in card(name)
    for name in PUZZLES:
        sizes = [path.stat().st_size for path in local_folder(name).iterdir()]
        assert sum(sizes) < MOST_BYTES_OF_A_PUZZLE


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_stored_in_half_and_loaded_in_full(name: str) -> None:
    stored = openmythos.load_pretrained(name, dtype=torch.bfloat16).state_dict()
    for model in (openmythos.load_pretrained(name), openmythos.load_pretrained(local_folder(name))):
        for key, tensor in model.state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, stored[key].float())
    size = (local_folder(name) / "model.safetensors").stat().st_size
    assert size < 2.1 * sum(tensor.numel() for tensor in stored.values()) + 10_000


@pytest.mark.parametrize("name", PUZZLES)
def test_puzzles_are_solved_as_the_card_says(name: str) -> None:
    folder, puzzle = local_folder(name), puzzle_of(local_folder(name))
    assert puzzle is not None
    expected = stored_scores(name)["accuracy"]
    assert [*expected] == [str(size) for size in zoo.scored_sizes(puzzle)]
    sizes = [puzzle.max_train_size // 2, puzzle.max_train_size]
    model = openmythos.load_pretrained(name)
    found = zoo.scores(model, folder, loops=(2, 6), sizes=sizes)["accuracy"]
    for size, row in found.items():
        for loops, value in row.items():
            assert math.isclose(value, expected[size][loops], abs_tol=0.005), (size, loops)
    for line in zoo.score_table(expected, puzzle.size_word).splitlines()[2:]:
        assert line in card(name)


def test_the_sizes_that_are_scored_go_beyond_training() -> None:
    assert zoo.scored_sizes(Walks(HopsConfig())) == [1, 2, 4, 6, 8, 10, 12]
    sums = make_puzzle(AdditionConfig(max_terms=5), seed=0)
    assert zoo.scored_sizes(sums) == [2, 3, 4, 5]
    table = zoo.score_table({"1": {"1": 1.0, "2": 0.25}, "2": {"1": 0.5, "2": 0.0}}, "hops")
    assert table.splitlines()[0] == "| hops | 1 loop | 2 |"
    assert table.splitlines()[2:] == ["| 1 | 100.0 % | 25.0 % |", "| 2 | 50.0 % | 0.0 % |"]


def test_text_is_predicted_as_the_card_says() -> None:
    folder = local_folder("zoo:text")
    stored = stored_scores("zoo:text")
    expected = stored["bits_per_byte"]
    found = zoo.scores(openmythos.load_pretrained("zoo:text"), folder, loops=(4,))
    for loops, value in found["bits_per_byte"].items():
        assert math.isclose(value, expected[loops], abs_tol=0.002), loops
    text = "".join(document.text for document in load_documents(str(folder / HELD_OUT_FILE)))
    assert 60_000 < len(text.encode()) <= zoo.SAMPLE_BYTES
    assert stored["xz -9"] == pytest.approx(marks(b"", text.encode())["xz -9"], abs=0.001)
    rows = {f"{name}": value for name, value in stored.items() if name != "bits_per_byte"}
    rows |= {f"zoo:text, {n} loop{'s' * (n != '1')}": value for n, value in expected.items()}
    for name, value in rows.items():
        assert f"| {name} | {value:.3f} |" in card("zoo:text")


def test_the_text_comes_with_its_licence_and_was_not_trained_on() -> None:
    folder = local_folder("zoo:text")
    licence = (folder / "LICENSE-PYTHON.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence
    sample = list(load_documents(str(folder / HELD_OUT_FILE)))
    whole = [document for document in sample[:-1] if len(document.text) > 0]
    assert held_out(whole) == whole  # the last one may have been cut


# --- how they are made ----------------------------------------------------------------------------


def test_the_plan_is_the_demos_and_says_where_it_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["zoo", "--plan"])
    zoo.main()
    plan = json.loads(capsys.readouterr().out)
    _, hops = configs(0, 120.0, 150.0, [])
    assert plan["walks"] == json.loads(json.dumps(to_dict(hops)))
    assert plan["text"]["data"]["source"] == "python-docs"
    assert plan["text"]["train"]["max_steps"] == zoo.TEXT_STEPS
    for name in NAMES:
        planned = from_dict(ModelConfig, plan[name.removeprefix("zoo:")]["model"])
        assert load_config(name) == planned


@pytest.mark.parametrize("name", ["walks", "products"])
def test_a_run_becomes_a_folder_of_the_zoo(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A card that is there stays; the settings of the puzzle come along."""
    small = ["model.d_model=16", "model.attention.num_heads=4", "train.max_steps=1"]
    small += ["train.batch_size=2", "model.feed_forward.d_ff=16"]
    run = set_up(apply_overrides(zoo.recipes()[name], small), tmp_path / "run")
    run.train()
    target = tmp_path / "zoo" / name
    target.mkdir(parents=True)
    (target / "README.md").write_text("a card")
    for setting, value in (("NUM_PUZZLES", 4), ("PUZZLE_LOOPS", (1, 2))):
        monkeypatch.setattr(zoo, setting, value)
    monkeypatch.setattr(zoo, "ZOO_FOLDER", tmp_path / "zoo")
    monkeypatch.setattr("sys.argv", ["zoo", name, "--trained", str(tmp_path / "run")])
    zoo.main()
    assert checkpoint_damage(target) is None and (target / "README.md").read_text() == "a card"
    puzzle = puzzle_of(target)
    assert puzzle is not None and puzzle.settings == run.task.puzzle.settings
    assert f"| {puzzle.size_word} | 1 loop | 2 |" in capsys.readouterr().out
    assert openmythos.load_pretrained(target).embed.weight.dtype == torch.bfloat16
    assert (target / zoo.SCORES).is_file() and not (target / "training_state.json").exists()


def test_the_sample_is_held_out_and_seen_nowhere_else() -> None:
    texts = [f"Document {i}.\n\n" + f"What number {i} says. " * 20 + "\n\nEnd." for i in range(200)]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    chosen = zoo.sample(documents, size=3000)
    assert 2000 < sum(len(d.text) for d in chosen) <= 3000
    whole = {document.name: document.text for document in held_out(documents)}
    assert all(whole[d.name].startswith(d.text) for d in chosen)
    assert zoo.sample(reversed(documents), size=3000) == chosen
    trained = "\n".join(d.text for d in documents if d.name not in whole)
    assert zoo.shared_paragraphs(chosen, trained) == []
    assert zoo.shared_paragraphs(chosen, trained + chosen[0].text.replace(" ", "\n"))
