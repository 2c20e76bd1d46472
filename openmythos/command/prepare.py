"""``openmythos prepare``: tokenise text into shards on disk."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from openmythos.command.option import AsJson, Out, Seed
from openmythos.terminal import console, note, print_table

if TYPE_CHECKING:
    from openmythos.data.index import PreparedData
    from openmythos.tokenizer import Tokenizer


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="python-docs, python-source, hf:NAME, a folder, a file (text, .jsonl, .json, "
            ".csv, .tsv, .parquet; .gz, .bz2, .xz, .zst), or - for standard input."
        ),
    ],
    out: Out = Path("data"),
    vocab_size: Annotated[int, typer.Option(help="Of the BPE tokenizer.")] = 2048,
    byte_level: Annotated[bool, typer.Option("--bytes", help="Bytes instead of BPE.")] = False,
    tokenizer_of: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", help="Checkpoint, run, zoo:NAME, prepared data or tokenizer.json."
        ),
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of documents held out.")] = 0.1,
    column: Annotated[str, typer.Option(help="Text column of tables.")] = "text",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out files and rows that cannot be read.")
    ] = False,
    conversations: Annotated[
        str | None,
        typer.Option(
            help="Rows are conversations (messages, or prompt and completion): answers or all, "
            "which of their tokens count in the loss."
        ),
    ] = None,
    show: Annotated[
        int, typer.Option(help="Print so many examples, the tokens that count in colour.")
    ] = 0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Tokenise a source into memory-mapped shards."""
    if conversations not in (None, "answers", "all"):
        raise ValueError(f"--conversations is {conversations!r}; allowed: answers, all")
    if show < 0:
        raise ValueError(f"--show is {show}; it must be at least 0")
    note("reading the source ...")
    from openmythos.data.prepare import prepare as write
    from openmythos.interop.hub import local_folder
    from openmythos.tokenizer import Tokenizer, byte_tokenizer

    tokenizer = byte_tokenizer() if byte_level else None
    if tokenizer_of is not None:
        if byte_level:
            raise ValueError("--bytes and --tokenizer both name a tokenizer; give one of them")
        is_here = tokenizer_of.exists() and tokenizer_of.suffix != ".gguf"
        tokenizer = Tokenizer.load(tokenizer_of if is_here else local_folder(tokenizer_of))
    data = write(
        source,
        out,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        column=column,
        skip_bad=skip_bad,
        conversations=conversations,  # type: ignore[arg-type]
        seed=seed,
    )
    screen = console(notes=as_json)
    if show:
        for example in examples(out, show):
            screen.print(example)
    if as_json:
        names = ("vocab_size", "num_duplicates", "num_replaced", "num_left_out", "left_out")
        counts = {name: getattr(data, name) for name in names}
        typer.echo(json.dumps({"folder": str(out), **counts, **sizes(data)}))
        return
    table = Table(title=f"{source} in {out}, vocabulary {data.vocab_size:,}")
    for heading in ("split", "documents", "tokens", "bytes", "bytes/token"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, s in sizes(data).items():
        per_token = f"{s['bytes'] / max(1, s['tokens']):.2f}"
        table.add_row(name, f"{s['documents']:,}", f"{s['tokens']:,}", f"{s['bytes']:,}", per_token)
    print_table(console(), table)
    typer.echo(data.summary(), err=True)


def sizes(data: "PreparedData") -> dict[str, dict[str, int]]:
    """How much each split holds."""
    return {
        name: {"documents": s.num_documents, "tokens": s.num_tokens, "bytes": s.num_bytes}
        for name, s in data.splits.items()
    }


def examples(folder: Path, count: int) -> Iterator[Text]:
    """The first training documents; what counts in the loss is coloured, and in brackets if piped.

    Special tokens are written out. The first token of a document never counts.
    """
    import numpy as np

    from openmythos.data.index import read_index
    from openmythos.data.loader import TokenLoader

    split = read_index(folder).splits["train"]
    loader = TokenLoader(folder, seq_len=split.num_tokens - 1, batch_size=1, verify=False)
    colours, tokenizer = console().is_terminal, loader.tokenizer
    for number in range(min(count, split.num_documents)):
        ids, counted = loader.document(number)
        example = Text(f"example {number + 1}, {counted.sum():,} of {len(ids):,} tokens count: ")
        borders = np.flatnonzero(np.diff(counted)) + 1
        for run in np.split(np.arange(len(ids)), borders):
            text = written_out(ids[run].tolist(), tokenizer)
            if counted[run[0]]:
                example.append(text if colours else f"[{text}]", style="bold green")
            else:
                example.append(text, style="dim")
        yield example


def written_out(ids: list[int], tokenizer: "Tokenizer") -> str:
    """The text of tokens, special tokens included."""
    text = ""
    for special, group in groupby(ids, key=tokenizer.special_text):
        run = list(group)
        text += special * len(run) if special else tokenizer.decode(run)
    return text
