import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import openmythos
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import load_config

NAME = "example-owner/example-model"


class Hub:
    """Stands for the hub: one model, whose files come as they are asked for."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model, self.cache, self.asked = model, cache, list[list[str]]()

    def snapshot_download(self, name: str, allow_patterns: list[str]) -> str:
        self.asked.append(allow_patterns)
        if name != NAME:
            raise OSError("404 Client Error.\nRepository not found")
        for pattern in allow_patterns:
            for file in self.model.glob(pattern):
                self.cache.mkdir(exist_ok=True)
                shutil.copy(file, self.cache)
        return str(self.cache)


@pytest.fixture
def hub(golden_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    model = tmp_path / "stored"
    shutil.copytree(golden_dir("ouro"), model)
    (model / "io.safetensors").unlink()
    (model / "modeling_ouro.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    found = Hub(model, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


def test_a_name_on_the_hub_loads_without_its_code(hub: Hub) -> None:
    model = openmythos.load_pretrained(NAME)
    again = openmythos.load_pretrained(hub.model)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert load_config(NAME) == again.config
    assert not list(hub.cache.glob("*.py"))
    assert all("*.bin" not in asked for asked in hub.asked)


def test_torch_files_are_fetched_where_nothing_safer_is_there(hub: Hub) -> None:
    (hub.model / "model.safetensors").rename(hub.model / "pytorch_model.bin")
    assert (local_folder(NAME) / "pytorch_model.bin").exists()
    assert len(hub.asked) == 2


def test_what_is_here_is_not_looked_up(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for path in ("runs/absent", "absent", str(tmp_path / "absent"), "./owner/name"):
        with pytest.raises(ValueError, match="does not exist"):
            local_folder(path)
    shutil.copytree(hub.model, tmp_path / NAME)
    assert local_folder(NAME) == (tmp_path / NAME).resolve()
    assert not hub.asked


def test_what_cannot_be_fetched_is_one_line(hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"owner/absent is no folder here, .*404") as error:
        openmythos.load_pretrained("owner/absent")
    assert "\n" not in str(error.value)


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached, and offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not cached, and offline"):
        local_folder(NAME)


def test_models_that_ship_have_an_address(hub: Hub, tmp_path: Path) -> None:
    folder = local_folder("zoo:walks")
    assert folder == local_folder(Path("zoo:walks")) and (folder / "model.safetensors").is_file()
    assert load_config("zoo:walks").num_loops == openmythos.load_pretrained(folder).config.num_loops
    for name in ("zoo:", "zoo:absent", "zoo:../zoo/walks", "zoo:walks/x"):
        with pytest.raises(ValueError, match=f"no model '{name}' ships; these do: .*zoo:walks"):
            local_folder(name)
    shutil.copytree(hub.model, tmp_path / "zoo:walks")
    assert local_folder("zoo:walks") == (tmp_path / "zoo:walks").resolve()
    assert not hub.asked
