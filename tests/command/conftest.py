import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openmythos import cli
from openmythos.cli import app
from tests.train.examples import write_text

SMALL = (
    "model.vocab_size=300",
    "model.d_model=16",
    "model.num_core_layers=1",
    "model.max_seq_len=64",
    "model.attention.num_heads=2",
    "model.attention.num_kv_heads=1",
    "model.attention.head_dim=8",
    "model.feed_forward.d_ff=32",
    "data.seq_len=32",
    "train.batch_size=4",
    "train.max_steps=4",
    "train.eval_loops=[1,2]",
    "train.eval_batches=1",
)
Invoke = Callable[..., str]


def sets(*overrides: str) -> list[str]:
    """``--set`` for each override."""
    return [word for override in overrides for word in ("--set", override)]


def invoke_app(*arguments: object, status: int = 0, stdin: str | None = None) -> str:
    """Standard output of a command."""
    result = CliRunner().invoke(app, [str(word) for word in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout


@pytest.fixture
def invoke() -> Invoke:
    return invoke_app


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A run folder that ``openmythos train`` wrote. Read it only."""
    out = tmp_path_factory.mktemp("runs") / "text"
    invoke_app("train", "tiny", "--data", text_file, "--out", out, *sets(*SMALL))
    return out


@pytest.fixture(scope="session")
def hops_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on walks, whose checkpoint has no tokenizer. Read it only."""
    out = tmp_path_factory.mktemp("runs") / "hops"
    small = [word for word in SMALL if not word.startswith(("data.", "model.vocab"))]
    invoke_app("train", "tiny", "--data", "hops", "--out", out, *sets(*small))
    return out


def stored(run: Path) -> dict[str, object]:
    return json.loads((run / "config.json").read_text(encoding="utf-8"))


def refused(invoke: Invoke, *arguments: object) -> str:
    """The message of the ValueError that the command line turns into one line."""
    with pytest.raises(ValueError, match=r".") as caught:
        invoke(*arguments)
    return str(caught.value)


def error_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error, after notes, of a command that ends with status 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["openmythos", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and lines[-1].startswith("error: ")
    assert not any(line.startswith(("error: ", "Traceback")) for line in lines[:-1])
    return lines[-1]


__all__ = ["Invoke", "error_line", "invoke_app", "refused", "sets", "stored"]
