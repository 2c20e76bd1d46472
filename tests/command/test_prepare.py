import json
from pathlib import Path

import pytest
from tokenizers import normalizers
from typer.testing import CliRunner

from openmythos import Tokenizer
from openmythos.cli import app
from openmythos.data.index import read_index
from tests.command.conftest import Invoke, error_line, refused
from tests.foreign import END, MARKED, backend, write_chat_folder, write_folder


def test_prepare_as_json_and_as_a_table(invoke: Invoke, tmp_path: Path, text_file: Path) -> None:
    out = tmp_path / "data"
    report = json.loads(invoke("prepare", text_file, "--out", out, "--vocab-size", 280, "--json"))
    assert report["folder"] == str(out) and report["vocab_size"] <= 280
    assert report["train"]["bytes"] + report["val"]["bytes"] > 0.9 * text_file.stat().st_size
    assert report["train"]["tokens"] > report["val"]["tokens"] > 0
    table = invoke("prepare", text_file, "--out", tmp_path / "bytes", "--bytes")
    assert "vocabulary 259" in table and "bytes/token" in table
    everything = invoke(
        "prepare", text_file, "--out", tmp_path / "all", "--bytes", "--val-fraction", 0
    )
    assert "val" in everything


def test_prepare_from_standard_input_and_with_bad_rows(invoke: Invoke, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(30)) + '{"te')
    command = ("prepare", rows, "--out", tmp_path / "rows", "--bytes", "--json")
    assert "line 31 is not JSON" in refused(invoke, *command)
    report = json.loads(invoke(*command, "--skip-bad"))
    assert (report["num_duplicates"], report["num_replaced"], report["num_left_out"]) == (0, 0, 1)
    assert report["left_out"][0].startswith(f"{rows} line 31")
    piped = ("prepare", "-", "--out", tmp_path / "piped", "--bytes")
    result = CliRunner().invoke(app, [*map(str, piped)], input="One sentence. " * 300)
    assert result.exit_code == 0 and "vocabulary 259" in result.stdout
    assert "documents, " in result.stderr and "0 left out" in result.stderr


def test_prepare_refuses_what_it_cannot_read(invoke: Invoke, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "empty.txt" in refused(invoke, "prepare", empty, "--out", tmp_path / "data")
    assert "absent" in refused(invoke, "prepare", tmp_path / "absent", "--out", tmp_path / "data")


def test_a_tokenizer_in_gpt2s_form_needs_no_more_words(
    invoke: Invoke, tmp_path: Path, text_file: Path
) -> None:
    """Only tokenizer.json and the length of the model's context; and one end token."""
    folder = write_folder(tmp_path / "gpt2", backend(END), tokenizer_config={"model_max_length": 9})
    out = tmp_path / "data"
    report = json.loads(invoke("prepare", text_file, "--tokenizer", folder, "--out", out, "--json"))
    assert report["vocab_size"] == 259
    found = read_index(out).load_tokenizer()
    assert (found.bos_id, found.eos_id) == (258, 258)
    assert found.begin_ids == (258,)  # a model of this data has seen texts begin so
    assert found.fingerprint == Tokenizer.load(folder).fingerprint


def test_a_tokenizer_that_changes_text_is_refused(
    invoke: Invoke, tmp_path: Path, text_file: Path
) -> None:
    folder = write_folder(tmp_path / "lower", backend(END, normalizer=normalizers.Lowercase()))
    message = refused(
        invoke, "prepare", text_file, "--tokenizer", folder, "--out", tmp_path / "data"
    )
    assert "the tokenizer changes text" in message and "\n" not in message
    assert not (tmp_path / "data").exists()


def test_conversations_are_shown_with_what_counts(invoke: Invoke, tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path / "chat")
    template = MARKED["chatml (Qwen, SmolLM)"]
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    rows = [{"prompt": "one?", "completion": "two é!"}, {"prompt": "x", "completion": ""}]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("prepare", path, "--out", tmp_path / "data", "--tokenizer", folder)
    assert "allowed: answers, all" in refused(invoke, *command, "--conversations", "some")
    command = (*command, "--conversations", "answers", "--val-fraction", 0, "--show", 3)
    assert "talks.jsonl line 2 completion is empty" in refused(invoke, *command)
    said = invoke(*command, "--skip-bad")
    asked = "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
    assert f"{asked}[two é!<|im_end|>]\n" in said and said.startswith("example 1, ")
    assert "example 2" not in said


USER, ANSWER = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
MARKS = MARKED["chatml (Qwen, SmolLM)"]


@pytest.mark.parametrize(
    ("messages", "template", "said"),
    [
        ([ANSWER, USER], MARKS, "line 1 message 1 is of the role 'assistant', where system or"),
        ([USER, USER, ANSWER], MARKS, "line 1 message 2 is of the role 'user', where assistant"),
        ([USER, {**ANSWER, "content": "  "}], MARKS, "line 1 message 2 is empty"),
        ([USER, {"role": "tool", "content": "x"}], MARKS, "has the role 'tool'; known are system"),
        ([{"role": "system", "content": "x"}, USER], MARKS, "a message of the user: no answer"),
        ([USER, ANSWER], "{{ raise_exception('no\nuser') }}" + MARKS, "template fails: no user"),
        ([USER, ANSWER], "{{ messages[0].content }}", "does not mark answers with {% generation"),
        ([USER, ANSWER], "{% for %}{% generation %}", "the checkpoint's chat template fails"),
    ],
)
def test_a_bad_conversation_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    messages: list[dict[str, str]],
    template: str,
    said: str,
) -> None:
    folder, path = write_chat_folder(tmp_path / "chat"), tmp_path / "talks.jsonl"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    options = ("--conversations", "answers", "--tokenizer", folder, "--out", tmp_path / "out")
    assert said in error_line(capsys, "prepare", path, *options)
    assert not (tmp_path / "out" / "index.json").exists()
