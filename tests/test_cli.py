import inspect
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from safetensors import SafetensorError

from openmythos import __version__, cli

COMMANDS = (
    *("demo", "train", "generate", "chat", "prepare", "eval", "presets", "inspect", "export"),
    "calibrate-exit",
    "config",
    "convert",
    "plan",
    "report",
    "reproduce",
    "analyze",
    "retrofit",
    "scaling-law",
    "serve",
)


SEEDS = "--seed is "
PACKAGE = str(Path(cli.__file__).parents[1])  # from any working directory, the one under test


def openmythos(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openmythos", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONPATH": PACKAGE},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_table_of_commands() -> None:
    names = [c.name or c.callback.__name__ for c in cli.app.registered_commands]
    assert sorted(names) == sorted(COMMANDS)


def test_help_of_every_command_needs_no_torch() -> None:
    program = (
        "import sys, json\n"
        "from typer.testing import CliRunner\n"
        "from openmythos.cli import app\n"
        "shown = {}\n"
        f"for name in ((), *((c,) for c in {COMMANDS!r})):\n"
        "    result = CliRunner().invoke(app, [*name, '--help'])\n"
        "    shown[' '.join(name)] = [result.exit_code, result.output]\n"
        "heavy = [m for m in ('torch', 'numpy', 'tokenizers', 'matplotlib') if m in sys.modules]\n"
        "print(json.dumps([shown, heavy]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    shown, heavy = json.loads(ran.stdout)
    assert heavy == []
    assert all(code == 0 for code, _ in shown.values())
    for name in COMMANDS:
        assert name in shown[""][1]
    for name in ("train", "demo", "generate"):
        assert "--set" in shown[name][1] and "--device" in shown[name][1]
        assert "--seed" in shown[name][1]


# What each command is tried with; the words stand for a file or folder of that kind.
TRIED = {
    "demo": (),
    "train": (),
    "generate": ("FOLDER", "--prompt", "a"),
    "chat": ("FOLDER",),
    "prepare": ("FOLDER",),
    "eval": ("FOLDER",),
    "presets": (),
    "inspect": ("FOLDER",),
    "plan": ("tiny", "--serve"),
    "report": ("FOLDER",),
    "reproduce": (),
    "scaling-law": ("fit", "FOLDER"),
    "analyze": ("FOLDER",),
    "config": (),
    "export": ("FOLDER", "--out", "OUT"),
    "convert": ("FOLDER", "--out", "OUT"),
    "retrofit": ("FOLDER", "--out", "OUT"),
    "serve": ("FOLDER",),
    "calibrate-exit": ("FOLDER",),
}
FIRST_WORDS = """
import json, sys
from typer.testing import CliRunner
from openmythos.cli import app

class Stop(Exception):
    pass

class Finder:  # torch and what is as slow to import is never loaded
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "numpy", "tokenizers", "matplotlib"):
            raise Stop(name)

sys.meta_path.insert(0, Finder())
said = {}
for name, words in json.loads(sys.argv[1]).items():
    result = CliRunner().invoke(app, [name, *words])
    slow = isinstance(result.exception, Stop)
    said[name] = [slow, result.exit_code, result.stdout, result.stderr]
print(json.dumps(said))
"""


def test_every_command_speaks_before_it_loads_anything_slow(tmp_path: Path) -> None:
    """Torch takes seconds to import from a cold disk; the first line must come before."""
    assert sorted(TRIED) == sorted(COMMANDS)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    places = {"FOLDER": str(folder), "OUT": str(tmp_path / "out")}
    tried = {name: [places.get(word, word) for word in words] for name, words in TRIED.items()}
    tried["inspect"] = ["--kernels"]
    command = [sys.executable, "-c", FIRST_WORDS, json.dumps(tried)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(ran.stdout)
    assert {name for name, (slow, *_) in said.items() if not slow} == {
        "plan",
        "presets",
        "reproduce",
    }
    for name, (slow, status, stdout, stderr) in said.items():
        assert stderr.endswith(" ...\n") or not slow, (name, stderr)
        assert stdout == "" or (name in ("plan", "presets") and status == 0)


def test_every_command_that_reports_takes_json() -> None:
    for command in cli.app.registered_commands:
        assert command.callback is not None
        takes = "as_json" in inspect.signature(command.callback).parameters
        assert takes != (command.callback.__name__ in ("chat", "reproduce", "serve")), (
            command.callback.__name__
        )


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        assert openmythos("--help").returncode == 0
        times.append(time.perf_counter() - started)
    print(f"openmythos --help: {min(times):.2f} s")  # the budget is 0.4 s; timings fail no test


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "tiney"), "no preset 'tiney'; did you mean 'tiny'?"),
        (("train", "--set", "model.d_modle=8"), "did you mean 'd_model'?"),
        (("generate", "absent", "--prompt", "a"), "absent does not exist"),
        (("train", "--data", "empty.txt"), "empty.txt"),
        (("train", "--config", "broken.json"), "--config broken.json cannot be used"),
        (("train", "--out", "empty.txt", "--data", "hops"), "empty.txt"),
        (("train", "--config", "absent.json"), "cannot be used: no such file or directory (absent"),
        (("prepare", "empty.txt", "--seed", "-1"), SEEDS),
        (("train", "--seed", str(2**64)), SEEDS),
        (("train", "--set", f"train.seed={2**64}"), SEEDS.removeprefix("--")),
        (("eval", "absent", "--seed", str(2**64)), SEEDS),
        (("demo", "--seed", str(2**200)), SEEDS),
        (("inspect", "tiny", "--set", "tie_embeddings=yes"), "is 'yes'; expected true or false"),
    ],
)
def test_errors_are_one_line_with_status_2(
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["openmythos", *arguments])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets its own
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    *notes, line = printed.err.splitlines()
    assert line.startswith("error: ") and said in line
    assert all(text.endswith(" ...") for text in notes)
    assert printed.out == ""


def test_a_process_ends_with_one_line_and_status_2(tmp_path: Path) -> None:
    ran = openmythos("train", "tiney", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.splitlines()[-1].startswith("error: no preset 'tiney'")
    assert "Traceback" not in ran.stderr


def test_main_joins_lines_and_keeps_real_faults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails_with(error: BaseException) -> int:
        def app() -> None:
            raise error

        monkeypatch.setattr(cli, "app", app)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code

    assert fails_with(ValueError("x is 1;\n   it must be 2")) == 2
    assert capsys.readouterr().err == "error: x is 1; it must be 2\n"
    assert fails_with(PermissionError(13, "denied", "out")) == 2
    assert capsys.readouterr().err == "error: out cannot be used: denied\n"
    assert fails_with(KeyboardInterrupt()) == 130
    capsys.readouterr()
    for cause, said in (
        (MemoryError(), "out of memory; take"),
        (
            MemoryError("Unable to allocate 745. GiB for an array with shape (100000000000,)"),
            "out of memory (asked for 745 GiB); take a smaller model, batch or depth\n",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (SafetensorError("No space left on device"), "No space left"),
        (OverflowError("int too large to convert to C long"), "a number is too large"),
        (RuntimeError("Overflow when unpacking long"), "a number is too large"),
        (ValueError("x" * 900_000), "x ... x"),
    ):
        assert fails_with(cause) == 2
        message = capsys.readouterr().err
        assert said in message and len(message) < 2100 and message.count("\n") == 1
    for fault in (TypeError("a bug"), RuntimeError("a bug")):  # these keep their traceback
        monkeypatch.setattr(cli, "app", lambda fault=fault: (_ for _ in ()).throw(fault))
        with pytest.raises(type(fault), match="a bug"):
            cli.main()


def test_version_and_short_help() -> None:
    assert openmythos("--version").stdout == f"openmythos {__version__}\n"
    assert openmythos("train", "-h").stdout == openmythos("train", "--help").stdout
    assert "--show-completion" in openmythos("-h").stdout


def test_usage_errors_and_no_arguments() -> None:
    ran = openmythos("trian")
    assert ran.returncode == 2 and "trian" in ran.stderr and "Traceback" not in ran.stderr
    assert openmythos("presets", "--json").returncode == 0
    assert "Usage" in "".join(getattr(openmythos(), name) for name in ("stdout", "stderr"))


LONG_PREPARE = """
import signal, sys, time
import openmythos.data.prepare
from openmythos.cli import main

# A shell starts what runs in its background with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def wait(*arguments, **options):
    print("started", flush=True)
    time.sleep(60)

openmythos.data.prepare.prepare = wait
sys.argv = ["openmythos", "prepare", "python-docs"]
main()
"""


def test_interrupting_a_command_leaves_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_PREPARE],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
