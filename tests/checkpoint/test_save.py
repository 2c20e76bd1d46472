import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from openmythos.checkpoint.load import load_checkpoint, load_weights
from openmythos.checkpoint.save import save_pretrained, save_tensors
from openmythos.checkpoint.weights import StoredWeights
from openmythos.config import ModelConfig
from openmythos.config.schema import apply_overrides, from_dict
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer, byte_tokenizer
from tests.checkpoint.examples import CONFIG, make_model


@pytest.mark.parametrize("tied", [True, False])
def test_folder_layout(tmp_path: Path, tied: bool) -> None:
    config = apply_overrides(CONFIG, [f"tie_embeddings={json.dumps(tied)}"])
    folder = save_pretrained(make_model(0, config), tmp_path / "new" / "saved")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.json", "manifest.json", "model.safetensors")
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (data.pop("format"), data.pop("format_version")) == ("openmythos", 2)
    assert from_dict(ModelConfig, data) == config
    assert ("head.weight" in StoredWeights(folder).shapes) == (not tied)


def test_tokenizer_is_saved(model: RecurrentDepthLM, tmp_path: Path) -> None:
    folder = save_pretrained(model, tmp_path / "saved", byte_tokenizer())
    assert Tokenizer.load(folder).fingerprint == byte_tokenizer().fingerprint
    load_checkpoint(folder)


def test_model_without_weights_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        hollow = RecurrentDepthLM(CONFIG)
    with pytest.raises(ValueError, match="meta device"):
        save_pretrained(hollow, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_model_whose_blocks_were_compiled_is_saved_under_plain_names(tmp_path: Path) -> None:
    model = make_model(0)
    expected = list(model.state_dict())
    model.core[0] = torch.compile(model.core[0], backend="eager")
    assert list(model.state_dict()) != expected
    folder = save_pretrained(model, tmp_path / "saved")
    assert sorted(StoredWeights(folder).shapes) == sorted(expected)
    load_checkpoint(folder)
    load_weights(model, folder)


def test_the_same_tensors_are_the_same_file(tmp_path: Path) -> None:
    """Whatever order their metadata comes in."""
    tensors = {"b": torch.arange(3.0), "a": torch.zeros(2, 2)}
    metadata = dict.fromkeys("zyxw", '{"é": [1, "\\n"]}')
    written = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        save_tensors(tensors, path, metadata)
        written.add(path.read_bytes())
    assert len(written) == 1
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in "ab")
