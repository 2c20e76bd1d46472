"""``openmythos train``: start or continue a training run."""

from pathlib import Path
from typing import Annotated

import typer

from openmythos.command.option import Device, Out, TrainSeed, check_device, set_option
from openmythos.terminal import console, note


def train(
    preset: Annotated[
        str | None, typer.Argument(help="Preset of the model; default: tiny.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="hops, a source of `prepare`, or a prepared folder; default: python-docs."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A run's config.json, instead of preset and data.")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option("--from", help="Checkpoint whose model and weights to start from."),
    ] = None,
    out: Out = Path("runs/train"),
    overrides: Annotated[list[str] | None, set_option("model.num_loops=8")] = None,
    device: Device = "cpu",
    seed: TrainSeed = None,
) -> None:
    """Train a model; run the same command again to continue an interrupted run."""
    note("preparing the run ...")
    from openmythos.train.display import TrainDisplay
    from openmythos.train.loop import TrainingStopped
    from openmythos.train.run import DEFAULT_DATA, resolve, set_up
    from openmythos.train.task import HopsTask, TextTask

    resolved = resolve(preset, data, config, overrides or [], seed, init_from)
    check_device(device)
    screen = console()
    run = set_up(resolved, out, device)
    screen.print(run.in_words((data or DEFAULT_DATA) if config is None else str(config)))
    for change in run.changes:
        screen.print(change)
    if isinstance(run.task, TextTask):
        typer.echo(run.task.train.data.summary(), err=True)
    if isinstance(run.task, HopsTask):
        screen.print(run.task.leaks_in_words())
    try:
        with TrainDisplay(screen, "training") as display:
            result = run.train(display)
    except TrainingStopped as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    state = "interrupted and saved" if result.interrupted else "done"
    kept = run.folder.last_checkpoint()
    said = f"{state}: step {result.step}, {result.seconds:.0f} s, checkpoint {kept}"
    screen.print(said)
    if result.interrupted:
        raise typer.Exit(130)
