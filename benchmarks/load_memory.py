"""Peak memory of loading a checkpoint of one gigabyte, for several names, files and dtypes.

    .venv/bin/python -m benchmarks.load_memory
    .venv/bin/python -m benchmarks.load_memory --gigabytes 0.25 --only sharded

Each checkpoint is written into a temporary folder and loaded in a fresh process, which reports its
resident memory after the import, after a tiny checkpoint (what torch imports only when it is used),
and at its peak. Pages of files that are mapped count as resident, so reading a file through a map
can cost as much as a copy.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from openmythos.checkpoint.load import empty_model
from openmythos.checkpoint.save import save_pretrained
from openmythos.config import GQAConfig, ModelConfig, SwiGLUConfig
from openmythos.folder import write_json
from openmythos.interop.families import openmythos_original
from openmythos.interop.loading import load_pretrained
from openmythos.interop.mapping import export_tensors
from openmythos.model.recurrent import RecurrentDepthLM

GIGABYTE = 10**9
NUM_SHARDS = 4
TINY = "tiny"  # the folder of a checkpoint that is loaded first
LIMIT = 1.3  # of the weights, in the larger of the dtypes that are stored and asked for
ORIGINAL = {
    "vocab_size": 32_000,
    "dim": 1024,
    "n_heads": 16,
    "n_kv_heads": 4,
    "max_seq_len": 2048,
    "max_loop_iters": 8,
    "prelude_layers": 2,
    "coda_layers": 2,
    "attn_type": "mla",
    "kv_lora_rank": 256,
    "q_lora_rank": 512,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 512,
    "act_threshold": 0.99,
    "rope_theta": 10_000.0,
    "lora_rank": 8,
}
# name: (writer, what is stored, what is asked for; None is what is stored)
CASES = {
    "ours, float32": ("ours", torch.float32, None),
    "ours, bfloat16": ("ours", torch.bfloat16, None),
    "ours, float32 to bfloat16": ("ours", torch.float32, torch.bfloat16),
    "ours, bfloat16 to float32": ("ours", torch.bfloat16, torch.float32),
    "original, sharded safetensors, float32": ("safetensors", torch.float32, None),
    "original, sharded safetensors, bfloat16": ("safetensors", torch.bfloat16, None),
    "original, sharded torch, float32": ("torch", torch.float32, None),
    "original, sharded torch, bfloat16": ("torch", torch.bfloat16, None),
    "original, one torch file, float32": ("one torch file", torch.float32, None),
    "original, sharded torch, float32 to bfloat16": ("torch", torch.float32, torch.bfloat16),
}


def resident(field: str) -> int:
    """Bytes that the kernel counts for this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def load(folder: str, dtype: str) -> None:
    """In a fresh process: load and print what it took."""
    imported = resident("VmRSS")
    load_pretrained(Path(folder).with_name(TINY))
    ready, started = resident("VmRSS"), time.perf_counter()
    model = load_pretrained(folder, dtype=None if dtype == "None" else getattr(torch, dtype))
    seconds = time.perf_counter() - started
    loaded = sum(tensor.nbytes for tensor in model.state_dict().values())
    found = {"imported": imported, "ready": ready, "peak": resident("VmHWM"), "loaded": loaded}
    print(json.dumps({**found, "seconds": seconds}))


# --- checkpoints ----------------------------------------------------------------------------------


def filled(shapes: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights with memory of their own, from tensors that have none."""
    return {name: torch.full(t.shape, 0.01, dtype=dtype) for name, t in shapes.items()}


def our_config(num_layers: int) -> ModelConfig:
    """A looped model of 12.6 million parameters a core layer."""
    return ModelConfig(
        vocab_size=32_000,
        d_model=1024,
        num_prelude_layers=2,
        num_core_layers=num_layers,
        num_coda_layers=2,
        num_loops=8,
        attention=GQAConfig(num_heads=16, num_kv_heads=8, head_dim=64),
        feed_forward=SwiGLUConfig(d_ff=3072),
    )


def grow(num_bytes: int, dtype: torch.dtype, original: bool) -> RecurrentDepthLM:
    """The largest model that fits into so many bytes: more core layers, or more experts."""
    number, step = (4, 4) if original else (1, 1)
    while True:
        fields = {**ORIGINAL, "n_experts": number + step}
        config = openmythos_original.read_config(fields) if original else our_config(number + step)
        larger = empty_model(config)
        if sum(p.numel() for p in larger.parameters()) * dtype.itemsize > num_bytes:
            fields = {**ORIGINAL, "n_experts": number}
            return empty_model(
                openmythos_original.read_config(fields) if original else our_config(number)
            )
        number += step


def write(folder: Path, writer: str, dtype: torch.dtype, num_bytes: int) -> int:
    """Write a checkpoint; returns the bytes of its weights."""
    folder.mkdir()
    model = grow(num_bytes, dtype, original=writer != "ours")
    if writer == "ours":
        for name, tensor in filled(dict(model.named_parameters()), dtype).items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor))
        save_pretrained(model, folder)
    else:
        shape = {**ORIGINAL, "n_experts": model.core[0].feed_forward.config.num_experts}
        write_json(folder / "config.json", shape)
        tensors = filled(export_tensors(openmythos_original.FAMILY, model), dtype)
        if writer == "one torch file":
            torch.save({"model": tensors}, folder / "model.pt")
        else:
            write_shards(folder, tensors, writer)
    weights = [path for path in folder.iterdir() if path.suffix != ".json"]
    return sum(path.stat().st_size for path in weights)


def write_shards(folder: Path, tensors: dict[str, Tensor], writer: str) -> None:
    """As other programs write large models: numbered files and an index."""
    stem, suffix = ("model", "safetensors") if writer == "safetensors" else ("pytorch_model", "bin")
    places = {}
    for number in range(NUM_SHARDS):
        shard = f"{stem}-{number + 1:05}-of-{NUM_SHARDS:05}.{suffix}"
        names = list(tensors)[number::NUM_SHARDS]
        part = {name: tensors[name] for name in names}
        save_file(part, folder / shard) if suffix != "bin" else torch.save(part, folder / shard)
        places |= dict.fromkeys(names, shard)
    write_json(folder / f"{stem}.{suffix}.index.json", {"weight_map": places})


def measure(case: str, num_bytes: int, folder: Path) -> dict[str, float | str]:
    """One case, in megabytes."""
    writer, stored, wanted = CASES[case]
    on_disk = write(folder / "model", writer, stored, num_bytes)
    save_pretrained(
        RecurrentDepthLM(replace(our_config(1), d_model=16, vocab_size=8)), folder / TINY
    )
    dtype = "None" if wanted is None else str(wanted).removeprefix("torch.")
    command = [sys.executable, "-m", "benchmarks.load_memory", "--load", str(folder / "model")]
    ran = subprocess.run([*command, dtype], capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    weights = found["loaded"] * max(1, stored.itemsize / (wanted or stored).itemsize)
    return {
        "case": case,
        "file_mb": on_disk / 1e6,
        "weights_mb": weights / 1e6,
        "imported_mb": found["imported"] / 1e6,
        "ready_mb": found["ready"] / 1e6,
        "peak_mb": found["peak"] / 1e6,
        "increase_mb": (found["peak"] - found["ready"]) / 1e6,
        "ratio": (found["peak"] - found["ready"]) / weights,
        "seconds": found["seconds"],
    }


def line(row: dict[str, float | str]) -> str:
    """A row of the table, in megabytes of 10^6 bytes."""
    return (
        f"{row['case']:45} weights {row['weights_mb']:5.0f} MB: imported "
        f"{row['imported_mb']:4.0f}, ready {row['ready_mb']:4.0f}, peak {row['peak_mb']:5.0f}; "
        f"increase {row['increase_mb']:5.0f} MB = {row['ratio']:.2f} x weights, "
        f"{row['seconds']:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of a checkpoint, 10^9")
    parser.add_argument("--only", default="", help="only cases with this in their names")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(*options.load)
        return
    rows = []
    for case in (name for name in CASES if options.only in name):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(case, int(options.gigabytes * GIGABYTE), Path(folder)))
        if not options.json:
            print(line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows, indent=2))
    if any(float(row["ratio"]) > LIMIT for row in rows):
        sys.exit(f"a load took more than {LIMIT} times the weights")


if __name__ == "__main__":
    main()
