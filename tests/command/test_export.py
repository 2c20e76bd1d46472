import json
from pathlib import Path

import pytest
import torch

from openmythos.interop.loading import load_pretrained
from openmythos.tokenizer import Tokenizer
from tests.command.conftest import Invoke, refused, stored


def test_a_run_is_exported_with_its_tokenizer(
    invoke: Invoke, text_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "export"
    said = invoke("export", text_run, "--to", "hf", "--out", out, "--num-loops", 3)
    assert said.startswith(f"wrote {out}\n") and "trust_remote_code=True" in said
    model, run = load_pretrained(out), load_pretrained(text_run)
    assert model.config.num_loops == 3 != run.config.num_loops
    assert torch.equal(model.embed.weight, run.embed.weight)
    tokenizer = Tokenizer.load(out)
    assert stored(out)["bos_token_id"] == tokenizer.bos_id
    again = tmp_path / "again"
    invoke("export", out, "--out", again, "--dtype", "bfloat16")  # an export is a source too
    assert stored(again)["dtype"] == "bfloat16" and (again / "tokenizer_config.json").is_file()


def test_a_checkpoint_without_a_tokenizer_says_so(
    invoke: Invoke, hops_run: Path, tmp_path: Path
) -> None:
    said = invoke("export", hops_run, "--out", tmp_path / "export")
    assert "without a tokenizer" in said
    said = json.loads(invoke("export", hops_run, "--out", tmp_path / "export", "--json"))
    assert said["tokenizer"] is False and said["folder"] == str(tmp_path / "export")
    assert said["num_loops"] == load_pretrained(hops_run).config.num_loops
    assert not (tmp_path / "export" / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "RUN", "--to", "gguf"), "--to is 'gguf'; allowed: hf"),
        (("export", "RUN", "--dtype", "int4"), "--dtype is 'int4'; allowed: float32, float16"),
        (("export", "absent"), "absent does not exist"),
    ],
)
def test_refusals(
    invoke: Invoke, hops_run: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    words = [hops_run if word == "RUN" else word for word in arguments]
    assert said in refused(invoke, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
