import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from openmythos.cli import app
from openmythos.command.option import check_device, parse_dtype, parse_loops
from openmythos.data.prepare import prepare
from openmythos.data.synthetic import HopsConfig
from openmythos.engine.request import Request
from openmythos.engine.sampling import row_generator
from openmythos.tokenizer import Tokenizer
from openmythos.train.recipe import TrainConfig
from tests.command.conftest import Invoke, refused
from tests.foreign import CHATML
from tests.interop.test_gguf import small_llama, write_gguf


def test_parse_loops() -> None:
    assert parse_loops("1,2,16") == (1, 2, 16)
    assert parse_loops(" 3 ") == (3,)
    for text in ("", "0", "1,-2", "1,,2", "x", "1.5", "1,1000001"):
        with pytest.raises(
            ValueError, match=f"--num-loops is {text!r}; give whole numbers of 1 to"
        ):
            parse_loops(text)


def examples_of_set() -> dict[str, list[str]]:
    """The overrides that each command's help gives as examples."""
    found = {}
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        words = CliRunner().invoke(app, [name, "--help"]).output.split()
        given = [word.strip(".,()") for word in words if re.fullmatch(r"[^<>=]+=[^=]+", word)]
        found[name] = [
            word for word in given if "--set" in words and not word.rpartition("=")[2].isupper()
        ]
    return {name: given for name, given in found.items() if given}


def test_help_names_fields_that_the_command_has() -> None:
    from openmythos.command.decoding import decoding_of
    from openmythos.command.demo import configs
    from openmythos.config.presets import preset
    from openmythos.config.schema import apply_overrides
    from openmythos.train.run import resolve

    def decode(overrides: list[str]) -> None:
        decoding_of("kl", "every_k", overrides)

    accepts = {
        "train": lambda given: resolve("tiny", None, None, given, None),
        "inspect": lambda given: apply_overrides(preset("tiny"), given),
        "plan": lambda given: apply_overrides(preset("tiny"), given),
        "demo": lambda given: configs(0, 1.0, 1.0, given),
        "generate": decode,
        "chat": decode,
    }
    examples = examples_of_set()
    assert examples.keys() == accepts.keys()
    for name, given in examples.items():
        accepts[name](given)


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
def test_a_seed_has_one_range_and_one_text(seed: int) -> None:
    said = f"seed is {seed}; it must be an integer in 0..18446744073709551615"
    for use in (
        lambda: Request(tokens=[1], seed=seed),
        lambda: TrainConfig(max_steps=1, seed=seed),
        lambda: HopsConfig(seed=seed),
        lambda: row_generator(seed, 0),
        lambda: prepare("absent", "absent", seed=seed),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            use()
    for name in ("train", "generate", "chat", "demo", "prepare", "eval"):
        given = [] if name in ("train", "demo") else ["absent"]
        with pytest.raises(ValueError, match=f"^--{re.escape(said)}$"):
            CliRunner().invoke(app, [name, *given, "--seed", str(seed)], catch_exceptions=False)
    assert TrainConfig(max_steps=1, seed=2**64 - 1).seed == 2**64 - 1


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("cpu") == "cpu"
    for device in ("gpu", "cuda:x", "", "meta"):
        with pytest.raises(
            ValueError, match=f"--device is {device!r}; give cpu, cuda, cuda:N or mps"
        ):
            check_device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="this machine has 0 of cuda"):
        check_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda") == "cuda"
    assert check_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="'cuda:2', but this machine has 2 of cuda"):
        check_device("cuda:2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="this machine has 0 of mps"):
        check_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert check_device("mps") == "mps"


def test_dtypes_are_torchs() -> None:
    assert parse_dtype(None) is None
    assert parse_dtype("bfloat16") is torch.bfloat16


def test_every_command_that_reads_a_model_takes_a_gguf_file(
    invoke: Invoke, text_file: Path, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "a.gguf", small_llama(), pre="llama-bpe")
    few = ("--max-new-tokens", 3)
    written = invoke("generate", file, "--prompt", "the in", *few, "--temperature", 0, "--json")
    assert len(json.loads(written)[0]["tokens"]) <= 3
    assert "/quit" not in invoke("chat", file, *few, stdin="the\n")
    assert json.loads(invoke("inspect", file, "--json"))["config"]["num_core_layers"] == 2
    for command in (("convert",), ("convert", "--to", "llama"), ("export",), ("retrofit",)):
        name, *words = command
        out = tmp_path / "-".join(command)
        invoke(name, file, "--out", out, *words)
        text = Tokenizer.load(out)
        assert text.names["eos_token"] == "<|im_end|>" and text.chat_template == CHATML
        again = invoke("generate", out, "--prompt", "the in", *few, "--temperature", 0, "--json")
        if name != "retrofit":  # which adds an injection
            assert json.loads(again) == json.loads(written)
    data = tmp_path / "data"
    invoke("prepare", text_file, "--tokenizer", file, "--out", data)
    depths = ("--num-loops", "1", "--seq-len", 16, "--max-batches", 1, "--json")
    assert json.loads(invoke("eval", file, "--data", data, *depths))[0]["bits_per_byte"] > 0
    said = refused(invoke, "generate", "absent.gguf", "--prompt", "a")
    assert said == "absent.gguf does not exist; give a .gguf file of a Llama"
