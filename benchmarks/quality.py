"""Held-out bits per byte of OpenMythos and of the original after equal wall time.

Same text, tokenizer, windows, machine and seconds; comparable numbers of parameters. The original
is trained with its own script's recipe (AdamW, weight decay 0.1 on everything, warm-up, cosine) at
two learning rates, and the better one counts. Run alone on an idle machine:

    python -m benchmarks.quality --seconds 120
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from benchmarks.original import original_module
from openmythos.config.schema import to_dict
from openmythos.data.loader import TokenLoader
from openmythos.demo.text import text_config
from openmythos.folder import write_json
from openmythos.model.inference import inference

LOOPS = (1, 2, 4, 8, 16)
LEARNING_RATES = (1e-3, 3e-3)
WARMUP = 0.05  # share of the run; the original's script warms up over 2,000 of 57,000 steps


def train_original(
    data: Path, seconds: float, learning_rate: float, seed: int
) -> dict[str, object]:
    """Train the original for so many seconds and measure it at every number of loops."""
    torch.manual_seed(seed)
    settings = text_config(seed, seconds)
    size, seq_len = settings.train.batch_size, settings.data.seq_len
    loader = TokenLoader(data, "train", seq_len=seq_len, batch_size=size, seed=seed)
    original = original_module()
    config = original.MythosConfig(
        vocab_size=loader.tokenizer.vocab_size,
        dim=settings.model.d_model,
        n_heads=settings.model.attention.num_heads,
        n_kv_heads=settings.model.attention.num_heads,
        max_seq_len=seq_len,
        max_loop_iters=4,
        prelude_layers=1,
        coda_layers=1,
        attn_type="gqa",
        n_experts=8,
        n_shared_experts=1,
        n_experts_per_tok=2,
        expert_dim=128,
        lora_rank=8,
    )
    model = original.OpenMythos(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    started, step = time.perf_counter(), 0
    while (progress := (time.perf_counter() - started) / seconds) < 1:
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, progress / WARMUP) * cosine
        batch = loader.batch(step)
        logits = model(batch.tokens)
        loss = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    validation = TokenLoader(data, "val", seq_len=seq_len, batch_size=size, seed=seed)
    return {
        "model": f"original, lr {learning_rate:g}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "tokens": step * size * seq_len,
        "bits_per_byte": {loops: held_out(model, validation, loops) for loops in LOOPS},
    }


def held_out(model: torch.nn.Module, loader: TokenLoader, num_loops: int) -> float:
    """Bits per byte of the validation text; the original knows no documents, so it sees across."""
    nats, num_bytes = 0.0, 0
    with inference(model):
        for batch in loader.validation_batches():
            logits = model(batch.tokens, n_loops=num_loops)
            losses = functional.cross_entropy(
                logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
            )
            nats += float(losses)
            num_bytes += batch.num_bytes
    return nats / math.log(2) / num_bytes


def train_ours(folder: Path, data: Path, seconds: float, seed: int) -> dict[str, object]:
    """The demo's act 1 through the command line; evaluated by `openmythos eval`."""
    config = to_dict(text_config(seed, seconds))
    config["data"]["source"] = str(data)
    config["train"]["eval_loops"] = [1]
    config["train"]["eval_batches"] = 1
    write_json(folder / "ours.json", config)
    run = folder / "ours"
    command = [sys.executable, "-m", "openmythos"]
    start = [*command, "train", "--config", str(folder / "ours.json"), "--out", str(run)]
    subprocess.run(start, check=True, stdout=subprocess.DEVNULL)
    loops = ",".join(map(str, LOOPS))
    evaluate = [*command, "eval", str(run), "--data", str(data), "--num-loops", loops, "--json"]
    evaluate += ["--seq-len", str(config["data"]["seq_len"])]
    rows = json.loads(subprocess.run(evaluate, check=True, capture_output=True).stdout)
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = max(row["step"] for row in last)
    resolved = json.loads((run / "config.json").read_text())
    from openmythos import load_pretrained

    size = resolved["train"]["batch_size"] * resolved["data"]["seq_len"]
    return {
        "model": "OpenMythos, preset tiny",
        "parameters": sum(p.numel() for p in load_pretrained(run).parameters()),
        "steps": steps,
        "tokens": steps * size,
        "bits_per_byte": {row["num_loops"]: row["bits_per_byte"] for row in rows},
    }


def main() -> None:
    """Prepare once, train one after the other, each in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--original", nargs=2, metavar=("DATA", "LR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.original is not None:
        data, rate = options.original
        print(json.dumps(train_original(Path(data), options.seconds, float(rate), options.seed)))
        return
    from openmythos.data.prepare import prepare

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = text_config(options.seed, options.seconds)
        data = folder / "data"
        prepare(settings.data.source, data, vocab_size=settings.model.vocab_size)
        rows.append(train_ours(folder, data, options.seconds, options.seed))
        for rate in LEARNING_RATES:
            command = [
                sys.executable,
                "-m",
                "benchmarks.quality",
                "--seconds",
                str(options.seconds),
            ]
            command += ["--seed", str(options.seed), "--original", str(data), str(rate)]
            done = subprocess.run(command, check=True, capture_output=True)
            rows.append(json.loads(done.stdout))
    if options.json:
        print(json.dumps(rows))
        return
    table = Table(title=f"held-out bits per byte after {options.seconds:.0f} s of training")
    for heading in ("model", "parameters", "tokens", *(f"{loops} loops" for loops in LOOPS)):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        bits = {int(loops): value for loops, value in row["bits_per_byte"].items()}
        cells = [f"{bits[loops]:.3f}" for loops in LOOPS]
        table.add_row(row["model"], f"{row['parameters']:,}", f"{row['tokens']:,}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
