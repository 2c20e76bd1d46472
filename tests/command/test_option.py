import json
from pathlib import Path

import pytest
import torch

from openmythos.command.option import check_device, parse_dtype, parse_loops
from openmythos.tokenizer import Tokenizer
from tests.command.conftest import Invoke, refused
from tests.foreign import CHATML
from tests.interop.test_gguf import small_llama, write_gguf


def test_parse_loops() -> None:
    assert parse_loops("1,2,16") == (1, 2, 16)
    assert parse_loops(" 3 ") == (3,)
    for text in ("", "0", "1,-2", "1,,2", "x", "1.5"):
        with pytest.raises(ValueError, match=f"--num-loops is {text!r}; give positive"):
            parse_loops(text)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("cpu") == "cpu"
    for device in ("gpu", "cuda:x", "", "meta"):
        with pytest.raises(ValueError, match=f"--device is {device!r}; give cpu, cuda or cuda:N"):
            check_device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="this machine has 0 of cuda"):
        check_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda") == "cuda"
    assert check_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="'cuda:2', but this machine has 2 of cuda"):
        check_device("cuda:2")


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
