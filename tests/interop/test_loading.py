from pathlib import Path

import pytest
import torch

import openmythos
from openmythos.checkpoint import save_pretrained
from openmythos.config import GQAConfig, ModelConfig, SwiGLUConfig
from openmythos.interop.loading import load_config, load_pretrained
from openmythos.model.recurrent import RecurrentDepthLM

CONFIG = ModelConfig(
    vocab_size=8,
    d_model=8,
    num_prelude_layers=1,
    num_core_layers=1,
    num_coda_layers=1,
    num_loops=2,
    attention=GQAConfig(num_heads=1, num_kv_heads=1, head_dim=8),
    feed_forward=SwiGLUConfig(d_ff=8),
)


def test_our_own_folder_is_loaded_with_its_options(tmp_path: Path) -> None:
    model = RecurrentDepthLM(CONFIG)
    folder = save_pretrained(model, tmp_path / "saved")
    loaded = load_pretrained(str(folder), dtype=torch.float64)
    assert loaded.config == CONFIG
    assert torch.equal(loaded.embed.weight, model.embed.weight.double())


def test_the_package_names_the_loader() -> None:
    assert openmythos.load_pretrained is load_pretrained


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    folder = save_pretrained(RecurrentDepthLM(CONFIG), tmp_path / "saved")
    (folder / "config.json").write_text('{"format": "gguf"}', encoding="utf-8")
    with pytest.raises(ValueError, match="has format 'gguf'"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="does not exist"):
        load_pretrained(tmp_path / "absent")


def test_a_config_is_read_without_the_weights(tmp_path: Path) -> None:
    folder = save_pretrained(RecurrentDepthLM(CONFIG), tmp_path / "saved")
    assert load_config(folder) == CONFIG
    stored = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(stored.replace('"d_model"', '"dmodel"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: unknown key 'dmodel'"):
        load_config(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(ValueError, match="of no known family"):
        load_config(folder)
