import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from openmythos.command import option
from openmythos.eval import python_docs
from openmythos.folder import PUZZLE_FILE
from openmythos.interop.hub import zoo_names
from tests.command.conftest import SMALL, Invoke, refused, sets
from tests.eval.examples import documents
from tests.strategies import unchecked


def test_eval(invoke: Invoke, text_run: Path) -> None:
    command = ("eval", text_run, "--num-loops", "1,3", "--seq-len", 32)
    rows = json.loads(invoke(*command, "--json"))
    assert [row["num_loops"] for row in rows] == [1, 3]
    one_by_one = json.loads(invoke(*command, "--batch-size", 1, "--json"))
    for a, b in zip(rows, one_by_one, strict=True):
        assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], rel=1e-5)
    newest = text_run / "checkpoints" / "step-00000004"
    given = invoke("eval", newest, *command[2:], "--data", text_run / "data", "--json")
    assert json.loads(given) == rows
    rounded = json.loads(invoke(*command, "--weights", "int8", "--json"))
    for a, b in zip(rows, rounded, strict=True):
        assert a["bits_per_byte"] != b["bits_per_byte"]
        assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], abs=0.02)
    table = invoke(*command, "--max-batches", 1)
    assert "bits per byte" in table and "held-out text" in table


def test_eval_finds_the_prepared_folder_of_the_run(
    invoke: Invoke, text_file: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "prepared", tmp_path / "run"
    invoke("prepare", text_file, "--out", data, "--bytes")
    invoke("train", "--data", data, "--out", out, *sets(*SMALL, "train.max_steps=1"))
    assert len(json.loads(invoke("eval", out, "--num-loops", 2, "--json"))) == 1
    invoke("prepare", text_file, "--out", tmp_path / "other", "--vocab-size", 270)
    message = refused(invoke, "eval", out, "--data", tmp_path / "other")
    assert "tokenizer mismatch" in message
    nowhere = refused(invoke, "eval", out, "--data", tmp_path)
    assert "belongs to no run" in nowhere and "as --data" in nowhere


def test_a_converted_checkpoint_is_evaluated_with_the_data_of_its_run(
    invoke: Invoke, text_run: Path, hops_run: Path, tmp_path: Path
) -> None:
    ours, walks = tmp_path / "ours", tmp_path / "walks"
    invoke("convert", text_run, "--out", ours)
    invoke("convert", hops_run, "--out", walks)
    said = refused(invoke, "eval", ours)
    assert (
        f"{ours} belongs to no run" in said and "give the run, prepared data, or zoo:text" in said
    )
    options = ("--num-loops", 2, "--json")
    for data in (text_run, text_run / "data", text_run / "checkpoints" / "step-00000004"):
        given = invoke("eval", ours, "--data", data, *options)
        assert json.loads(given) == json.loads(invoke("eval", text_run, *options))
    asked = ("--tasks", "hops_2", *options)
    for data in ((), ("--data", hops_run)):  # it has its walks with it
        given = json.loads(invoke("eval", walks, *data, *asked))
        assert given["curves"] == json.loads(invoke("eval", hops_run, *asked))["curves"]
    (walks / PUZZLE_FILE).unlink()
    assert "a checkpoint without a tokenizer" in refused(invoke, "eval", walks)
    assert "a checkpoint without a tokenizer" in refused(invoke, "generate", walks, "--prompt", "a")


def test_a_run_is_evaluated_from_any_directory(
    invoke: Invoke, text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--num-loops", 2, "--json")
    there = json.loads(invoke("eval", text_run, *options))
    monkeypatch.chdir(tmp_path)
    assert json.loads(invoke("eval", os.path.relpath(text_run), *options)) == there
    monkeypatch.chdir(text_run / "checkpoints")
    assert json.loads(invoke("eval", "step-00000004", *options)) == there
    monkeypatch.chdir(text_run)
    assert json.loads(invoke("eval", ".", *options)) == there
    moved = tmp_path / "moved"
    shutil.copytree(text_run, moved)
    assert json.loads(invoke("eval", moved, *options)) == there
    shutil.rmtree(moved / "data")
    said = refused(invoke, "eval", moved)
    assert said.startswith(f"the data of {moved} is gone: there is none in {moved / 'data'}")


def test_a_run_on_walks_is_asked_the_hops_of_its_training(invoke: Invoke, hops_run: Path) -> None:
    report = json.loads(invoke("eval", hops_run, "--num-loops", 1, "--limit", 8, "--json"))
    names = [curve["task"] for curve in report["curves"]]
    assert names == ["hops_1", "hops_2", "hops_4", "hops_8"]
    assert "--seq-len is of held-out text" in refused(invoke, "eval", hops_run, "--seq-len", 4)
    for hops in (64, 99_999_999_999):
        said = refused(invoke, "eval", hops_run, "--tasks", f"hops_{hops}")
        assert said.endswith(f"has {hops + 1} tokens, and the model reads at most 64")


def test_a_name_that_is_no_task_is_refused_before_anything_is_loaded(
    invoke: Invoke, text_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(option, "check_device", lambda _: pytest.fail("torch was loaded"))
    said = refused(invoke, "eval", text_run, "--tasks", "python_docs_choices")
    assert "did you mean 'python_docs_choice'?" in said


def test_eval_refuses(invoke: Invoke, text_run: Path, hops_run: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(invoke, "eval", tmp_path / "absent")
    assert refused(invoke, "eval", "/usr").startswith("/usr is no checkpoint: it has no config")
    assert "--num-loops is '0'" in refused(invoke, "eval", text_run, "--num-loops", "0")
    invoke("eval", text_run, "--max-batches", 0, status=2)


def test_eval_writes_numbers_and_a_picture(invoke: Invoke, text_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    said = invoke("eval", text_run, "--num-loops", "1,3", "--seq-len", 32, "--out", out)
    assert str(out / "scores.png") in said
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (curve,) = report["curves"]
    assert [point["num_loops"] for point in curve["scores"]] == [1, 3]
    assert curve["higher_is_better"] is False
    flops = {point["num_loops"]: point["flops"] for point in report["flops_per_token"]}
    assert 0 < flops[1] < flops[3]
    assert report["versions"].keys() >= {"openmythos", "python", "torch"}


def test_eval_on_tasks_that_ship(
    invoke: Invoke, text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_docs, "documents", documents)
    command = ("eval", text_run, "--tasks", "python_docs_choice, python_docs_bits")
    command = (*command, "--num-loops", "2,1", "--limit", 4)
    report = json.loads(invoke(*command, "--json", "--out", tmp_path))
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == report
    choice, bits = report["curves"]
    assert (choice["task"], bits["task"]) == ("python_docs_choice", "python_docs_bits")
    assert choice["baselines"].keys() >= {"chance", "longest", "overlap"}
    assert [point["num_questions"] for point in bits["scores"]] == [4, 4]
    assert bits["gain"]["value"] == pytest.approx(
        bits["scores"][1]["value"] - bits["scores"][0]["value"]
    )
    table = " ".join(invoke(*command, "--batch-size", 1).split())
    for said in ("python_docs_choice", "bits per byte", "MFLOPs", "last - first", "± 0."):
        assert said in table
    assert "without a model, python_docs_choice accuracy: chance 0.250" in table


def test_eval_on_walks(invoke: Invoke, hops_run: Path) -> None:
    report = json.loads(
        invoke("eval", hops_run, "--tasks", "hops_1,hops_4", "--num-loops", 2, "--json")
    )
    assert [curve["task"] for curve in report["curves"]] == ["hops_1", "hops_4"]
    for curve in report["curves"]:
        assert curve["baselines"] == dict.fromkeys(
            ("chance", "majority", "last_token", "suffix_only"), 1 / 16
        )
        assert curve["scores"][0]["num_questions"] == 512
        assert curve["gain"] is None


def test_eval_refuses_tasks(invoke: Invoke, text_run: Path, hops_run: Path) -> None:
    run = ("eval", text_run, "--tasks")
    assert "hops_2 needs a run on hops" in refused(invoke, *run, "hops_2")
    assert "needs a model of text" in refused(
        invoke, "eval", hops_run, "--tasks", "python_docs_bits"
    )
    assert "--tasks is ' , '" in refused(invoke, *run, " , ")
    assert "gone.yaml does not exist" in refused(invoke, *run, "gone.yaml")
    bits = (*run, "python_docs_bits", "--data", text_run)
    assert "--data is of held-out text" in refused(invoke, *bits)
    assert "--limit needs --tasks" in refused(invoke, "eval", text_run, "--limit", 3)
    message = refused(invoke, "eval", hops_run, "--tasks", "hops_1", "--num-fewshot", 2)
    assert "those that ship have none" in message


def test_a_puzzle_is_trained_asked_and_answered(invoke: Invoke, tmp_path: Path) -> None:
    run, small = tmp_path / "run", []
    for field in ("model.d_model=16", "model.num_coda_layers=0", "data.max_train_terms=2"):
        small += ["--set", field]
    few = ("--steps", 2, "--batch-size", 4, "--set", "train.eval_loops=[1]", *small)
    invoke("train", "--data", "addition", "--out", run, *few)
    report = json.loads(invoke("eval", run, "--num-loops", "1,2", "--limit", 8, "--json"))
    (curve,) = report["curves"]
    assert curve["task"] == "addition_2" and curve["baselines"]["majority"] < 0.011
    answer = json.loads(invoke("generate", run, "--prompt", "4 7 + 8 5 =", "--json"))
    assert len(answer[0]["tokens"]) == 3  # all digits
    assert "of at least 2 to 8" in refused(invoke, "eval", run, "--tasks", "addition_9")
    said = refused(invoke, "eval", run, "--tasks", "hops_2")
    assert said == "task hops_2 needs a run on hops (train --data hops); this is of addition"
    assert "4 0 + 8 0 =" in refused(invoke, "generate", run, "--prompt", "four + eight")
    options = ("--num-tokens", 16, "--max-loops", 2, "--max-rows", 4, "--out", run, "--json")
    with unchecked():
        measured = json.loads(invoke("calibrate-exit", run, *options))
    assert measured["metric"] == "accuracy" and len(measured["points"]) >= 2


def test_data_may_be_a_model_that_ships(
    invoke: Invoke, text_run: Path, hops_run: Path, text_file: Path
) -> None:
    asked = ("--num-loops", 1, "--limit", 1, "--tasks", "held_out", "--data", "zoo:text", "--json")
    (curve,) = json.loads(invoke("eval", text_run, *asked))["curves"]
    assert curve["task"] == "held_out"
    (curve,) = json.loads(
        invoke(
            "eval", hops_run, "--num-loops", 1, "--data", "zoo:walks", "--tasks", "hops_1", "--json"
        )
    )["curves"]
    assert curve["task"] == "hops_1"
    for path, data, said in (
        (
            text_run,
            "absent",
            "--data absent does not exist; give prepared data, a run, or zoo:",
        ),
        (text_run, text_file, f"openmythos prepare {text_file} --out FOLDER"),
        (text_run, "zoo:absent", f"these do: {', '.join(zoo_names())}"),
        (text_run, "zoo:walks", "reads text; give text as --data"),
        (hops_run, "zoo:text", "is of a run on a puzzle (hops)"),
    ):
        assert said in refused(invoke, "eval", path, "--num-loops", 1, "--data", data)
