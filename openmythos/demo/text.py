"""Act 1 of the demo: the preset tiny on real text."""

import gzip
import lzma
import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from openmythos.analysis.trace import trace_loops
from openmythos.config import presets
from openmythos.data.loader import TokenLoader
from openmythos.data.packing import on_device
from openmythos.demo.result import TextResult
from openmythos.eval.score import with_error
from openmythos.report.page import LoopScale, render_sample, render_scale
from openmythos.report.sample import EXIT_KL, continuations, write_sample_file
from openmythos.terminal import print_table
from openmythos.train.depth_schedule import DepthSchedule, PoissonDepth
from openmythos.train.display import TrainDisplay
from openmythos.train.metrics import read_metrics
from openmythos.train.recipe import RunConfig, TextData, TrainConfig
from openmythos.train.run import set_up
from openmythos.train.task import TextTask
from openmythos.train.validation import held_out_bits

PROMPTS = ("The function returns", "Raise an exception if", "A class that")
TEXT_LOOPS = (1, 2, 4, 8, 16)
NEW_TOKENS = 64


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
    training, validation = run.task.train, run.task.validation
    if not isinstance(training, TokenLoader):
        raise TypeError("act 1 trains on text of one source")
    held_out = {}
    for loops in TEXT_LOOPS:
        with console.status(Text(f"held-out text at {loops} loops")):
            held_out[loops] = held_out_bits(model, validation, loops)
    tokenizer, most = run.folder.tokenizer, 4 * model.config.num_loops
    if tokenizer is None:
        raise TypeError("act 1 has a tokenizer")
    samples = continuations(
        model,
        tokenizer,
        PROMPTS,
        num_loops=most,
        max_new_tokens=NEW_TOKENS,
        seed=train_config.seed,
    )
    write_sample_file(samples, out, result.step)
    batch, ctx = on_device(model, next(iter(validation.validation_batches(1))))
    rows = [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "train"]
    sampling = train_config.depth.sampling
    depth, drawn = sampling.mean_recurrence, [row["num_loops"] for row in rows]
    with console.status("other compressors on the same text"):
        others = marks(training.text(), validation.text())
    found = TextResult(
        train_curve=[(row["seconds"], row["bits_per_byte"]) for row in rows],
        held_out=held_out,
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
        marks=others,
    )
    if found.trained_depth == depth:
        point = (result.seconds, found.validation[found.trained_depth].value)
        found = replace(found, held_out_curve=[point])
    show_text(console, found)
    return found


def show_text(console: Console, result: TextResult) -> None:
    """Print the held-out numbers with their errors, and the samples."""
    depth = result.trained_depth
    table = Table(title="held-out text")
    table.add_column("loops", justify="right")
    table.add_column("bits per byte", justify="right")
    table.add_column(f"difference to {depth} loops", justify="right")
    for loops, score in result.validation.items():
        change = "" if loops == depth else with_error(result.difference(loops, depth), 4, sign="+")
        table.add_row(str(loops), with_error(score), change)
    print_table(console, table)
    scale = LoopScale.of(piece.loops for sample in result.samples for piece in sample.pieces)
    console.print(render_scale(scale))
    for sample in result.samples:
        console.print(render_sample(sample, scale))
        console.print()


def marks(known: bytes, text: bytes) -> dict[str, float]:
    """Bits per byte of other compressors on held-out text, ``known`` being the training text.

    A compressor learns from the text that it compresses only. So the last one is xz that has read
    the training text first, as the model has: the bytes that the held-out text adds to it.
    """
    before, after = (len(lzma.compress(part, preset=9)) for part in (known, known + text))
    sizes = {
        "gzip -9": len(gzip.compress(text, 9)),
        "xz -9": len(lzma.compress(text, preset=9)),
        "xz -9 after the training text": after - before,
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
