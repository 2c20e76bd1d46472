"""``openmythos analyze`` on models that ship, on hardly trained runs and on every family."""

import json
from pathlib import Path

import pytest

from openmythos.checkpoint.save import save_pretrained
from openmythos.command.analyze import (
    cut_to_read,
    measured,
    name_of,
    questions_to_read,
    read_tokens,
)
from openmythos.data.puzzle_table import CONFIGS, make_puzzle
from openmythos.data.synthetic import HopsConfig, Walks
from tests.analysis.family import FAMILIES, GOLDEN, model_of
from tests.command.conftest import Invoke, refused
from tests.report.parser import Page
from tests.strategies import random_model, small_config, unchecked

FEW = ("--num-examples", 6, "--max-loops", 2)


def page_of(folder: Path) -> Page:
    """The page, read strictly; the record beside it is all that it links to."""
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert {each for each in page.references if not each.startswith("#")} == {"analysis.json"}
    assert len(page.ids) == len(set(page.ids)) and all(page.labels)
    return page


def test_walks(invoke: Invoke, hops_run: Path, tmp_path: Path) -> None:
    options = ("--num-examples", 6, "--max-loops", 4, "--task", "hops_3", "--out", tmp_path)
    with unchecked():
        said = invoke("analyze", hops_run, *options)
    stored = json.loads((tmp_path / "analysis.json").read_text())
    assert stored["examples"] == "walks of 3 hops"
    assert stored["interventions"][0]["num_loops"] == stored["depth"]["fewest"]
    assert stored["interventions"][-1]["num_loops"] == stored["depth"]["trained"]
    columns = stored["interventions"][0]["reading_map"]["columns"]
    assert columns == ["start", "relation 1", "relation 2"]
    assert "entity after hop 2" in stored["lenses"][0]["targets"]
    assert str(tmp_path / "report.html") in said and "shuffled" in said
    assert page_of(tmp_path).labels[0].startswith("Heat map, needed at this loop")


def test_text(invoke: Invoke, text_run: Path, text_file: Path, tmp_path: Path) -> None:
    options = (*FEW, "--seq-len", 8, "--out", tmp_path, "--json")
    with unchecked():
        own = json.loads(invoke("analyze", text_run, *options))
        given = json.loads(invoke("analyze", text_run, *options, "--text", text_file))
    assert given == json.loads((tmp_path / "analysis.json").read_text())
    assert own["examples"] == "windows of 8 tokens of held-out text"
    assert given["examples"] == f"windows of 8 tokens of text of {text_file.name}"
    assert own["depth"]["of_text"] and own["settings"]["num_rows"] == 6
    columns = given["interventions"][0]["reading_map"]["columns"]
    assert columns == ["1", "2-3", "4-7"]
    page_of(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    model = model_of(family)
    texts = [tuple((7 * place + row) % 80 for place in range(12)) for row in range(4)]
    read = cut_to_read(texts, 5, "ids", 2, seed=0)
    with unchecked():
        found = measured(model, family, *read, 2, 1 << 30, 0).to_dict()
    assert found["dynamics"]["trace"]["num_tokens"] == 10
    assert [lens["lens"] for lens in found["lenses"]] == ["logit", "coda"]
    fewest = found["depth"]["fewest"]
    assert found["interventions"][0]["num_loops"] == fewest <= 2
    assert len(found["interventions"]) == 1 + (fewest != model.config.num_loops <= 2)
    json.dumps(found, allow_nan=False)


def test_a_model_without_a_tokenizer(invoke: Invoke, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps([list(range(20))] * 3))
    options = ("--tokens", tokens, "--seq-len", 5, "--num-examples", 2, "--max-loops", 2)
    with unchecked():
        invoke("analyze", GOLDEN / "parcae", *options, "--out", tmp_path)
    stored = json.loads((tmp_path / "analysis.json").read_text())
    assert stored["examples"] == "windows of 5 tokens of tokens.json"
    page_of(tmp_path)


def test_mistakes_are_one_line(
    invoke: Invoke, text_run: Path, hops_run: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "x.txt", ("--out", tmp_path)
    file.write_text("a")
    for words, options in {
        "--text and --task exclude each other": ("--text", file, "--task", "hops"),
        "--text is absent, which is no file": ("--text", "absent"),
        "--task is for models of puzzles": ("--task", "hops"),
        "--seq-len is 65; the model reads at most 64": ("--seq-len", 65),
        "x.txt is not JSON": ("--tokens", file),
        "the text is too short": ("--text", file),
        "one row needs more; give more bytes": ("--max-bytes", 1000),
    }.items():
        assert words in refused(invoke, "analyze", text_run, *options, *out)
    for words, options in {
        "--task is 'hop'; give hops, or hops_N": ("--task", "hop"),
        "walks of 64 hops have 65 tokens, and the model reads 64": ("--task", "hops_64"),
        "--text is for models of text": ("--text", file),
        "--seq-len is for models of text": ("--seq-len", 8),
    }.items():
        assert words in refused(invoke, "analyze", hops_run, *options, *out)
    assert "without a tokenizer" in refused(invoke, "analyze", GOLDEN / "ouro", *out)
    assert not (tmp_path / "analysis.json").exists()


@pytest.mark.parametrize("wrong", ["{}", "[1, 2]", "[[1, 9]]", "[[true]]", "[[0.5]]", '["a"]'])
def test_tokens_are_lists_of_ids(wrong: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(wrong)
    with pytest.raises(ValueError, match="must hold a list per text of ids from 0 to 8"):
        read_tokens(file, 9)
    file.write_text("[[1, 8], []]")
    assert read_tokens(file, 9) == [(1, 8), ()]


def test_the_folder_has_the_name_of_the_model(tmp_path: Path) -> None:
    assert name_of(Path("zoo:walks")) == "walks"
    assert name_of(tmp_path / "runs" / "mine") == "mine"


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_puzzle(kind: str, invoke: Invoke, tmp_path: Path) -> None:
    shorter = {"length": 9, "max_train_hops": 2} if kind == "induction" else {}
    puzzle = make_puzzle(CONFIGS[kind](**shorter), seed=0)
    model = random_model(small_config(vocab_size=puzzle.vocab_size, max_seq_len=40))
    size = max(puzzle.least_size, min(2, puzzle.max_train_size))
    save_pretrained(model, tmp_path / "model")
    puzzle.save(tmp_path / "model")
    with unchecked():
        options = ("--task", f"{kind}_{size}", "--out", tmp_path, *FEW)
        invoke("analyze", tmp_path / "model", *options)
    stored = json.loads((tmp_path / "analysis.json").read_text())
    assert stored["examples"] == puzzle.in_words(size)
    assert stored["settings"]["num_tokens"] == puzzle.question_len(size)
    page_of(tmp_path)


def test_written_out_walks_and_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="these walks are written out"):
        questions_to_read(Walks(HopsConfig(written_out=True)), None, 64, 4, 0)
    products = make_puzzle(CONFIGS["products"](), seed=0)
    assert len(questions_to_read(products, None, 64, 4, 0)[0].tokens[0]) == 16
    for task, said in {
        "hops_3": "give products, or products_N for products of N factors",
        "products_65": "products of 65 factors have 65 tokens, and the model reads 64",
        "products_1": "nothing can be replaced before the last token",
    }.items():
        with pytest.raises(ValueError, match=said):
            questions_to_read(products, task, 64, 4, 0)
