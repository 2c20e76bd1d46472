"""``openmythos train``: start or continue a training run."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from openmythos.command.option import (
    AsJson,
    Device,
    Out,
    TrainSeed,
    check_device,
    require_once,
    set_option,
    with_shorthands,
)
from openmythos.config.parallel import started_rank
from openmythos.terminal import console, note, print_table

if TYPE_CHECKING:
    from openmythos.eval.before_after import BeforeAfter
    from openmythos.train.loop import TrainResult
    from openmythos.train.recipe import MixtureData, RunConfig
    from openmythos.train.run import Run


FixedDepthOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Always this number of loops, instead of depths as the checkpoint was trained at; "
        "the model is then trained for this depth only.",
    ),
]
BaseText = Annotated[
    str | None,
    typer.Option(
        help="Text, as --data takes it, that is scored by loops before and after --from; "
        "default: what goes with the checkpoint."
    ),
]


def train(
    preset: Annotated[
        str | None, typer.Argument(help="Preset of the model; default: tiny.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A puzzle (hops, products, recall, facts, induction, addition), a source of "
            "`prepare`, or a prepared folder; default: python-docs. Repeatable for a mixture, "
            "each with a --weight."
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the rows that are from a --data, in the same order; they sum to 1."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A run's config.json, instead of preset and data.")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Checkpoint, or zoo:NAME, whose model and weights to start from."
        ),
    ] = None,
    out: Out = Path("runs/train"),
    steps: Annotated[
        int | None,
        typer.Option(help="Optimiser steps in all; short for --set train.max_steps=N."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows of a step; short for --set train.batch_size=N.")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="AdamW's learning rate: 0.003; with --from 0.0002, of an adapter 0.001. The "
            "blocks' matrices have train.optimizer.muon_lr: 0.02; with --from 0.0003."
        ),
    ] = None,
    fixed_depth: FixedDepthOption = None,
    base_text: BaseText = None,
    seed: TrainSeed = None,
    overrides: Annotated[list[str] | None, set_option("model.num_loops=8")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Train a model; run the same command again to continue an interrupted run."""
    short = {
        "--steps": ("train.max_steps", steps),
        "--batch-size": ("train.batch_size", batch_size),
        "--lr": ("train.optimizer.lr", lr),
        "--seed": ("train.seed", seed),
    }
    with one_voice():
        note("preparing the run ...")
        from openmythos.train.run import resolve

        given = overrides or []
        if data:
            require_once(given, "--data", "data.source", data[0])
        require_once(given, "--from", "train.init_from", init_from)
        require_once(given, "--fixed-depth", "train.depth.sampling", fixed_depth)
        if fixed_depth is not None:
            sampling = {"kind": "fixed", "mean_recurrence": fixed_depth}
            given = [*given, f"train.depth.sampling={json.dumps(sampling)}"]
        chosen = chosen_data(data or [], weight or [])
        resolved = resolve(preset, chosen, config, with_shorthands(given, short), init_from)
        check_device(device)
        trained_on = in_words(chosen) if config is None else str(config)
        if base_text is not None and resolved.train.init_from is None:
            raise ValueError(f"--base-text {base_text} is of a checkpoint; give --from, too")
        if base_text is not None and not resolved.train.eval_loops:
            raise ValueError(
                f"--base-text {base_text} is scored at the loops of train.eval_loops, and these "
                "are []; name some, or leave it out"
            )
        run_to_the_end(resolved, trained_on, out, device, as_json, base_text)


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Of the processes that ``torchrun`` started, only the first prints, and says what is wrong."""
    if not started_rank():
        yield
        return
    unheard = io.StringIO()
    with contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
        try:
            yield
        except ValueError:
            raise typer.Exit(2) from None


def run_to_the_end(
    resolved: "RunConfig",
    trained_on: str,
    out: Path,
    device: str,
    as_json: bool,
    base_text: str | None = None,
) -> None:
    """Set a run up, train it, and say how it ended; the exit code says it, too."""
    from openmythos.train.loop import TrainingStopped
    from openmythos.train.run import set_up
    from openmythos.train.trained_depth import depth_in_words

    screen = console(notes=as_json)
    run = set_up(resolved, out, device)
    screen.print(run.in_words(trained_on))
    if resolved.train.init_from is not None:
        screen.print(depth_in_words(resolved))
    say_memory(run, screen)
    scores = scored_before(run, base_text, screen)
    try:
        result = train_shown(run, screen)
    except TrainingStopped as error:
        if run.ranks.first:
            write_page(run, with_samples=False)
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if run.ranks.first:
        summary = ended(run, result, screen)
        if scores is not None and not result.interrupted:
            summary["scores"] = str(scored_after(scores, screen))
        if as_json:
            typer.echo(json.dumps(summary))
    run.ranks.leave()
    if result.interrupted:
        raise typer.Exit(128 + result.signal)  # 130 or 143, as shells say it; 0: the run is done


def say_memory(run: "Run", screen: Console) -> None:
    """Say what the deepest step takes, and what the machine has.

    Raises:
        DoesNotFitError: It has less.
    """
    from openmythos.train.fits import memory_in_words

    parameters = list(run.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    adapter = None if run.folder.adapter is None else trained
    held = sum(p.numel() * p.element_size() for p in parameters)
    screen.print(memory_in_words(run.config, run.ranks.device, adapter, held))


def scored_before(run: "Run", base_text: str | None, screen: Console) -> "BeforeAfter | None":
    """Score the checkpoint that a run starts from; None if it starts from none.

    Raises:
        ValueError: ``base_text`` cannot be used.
    """
    from openmythos.eval.before_after import BeforeAfter

    settings = run.config.train
    if settings.init_from is None or not settings.eval_loops:
        return None
    if run.ranks.mesh is not None:
        screen.print("scores before and after: one process measures them; use openmythos eval")
        return None
    scores = BeforeAfter(run, base_text)
    screen.print(scores.in_words)
    note("scores by loops before training ...")
    try:
        scores.before()
    except ValueError as error:
        screen.print(f"scores before and after: none: {error}")
        return None
    return scores


def scored_after(scores: "BeforeAfter", screen: Console) -> Path:
    """Score the trained model, print both, and draw them if matplotlib is there."""
    from rich.table import Table

    from openmythos.eval.before_after import curves_of
    from openmythos.eval.picture import plot_before_after
    from openmythos.train.run_folder import SCORES_PICTURE

    note("scores by loops after training ...")
    scores.after()
    head, rows = scores.rows()
    table = Table(title="scores by number of loops, before and after")
    for name in head:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    print_table(screen, table)
    try:
        before, after = (curves_of(scores.stored[when]) for when in ("before", "after"))
        plot_before_after(before, after, scores.path.with_name(SCORES_PICTURE))
    except ValueError as error:
        note(f"note: no picture: {error}")
    return scores.path


def chosen_data(sources: list[str], weights: list[float]) -> "str | MixtureData | None":
    """What ``--data`` and ``--weight`` choose: one source or puzzle, or a mixture.

    Raises:
        ValueError: There is not one weight for each of several sources, one of them is a puzzle, or
            the weights cannot be used.
    """
    from openmythos.train.recipe import MixtureData, MixtureSource
    from openmythos.train.run import PUZZLE_DATA

    if len(sources) < 2 and not weights:
        return sources[0] if sources else None
    if len(sources) != len(weights):
        raise ValueError(
            f"--data is given {len(sources)} times and --weight {len(weights)} times; a mixture "
            "needs a weight for each, such as --data a --weight 0.7 --data b --weight 0.3"
        )
    if puzzles := [name for name in sources if name in PUZZLE_DATA]:
        raise ValueError(f"--data {puzzles[0]} is a puzzle, and a mixture is of text; leave it out")
    pairs = zip(sources, weights, strict=True)
    parts = tuple(MixtureSource(source=name, weight=share) for name, share in pairs)
    return MixtureData(sources=parts)


def in_words(data: "str | MixtureData | None") -> str:
    """What a run is trained on."""
    from openmythos.train.run import DEFAULT_DATA

    return (data or DEFAULT_DATA) if data is None or isinstance(data, str) else data.in_words


def train_shown(run: "Run", screen: Console) -> "TrainResult":
    """Say what a run begins with, and train it with its progress on the screen."""
    from openmythos.train.display import TrainDisplay
    from openmythos.train.task import PuzzleTask, TextTask

    for change in run.changes:
        screen.print(change)
    if isinstance(run.task, TextTask):
        for line in run.task.in_words():
            typer.echo(line, err=True)
    if isinstance(run.task, PuzzleTask):
        screen.print(run.task.leaks_in_words())
    with TrainDisplay(screen, "training") as display:
        return run.train(display)


def ended(run: "Run", result: "TrainResult", screen: Console) -> dict[str, Any]:
    """Say how a run ended; returns that as ``--json`` prints it."""
    from openmythos.train.metrics import last_validation

    state = "interrupted and saved" if result.interrupted else "done"
    folder, kept = run.folder.path, run.folder.last_checkpoint()
    screen.print(f"{state}: step {result.step}, {result.seconds:.0f} s, checkpoint {kept}")
    if result.skipped:
        why = "their loss or gradients were not finite"
        screen.print(f"skipped: {result.skipped} of {result.step} steps changed nothing; {why}")
    # To continue a text, a model must be whole on one process.
    page = write_page(run, not result.interrupted and run.ranks.mesh is None)
    if page is not None:
        screen.print(f"page: {page}")
    held_out = last_validation(folder / "metrics.jsonl")
    places = {"folder": str(folder), "checkpoint": str(kept), "page": page and str(page)}
    ending = {"step": result.step, "seconds": result.seconds, "interrupted": result.interrupted}
    ending["skipped_steps"] = result.skipped
    return {**places, **ending, "held_out": held_out}


def write_page(run: "Run", with_samples: bool) -> Path | None:
    """Write the run's page, and before it samples; None if it could not be drawn.

    The run is done and saved, so that what goes wrong here is only said.
    """
    note("writing the page ...")
    from openmythos.report.run import write_run_page
    from openmythos.report.sample import write_samples

    try:
        if with_samples:
            write_samples(run)
        return write_run_page(run.folder.path)
    except (ValueError, OSError) as error:
        note(f"note: no page: {error}")
    return None
