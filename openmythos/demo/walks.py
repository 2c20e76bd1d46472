"""Act 2 of the demo: walks of known length, trained with sampled depth and a curriculum."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openmythos.analysis.trace import trace_loops
from openmythos.config import ACTConfig, GQAConfig, ModelConfig, ReLUSquaredConfig
from openmythos.config.schema import to_dict
from openmythos.data.synthetic import Walks
from openmythos.demo.result import HopsResult
from openmythos.demo.takeaway import halting_takeaways
from openmythos.engine.reference import generate
from openmythos.folder import write_json
from openmythos.interop.loading import load_pretrained
from openmythos.model.exit import CumulativeThreshold, EntropyKLExit, Rule
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.terminal import print_table
from openmythos.train.depth_schedule import ClippedPoissonDepth, DepthSchedule
from openmythos.train.display import TrainDisplay
from openmythos.train.loop import TrainingStopped
from openmythos.train.metrics import read_metrics
from openmythos.train.optim import OptimizerConfig
from openmythos.train.recipe import HopsData, RunConfig, TrainConfig
from openmythos.train.run import set_up
from openmythos.train.task import PuzzleTask
from openmythos.train.validation import puzzle_right

TRAINED_LOOPS = (2, 8)
LOOPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
HOPS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12)
NUM_WALKS = 512  # held-out walks per number of hops


def hops_config(seed: int, seconds: float) -> RunConfig:
    """A model with a two-layer core on walks, trained for ``seconds``."""
    # With a higher learning rate, without QK-norm, or with one depth per batch, some runs diverge
    # suddenly and late: rows with too few loops for their walk give noisy but large gradients.
    low, high = TRAINED_LOOPS
    model = ModelConfig(
        vocab_size=20,
        d_model=64,
        num_prelude_layers=0,
        num_core_layers=2,
        num_coda_layers=0,
        num_loops=high,
        max_seq_len=64,
        attention=GQAConfig(num_heads=4, num_kv_heads=4, head_dim=16, qk_norm="weightless"),
        feed_forward=ReLUSquaredConfig(d_ff=256),
        rope=None,
    )
    sampled = ClippedPoissonDepth(mean_recurrence=4, low=low, high=high)
    settings = TrainConfig(
        seed=seed,
        max_seconds=seconds,
        batch_size=128,
        optimizer=OptimizerConfig(
            lr=2e-3,
            embedding_lr=None,
            muon_lr=0.003,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            warmup=0.03,
            decay=0.6,
        ),
        depth=DepthSchedule(sampling=sampled, per_sequence=True),
        eval_loops=(),
    )
    return RunConfig(model=model, train=settings, data=HopsData())


def act_hops(
    console: Console, out: Path, config: RunConfig, device: str
) -> tuple[HopsResult, HopsResult]:
    """Train on walks, and in a second process the same model with the original's halting."""
    other = out / "hops_original_halting"
    other.mkdir(parents=True)
    halting = ACTConfig(bias_init=0.0, keep_remainder=False)
    halted = replace(config, model=replace(config.model, halting=halting))
    start = other.with_name(f"{other.name}.json")
    write_json(start, to_dict(halted))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small gains nothing from a second thread
    command = [sys.executable, "-m", "openmythos", "train", "--config", str(start)]
    beside = subprocess.Popen(
        [*command, "--out", str(other), "--device", device],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        run = set_up(config, out / "hops", device)
        console.print(run.in_words(config.data.in_words))
        task = run.task
        if not isinstance(task, PuzzleTask) or not isinstance(task.puzzle, Walks):
            raise TypeError("act 2 trains on walks")
        walks = task.puzzle
        with TrainDisplay(console, "hops") as display:
            result = run.train(display)
        if result.interrupted:
            raise KeyboardInterrupt
        with console.status("waiting for the comparison run"):
            _, errors = beside.communicate()
    finally:
        beside.kill()
        beside.wait()
        torch.set_num_threads(threads)
    if beside.returncode:
        lines = errors.strip().splitlines() or [f"exit status {beside.returncode}"]
        raise TrainingStopped(f"the comparison run failed: {lines[-1]}")
    rule = EntropyKLExit(kl=0.01, entropy=1.0)
    with console.status("accuracy over hops and loops"):
        ours = measure_hops(run.model, walks, out / "hops", rule)
        act = CumulativeThreshold(threshold=0.99)
        theirs = measure_hops(load_pretrained(other, device=device), walks, other, act)
        theirs = replace(theirs, name="The original's halting", decider="ACT halting")
    show_hops(console, ours)
    for takeaway in halting_takeaways(ours, theirs):
        console.print(takeaway.text)
    return ours, theirs


def measure_hops(model: RecurrentDepthLM, walks: Walks, out: Path, rule: Rule) -> HopsResult:
    """On held-out walks: accuracy by hops and loops, and the loops taken under the exit rule."""
    right = [
        [puzzle_right(model, walks, hops, loops, NUM_WALKS, seed=1).tolist() for loops in LOOPS]
        for hops in HOPS
    ]
    exits = [exit_loops(model, walks, hops, rule) for hops in HOPS]
    taken = np.array([counts for counts, _ in exits])
    pairs = [(hops, count) for hops, row in zip(HOPS, taken.tolist(), strict=True) for count in row]
    metrics = read_metrics(out / "metrics.jsonl")
    rows = [row for row in metrics if row["kind"] == "train"]
    longest = walks.held_out_batch(max(HOPS), NUM_WALKS, seed=2).tokens
    longest = longest.to(model.embed.weight.device)
    return HopsResult(
        exit_rule=describe_rule(rule),
        hops=list(HOPS),
        loops=list(LOOPS),
        right=np.array(right),
        max_train_hops=walks.config.max_train_hops,
        trained_loops=TRAINED_LOOPS,
        taken=taken,
        taken_right=np.array([answers for _, answers in exits]),
        rank_correlation=rank_correlation(pairs),
        leak_baselines={hops: walks.leak_baselines(hops) for hops in HOPS},
        chance=1 / walks.config.num_entities,
        trace=trace_loops(model, longest, 2 * max(LOOPS)),
        stage_curve=[(row["step"], int(row["stage"])) for row in rows],
        seconds=rows[-1]["seconds"],
        steps=rows[-1]["step"],
    )


def describe_rule(rule: Rule) -> str:
    """A rule and its fields in words."""
    fields = ", ".join(f"{key} {value}" for key, value in to_dict(rule).items() if key != "kind")
    return f"{rule.kind.replace('_', ' + ')} ({fields})"


def exit_loops(
    model: RecurrentDepthLM, walks: Walks, num_hops: int, rule: Rule
) -> tuple[list[int], list[bool]]:
    """The loops that each held-out walk takes under the rule, and whether it is answered right."""
    batch = walks.held_out_batch(num_hops, NUM_WALKS, seed=1)
    result = generate(model, batch.tokens, max_new_tokens=1, num_loops=max(LOOPS), exit_rule=rule)
    targets = batch.targets[:, -1].tolist()
    right = [new[0] == target for new, target in zip(result.tokens, targets, strict=True)]
    return [loops[0] for loops in result.loops], right


def rank_correlation(pairs: Sequence[tuple[float | int, int]]) -> float | None:
    """Spearman's rank correlation, with mean ranks for ties; None if one side is constant."""
    ranks = []
    for column in np.asarray(pairs, dtype=np.float64).T:
        _, inverse, counts = np.unique(column, return_inverse=True, return_counts=True)
        mean_rank = np.asarray(counts.cumsum() - (counts - 1) / 2)
        ranks.append(mean_rank[inverse])
    if ranks[0].std() == 0 or ranks[1].std() == 0:
        return None
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


def show_hops(console: Console, result: HopsResult) -> None:
    """The grid as a table: trained and never-trained hops apart."""
    table = Table(title="accuracy in % on held-out walks: hops (rows) x loops (columns)")
    table.add_column("hops", justify="right")
    for loops in result.loops:
        table.add_column(str(loops), justify="right")
    table.add_column("taken", justify="right")
    for hops, row, mean in zip(result.hops, result.accuracy, result.exit_loops, strict=True):
        cells = [Text(f"{100 * x:.0f}", "green" if x >= 0.5 else "dim") for x in row]
        last = hops == result.max_train_hops
        table.add_row(str(hops), *cells, f"{mean:.1f}", end_section=last)
    print_table(console, table)
    rank = result.rank_correlation
    follows = "the same everywhere" if rank is None else f"rank correlation {rank:.2f} with hops"
    console.print(f"below the line: never trained; chance {result.chance:.0%}; taken: {follows}")
