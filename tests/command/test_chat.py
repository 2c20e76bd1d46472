import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from openmythos import Tokenizer, save_pretrained
from openmythos.cli import app
from openmythos.command import chat
from openmythos.engine import engine as engine_module
from openmythos.engine.engine import Engine
from openmythos.engine.request import Request
from openmythos.tokenizer import byte_tokenizer
from tests.command.conftest import Invoke, refused, sets
from tests.foreign import write_chat_folder
from tests.strategies import scripted_model


def test_chat_over_a_pipe(text_run: Path) -> None:
    lines = ["the list", "", "/loops 2", "a value", "/loops 99", "/what", "/reset", "/[/x]", "[/x]"]
    command = [sys.executable, "-m", "openmythos", "chat", str(text_run), "--max-new-tokens", "6"]
    ran = subprocess.run(
        command,
        input="\n".join(lines) + "\n",
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stderr.count("> ") >= len(lines)
    assert ran.stderr.count("give /loops 1..16") == 3
    assert "'/loops 99'" in ran.stderr and "'/[/x]'" in ran.stderr
    assert "/loops" not in ran.stdout and ran.stdout.strip()


def test_chat_goes_on_when_the_context_is_full(text_run: Path) -> None:
    long_line, too_long = "the " * 20, "the function " * 60
    ran = CliRunner().invoke(
        app,
        ["chat", str(text_run), "--max-new-tokens", "30"],
        input=f"{long_line}\n{long_line}\n{too_long}\n/quit\n",
    )
    assert ran.exit_code == 0
    assert "the context is full; starting again" in ran.stderr
    assert "too long for this model" in ran.stderr


def test_every_line_is_a_walk_of_its_own() -> None:
    lines = "e3 r1\nhello\n\ne3 r1\n/loops 2\ne3\n"
    ran = CliRunner().invoke(app, ["chat", "zoo:walks", "--temperature", "0"], input=lines)
    assert ran.exit_code == 0
    assert "each line is a question: a walk is a start, e0 to e15" in ran.stderr
    assert "'hello' is no word of a walk" in ran.stderr and "there is no walk" in ran.stderr
    first, again, start = ran.stdout.split()
    assert first == again and start == "e3"


def test_depth_is_read_from_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    assert chat.read_depth(console, "/loops 3", 4, 8) == 3
    for line in ("/loops", "/loops 9", "/loops 0", "/loops x", "/loop 3", "/loops 1 2"):
        assert chat.read_depth(console, line, 4, 8) == 4
    assert capsys.readouterr().out.count("give /loops 1..8") == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--num-loops", 0), "num_loops is 0; it must be an integer of at least 1"),
        (("--num-loops", 10**12), "and 1000000000000 loops needs"),
        (("--max-new-tokens", 0), "max_new_tokens is 0"),
        (("--exit-rule", "cumulative_threshold", *sets("exit_rule.threshold=1")), "halting head"),
        (("--temperature", -1), "temperature is -1.0"),
        (("--top-p", 7), "top_p is 7.0"),
        (("--stop", ""), "stop"),
    ],
)
def test_options_are_checked_before_the_first_line(
    invoke: Invoke, text_run: Path, options: tuple[object, ...], said: str
) -> None:
    def read(*_: object) -> None:
        pytest.fail("a line was read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "ask", read)
        assert said in refused(invoke, "chat", text_run, *options)


def test_an_interrupt_ends_the_answer_and_another_the_talk(
    text_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lines, drawn, draw = iter(["the list", "a value"]), [], engine_module.sample

    def interrupted(*arguments: Any) -> Any:
        drawn.append(draw(*arguments))
        if len(drawn) == 3:
            signal.raise_signal(signal.SIGINT)
        return drawn[-1]

    def ask(_: object, prompt: object) -> str:
        for line in lines:
            return line
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr(engine_module, "sample", interrupted)
    monkeypatch.setattr(Console, "input", ask)
    recorder = Recorder(monkeypatch)
    command = ["chat", str(text_run), "--max-new-tokens", "5", "--temperature", "0"]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0 and ran.exception is None
    first, second = recorder.prompts
    assert len(drawn) == 3 + 5
    tokenizer = Tokenizer.load(text_run)
    assert first == tokenizer.encode_prompt("the list\n")
    answered = [int(row) for draw in drawn[:3] for row in draw]
    assert second == [*first, *answered, *tokenizer.encode("a value\n")]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_ends_the_program(
    text_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(*_: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr(engine_module, "sample", interrupted)
    ran = CliRunner().invoke(app, ["chat", str(text_run)], input="the list\n")
    assert ran.exit_code == 130 and "Traceback" not in ran.output


# --- chat templates -------------------------------------------------------------------------------


class Recorder:
    """Notes what engines are asked, and keeps the latest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[Request] = []
        self.engine: Engine | None = None
        add = Engine.add

        def adds(engine: Engine, request: Request, **options: Any) -> int:
            self.engine = engine
            self.requests.append(request)
            return add(engine, request, **options)

        monkeypatch.setattr(Engine, "add", adds)

    @property
    def prompts(self) -> list[list[int]]:
        return [list(request.tokens) for request in self.requests]


def test_a_conversation_is_written_in_the_template(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model sees what transformers' template gives, and what it has read it reads only once."""
    tokenizer = Tokenizer.load(write_chat_folder(tmp_path / "tokenizer"))
    (newline,), (o,), (k,) = (tokenizer.encode(letter) for letter in "\nok")
    model = scripted_model(300, {newline: o, o: k, k: tokenizer.eos_id})
    folder = save_pretrained(model, tmp_path / "model", tokenizer)
    recorder = Recorder(monkeypatch)
    lines = "hello <|im_end|>\nagain\n/quit\n"
    said = invoke("chat", folder, "--temperature", 0, stdin=lines)
    assert said.count("ok") == 2
    talk = [{"role": "user", "content": "hello <|im_end|>"}]
    first = tokenizer.encode_chat(talk)
    talk += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "again"}]
    whole = tokenizer.encode_chat(talk)
    assert recorder.prompts == [first, whole]
    assert [request.sample_idx for request in recorder.requests] == [0, 1]
    stats, page = recorder.engine.stats, 16
    assert stats.num_prompt_tokens_found == (len(first) - 1) // page * page > 0
    assert first.count(tokenizer.eos_id) == 1  # what the user typed is text
    recorder.requests.clear()
    invoke("chat", folder, "--temperature", 0, "--stop", "k", "--special", stdin=lines)
    assert recorder.prompts[0].count(tokenizer.eos_id) == 2


@pytest.mark.parametrize(
    ("follows", "options", "said"),
    [
        ("", (), "(no answer: the model ended it at once)"),
        (" ", (), "(no answer but white space)"),
        ("o", ("--stop", "o"), "(no answer: it began with a --stop text)"),
        ("o", (), None),
    ],
)
def test_an_answer_that_shows_nothing_is_told(
    tmp_path: Path, follows: str, options: tuple[str, ...], said: str | None
) -> None:
    tokenizer = byte_tokenizer()
    chain = [*tokenizer.encode("\n"), *tokenizer.encode(follows), tokenizer.eos_id]
    model = scripted_model(259, dict(itertools.pairwise(chain)))
    folder = str(save_pretrained(model, tmp_path / "model", tokenizer))
    command = ["chat", folder, "--temperature", "0", *options]
    chatted = CliRunner().invoke(app, command, input="a\n\nb\n")
    made = CliRunner().invoke(app, ["generate", *command[1:], "--prompt", "a\n"])
    assert chatted.exit_code == made.exit_code == 0
    for ran, count in ((chatted, 3), (made, 1)):
        assert ran.stderr.count("(no answer") == (count if said else 0)
        assert said is None or ran.stderr.count(said) == count
        assert "(no answer" not in ran.stdout


def test_without_a_template_lines_continue_the_text(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    (newline,), (o,) = (tokenizer.encode(letter) for letter in "\no")
    model = scripted_model(259, {newline: o, o: tokenizer.eos_id})
    folder = save_pretrained(model, tmp_path / "model", tokenizer)
    recorder = Recorder(monkeypatch)
    invoke("chat", folder, "--temperature", 0, stdin="a\nb\n")
    a, b = ([tokenizer.bos_id, *tokenizer.encode(f"{letter}\n")] for letter in "ab")
    answer = [o, tokenizer.eos_id]
    assert recorder.prompts == [a, [*a, *answer, *b]]
