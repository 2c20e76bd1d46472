"""Tokens per second of the engine where tokens take different numbers of loops.

    python -m benchmarks.engine [--models core,walks,moe,tiny] [--rows 1,8,32] [--parts ...]
                                [--tokens 40] [--eager] [--out .bench/engine.json]

Depths are drawn from 1 .. T-1, T/2 on average, so that deciding costs nothing and the ceiling is
known: (f0 + T fr) / (f0 + mean fr), with f0 the multiplications outside the loop and fr those of
one loop, from ``config.counts``. One thread, CPU time, steady state, compiled unless ``--eager``;
every figure is the better of two.

- fixed, half: every token takes T loops, or T/2
- exits: drawn depths, tokens held back at the boundary as the measured call costs say
- lockstep: drawn depths, the next tokens begin when the last row has left (rows that left earlier
  are not computed)
- session: every token takes T loops in ``Session``, the reference

Parts: ``depths`` is the above for T = 8, ``deep`` for T = 16 with 8 rows of the first model, and
``mixed`` half of 16 rows at 2 loops beside half at 8, against lockstep, of ``core`` and ``tiny``.
"""

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.original import ROOT
from openmythos.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, SwiGLUConfig
from openmythos.config.counts import forward_flops
from openmythos.config.presets import preset
from openmythos.engine.engine import Engine, EngineConfig
from openmythos.engine.reference import Session
from openmythos.engine.request import Request
from openmythos.engine.runner import Entry
from openmythos.engine.scheduler import Fair, Job
from openmythos.folder import write_whole
from openmythos.model.exit import ArgmaxStableExit
from openmythos.model.recurrent import RecurrentDepthLM

PROMPT, MAX_LEN, LONGEST_HOLD_MS, REPEATS = 32, 512, 1e6, 2
MIXED_ROWS, SHALLOW = 16, 2
NAMES = ("fixed", "half", "exits", "lockstep", "session")
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
    """One model and one engine for all measurements; it is compiled once."""

    def __init__(
        self,
        name: str,
        most_rows: int,
        loops: int,
        tokens: int,
        compiled: bool,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        page_size: int = 16,
    ) -> None:
        self.loops, self.tokens, self.compiled = loops, tokens, compiled
        self.config = make_config(name)
        self.model = RecurrentDepthLM(self.config).to(device=device, dtype=dtype).eval()
        with torch.no_grad():
            for weight in self.model.parameters():
                if not weight.any():  # with new output projections nothing read would matter
                    weight.normal_(std=0.02)
        self.clock = time.process_time if device == "cpu" else time.perf_counter
        draw = random.Random(0)
        vocab = self.config.vocab_size
        self.prompts = [[draw.randrange(vocab) for _ in range(PROMPT)] for _ in range(most_rows)]
        sizes = {"max_rows": most_rows, "max_loops": loops, "max_len": MAX_LEN}
        sizes |= {"page_size": page_size, "prefill_chunk": max(256, page_size)}
        options = {"max_hold_ms": LONGEST_HOLD_MS, "compiled": compiled, "reuse_prefixes": False}
        self.engine = DrawnDepths(self.model, EngineConfig(**sizes, **options))
        self.engine.warm_up()

    def ceiling(self, mean: float) -> float:
        """The speed-up if only multiplications counted."""
        one, two = (forward_flops(self.config, num_loops=loops) for loops in (1, 2))
        loop = two - one
        outside = one - loop
        return (outside + self.loops * loop) / (outside + mean * loop)

    def rates(
        self, depths: list[int], *, drawn: bool = False, hold: int | None = None, fair: Fair = "sum"
    ) -> list[float]:
        """Tokens per second of each row, after the prompts and some tokens."""
        found = [self._rates(depths, drawn, hold, fair) for _ in range(REPEATS)]
        return max(found, key=sum)

    def _rates(self, depths: list[int], drawn: bool, hold: int | None, fair: Fair) -> list[float]:
        engine, rows = self.engine, len(depths)
        engine._scheduler.hold, engine._scheduler.fair = hold, fair
        engine.draw = random.Random(1) if drawn else None
        # With a rule, which is not asked, the engine cannot know when a token will stop.
        rule = ArgmaxStableExit() if drawn else None
        numbers = [
            engine.add(Request(tokens=prompt, num_loops=depth, exit_rule=rule))
            for prompt, depth in zip(self.prompts, depths, strict=False)
        ]
        counts = dict.fromkeys(numbers, 0)

        def go(tokens: int) -> float:
            left, begun = tokens * rows, self.clock()
            while left > 0:
                for event in engine.step():
                    counts[event.id] += 1
                    left -= 1
            return self.clock() - begun

        go(4)
        before = dict(counts)
        seconds = go(self.tokens)
        for number in numbers:
            engine.abort(number)
        engine.step()
        return [(counts[number] - before[number]) / seconds for number in numbers]

    def session(self, rows: int) -> float:
        """Tokens per second of the reference with all loops."""
        prompts = self.prompts[:rows]
        requests = [
            Request(tokens=prompt, max_new_tokens=self.tokens + 4, num_loops=self.loops)
            for prompt in prompts
        ]
        rates = []
        for _ in range(1 + REPEATS):  # the first one compiles
            stream = Session.fitting(self.model, requests, compiled=self.compiled).stream(requests)
            for _ in range(4 * rows):
                next(stream)
            begun = self.clock()
            rates.append(sum(1 for _ in stream) / (self.clock() - begun))
        return max(rates[1:])

    def depths(self, rows: int) -> dict[str, Any]:
        """All figures where every token has as many loops on average."""
        deep, half = [self.loops] * rows, [self.loops // 2] * rows
        return {
            "fixed": sum(self.rates(deep)),
            "half": sum(self.rates(half)),
            "exits": sum(self.rates(deep, drawn=True)),
            "lockstep": sum(self.rates(deep, drawn=True, hold=rows)),
            "session": self.session(rows),
            "ceiling": self.ceiling(self.loops / 2),
        }

    def mixed(self) -> dict[str, Any]:
        """Tokens per second of the shallow and the deep half: lockstep, for the sum, fair."""
        depths = [SHALLOW] * (MIXED_ROWS // 2) + [self.loops] * (MIXED_ROWS // 2)

        def halves(**how: Any) -> list[float]:
            rates = self.rates(depths, **how)
            return [sum(rates[: MIXED_ROWS // 2]), sum(rates[MIXED_ROWS // 2 :])]

        return {"lockstep": halves(hold=MIXED_ROWS), "sum": halves(), "deep": halves(fair="deep")}


def depth_row(model: str, rows: int, loops: int, found: dict[str, Any]) -> list[str]:
    """The table's row of ``Bench.depths``."""
    gain = found["exits"] / found["fixed"]
    return [
        *(model, str(rows), str(loops)),
        *(f"{found[name]:.0f}" for name in NAMES),
        *(f"{gain:.2f}", f"{found['ceiling']:.2f}", f"{gain / found['ceiling']:.2f}"),
        *(f"{found['exits'] / found['lockstep']:.2f}", f"{found['fixed'] / found['session']:.2f}"),
    ]


def mixed_lines(model: str, found: dict[str, Any]) -> list[str]:
    """What ``Bench.mixed`` found, in words."""
    base = found["lockstep"]
    lines = [
        f"{model}, {MIXED_ROWS} rows, half at {SHALLOW} loops, lockstep: {base[0]:.0f} each half"
    ]
    for fair in ("sum", "deep"):
        shallow, deep = found[fair]
        lines.append(
            f"  fair={fair!r}: shallow {shallow / base[0]:.2f}x, deep {deep / base[1]:.2f}x, "
            f"sum {(shallow + deep) / sum(base):.2f}x of lockstep"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="core,walks,moe,tiny")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--parts", default="depths,mixed,deep")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench" / "engine.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models, rows = options.models.split(","), [int(number) for number in options.rows.split(",")]
    parts = options.parts.split(",")
    progress = Console(stderr=True, highlight=False)
    table = Table(
        *("model", "rows", "T", *NAMES, "exits/fixed", "ceiling", "of it", "exits/lockstep"),
        "fixed/session",
        title="tokens/s",
    )
    results: list[dict[str, Any]] = []
    lines: list[str] = []

    def note(found: dict[str, Any], **what: Any) -> None:
        results.append(what | found)
        progress.print(json.dumps(results[-1]))

    for model in models:
        with_mixed = "mixed" in parts and model in ("core", "tiny")
        if "depths" in parts or with_mixed:
            most = max(*rows, MIXED_ROWS if with_mixed else 1)
            bench = Bench(model, most, 8, options.tokens, not options.eager)
            for number in rows if "depths" in parts else []:
                found = bench.depths(number)
                note(found, model=model, rows=number, loops=8)
                table.add_row(*depth_row(model, number, 8, found))
            if with_mixed:
                note(found := bench.mixed(), model=model, rows=MIXED_ROWS, part="mixed")
                lines += mixed_lines(model, found)
        if "deep" in parts and model == models[0]:
            found = Bench(model, 8, 16, options.tokens, not options.eager).depths(8)
            note(found, model=model, rows=8, loops=16)
            table.add_row(*depth_row(model, 8, 16, found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, json.dumps(results, indent=2) + "\n")
    console = Console(width=max(120, Console().width), highlight=False)
    console.print(table)
    for line in lines:
        console.print(line)


if __name__ == "__main__":
    main()
