"""``openmythos calibrate-exit``: which exit rule or depth is worth it, measured on this machine."""

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from openmythos.command.option import AsJson, Device, check_device
from openmythos.command.origin import data_of, data_source, puzzle_for, require_text
from openmythos.folder import require_writable
from openmythos.terminal import console, note, print_table

if TYPE_CHECKING:
    from openmythos.engine.engine import Engine
    from openmythos.eval.calibration import Frontier, Metric, Point, Text
    from openmythos.model.recurrent import RecurrentDepthLM

LEAST_TEXT, MOST_TEXT = 16, 128  # tokens of a text that are read

Within = Annotated[
    float,
    typer.Option(help="The most quality to lose: bits per byte, or share of right answers."),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Prepared folder, or a run or zoo:NAME whose data to use; default: its own."),
]
MaxLoops = Annotated[
    int | None, typer.Option(help="Most loops to try; default: twice the model's own.", min=1)
]
MaxSize = Annotated[
    int | None,
    typer.Option(help="Of a puzzle: the largest size, such as hops; default: as trained.", min=1),
]
NumTokens = Annotated[int, typer.Option(help="Tokens to read with each setting.", min=1)]
MaxRows = Annotated[int, typer.Option(help="Texts that are read at once.", min=1)]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Measure compiled calls, as serve --compile.")
]
Out = Annotated[
    Path | None, typer.Option(help="Folder for exit.json and exit.png; default: the checkpoint's.")
]


def calibrate_exit(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint or run folder, or zoo:NAME.")],
    within: Within = 0.01,
    data: Data = None,
    max_loops: MaxLoops = None,
    max_size: MaxSize = None,
    num_tokens: NumTokens = 8192,
    max_rows: MaxRows = 8,
    compiled: Compiled = False,
    out: Out = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure exit rules and depths token by token; write the best for serve to use."""
    note("loading the model ...")
    if not within >= 0:
        raise ValueError(f"--within is {within}; give the most quality to lose, for example 0.01")
    check_device(device)
    from openmythos.analysis.picture import require_matplotlib
    from openmythos.interop.hub import local_folder

    require_matplotlib()  # fail before the measurement rather than after it
    from openmythos import load_pretrained
    from openmythos.checkpoint.save import EXIT_FILE, EXIT_PICTURE
    from openmythos.engine.engine import Engine, EngineConfig
    from openmythos.eval.calibration import depths_up_to
    from openmythos.eval.exit_choice import processor_name, write_choice
    from openmythos.eval.picture import plot_frontier

    folder = local_folder(checkpoint)
    target = target_for(checkpoint, folder) if out is None else out
    require_writable(target / EXIT_FILE)
    model = load_pretrained(folder, device=device)
    texts, metric = texts_for(model, folder, data, max_size, num_tokens, max_rows)
    most = 2 * model.config.num_loops if max_loops is None else max_loops
    longest = max(len(text.read) for text in texts)
    config = EngineConfig(max_rows=max_rows, max_loops=most, max_len=longest, compiled=compiled)
    engine = Engine(model, config)
    found = measured(engine, texts, depths_up_to(most), metric, within)
    settings = {
        "max_rows": max_rows,
        "compiled": compiled,
        "num_texts": len(texts),
        "num_tokens": found.chosen.num_tokens,
        "max_size": max_size,
    }
    processor = processor_name(model.embed.weight.device)
    write_choice(found, target / EXIT_FILE, processor, settings)
    plot_frontier(found, target / EXIT_PICTURE)
    if as_json:
        typer.echo(json.dumps(json.loads((target / EXIT_FILE).read_text(encoding="utf-8"))))
        return
    show(found)
    console().print(f"{target / EXIT_FILE}\n{target / EXIT_PICTURE}")


def target_for(checkpoint: Path, folder: Path) -> Path:
    """The folder for exit.json where none is given: the checkpoint's own.

    Raises:
        ValueError: It cannot be kept there: a file, a model that ships, or a folder that is read
            only.
    """
    from openmythos.checkpoint.save import EXIT_FILE
    from openmythos.interop.gguf import SUFFIX
    from openmythos.interop.hub import ZOO_FOLDER

    why = ""
    if checkpoint.suffix == SUFFIX and checkpoint.is_file():
        why = "is a file"
    elif folder.parent == ZOO_FOLDER:
        why = "is part of the package"
    else:
        try:
            require_writable(folder / EXIT_FILE)
        except OSError as error:
            why = f"cannot be written to ({error})"
    if why:
        raise ValueError(
            f"{checkpoint} {why}: give a folder for {EXIT_FILE} as --out, or calibrate a copy, "
            f"which serve then uses: openmythos convert {checkpoint} --out COPY"
        )
    return folder


def texts_for(
    model: "RecurrentDepthLM",
    folder: Path,
    data: Path | None,
    max_size: int | None,
    num_tokens: int,
    max_rows: int,
) -> "tuple[list[Text], Metric]":
    """Held-out texts or questions of about so many tokens, and what their quality is.

    Raises:
        ValueError: There are none, or the model cannot read them.
    """
    from openmythos.data.loader import TokenLoader
    from openmythos.eval.calibration import PARTS, questions_of, texts_of, windows_of
    from openmythos.eval.task import brings_text, shipped_task
    from openmythos.eval.task_name import HELD_OUT
    from openmythos.tokenizer import Tokenizer

    source = folder if data is None else data_source(data)
    puzzle, room = puzzle_for(folder, source), model.config.max_seq_len - 1
    if puzzle is not None:
        largest = puzzle.max_train_size if max_size is None else max_size
        puzzle.check(largest)
        if puzzle.num_tokens(largest) > room:
            raise ValueError(
                f"--max-size is {largest}; {puzzle.in_words(largest)} have "
                f"{puzzle.num_tokens(largest)} tokens, and the model reads {room}"
            )
        sizes = range(min(puzzle.train_sizes[0], largest), largest + 1)
        return questions_of(puzzle, sizes, num_tokens), "accuracy"
    if max_size is not None:
        raise ValueError("--max-size is for models of puzzles; leave it out")
    require_text(folder)
    # So many texts that each part of them fills the rows twice.
    length = min(MOST_TEXT, room, max(LEAST_TEXT, num_tokens // (2 * PARTS * max_rows)))
    rows = -(-num_tokens // length)
    if brings_text(source):
        task = shipped_task(HELD_OUT, None, source)
        assert task is not None
        own = (row["text"] for row in task.documents)
        return list(islice(windows_of(own, Tokenizer.load(folder), length), rows)), "bits_per_byte"
    loader = TokenLoader(
        data_of(source),
        "val",
        seq_len=length,
        batch_size=rows,
        tokenizer_fingerprint=Tokenizer.load(folder).fingerprint,
    )
    texts = texts_of(loader, min(rows, loader.num_windows))
    if not texts:
        raise ValueError("the held-out text is empty; prepare more text and give it as --data")
    return texts, "bits_per_byte"


def measured(
    engine: "Engine", texts: "list[Text]", depths: list[int], metric: "Metric", within: float
) -> "Frontier":
    """Measure every depth, and the rules that stop tokens before the shallowest good one."""
    from openmythos.eval.calibration import (
        PARTS,
        Setting,
        added_up,
        choose,
        measure,
        read,
        rules_to_try,
        shallowest,
    )

    note(f"{len(texts)} texts at {len(depths)} depths ...")
    enough = shallowest(engine.model, texts, depths, metric, within)
    note(f"{enough} loops are enough; looking for thresholds of rules ...")
    rules = rules_to_try(engine.model, texts, enough)
    settings = [Setting(depth) for depth in depths] + [Setting(enough, rule) for rule in rules]
    note(f"measuring {len(settings)} settings ...")
    engine.warm_up()
    read(engine, settings[-1], texts[:1])  # the first call of a kernel takes longer
    parts: list[Point] = []
    for point in measure(engine, settings, texts):
        turn, place = divmod(len(parts), len(settings))
        parts.append(point)
        said = f"{point.setting}: {point.speeds[0]:,.0f} tokens/s"
        note(f"turn {turn + 1} of {PARTS}, {place + 1}/{len(settings)}: {said}")
    return choose(added_up(parts), metric, within)


def show(found: "Frontier") -> None:
    """Print the frontier, and the choice."""
    from openmythos.eval.score import in_words

    screen = console()
    table = Table(title="the fastest at each quality: depths, and rules below them")
    columns = ("setting", in_words(found.metric), "lost", "loops\nper token", "tokens/s")
    for column in columns:
        table.add_column(column, justify="left" if column == "setting" else "right")
    shown = {id(point) for point in found.undominated}
    shown |= {id(found.best), id(found.fixed), id(found.chosen)}
    fastest_first = sorted(found.points, key=found.gain, reverse=True)
    for point in fastest_first:
        if id(point) in shown:
            mark = " <- chosen" if point is found.chosen else ""
            table.add_row(f"{point.setting}{mark}", *cells(point, found))
    print_table(screen, table)
    chosen, fixed = found.chosen, found.fixed
    if chosen is fixed:
        screen.print(f"{fixed.setting} for every token: no rule is worth its cost")
    else:
        screen.print(
            f"{chosen.setting}: {found.gain(chosen):.2f} times the tokens/s of "
            f"{fixed.setting.num_loops} loops for every token"
        )


def cells(point: "Point", found: "Frontier") -> list[str]:
    """A point's numbers in words."""
    from openmythos.eval.score import with_error

    return [
        with_error(point.score, 4),
        with_error(found.loss(point), 4),
        f"{point.mean_loops:.2f}",
        f"{found.tokens_per_s(point):,.0f}",
    ]
