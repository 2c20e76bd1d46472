"""Weights in 8 bits against fp32: tokens per second side by side, bytes per token, memory, quality.

    .venv/bin/python -m benchmarks.int8 speed d1024 1       (model B, C, d1024 or deep; batch size)
    .venv/bin/python -m benchmarks.int8 memory deep
    .venv/bin/python -m benchmarks.int8 quality RUN         (of the demo: text, or walks)

Every line is a process of its own. Speed is that of a compiled ``Session`` after the first new
token, both models in turn. Bytes per token are those of the weights that one new token reads: the
core once in every loop, of experts those of a token. Memory is the peak of a fresh process over
what it holds after a tiny checkpoint was loaded and used: of loading, and of 32 new tokens too.
"""

import json
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.load_memory import our_config, resident
from benchmarks.measure import CONFIGS, decode_session, some_tokens
from openmythos.checkpoint.load import empty_model, fill_model
from openmythos.checkpoint.save import save_pretrained
from openmythos.config import ModelConfig, MoEConfig
from openmythos.interop.families.openmythos_original import read_config
from openmythos.interop.loading import load_pretrained
from openmythos.model.recurrent import RecurrentDepthLM

ROUNDS, PROMPT, STEPS = 5, 64, 32
LOOPS = (1, 2, 4, 8, 12, 16)


def config_of(name: str) -> ModelConfig:
    """B and C are those of ``benchmarks.measure``; in fp32 d1024 is 0.3 GB, deep 1.1 GB."""
    if name == "deep":
        return our_config(16)
    if name == "d1024":
        return replace(our_config(2), vocab_size=4096, max_seq_len=512)
    return read_config({**CONFIGS[name][0], "act_threshold": 0.99, "rope_theta": 10_000.0})


@torch.no_grad()
def write(folder: Path, config: ModelConfig) -> Path:
    """A checkpoint whose matrices are random, also those that a new model has as zeros."""
    model, generator = empty_model(config), torch.Generator().manual_seed(0)

    def drawn(name: str, like: Tensor) -> Tensor:
        if like.dim() < 2:
            vector = torch.ones if "norm" in name else torch.zeros
            return vector(like.shape, dtype=like.dtype)
        return torch.randn(like.shape, generator=generator) * like.shape[-1] ** -0.5

    tensors = ((name, drawn(name, like)) for name, like in model.state_dict().items())
    return save_pretrained(fill_model(model, tensors, folder, None, "cpu"), folder)


def bytes_per_token(model: RecurrentDepthLM) -> int:
    """Bytes of the weights that one new token reads."""
    config, found = model.config, 0.0
    part = config.core_ff
    chosen = part.num_experts_per_token / part.num_experts if isinstance(part, MoEConfig) else 1.0
    for name, tensor in model.state_dict().items():
        loops = config.num_loops if name.startswith("core.") else 1
        routed = ".feed_forward.gate_up" in name or ".feed_forward.down" in name
        experts = name.startswith("core.") and isinstance(part, MoEConfig) and routed
        row = 1 / config.vocab_size if name.startswith("embed.") and config.tie_embeddings else 0
        found += tensor.nbytes * (loops * (chosen if experts else 1) + row)
        if name.startswith("embed.") and not config.tie_embeddings:
            found -= tensor.nbytes * (1 - 1 / config.vocab_size)
    return round(found)


def speed(name: str, rows: int) -> dict[str, object]:
    """Tokens per second of both, in turn."""
    config = config_of(name)
    tokens: Tensor = some_tokens(rows, PROMPT) % config.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "model"), config)
        models = {weights: load_pretrained(path, weights=weights) for weights in ("stored", "int8")}
    spent: dict[str, list[float]] = {weights: [] for weights in models}
    for _ in range(ROUNDS + 1):  # the first compiles
        for weights, model in models.items():
            seconds = decode_session(model, tokens, config.num_loops, compiled=True)
            spent[weights].append(seconds)
    found = {weights: rows * STEPS / median(each[1:]) for weights, each in spent.items()}
    read = {weights: bytes_per_token(model) for weights, model in models.items()}
    return {
        "model": name,
        "batch": rows,
        "fp32_tokens_per_s": round(found["stored"], 1),
        "int8_tokens_per_s": round(found["int8"], 1),
        "speedup": round(found["int8"] / found["stored"], 2),
        "megabytes_per_token": [round(each / 1e6, 2) for each in read.values()],
        "bytes_ratio": round(read["int8"] / read["stored"], 3),
    }


def memory(name: str) -> dict[str, object]:
    """Peak growth in a fresh process for each, by ``memory-of``."""
    import subprocess

    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "model"), config_of(name))
        tiny = write(Path(folder, "tiny"), replace(our_config(1), d_model=64, vocab_size=64))
        grown = {}
        for weights in ("stored", "int8"):
            command = [sys.executable, "-m", "benchmarks.int8", "memory-of", str(path), str(tiny)]
            ran = subprocess.run([*command, weights], capture_output=True, text=True, check=True)
            grown[weights] = json.loads(ran.stdout.splitlines()[-1])
    size = {f"{weights}_megabytes": each for weights, each in grown.items()}
    ratio = [round(b / a, 3) for a, b in zip(grown["stored"], grown["int8"], strict=True)]
    return {"model": name, **size, "ratio": ratio}


def memory_of(path: str, tiny: str, weights: str) -> list[float]:
    """Megabytes that the peak grows by loading a model, and by loading and 32 new tokens."""

    def decode(folder: str, loaded: list[int]) -> None:
        model = load_pretrained(folder, weights=weights)
        loaded.append(resident("VmHWM"))
        tokens = some_tokens(1, PROMPT) % model.config.vocab_size
        decode_session(model, tokens, 1, compiled=False)

    peaks: list[int] = []
    decode(tiny, peaks)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    before = resident("VmRSS")
    decode(path, peaks)
    return [round((peak - before) / 1e6, 1) for peak in (peaks[-1], resident("VmHWM"))]


def quality(run: str) -> dict[str, object]:
    """Scores by number of loops in fp32 and in 8 bits."""
    from openmythos.command.evaluate import held_out, on_tasks, usual_sizes
    from openmythos.command.origin import puzzle_of
    from openmythos.interop.hub import local_folder

    folder = local_folder(run)
    walks, found = puzzle_of(folder), {}
    for weights in ("stored", "int8"):
        with redirect_stderr(StringIO()):
            if walks is None:
                curves, _ = held_out(folder, LOOPS, None, 16, None, 8, "cpu", weights)
            else:
                names = usual_sizes(walks)
                more = (folder, names, walks, LOOPS, 256, None, 64, 0, "cpu", weights)
                curves, _ = on_tasks(*more)
        for curve in curves:
            scores = [round(score.value, 4) for score in curve.scores.values()]
            found[f"{curve.task} {weights}"] = scores
    return {"run": run, "loops": LOOPS, **found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    started = time.perf_counter()
    what, *words = sys.argv[1:]
    if what == "speed":
        print(json.dumps(speed(words[0], int(words[1]))), flush=True)
    elif what == "memory-of":
        print(json.dumps(memory_of(*words)))
    else:
        print(json.dumps({"memory": memory, "quality": quality}[what](*words)), flush=True)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
