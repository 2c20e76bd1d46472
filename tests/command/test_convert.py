import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from openmythos.interop.loading import load_pretrained
from tests.command.conftest import Invoke, refused, stored


def test_a_published_checkpoint_is_converted_there_and_back(
    invoke: Invoke, golden_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    source, ours, theirs = golden_dir("openmythos-mla"), tmp_path / "ours", tmp_path / "theirs"
    invoke("convert", source, "--out", ours)
    assert stored(ours)["format"] == "openmythos"
    invoke("convert", ours, "--to", "original-openmythos", "--out", theirs)
    assert stored(theirs)["attn_type"] == "mla"
    tokens = torch.arange(12).view(2, 6)
    logits = load_pretrained(source)(tokens).logits
    assert torch.equal(load_pretrained(theirs)(tokens).logits, logits)
    invoke("convert", source, "--out", ours, "--dtype", "float16")
    assert load_pretrained(ours).embed.weight.dtype == torch.float16


def test_convert_reports_as_json(invoke: Invoke, text_run: Path, tmp_path: Path) -> None:
    said = json.loads(invoke("convert", text_run, "--out", tmp_path / "out", "--json"))
    count = sum(p.numel() for p in load_pretrained(text_run).parameters())
    assert said == {
        "folder": str(tmp_path / "out"),
        "format": "openmythos",
        "tokenizer": True,
        "total_params": count,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("convert", "RUN", "--to", "huggin"), "--to is 'huggin'; allowed: openmythos, original"),
        (("convert", "RUN", "--to", "original-openmythos"), "the original OpenMythos has experts"),
    ],
)
def test_refusals(
    invoke: Invoke, hops_run: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    words = [hops_run if word == "RUN" else word for word in arguments]
    assert said in refused(invoke, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_checkpoint_is_taken_on_request(
    invoke: Invoke, text_run: Path, tmp_path: Path
) -> None:
    changed, new = tmp_path / "changed", tmp_path / "new"
    shutil.copytree(next((text_run / "checkpoints").glob("step-*")), changed)
    config = stored(changed)
    (changed / "config.json").write_text(json.dumps(config | {"num_loops": 3}), encoding="utf-8")
    said = refused(invoke, "convert", changed, "--out", new)
    assert f"openmythos convert {changed} --no-verify --out NEW" in said
    invoke("convert", changed, "--no-verify", "--out", new)
    assert load_pretrained(new).config.num_loops == 3


def test_names_of_families_are_plain(invoke: Invoke, hops_run: Path, tmp_path: Path) -> None:
    said = refused(invoke, "convert", hops_run, "--to", "x", "--out", tmp_path / "out")
    names = said.partition("allowed: ")[2].split(", ")
    assert {"openmythos", "parcae", "parcae-gpt"} <= set(names)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)
