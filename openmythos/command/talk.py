"""Commands that talk: generate and chat, each token coloured by the loops it took."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from openmythos.command.option import AsJson, Device, Overrides, Seed, check_device
from openmythos.folder import write_whole

if TYPE_CHECKING:
    from openmythos.engine.reference import Session
    from openmythos.model.cache import CacheLayout
    from openmythos.model.exit import Rule
    from openmythos.model.recurrent import RecurrentDepthLM
    from openmythos.tokenizer import Tokenizer

MIN_ANSWER = 8  # tokens of the context that must be left for an answer

Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint or run folder.")]
NewTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
NumLoops = Annotated[int | None, typer.Option(help="Most loops a token; default: the model's.")]
ExitKind = Annotated[
    str,
    typer.Option(
        "--exit-rule",
        help="fixed, kl, entropy_kl, latent_difference, acceleration, argmax_stable or "
        "cumulative_threshold; its fields with --set exit_rule.FIELD=VALUE.",
    ),
]
Layout = Annotated[
    str,
    typer.Option(
        "--cache-layout",
        help="per_loop (exact), last_loop, first_loop or every_k (--set cache_layout.k=2).",
    ),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Keep the K most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Keep the fewest tokens of this probability.")]


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue. Repeatable.")] = None,
    max_new_tokens: NewTokens = 64,
    num_loops: NumLoops = None,
    exit_rule: ExitKind = "fixed",
    cache_layout: Layout = "per_loop",
    overrides: Overrides = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Wait for the compiler, then decode faster.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts, all in one batch."""
    if not prompt:
        raise ValueError('give at least one --prompt "..."')
    rule, layout = decoding_of(exit_rule, cache_layout, overrides or [])
    model, tokenizer = load(checkpoint, device)
    from openmythos import generate as run

    result = run(
        model,
        [[tokenizer.bos_id, *tokenizer.encode(text)] for text in prompt],
        max_new_tokens=max_new_tokens,
        num_loops=num_loops,
        exit_rule=rule,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=[tokenizer.eos_id],
        cache_layout=layout,
        compiled=compiled,
        seed=seed,
    )
    rows = [
        {"prompt": text, "text": tokenizer.decode(tokens), "tokens": tokens, "loops": loops}
        for text, tokens, loops in zip(prompt, result.tokens, result.loops, strict=True)
    ]
    if out is not None:
        write_whole(out, json.dumps(rows, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(rows))
        return
    most = model.config.num_loops if num_loops is None else num_loops
    console = Console(highlight=False)
    for text, tokens, loops in zip(prompt, result.tokens, result.loops, strict=True):
        console.print(Text(text, style="bold"), end="")
        console.print(coloured(tokenizer, zip(tokens, loops, strict=True), most), soft_wrap=True)
        if loops:
            console.print(Text(f"{sum(loops) / len(loops):.2f} of {most} loops a token", "dim"))


def chat(
    checkpoint: Checkpoint,
    max_new_tokens: NewTokens = 128,
    num_loops: NumLoops = None,
    exit_rule: ExitKind = "fixed",
    cache_layout: Layout = "per_loop",
    overrides: Overrides = None,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Talk to a model: each line goes on where the last answer ended."""
    rule, layout = decoding_of(exit_rule, cache_layout, overrides or [])
    model, tokenizer = load(checkpoint, device)
    from openmythos.engine.reference import Session

    console = Console(highlight=False)
    depth = model.config.num_loops if num_loops is None else num_loops
    deepest = max(4 * model.config.num_loops, depth)

    def fresh() -> "Session":
        return Session(model, max_loops=deepest, cache_layout=layout, seed=seed)

    session, prefix = fresh(), [tokenizer.bos_id]
    console.print(Text("/loops N, /reset, /quit; a base model continues text.", "dim"))
    while (line := ask(console)) is not None and line != "/quit":
        if line == "/reset":
            session, prefix = fresh(), [tokenizer.bos_id]
            continue
        if line.startswith("/"):
            depth = read_depth(console, line, depth, deepest)
            continue
        words = tokenizer.encode(f"{line}\n")
        if len(words) > session.max_len - MIN_ANSWER:
            console.print(f"[red]that line has {len(words)} tokens: too long for this model[/]")
            continue
        if session.lengths[0] + 1 + len(words) > session.max_len - MIN_ANSWER:
            console.print(Text("the context is full; starting again", "dim"))
            session, prefix = fresh(), [tokenizer.bos_id]
        prompt = [*prefix, *words]
        stream = session.stream(
            [prompt],
            max_new_tokens=min(max_new_tokens, session.max_len - session.lengths[0] - len(prompt)),
            num_loops=depth,
            exit_rule=rule,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=[tokenizer.eos_id],
        )
        for piece in pieces(tokenizer, ((new.token, new.num_loops) for new in stream), deepest):
            console.print(piece, end="", soft_wrap=True)
        console.print()
        # After an end of text the model has only ever seen the beginning of another one.
        prefix = [tokenizer.bos_id] if session.pending[0] == [tokenizer.eos_id] else []


def ask(console: Console) -> str | None:
    """The next line of the user; None at the end of input."""
    try:
        return console.input("[bold cyan]> [/]")
    except EOFError:
        return None


def read_depth(console: Console, line: str, depth: int, deepest: int) -> int:
    """The depth after a command of the user."""
    words = line.split()
    number = int(words[1]) if len(words) == 2 and words[1].isdigit() else 0
    if words[0] == "/loops" and 1 <= number <= deepest:
        return number
    console.print(f"[red]{line!r}: give /loops 1..{deepest}, /reset or /quit[/]")
    return depth


def decoding_of(
    exit_rule: str, cache_layout: str, overrides: list[str]
) -> tuple["Rule", "CacheLayout"]:
    """The exit rule and the cache layout of the command line, by kind.

    Their fields come as ``exit_rule.FIELD=VALUE`` and ``cache_layout.FIELD=VALUE``.

    Raises:
        ValueError: An unknown kind, field or value.
    """
    from openmythos.config.schema import from_dict, require
    from openmythos.model.cache import EveryK, FirstLoop, LastLoop, PerLoop
    from openmythos.model.exit import make_exit_rule

    layouts: dict[str, type[CacheLayout]] = {
        "per_loop": PerLoop,
        "last_loop": LastLoop,
        "first_loop": FirstLoop,
        "every_k": EveryK,
    }
    fields: dict[str, dict[str, Any]] = {"exit_rule": {}, "cache_layout": {}}
    for override in overrides:
        key, separator, text = override.partition("=")
        part, _, field = key.partition(".")
        if not separator or not field or part not in fields:
            raise ValueError(
                f"--set {override!r}: here only exit_rule.FIELD=VALUE and cache_layout.FIELD=VALUE "
                "can be set"
            )
        try:
            fields[part][field] = json.loads(text)
        except json.JSONDecodeError:
            raise ValueError(f"--set {override!r}: the value is not a number") from None
    require(cache_layout in layouts, "--cache-layout", cache_layout, f"one of {', '.join(layouts)}")
    layout = from_dict(
        layouts[cache_layout], fields["cache_layout"], f"cache_layout {cache_layout!r}"
    )
    return make_exit_rule(exit_rule, **fields["exit_rule"]), layout


def load(checkpoint: Path, device: str) -> tuple["RecurrentDepthLM", "Tokenizer"]:
    """A checkpoint's model and tokenizer.

    Raises:
        ValueError: There is no checkpoint, or it has no tokenizer.
    """
    check_device(device)
    from openmythos import load_pretrained
    from openmythos.interop.hub import local_folder
    from openmythos.tokenizer import Tokenizer

    folder = local_folder(checkpoint)
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} has no tokenizer.json; the model was not trained on text")
    return load_pretrained(folder, device=device), Tokenizer.load(folder)


def pieces(tokenizer: "Tokenizer", tokens: Iterator[tuple[int, int]], most: int) -> Iterator[Text]:
    """Text of (token, loops) pairs as they come; bytes of an unfinished character wait."""
    from openmythos.report.page import Piece, Sample, render_sample

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token, loops in tokens:
        text = decoder.decode(tokenizer.decode_bytes([token]))
        if text:
            yield render_sample(Sample(prompt="", pieces=[Piece(text=text, loops=loops)]), most)


def coloured(tokenizer: "Tokenizer", tokens: Iterator[tuple[int, int]], most: int) -> Text:
    """All pieces as one text."""
    return Text.assemble(*pieces(tokenizer, tokens, most))
