"""Peak memory of one training step with and without activation checkpointing per loop.

    .venv/bin/python -m benchmarks.recompute_memory
    .venv/bin/python -m benchmarks.recompute_memory --parts --num-loops 16

Every row of the table is a fresh process: a preset, ``--rows`` rows of ``--tokens`` tokens, one
forward and backward with all loops, after one of two loops that makes torch import what it needs.
With ``--parts`` the model has depth attention, LoRA per loop, ACT and experts.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace

import torch

from benchmarks.load_memory import resident
from openmythos.config import (
    ACTConfig,
    DepthAttentionConfig,
    ModelConfig,
    MoEConfig,
    WeightLoRAConfig,
)
from openmythos.config.presets import preset
from openmythos.model.recurrent import RecurrentDepthLM

MEGABYTE = 10**6


def model_config(parts: bool) -> ModelConfig:
    """The preset ``tiny``, or the same with every part that a recomputed loop must get right."""
    config = preset("tiny")
    if not parts:
        return config
    return replace(
        config,
        depth_attention=DepthAttentionConfig(num_recent_loops=2),
        loop_adapter=WeightLoRAConfig(rank=8, num_loops=8),
        halting=ACTConfig(),
        core_feed_forward=MoEConfig(num_experts=8, num_experts_per_token=2, d_expert=128),
    )


def measure(num_loops: int, recompute: bool, rows: int, tokens: int, parts: bool) -> None:
    """Run one step and print its memory and time; runs in a fresh process."""
    model = RecurrentDepthLM(model_config(parts), torch.Generator().manual_seed(0)).train()
    ids = torch.randint(model.config.vocab_size, (rows, tokens))
    before = 0
    for loops in (2, num_loops):
        model.zero_grad()
        before, started = resident("VmRSS"), time.perf_counter()
        model(ids, num_loops=loops, recompute=recompute).logits.square().mean().backward()
    seconds = time.perf_counter() - started
    print(json.dumps({"increase": resident("VmHWM") - before, "seconds": seconds}))


def main() -> None:
    """Measure every combination and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-loops", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = {"rows": arguments.rows, "tokens": arguments.tokens, "parts": arguments.parts}
    if arguments.one is not None:
        measure(**arguments.one, **shape)
        return
    print("| loops | recomputed | increase, MB | seconds |\n|---|---|---|---|")
    for num_loops in arguments.num_loops:
        for recompute in (False, True):
            one = json.dumps({"num_loops": num_loops, "recompute": recompute})
            command = [sys.executable, "-m", "benchmarks.recompute_memory", "--one", one]
            command += ["--rows", str(arguments.rows), "--tokens", str(arguments.tokens)]
            command += ["--parts"] if arguments.parts else []
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            megabytes, word = found["increase"] / MEGABYTE, "yes" if recompute else "no"
            print(f"| {num_loops} | {word} | {megabytes:.0f} | {found['seconds']:.1f} |")


if __name__ == "__main__":
    main()
