"""The engine on a GPU, in fp32 and bf16: its speed, and whether requests give what they give alone.

    python -m benchmarks.engine_device [--device cuda] [--out .bench/engine_device.json]

Speed is that of ``benchmarks.engine`` by the clock. For coherence requests of several lengths,
depths and rules share an engine; each is compared with ``generate`` of it alone. Rounding can
decide between two tokens that are as likely, so each first difference is given with the margin
that the two likeliest tokens had there.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import Bench
from benchmarks.original import ROOT
from openmythos.engine.engine import Engine, EngineConfig
from openmythos.engine.reference import Session
from openmythos.engine.request import Request
from openmythos.folder import write_whole
from openmythos.model.exit import KLExit, LatentDifferenceExit
from openmythos.ops.paged import FLASH_PAGE

DTYPES = (torch.float32, torch.bfloat16)
NUM_REQUESTS, CLOSE = 12, 1e-4  # a margin of log-probabilities that rounding may decide


def coherence(bench: Bench, new_tokens: int) -> dict[str, Any]:
    """Of how many requests the tokens differ from those alone, and the margins there."""
    model, draw, margins = bench.model, random.Random(0), []
    vocab = model.config.vocab_size
    requests = [
        Request(
            tokens=[draw.randrange(vocab) for _ in range(draw.randint(2, 40))],
            max_new_tokens=new_tokens,
            num_loops=draw.randint(1, bench.loops),
            exit_rule=draw.choice([None, KLExit(), LatentDifferenceExit()]),
            logprobs=2,
        )
        for _ in range(NUM_REQUESTS)
    ]
    size = bench.engine.config.page_size
    sizes = {"max_rows": 8, "max_len": bench.engine.capacity.max_len, "page_size": size}
    engine = Engine(
        model, EngineConfig(**sizes, max_loops=bench.loops, prefill_chunk=max(256, size))
    )
    numbers = [engine.add(request) for request in requests]
    found: dict[int, list[int | None]] = {number: [] for number in numbers}
    while not engine.is_idle:
        for event in engine.step():
            found[event.id].append(event.token)
    for number, request in zip(numbers, requests, strict=True):
        alone = list(Session.fitting(model, [request], max_loops=bench.loops).stream([request]))
        for token, new in zip(found[number], alone, strict=True):
            if token != new.token:
                assert new.logprobs is not None
                (_, first), (_, second) = new.logprobs.top[:2]
                margins.append(first - second)
                break
    far = sum(margin > CLOSE for margin in margins)
    return {"requests": len(requests), "differ": len(margins), "differ_beyond_rounding": far}


def run(
    device: str, models: list[str], rows: list[int], tokens: int, compiled: bool
) -> list[dict[str, Any]]:
    """All figures, by model and type."""
    results = []
    for name in models:
        for dtype in DTYPES:
            half = dtype is not torch.float32
            size = FLASH_PAGE if half and device.startswith("cuda") else 16
            place = {"device": device, "dtype": dtype, "page_size": size}
            bench = Bench(name, max(rows), 8, tokens, compiled, **place)
            what = {"model": name, "dtype": str(dtype).removeprefix("torch."), "device": device}
            results.append(what | {"coherence": coherence(bench, min(tokens, 16))})
            results += [what | {"rows": number} | bench.depths(number) for number in rows]
            for result in results[-1 - len(rows) :]:
                print(json.dumps(result), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default="core,tiny")
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench" / "engine_device.json")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return 0
    begun, rows = time.monotonic(), [int(number) for number in options.rows.split(",")]
    models = options.models.split(",")
    results = run(options.device, models, rows, options.tokens, not options.eager)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, json.dumps(results, indent=2) + "\n")
    print(f"{time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
