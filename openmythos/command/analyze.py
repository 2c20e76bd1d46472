"""``openmythos analyze``: what each loop of a model does, as a page and as numbers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openmythos.command.option import AsJson, Device, Seed, check_device
from openmythos.command.origin import data_of, puzzle_of, require_text
from openmythos.folder import require_writable, write_json
from openmythos.terminal import console, note, print_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from openmythos.analysis.example import Examples
    from openmythos.analysis.pairs import Pairs
    from openmythos.analysis.record import Analysis
    from openmythos.data.puzzle import Puzzle
    from openmythos.model.recurrent import RecurrentDepthLM

RECORD_FILE, PAGE_FILE = "analysis.json", "report.html"
NUM_QUESTIONS, NUM_WINDOWS, SEQ_LEN = 256, 64, 64
MOST_WINDOWS = 2048  # of a text, from which those to read are taken at even distances


def analyze(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint or run folder, zoo:NAME, or a .gguf file.")
    ],
    text: Annotated[
        Path | None, typer.Option(help="A file of text to read; default: the model's own held-out.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="What is asked of a puzzle: its kind, such as hops, or with a size: hops_8."
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help="JSON of token ids, a list per text, for a model without a tokenizer."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder for {RECORD_FILE} and {PAGE_FILE}; default: runs/analysis/NAME."
        ),
    ] = None,
    max_loops: Annotated[
        int | None, typer.Option(help="Most loops to run; default: twice the model's own.", min=1)
    ] = None,
    num_examples: Annotated[
        int | None, typer.Option(help="Questions or windows of text; default: 256 or 64.", min=2)
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a window of text; default: 64.", min=3)
    ] = None,
    max_bytes: Annotated[
        int, typer.Option(help="Memory that a batch may take, besides the weights.", min=1)
    ] = 1 << 30,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """What each loop does: reading map, novelty, trace, blocks, experts, lenses; a page of it."""
    note("loading the model ...")
    check_device(device)
    from openmythos.analysis.picture import require_matplotlib

    require_matplotlib()  # fail before the measurements rather than after them
    check_sources(text, task, tokens)
    target = Path("runs/analysis") / name_of(checkpoint) if out is None else out
    require_writable(target / RECORD_FILE)
    from openmythos.interop.hub import local_folder
    from openmythos.interop.loading import load_pretrained
    from openmythos.report.analysis import write_analysis_page

    folder = local_folder(checkpoint)
    puzzle = puzzle_of(folder) if tokens is None else None
    check_fit(puzzle, folder, text, task, tokens, seq_len)
    model = load_pretrained(folder, device=device)
    room = model.config.max_seq_len
    if puzzle is not None:
        read = questions_to_read(puzzle, task, room, num_examples or NUM_QUESTIONS, seed)
    else:
        length = min(SEQ_LEN, room) if seq_len is None else seq_len
        if length > room:
            raise ValueError(f"--seq-len is {length}; the model reads at most {room} tokens")
        if tokens is None:
            texts, what = texts_to_read(folder, text)
        else:
            texts, what = read_tokens(tokens, model.config.vocab_size), tokens.name
        read = cut_to_read(texts, length, what, num_examples or NUM_WINDOWS, seed)
    most = 2 * model.config.num_loops if max_loops is None else max_loops
    found = measured(model, str(checkpoint), *read, most, max_bytes, seed)
    write_json(target / RECORD_FILE, found.to_dict())
    write_analysis_page(found, target / PAGE_FILE)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    show(found)
    console().print(f"{target / RECORD_FILE}\n{target / PAGE_FILE}")


def name_of(checkpoint: Path) -> str:
    """The last part of a checkpoint's name."""
    return checkpoint.resolve().name.removeprefix("zoo:") or "model"


def check_sources(text: Path | None, task: str | None, tokens: Path | None) -> None:
    """Check that one source is named at most, and that its file exists.

    Raises:
        ValueError: There are more, or there is no such file.
    """
    given = {"--text": text, "--task": task, "--tokens": tokens}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} exclude each other; give one of them")
    for name, file in (("--text", text), ("--tokens", tokens)):
        if file is not None and not file.is_file():
            raise ValueError(f"{name} is {file}, which is no file")


def check_fit(
    puzzle: "Puzzle | None",
    folder: Path,
    text: Path | None,
    task: str | None,
    tokens: Path | None,
    seq_len: int | None,
) -> None:
    """Check that the options fit what the model reads, before it is loaded.

    Raises:
        ValueError: They do not, or the model has no tokenizer for a text.
    """
    if puzzle is not None and text is not None:
        raise ValueError(
            f"--text is for models of text, and this one knows {puzzle.noun}s; give "
            f"--task {puzzle.kind}"
        )
    if puzzle is not None and seq_len is not None:
        raise ValueError(
            f"--seq-len is for models of text; give --task {puzzle.kind}_N for {puzzle.noun}s of N "
            f"{puzzle.size_word}"
        )
    if puzzle is None and task is not None:
        raise ValueError("--task is for models of puzzles; leave it out, or give --text FILE")
    if puzzle is None and tokens is None:
        require_text(folder)


# --- what is read ---------------------------------------------------------------------------------


def questions_to_read(
    puzzle: "Puzzle", task: str | None, max_seq_len: int, count: int, seed: int
) -> "tuple[Examples, Pairs, torch.Tensor]":
    """Held-out questions of one size, their pairs, and others on which predictions are fitted.

    Raises:
        ValueError: The task is of another puzzle, of a size that there is not, or too long.
    """
    from openmythos.analysis.example import puzzle_examples
    from openmythos.analysis.pairs import puzzle_pairs
    from openmythos.data.synthetic import Walks
    from openmythos.eval.task_name import PUZZLE

    kind, named = puzzle.kind, PUZZLE.fullmatch(task or "")
    if task in (None, kind):
        size = puzzle.max_train_size
    elif named is not None and named[1] == kind:
        size = int(named[2])
    else:
        raise ValueError(
            f"--task is {task!r}; give {kind}, or {kind}_N for {puzzle.noun}s of N "
            f"{puzzle.size_word}"
        )
    puzzle.check(size)
    if puzzle.question_len(size) > max_seq_len:
        raise ValueError(
            f"--task is {task!r}; {puzzle.in_words(size)} have {puzzle.question_len(size)} tokens, "
            f"and the model reads {max_seq_len}"
        )
    if isinstance(puzzle, Walks) and puzzle.config.written_out:
        raise ValueError("these walks are written out, and instruments read only their ends")
    return (
        puzzle_examples(puzzle, size, count, seed + 1),
        puzzle_pairs(puzzle, size, count, seed + 1),
        puzzle_examples(puzzle, size, count, seed + 2).tokens,
    )


def texts_to_read(folder: Path, text: Path | None) -> "tuple[Iterable[Sequence[int]], str]":
    """The token ids of a file's texts, or of what was held out, and what they are.

    Raises:
        ValueError: There is nothing to read.
    """
    from openmythos.data.loader import TokenLoader
    from openmythos.data.source import load_documents
    from openmythos.eval.calibration import texts_of
    from openmythos.eval.task import brings_text
    from openmythos.folder import HELD_OUT_FILE
    from openmythos.tokenizer import Tokenizer

    tokenizer, what = Tokenizer.load(folder), "held-out text"
    if text is not None or brings_text(folder):
        file = folder / HELD_OUT_FILE if text is None else text
        documents = load_documents(str(file))
        ids = ([*tokenizer.begin_ids, *tokenizer.encode(each.text)] for each in documents)
        return ids, what if text is None else f"text of {text.name}"
    try:
        source = data_of(folder)
    except ValueError as error:
        raise ValueError(f"{error}; or a file of text as --text") from None
    loader = TokenLoader(
        source,
        "val",
        seq_len=SEQ_LEN,
        batch_size=MOST_WINDOWS,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    rows = min(MOST_WINDOWS, loader.num_windows)
    return [part.tokens for part in texts_of(loader, rows)], what


def cut_to_read(
    texts: "Iterable[Sequence[int]]", length: int, what: str, count: int, seed: int
) -> "tuple[Examples, Pairs, torch.Tensor]":
    """Windows of texts; pairs of the first half, and others on which predictions are fitted.

    Args:
        texts: Token ids.
        length: Tokens in a window.
        what: The texts in words.
        count: Windows to read; there are twice as many pairs.
        seed: Of what is drawn.

    Raises:
        ValueError: The texts are too short.
    """
    import torch

    from openmythos.analysis.example import text_examples
    from openmythos.analysis.pairs import text_pairs

    windows = [
        text[start : start + length + 1]
        for text in texts
        for start in range(0, len(text), length + 1)
    ][:MOST_WINDOWS]
    corpus = torch.tensor([token for window in windows for token in window], dtype=torch.int64)
    least = 2 * length + 4
    if len(corpus) < least:
        raise ValueError(
            f"the text is too short: {len(corpus)} tokens, and windows of {length} need at least "
            f"{least}; give more text, or a smaller --seq-len"
        )
    step = max(1, len(windows) // count)
    examples = text_examples(windows[::step][:count], f"windows of {length} tokens of {what}")
    first, second = corpus.chunk(2)
    pairs = text_pairs(first, length, 2 * count, seed)
    return examples, pairs, text_pairs(second, length, 2 * count, seed + 1).tokens


def read_tokens(file: Path, vocab_size: int) -> list[tuple[int, ...]]:
    """The token ids of texts, from JSON.

    Raises:
        ValueError: The file does not hold lists of ids of the vocabulary.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--tokens {file} is not JSON: {error}") from None
    texts = stored if isinstance(stored, list) else None
    for text in [None] if texts is None else texts:
        if not isinstance(text, list) or not all(
            type(token) is int and 0 <= token < vocab_size for token in text
        ):
            raise ValueError(
                f"--tokens {file} must hold a list per text of ids from 0 to {vocab_size - 1}, "
                "like [[5, 3, 8], [2, 9]]"
            )
    return [tuple(text) for text in texts or []]


# --- what is measured -----------------------------------------------------------------------------


def measured(
    model: "RecurrentDepthLM",
    name: str,
    examples: "Examples",
    pairs: "Pairs",
    fit: "torch.Tensor",
    most: int,
    max_bytes: int,
    seed: int,
) -> "Analysis":
    """All instruments, one after the other."""
    from openmythos.analysis.depth import measure_depth
    from openmythos.analysis.dynamics import measure_dynamics
    from openmythos.analysis.lens import measure_lenses
    from openmythos.analysis.record import Analysis, intervene_at

    trained = model.config.num_loops
    examples = examples.to(model.embed.weight.device)
    note(f"{len(examples)} {examples.what}: answers after 1 to {most} loops ...")
    depth = measure_depth(model, examples, most, max_bytes)
    at = []
    for loops in [depth.fewest, *([trained] if depth.fewest != trained <= most else [])]:
        which = "enough" if loops == depth.fewest else "the model's own"
        note(f"reading map, operators and novelty at {loops} loops ({which}) ...")
        at.append(intervene_at(model, pairs, fit, loops, max_bytes, seed))
    note(f"state, blocks and experts over {most} loops ...")
    dynamics = measure_dynamics(model, examples, most, max_bytes)
    shown = max(each.num_loops for each in at)
    note(f"lenses over {shown} loops ...")
    lenses = measure_lenses(model, examples, shown, max_bytes)
    settings = {
        "num_rows": len(examples),
        "num_pairs": len(pairs),
        "num_tokens": examples.tokens.shape[1],
        "max_loops": most,
        "max_bytes": max_bytes,
        "seed": seed,
    }
    return Analysis(
        model=name,
        facts=facts_of(model),
        examples=examples.what,
        depth=depth,
        at=tuple(at),
        dynamics=dynamics,
        lenses=lenses,
        settings=settings,
    )


def facts_of(model: "RecurrentDepthLM") -> dict[str, Any]:
    """What a reader should know of the model."""
    config = model.config
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": [config.num_prelude_layers, config.num_core_layers, config.num_coda_layers],
        "num_loops": config.num_loops,
        "injection": config.injection.kind,
    }


# --- what is said ---------------------------------------------------------------------------------


def show(found: "Analysis") -> None:
    """Print the depth, and what changing loops shows."""
    from rich.table import Table

    screen = console()
    table = Table(title=f"{found.model} on {found.examples}")
    heads = ("loops", "accuracy", "loops\nthat read", "bits between\nneighbours")
    for column in (*heads, "95 %", "loops shuffled,\n95 %"):
        table.add_column(column, justify="right")
    for each in found.at:
        gap = each.difference
        table.add_row(
            str(each.num_loops),
            f"{found.depth.accuracy[each.num_loops - 1]:.3f}"
            if each.num_loops <= len(found.depth.accuracy)
            else "-",
            str(gap.num_working),
            "-" if gap.mean_bits is None else f"{gap.mean_bits:.3f}",
            span(gap.mean_interval),
            span(gap.null),
        )
    print_table(screen, table)


def span(interval: tuple[float, float] | None) -> str:
    """An interval in words."""
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
