import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import openmythos
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import load_config
from tests.interop.hub_server import Revision, serving

NAME = "example-owner/example-model"
BESIDE = ("chat_template.jinja", "merges.txt", "LICENSE")  # no JSON, and needed all the same


class Hub:
    """Stands for the hub: one model, whose files come as they are asked for."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model, self.cache, self.asked = model, cache, list[list[str]]()

    def snapshot_download(self, name: str, revision: str | None, allow_patterns: list[str]) -> str:
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
    for name in BESIDE:
        (model / name).write_text("text\n", encoding="utf-8")
    (model / "modeling_ouro.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    found = Hub(model, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


def test_a_name_on_the_hub_loads_without_its_code(hub: Hub) -> None:
    (hub.model / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    model = openmythos.load_pretrained(NAME)
    assert (hub.cache / "chat_template.jinja").is_file()  # it runs in a sandbox
    again = openmythos.load_pretrained(hub.model)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert load_config(NAME) == again.config
    assert not list(hub.cache.glob("*.py"))
    assert all((hub.cache / name).is_file() for name in BESIDE)
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


READ = """
import sys
import openmythos
from openmythos.data.source import load_documents
for name in sys.argv[1].split():
    try:
        if name.startswith("hf:"):
            print(name, *[document.text for document in load_documents(name)])
        else:
            print(name, openmythos.load_pretrained(name).config.num_loops)
    except ValueError as error:
        print(name, str(error).replace(chr(10), "|"))
"""


def test_models_and_datasets_come_over_http_at_a_branch_a_tag_or_a_commit(tmp_path: Path) -> None:
    """With the hub's own clients, in a process of its own: they read the address once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = []
    for branch, model in (("main", "walks"), ("v1", "walks_fixed_longest")):
        data = tmp_path / branch / "data"
        data.mkdir(parents=True)
        table = pa.table({"text": [f"{branch}-{n}" for n in range(3)], "other": [1, 2, 3]})
        pq.write_table(table, data / "train-00000-of-00001.parquet")
        kept.append(Revision("models", NAME, branch, local_folder(f"zoo:{model}")))
        kept.append(Revision("datasets", NAME, branch, tmp_path / branch))
    commit = next(one.commit for one in kept if (one.kind, one.branch) == ("models", "v1"))
    asked = [NAME, f"{NAME}@v1", f"{NAME}@{commit}", f"{NAME}@absent", "example-owner/absent"]
    asked += [f"hf:{NAME}", f"hf:{NAME}@v1", f"hf:{NAME}@absent"]
    with serving(kept) as address:
        own = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", READ, " ".join(asked)]
        env = {**os.environ, **own, "HF_HUB_OFFLINE": "0"}
        ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    said = dict(line.split(" ", 1) for line in ran.stdout.splitlines())
    assert [said[name] for name in asked[:3]] == ["8", "4", "4"]
    assert "could not be fetched from the Hugging Face hub (404" in said[asked[3]]
    assert "could not be fetched from the Hugging Face hub (404" in said[asked[4]]
    assert [said[name] for name in asked[5:7]] == ["main-0 main-1 main-2", "v1-0 v1-1 v1-2"]
    assert "cannot stream" in said[asked[7]] and "absent" in said[asked[7]]


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
