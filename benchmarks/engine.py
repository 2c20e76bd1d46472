"""Tokens per second of the engine where tokens take different numbers of loops.

    python -m benchmarks.engine [--models core,walks,moe,tiny] [--rows 1,8,32] [--loops 8]
                                [--tokens 48] [--eager] [--json]

Depths are drawn from 1 .. T-1, T/2 on average, so that deciding costs nothing and the ceiling is
known: (f0 + T fr) / (f0 + mean fr), with f0 the multiplications outside the loop and fr those of
one loop, from ``config.counts``. One thread, CPU time, steady state, compiled unless ``--eager``.

- fixed, half: every token takes T loops, or T/2
- exits: drawn depths, tokens held back at the boundary as the measured call costs say
- lockstep: drawn depths, the next tokens begin when the last row has left (rows that left earlier
  are not computed)
- session: every token takes T loops in ``Session``, the reference
- mixed: half of the rows at 2 loops beside half at T; tokens per second of both halves, in the
  engine and in lockstep
"""

import argparse
import json
import random
import time
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from openmythos.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, SwiGLUConfig
from openmythos.config.counts import forward_flops
from openmythos.config.presets import preset
from openmythos.engine.engine import Engine, EngineConfig
from openmythos.engine.reference import Session
from openmythos.engine.request import Request
from openmythos.engine.runner import Entry
from openmythos.engine.scheduler import Job
from openmythos.model.exit import ArgmaxStableExit
from openmythos.model.recurrent import RecurrentDepthLM

PROMPT, MAX_LEN, LONGEST_HOLD_MS = 32, 512, 1e6
GQA = GQAConfig(num_heads=8, num_kv_heads=2, head_dim=64)
MLA = MLAConfig(
    num_heads=8,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
)


def make_config(name: str) -> ModelConfig:
    """One of the four models."""
    fields: dict[str, Any] = {"num_loops": 8, "max_seq_len": MAX_LEN, "vocab_size": 4096}
    layers = ("num_prelude_layers", "num_core_layers", "num_coda_layers")
    if name == "tiny":
        return replace(preset("tiny"), max_seq_len=MAX_LEN)
    if name == "core":
        fields |= {"d_model": 512, "attention": GQA, "feed_forward": SwiGLUConfig(d_ff=1728)}
        return ModelConfig(**fields, **dict(zip(layers, (0, 4, 0), strict=True)))
    if name == "walks":
        heads = GQAConfig(num_heads=4, num_kv_heads=4, head_dim=16, qk_norm="weightless")
        fields |= {"vocab_size": 64, "d_model": 64, "attention": heads}
        fields |= {"feed_forward": SwiGLUConfig(d_ff=170)}
        return ModelConfig(**fields, **dict(zip(layers, (0, 2, 0), strict=True)))
    if name == "moe":
        experts = MoEConfig(
            num_experts=64, num_experts_per_token=4, d_expert=128, num_shared_experts=1
        )
        fields |= {"d_model": 512, "attention": MLA, "feed_forward": SwiGLUConfig(d_ff=1408)}
        fields |= {"core_feed_forward": experts}
        return ModelConfig(**fields, **dict(zip(layers, (1, 1, 1), strict=True)))
    raise SystemExit(f"error: no model {name!r}; there are core, walks, moe and tiny")


class DrawnDepths(Engine):
    """An engine in which each token's number of loops is drawn beforehand."""

    draw: random.Random | None = None

    def _entry(self, job: Job) -> Entry:
        entry = super()._entry(job)
        if self.draw is None:
            return entry
        return replace(entry, loops=self.draw.randint(1, job.depth - 1))


class Bench:
    """One model, compiled once for all measurements."""

    def __init__(self, name: str, rows: int, loops: int, tokens: int, compiled: bool) -> None:
        self.rows, self.loops, self.tokens, self.compiled = rows, loops, tokens, compiled
        self.config = make_config(name)
        self.model = RecurrentDepthLM(self.config).eval()
        draw = random.Random(0)
        vocab = self.config.vocab_size
        self.prompts = [[draw.randrange(vocab) for _ in range(PROMPT)] for _ in range(rows)]
        self.costs = None

    def ceiling(self, mean: float) -> float:
        """The speed-up if only multiplications counted."""
        one, two = (forward_flops(self.config, num_loops=loops) for loops in (1, 2))
        loop = two - one
        outside = one - loop
        return (outside + self.loops * loop) / (outside + mean * loop)

    def engine(self, depths: list[int], drawn: bool = False, **settings: Any) -> DrawnDepths:
        """An engine with one endless request per row."""
        sizes = {"max_rows": self.rows, "max_loops": self.loops, "max_len": MAX_LEN}
        options = {"max_hold_ms": LONGEST_HOLD_MS, "compiled": self.compiled} | settings
        engine = DrawnDepths(self.model, EngineConfig(**sizes, **options))
        if self.costs is None:
            engine.warm_up()
            self.costs = engine._scheduler.costs
        engine._scheduler.costs = self.costs
        engine.draw = random.Random(1) if drawn else None
        for prompt, depth in zip(self.prompts, depths, strict=True):
            # With a rule, which is not asked, the engine cannot know when a token will stop.
            rule = ArgmaxStableExit() if drawn else None
            engine.add(Request(tokens=prompt, num_loops=depth, exit_rule=rule))
        return engine

    def rates(self, engine: Engine) -> list[float]:
        """Tokens per second of each row, after the prompts and some tokens."""
        counts = [0] * self.rows

        def go(tokens: int) -> float:
            left, begun = tokens * self.rows, time.process_time()
            while left > 0:
                for event in engine.step():
                    counts[event.id] += 1
                    left -= 1
            return time.process_time() - begun

        go(4)
        counts[:] = [0] * self.rows
        seconds = go(self.tokens)
        return [count / seconds for count in counts]

    def session(self) -> float:
        """Tokens per second of the reference with all loops."""
        if self.compiled:  # compile it, and do not count that
            short = [
                Request(tokens=p, max_new_tokens=6, num_loops=self.loops) for p in self.prompts
            ]
            list(Session.fitting(self.model, short, compiled=True).stream(short))
        requests = [
            Request(tokens=prompt, max_new_tokens=self.tokens + 4, num_loops=self.loops)
            for prompt in self.prompts
        ]
        stream = Session.fitting(self.model, requests, compiled=self.compiled).stream(requests)
        for _ in range(4 * self.rows):
            next(stream)
        begun = time.process_time()
        return sum(1 for _ in stream) / (time.process_time() - begun)

    def measure(self) -> dict[str, Any]:
        """All figures."""
        deep, half = [self.loops] * self.rows, [self.loops // 2] * self.rows
        found: dict[str, Any] = {
            "fixed": sum(self.rates(self.engine(deep))),
            "half": sum(self.rates(self.engine(half))),
            "exits": sum(self.rates(self.engine(deep, drawn=True))),
            "lockstep": sum(self.rates(self.engine(deep, drawn=True, hold_rows=self.rows))),
            "session": self.session(),
            "ceiling": self.ceiling(self.loops / 2),
        }
        if self.rows > 1:
            mixed = [2] * (self.rows // 2) + [self.loops] * (self.rows - self.rows // 2)
            for name, hold in (("mixed", None), ("mixed_lockstep", self.rows)):
                rates = self.rates(self.engine(mixed, hold_rows=hold))
                found[name] = [sum(rates[: self.rows // 2]), sum(rates[self.rows // 2 :])]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="core,walks,moe,tiny")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--loops", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ("fixed", "half", "exits", "lockstep", "session")
    table = Table(
        *("model", "rows", *names, "exits/fixed", "ceiling", "of it", "exits/lockstep"),
        title=f"tokens/s, T = {options.loops}",
    )
    results = []
    for model in options.models.split(","):
        for rows in map(int, options.rows.split(",")):
            bench = Bench(model, rows, options.loops, options.tokens, not options.eager)
            found = bench.measure()
            results.append({"model": model, "rows": rows, "loops": options.loops} | found)
            gain = found["exits"] / found["fixed"]
            table.add_row(
                *(model, str(rows), *(f"{found[name]:.0f}" for name in names), f"{gain:.2f}"),
                *(f"{found['ceiling']:.2f}", f"{gain / found['ceiling']:.2f}"),
                f"{found['exits'] / found['lockstep']:.2f}",
            )
            if options.json:
                print(json.dumps(results[-1]), flush=True)
    if not options.json:
        Console().print(table)


if __name__ == "__main__":
    main()
