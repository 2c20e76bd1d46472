"""What every family is asked: there and back, and generation with a cache as without one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from openmythos.config import ModelConfig
from openmythos.engine.reference import GenerationResult, generate
from openmythos.interop.loading import load_pretrained
from openmythos.interop.mapping import Family, Recomputed, export_config, export_tensors
from openmythos.model.cache import KVCache, PerLoop
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import random_model, random_tokens

PROMPTS = [[3, 14, 15, 9, 2, 6], [5], [3, 5, 8, 9]]


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def exported(family: Family, model: RecurrentDepthLM, folder: Path) -> Path:
    """The model in a folder of the family."""
    return write_folder(folder, export_config(family, model.config), export_tensors(family, model))


@torch.no_grad()
def check_round_trip(family: Family, config: ModelConfig, folder: Path) -> None:
    """Ours to the family's names and back: the same config, weights and logits."""
    model = random_model(config)
    again = load_pretrained(exported(family, model, folder))
    assert again.config == config
    tokens = random_tokens(config, 2, 7)
    for num_loops in (1, 3):
        found, wanted = (m(tokens, num_loops=num_loops).logits for m in (again, model))
        assert torch.equal(found, wanted)
        assert wanted.std() > 0.1  # no path was zero


def check_same_bytes(family: Family, golden: Path) -> None:
    """Every stored tensor is used, and comes back as it was."""
    stored, model = load_file(golden / "model.safetensors"), load_pretrained(golden)
    written, rules = export_tensors(family, model), family.rules(model.config)
    skipped = {rule.their_name for rule in rules if isinstance(rule, Recomputed)}
    assert stored.keys() - written.keys() <= skipped
    assert written.keys() <= stored.keys()
    for name, tensor in written.items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor.view(torch.uint8), stored[name].view(torch.uint8)), name


@torch.no_grad()
def cached_logits(
    model: RecurrentDepthLM, tokens: Tensor, num_loops: int, chunks: list[int]
) -> Tensor:
    """The logits of all positions, read in chunks after one another."""
    rows, length = tokens.shape
    cache = KVCache(model.config, batch_size=rows, max_len=length, max_loops=num_loops)
    parts = []
    for chunk in tokens.split(chunks, dim=1):
        ctx = model.context(chunk, cache=cache)
        parts.append(model(chunk, num_loops=num_loops, ctx=ctx).logits)
    return torch.cat(parts, dim=1)


def check_generation(config: ModelConfig, num_loops: int) -> None:
    """Greedy: unequal prompts with the per-loop cache, without a cache, and one prompt alone."""

    def run(model: RecurrentDepthLM, prompts: list[list[int]], **options: Any) -> GenerationResult:
        return generate(
            model,
            prompts,
            max_new_tokens=6,
            num_loops=num_loops,
            cache_layout=PerLoop(),
            return_logits=True,
            **options,
        )

    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        model = random_model(config, dtype=dtype)
        cached, plain = (run(model, PROMPTS, use_cache=choice) for choice in (True, False))
        assert cached.tokens == plain.tokens
        assert cached.loops == [[num_loops] * 6] * len(PROMPTS)
        alone = run(model, PROMPTS[1:2])
        assert alone.tokens == cached.tokens[1:2]
        assert cached.logits is not None and plain.logits is not None and alone.logits is not None
        for a, b in zip(
            cached.logits + alone.logits, plain.logits + plain.logits[1:2], strict=True
        ):
            assert (a - b).abs().max() < tolerance
