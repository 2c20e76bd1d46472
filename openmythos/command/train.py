"""``openmythos train``: a run from its configuration to its last checkpoint."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from openmythos.command.option import Device, Out, Overrides, check_device

if TYPE_CHECKING:
    from openmythos.model.recurrent import RecurrentDepthLM
    from openmythos.train.loop import TrainResult
    from openmythos.train.recipe import HopsData, RunConfig, TextData
    from openmythos.train.run import Run

DEFAULT_PRESET, DEFAULT_DATA = "tiny", "python-docs"


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
    overrides: Overrides = None,
    device: Device = "cpu",
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of everything that is random; default: --config's, or 0."),
    ] = None,
) -> None:
    """Train a model; run the same command again to continue an interrupted run."""
    resolved = resolve(preset, data, config, overrides or [], seed, init_from)
    check_device(device)
    from openmythos.train.run import set_up

    console = Console(highlight=False)
    run = set_up(resolved, out, device)
    describe(console, run.model, (data or DEFAULT_DATA) if config is None else str(config))
    print_leak_baselines(console, run)
    result = run_training(console, run, "training")
    state = "interrupted and saved" if result.interrupted else "done"
    kept = run.folder.last_checkpoint()
    said = f"{state}: step {result.step}, {result.seconds:.0f} s, checkpoint {kept}"
    console.print(said, soft_wrap=True)
    if result.interrupted:
        raise typer.Exit(130)


def data_in_words(data: "TextData | HopsData") -> str:
    """What a run trains on."""
    from openmythos.train.recipe import TextData

    if isinstance(data, TextData):
        return data.source
    return f"walks over {data.num_entities} entities and {data.num_relations} permutations"


def describe(console: Console, model: "RecurrentDepthLM", data: str) -> None:
    """One line about a model and what it is trained on."""
    config = model.config
    count = sum(p.numel() for p in model.parameters())
    p, c, d = config.num_prelude_layers, config.num_core_layers, config.num_coda_layers
    layers = f"{p} prelude + {c} core (looped) + {d} coda layers"
    console.print(f"{count:,} parameters, {layers}, on {data}")


def print_leak_baselines(console: Console, run: "Run") -> None:
    """What guessers reach on walks that they do not follow; nothing for text."""
    from openmythos.train.task import HopsTraining

    if not isinstance(run.task, HopsTraining):
        return
    task = run.task.task
    hardest = task.config.max_train_hops
    guesses = task.leak_baselines(hardest)
    shown = ", ".join(f"{name.replace('_', ' ')} {share:.3f}" for name, share in guesses.items())
    console.print(f"leak baselines at {hardest} hops: {shown}", soft_wrap=True)


def run_training(console: Console, run: "Run", title: str) -> "TrainResult":
    """Train with the live display; a run that is lost ends the program with status 1."""
    from openmythos.train.display import TrainDisplay
    from openmythos.train.loop import TrainingStopped
    from openmythos.train.loop import train as run_loop
    from openmythos.train.metrics import Recorder

    try:
        with TrainDisplay(console, title) as display:
            recorder = Recorder(run.folder.path, display)
            return run_loop(run.model, run.task, run.config.train, run.folder, recorder)
    except TrainingStopped as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def resolve(
    preset: str | None,
    data: str | None,
    config: Path | None,
    overrides: list[str],
    seed: int | None,
    init_from: Path | None = None,
) -> "RunConfig":
    """The run's configuration: defaults, then preset, checkpoint or file, then overrides.

    Raises:
        ValueError: A field is unknown or out of range, or two arguments name the model or the data.
    """
    from openmythos.config import presets
    from openmythos.config.schema import apply_overrides, from_dict
    from openmythos.train.recipe import HopsData, RunConfig, TextData, TrainConfig

    if init_from is not None and (preset is not None or config is not None):
        raise ValueError(
            f"--from {init_from} already names the model; leave the preset and --config out, and "
            "change fields with --set"
        )
    if config is not None:
        if preset is not None or data is not None:
            raise ValueError(
                f"--config {config} already names model and data; leave the preset and --data out, "
                "and change fields with --set"
            )
        try:
            stored = json.loads(config.read_text(encoding="utf-8"))
            base = from_dict(RunConfig, stored)
        except (OSError, ValueError) as error:  # of JSON, of UTF-8 or of a field
            raise ValueError(f"--config {config} cannot be used: {error}") from None
    else:
        start = None if init_from is None else str(init_from)
        settings = TrainConfig(max_steps=1000, save_every=200, eval_every=200, init_from=start)
        if init_from is None:
            model = presets.preset(preset or DEFAULT_PRESET)
        else:
            from openmythos.interop.loading import load_config

            model = load_config(init_from)
        seq_len = min(TextData.seq_len, model.max_seq_len)
        text = TextData(source=data or DEFAULT_DATA, seq_len=seq_len)
        source = HopsData() if data == "hops" else text
        base = RunConfig(model=model, train=settings, data=source)
    seeds = [] if seed is None else [f"train.seed={seed}"]
    return apply_overrides(base, [*seeds, *overrides])
