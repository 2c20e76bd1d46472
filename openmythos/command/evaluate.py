"""``openmythos eval``: held-out loss, or scores on tasks, by number of loops."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from openmythos.command.option import (
    AsJson,
    Device,
    Loops,
    Seed,
    Weights,
    check_device,
    parse_loops,
)
from openmythos.command.origin import data_of, data_source, puzzle_for, require_text
from openmythos.folder import require_writable, write_json
from openmythos.terminal import console, note, print_table

if TYPE_CHECKING:
    from openmythos.config import ModelConfig
    from openmythos.data.puzzle import Puzzle
    from openmythos.eval.score import Results, Score, ScoreCurve

RESULTS_FILE, PICTURE_FILE = "results.json", "scores.png"
DEFAULT_SEQ_LEN = 256


Tasks = Annotated[
    str | None,
    typer.Option(
        help="Separated by commas: python_docs_choice, python_docs_word, python_docs_bits, "
        "held_out, a puzzle and its size (hops_8, products_16 ...), a task file, a folder of them, "
        "or a task of lm-evaluation-harness. Default: held-out loss; of a run on a puzzle, "
        "accuracy by size."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Only the first questions of each task.", min=1)]
Fewshot = Annotated[
    int | None, typer.Option(help="Examples before each question of the harness.", min=0)
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Prepared folder, or a run or zoo:NAME whose data or puzzle to use; default: its own."
    ),
]
BatchSize = Annotated[int, typer.Option(help="Rows per batch; does not change results.", min=1)]
SeqLen = Annotated[
    int | None, typer.Option(help="Tokens per row of held-out text; default: 256.", min=1)
]
MaxBatches = Annotated[
    int | None, typer.Option(help="Use only the first batches of held-out text.", min=1)
]
ResultsOut = Annotated[
    Path | None, typer.Option(help=f"Folder for {RESULTS_FILE} and {PICTURE_FILE}.")
]


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint or run folder, zoo:NAME, or a .gguf file.")
    ],
    tasks: Tasks = None,
    num_loops: Loops = "1,2,4,8,16",
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    data: Data = None,
    batch_size: BatchSize = 16,
    seq_len: SeqLen = None,
    max_batches: MaxBatches = None,
    out: ResultsOut = None,
    seed: Seed = 0,
    device: Device = "cpu",
    weights: Weights = "stored",
    as_json: AsJson = False,
) -> None:
    """Scores by number of loops: held-out bits per byte, or --tasks."""
    note("loading the model ...")
    loops = parse_loops(num_loops)
    names = None if tasks is None else task_names(tasks)
    check_device(device)
    if out is not None:
        from openmythos.analysis.picture import require_matplotlib

        require_matplotlib()  # fail before the evaluation rather than after it
        require_writable(out / RESULTS_FILE)
    from openmythos.config.counts import count
    from openmythos.eval.task import brings_text
    from openmythos.eval.task_name import HELD_OUT
    from openmythos.interop.hub import local_folder

    folder = local_folder(checkpoint)
    source = folder if data is None else data_source(data)
    puzzle = puzzle_for(folder, source)
    if puzzle is not None and names is None:
        names = usual_sizes(puzzle)
    if names is None and brings_text(source):
        names = [HELD_OUT]
    of_text: dict[str, object] = {"--seq-len": seq_len, "--max-batches": max_batches}
    of_text |= {"--data": data} if puzzle is None and HELD_OUT not in (names or ()) else {}
    refuse_given(names, of_text, {"--limit": limit, "--num-fewshot": num_fewshot})
    if names is None:
        rest = (batch_size, seq_len, max_batches, device, weights)
        curves, config = held_out(folder, source, loops, *rest)
    else:
        others = (limit, num_fewshot, batch_size, seed, device, weights)
        curves, config = on_tasks(folder, source, names, puzzle, loops, *others)
    flops = {n: count(config, num_loops=n).inference_flops_per_token for n in curves[0].scores}
    settings = {"limit": limit, "num_fewshot": num_fewshot, "seed": seed, "weights": weights}
    report = {
        "checkpoint": str(checkpoint),
        "settings": settings,
        "flops_per_token": [{"num_loops": n, "flops": flops[n]} for n in flops],
        "curves": [curve.to_dict() for curve in curves],
        "versions": versions(),
    }
    if out is not None:
        write_results(report, curves, out)
    if as_json:
        points = curves[0].scores.items()
        rows = [{"num_loops": n, "bits_per_byte": score.value} for n, score in points]
        typer.echo(json.dumps(rows if names is None else report))
        return
    show(curves, flops)
    if out is not None:
        console().print(f"{out / RESULTS_FILE}\n{out / PICTURE_FILE}")


def refuse_given(
    names: list[str] | None, of_text: Mapping[str, object], of_tasks: Mapping[str, object]
) -> None:
    """Refuse options of held-out text where tasks are asked, and the other way round.

    Raises:
        ValueError: One was given.
    """
    for option, given in (of_tasks if names is None else of_text).items():
        if given is not None:
            where = "needs --tasks" if names is None else "is of held-out text, not of tasks"
            raise ValueError(f"{option} {where}; leave it out")


def task_names(tasks: str) -> list[str]:
    """The names in ``--tasks``, each of which may be a task.

    Raises:
        ValueError: There is none, or one is no task.
    """
    from openmythos.eval.task_name import require_names

    names = [name for part in tasks.split(",") if (name := part.strip())]
    if not names:
        raise ValueError(f"--tasks is {tasks!r}; give names or files, separated by commas")
    require_names(names)
    return names


def usual_sizes(puzzle: "Puzzle") -> list[str]:
    """The tasks of a run on a puzzle: sizes 1, 2, 4 ..., up to the largest of its training."""
    most = puzzle.max_train_size
    doubled = [2**power for power in range(most.bit_length()) if 2**power >= puzzle.least_size]
    return [f"{puzzle.kind}_{number}" for number in sorted({*doubled, most})]


def require_fitting(names: Sequence[str], puzzle: "Puzzle", max_seq_len: int) -> None:
    """Check that a model can read the examples of these tasks.

    Raises:
        ValueError: An example is too long.
    """
    from openmythos.eval.task_name import PUZZLE

    for name in names:
        asked = PUZZLE.fullmatch(name)
        if asked is None or asked[1] != puzzle.kind:
            continue
        length = puzzle.num_tokens(int(asked[2]))
        if length > max_seq_len:
            raise ValueError(
                f"a {puzzle.noun} of task {name} has {length} tokens, and the model reads at most "
                f"{max_seq_len}"
            )


# --- what is measured -----------------------------------------------------------------------------


def held_out(
    folder: Path,
    source: Path,
    loops: Sequence[int],
    batch_size: int,
    seq_len: int | None,
    max_batches: int | None,
    device: str,
    weights: str = "stored",
) -> "tuple[list[ScoreCurve], ModelConfig]":
    """Bits per byte of the validation split by number of loops, and the model's config."""
    from openmythos import load_pretrained
    from openmythos.data.loader import TokenLoader
    from openmythos.eval.score import Measured, summarise, sweep
    from openmythos.tokenizer import Tokenizer
    from openmythos.train.validation import held_out_bits

    require_text(folder)
    expected = Tokenizer.load(folder).fingerprint
    prepared = data_of(source)
    model = load_pretrained(folder, device=device, weights=weights)
    loader = TokenLoader(
        prepared,
        "val",
        seq_len=min(DEFAULT_SEQ_LEN if seq_len is None else seq_len, model.config.max_seq_len),
        batch_size=batch_size,
        tokenizer_fingerprint=expected,
    )

    def measure_at(n: int) -> "Results":
        documents = held_out_bits(model, loader, n, max_batches)
        found = Measured(score=summarise(documents), outcomes=documents, higher_is_better=False)
        return {("held-out text", "bits_per_byte"): found}

    return sweep(loops, measure_at), model.config


def on_tasks(
    folder: Path,
    source: Path,
    names: Sequence[str],
    puzzle: "Puzzle | None",
    loops: Sequence[int],
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    seed: int,
    device: str,
    weights: str = "stored",
) -> "tuple[list[ScoreCurve], ModelConfig]":
    """Every task at every depth, and the model's config; all tasks are loaded before any runs."""
    from openmythos import load_pretrained
    from openmythos.eval.puzzle import PuzzleCodec
    from openmythos.eval.score import sweep
    from openmythos.eval.scoring import Codec, Scorer
    from openmythos.eval.task import measure_tasks, shipped_task
    from openmythos.interop.loading import load_config
    from openmythos.tokenizer import Tokenizer

    if puzzle is None:
        require_text(folder)
    codec: Codec = Tokenizer.load(folder) if puzzle is None else PuzzleCodec(puzzle)
    if puzzle is not None:
        require_fitting(names, puzzle, load_config(folder).max_seq_len)
    found = {name: shipped_task(name, puzzle, source) for name in names}
    elsewhere = [name for name, task in found.items() if task is None]
    others = None
    if elsewhere:
        from openmythos.eval.harness import load_tasks

        others = load_tasks(elsewhere, num_fewshot=num_fewshot, seed=seed)
    elif num_fewshot is not None:
        raise ValueError("--num-fewshot is for tasks of the harness; those that ship have none")
    model = load_pretrained(folder, device=device, weights=weights)
    scorer = Scorer(model=model, codec=codec, num_loops=1, batch_size=batch_size, seed=seed)
    shipped = [task for task in found.values() if task is not None]

    def measure_at(n: int) -> "Results":
        scorer.num_loops = n
        results = measure_tasks(scorer, shipped, limit)
        if others is not None:
            results |= others.measure(scorer, limit)
        said = [f"{task} {result.score.value:.3f}" for (task, _), result in results.items()]
        typer.echo(f"{n} loops: {', '.join(said)}", err=True)
        return results

    curves = sweep(loops, measure_at)
    if scorer.num_truncated:
        typer.echo(
            f"note: {scorer.num_truncated} contexts were longer than the model's "
            f"{scorer.max_len} tokens and were cut on the left",
            err=True,
        )
    return curves, model.config


def versions() -> dict[str, str]:
    """The versions of software that the scores depend on."""
    import importlib.metadata
    import importlib.util

    import torch

    from openmythos import __version__

    found = {"openmythos": __version__, "python": platform.python_version()}
    found["torch"] = torch.__version__
    if importlib.util.find_spec("lm_eval") is not None:
        found["lm_eval"] = importlib.metadata.version("lm_eval")
    return found


# --- what is said ---------------------------------------------------------------------------------


def write_results(report: dict[str, Any], curves: "Sequence[ScoreCurve]", out: Path) -> None:
    """Write ``results.json`` and ``scores.png``."""
    from openmythos.eval.picture import plot_score_curves

    write_json(out / RESULTS_FILE, report)
    plot_score_curves(curves, out / PICTURE_FILE)


def show(curves: "Sequence[ScoreCurve]", flops: dict[int, int]) -> None:
    """Print one table: a row per depth, a column per score, and the FLOPs per token."""
    from openmythos.eval.score import in_words

    screen = console()
    table = Table(title="scores by number of loops, with standard errors")
    table.add_column("loops", justify="right")
    for curve in curves:
        heading = f"{curve.task}\n{in_words(curve.metric)}"
        table.add_column(heading, justify="right", overflow="fold", min_width=14)
    table.add_column("MFLOPs\nper token", justify="right")
    for n, cost in flops.items():
        cells = [cell(curve.scores[n]) for curve in curves]
        table.add_row(str(n), *cells, f"{cost / 1e6:,.1f}", end_section=n == max(flops))
    if len(flops) > 1:
        gains = [cell(curve.gain, sign="+") for curve in curves if curve.gain is not None]
        table.add_row("last - first", *gains, "")
    counts = [max(score.num_questions for score in curve.scores.values()) for curve in curves]
    table.add_row("questions", *(f"{number:,}" for number in counts), "")
    print_table(screen, table)
    for curve in curves:
        if curve.baselines:
            said = ", ".join(f"{name} {value:.3f}" for name, value in curve.baselines.items())
            screen.print(f"without a model, {curve.task} {in_words(curve.metric)}: {said}")


def cell(score: "Score", sign: str = "") -> str:
    """A score with its standard error, as text."""
    if score.stderr is None:
        return f"{score.value:{sign}.4f}"
    return f"{score.value:{sign}.3f} ± {score.stderr:.3f}"
