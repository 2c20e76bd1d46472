"""A small model with random weights, and edits of its folder."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from openmythos.config import GQAConfig, ModelConfig, MoEConfig, SwiGLUConfig
from openmythos.model.recurrent import RecurrentDepthLM

CONFIG = ModelConfig(
    vocab_size=20,
    d_model=16,
    num_prelude_layers=1,
    num_core_layers=1,
    num_coda_layers=1,
    num_loops=2,
    attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    feed_forward=SwiGLUConfig(d_ff=16),
    core_feed_forward=MoEConfig(num_experts=4, num_experts_per_token=2, d_expert=8),
    max_seq_len=16,
)
TOKENS = torch.arange(10).view(2, 5)


def make_model(seed: int, config: ModelConfig = CONFIG) -> RecurrentDepthLM:
    """Every weight random, so that each of them matters."""
    model = RecurrentDepthLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return model.eval()


def without_checksums(folder: Path) -> Path:
    """As the format's first version was written at its beginning: without a manifest."""
    (folder / "manifest.json").unlink()
    edit_json(folder / "config.json", lambda data: data.update(format_version=1))
    return folder


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
