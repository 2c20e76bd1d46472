import json
from pathlib import Path

import pytest
import torch

from openmythos.checkpoint.load import load_checkpoint, load_weights
from openmythos.checkpoint.save import save_pretrained
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
