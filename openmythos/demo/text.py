"""Act 1 of the demo: the preset tiny on real text."""

import lzma
import math
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from openmythos.analysis.trace import trace_loops
from openmythos.config import presets
from openmythos.data.packing import on_device
from openmythos.data.source import load_documents
from openmythos.demo.result import TextResult
from openmythos.engine.reference import generate
from openmythos.folder import write_json
from openmythos.model.exit import KLExit
from openmythos.report.page import Piece, Sample, render_sample, render_scale
from openmythos.terminal import print_table
from openmythos.train.depth_schedule import DepthSchedule, PoissonDepth
from openmythos.train.display import TrainDisplay
from openmythos.train.metrics import read_metrics
from openmythos.train.recipe import HopsData, RunConfig, TextData, TrainConfig
from openmythos.train.run import Run, set_up
from openmythos.train.task import TextTask
from openmythos.train.validation import held_out_bits_per_byte

PROMPTS = ("The function returns", "Raise an exception if", "A class that")
TEXT_LOOPS = (1, 2, 4, 8, 16)
NEW_TOKENS = 64
EXIT_KL = 1e-3


def text_config(seed: int, seconds: float) -> RunConfig:
    """Preset ``tiny`` on python-docs, trained for ``seconds``."""
    model = presets.preset("tiny")
    sampling = PoissonDepth(mean_recurrence=model.num_loops)
    # Few loops first, and gradients through one loop only: twice the text in the same time.
    depth = DepthSchedule(sampling=sampling, mean_backprop_depth=1, ramp=0.6, max_loops=16)
    settings = TrainConfig(
        seed=seed, max_seconds=seconds, batch_size=12, depth=depth, eval_loops=(), log_every=5
    )
    return RunConfig(model=model, train=settings, data=TextData(source="python-docs"))


def act_text(console: Console, out: Path, config: RunConfig, device: str) -> TextResult:
    """Train on text, measure held-out bits per byte by number of loops, generate samples."""
    run = set_up(config, out, device)
    train_config, model = run.config.train, run.model
    console.print(run.in_words(config.data.in_words))
    with TrainDisplay(console, "text") as display:
        result = run.train(display)
    if result.interrupted:
        raise KeyboardInterrupt
    if not isinstance(run.task, TextTask) or run.task.validation is None:
        raise TypeError("act 1 trains on text of which some is held out")
    validation = run.task.validation
    curve = {}
    for loops in TEXT_LOOPS:
        with console.status(Text(f"held-out text at {loops} loops")):
            curve[loops] = held_out_bits_per_byte(model, validation, loops)
    table = Table(title="held-out bits per byte")
    for loops in curve:
        table.add_column(f"{loops} loops", justify="right")
    table.add_row(*(f"{bits:.3f}" for bits in curve.values()))
    print_table(console, table)
    samples = continuations(run)
    written = out / "samples" / f"step-{result.step:08d}.json"
    write_json(written, [asdict(sample) for sample in samples])
    most = 4 * model.config.num_loops
    console.print(render_scale(most))
    for sample in samples:
        console.print(render_sample(sample, most))
        console.print()
    batch, ctx = on_device(model, next(iter(validation.validation_batches(1))))
    rows = [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "train"]
    sampling = train_config.depth.sampling
    depth, drawn = sampling.mean_recurrence, [row["num_loops"] for row in rows]
    return TextResult(
        train_curve=[(row["seconds"], row["bits_per_byte"]) for row in rows],
        held_out_curve=[(result.seconds, bits) for loops, bits in curve.items() if loops == depth],
        validation=curve,
        mean_recurrence=float(depth),
        sampled_loops=(math.floor(min(drawn)), math.ceil(max(drawn))),
        depth_sampling=f"{sampling.kind.replace('_', ' ')} around {depth}",
        num_params=sum(p.numel() for p in model.parameters()),
        tokens_seen=result.step * train_config.batch_size * validation.seq_len,
        seconds=result.seconds,
        samples=samples,
        max_loops=most,
        exit_rule=f"KL between successive loops below {EXIT_KL}",
        trace=trace_loops(model, batch.tokens, 2 * most, ctx),
        marks=marks(config.data),
    )


def marks(data: TextData | HopsData) -> dict[str, float]:
    """Bits per byte of xz at its strongest setting on a built-in source, for comparison."""
    if not isinstance(data, TextData) or data.source not in ("python-docs", "python-source"):
        return {}
    text = "\n\n".join(document.text for document in load_documents(data.source)).encode()
    return {"xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text)}


def continuations(run: Run) -> list[Sample]:
    """Three continuations with a per-token exit rule."""
    tokenizer = run.folder.tokenizer
    if tokenizer is None:
        raise TypeError("act 1 has a tokenizer")
    result = generate(
        run.model,
        [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS],
        max_new_tokens=NEW_TOKENS,
        num_loops=4 * run.model.config.num_loops,
        exit_rule=KLExit(threshold=EXIT_KL),
        temperature=0.7,
        top_k=40,
        num_ids=tokenizer.vocab_size,
        stop_tokens=[tokenizer.eos_id],
        seed=run.config.train.seed,
    )
    samples = []
    for prompt, tokens, loops in zip(PROMPTS, result.tokens, result.loops, strict=True):
        pieces = [
            Piece(text=tokenizer.decode([token]), loops=count)
            for token, count in zip(tokens, loops, strict=True)
            if token != tokenizer.eos_id
        ]
        samples.append(Sample(prompt=prompt, pieces=pieces))
    return samples
