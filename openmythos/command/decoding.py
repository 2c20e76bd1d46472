"""What generate and chat share: decoding options, loading the model, coloured text."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from openmythos.command.option import check_device, set_option
from openmythos.command.origin import puzzle_of, require_text

if TYPE_CHECKING:
    from openmythos.engine.engine import Event
    from openmythos.engine.sampling import SamplingConfig
    from openmythos.eval.puzzle import PuzzleCodec
    from openmythos.model.cache import CacheLayout
    from openmythos.model.exit import Rule
    from openmythos.model.recurrent import RecurrentDepthLM
    from openmythos.report.page import LoopScale
    from openmythos.text_stream import TextPiece, TextStream
    from openmythos.tokenizer import Tokenizer

Checkpoint = Annotated[
    Path, typer.Argument(help="A checkpoint or run folder, zoo:NAME, or a .gguf file.")
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        help="Most tokens to generate; default: 64, in a chat 128, of a puzzle those of an answer."
    ),
]
NumLoops = Annotated[int | None, typer.Option(help="Most loops per token; default: the model's.")]
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
DecodingFields = Annotated[
    list[str] | None, set_option("exit_rule.threshold=0.01 or cache_layout.k=2")
]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy. Default: as the checkpoint asks to be sampled.")
]
TopK = Annotated[int | None, typer.Option(help="Keep the K most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Keep the fewest tokens of this probability.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends an answer, not shown. Repeatable.")
]
Special = Annotated[
    bool,
    typer.Option("--special", help="Read marks such as <|im_start|> in the text as the tokens."),
]


def decoding_of(
    exit_rule: str, cache_layout: str, overrides: list[str]
) -> tuple["Rule", "CacheLayout"]:
    """The exit rule and the cache layout for these kinds and overrides.

    Overrides have the forms ``exit_rule.FIELD=VALUE`` and ``cache_layout.FIELD=VALUE``.

    Raises:
        ValueError: A kind or field is unknown, or a value is not allowed.
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


def sampling_of(
    tokenizer: "Tokenizer | PuzzleCodec",
    default: "SamplingConfig",
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
) -> "SamplingConfig":
    """How to sample: as the options say, else as the checkpoint does, else the default.

    A temperature that is given leaves the checkpoint's top-k and top-p out, but not its repetition
    penalty. Ids without a token are never sampled. A note says what else the checkpoint asks for.
    """
    from openmythos.engine.sampling import SamplingConfig
    from openmythos.tokenizer_folder import unobeyed

    sampled = temperature is None and bool(tokenizer.sampling)
    ignored = unobeyed(tokenizer.generation, sampled=sampled)
    if ignored:
        said = ", ".join(f"{name}={value}" for name, value in ignored.items())
        typer.echo(f"note: the checkpoint asks for {said}, which is not obeyed here", err=True)
    fields = {name: getattr(default, name) for name in ("temperature", "top_k", "top_p")}
    fields |= tokenizer.sampling if temperature is None else {}
    fields["repetition_penalty"] = tokenizer.generation.get("repetition_penalty") or 1.0
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    fields |= {name: value for name, value in given.items() if value is not None}
    return SamplingConfig(**fields, num_ids=tokenizer.vocab_size)


def load(
    checkpoint: Path, device: str, weights: str = "stored"
) -> tuple["RecurrentDepthLM", "Tokenizer | PuzzleCodec"]:
    """A checkpoint's model and tokenizer; of a model of a puzzle, the words of that.

    Raises:
        ValueError: There is no checkpoint, or it reads neither text nor a puzzle.
    """
    check_device(device)
    from openmythos import load_pretrained
    from openmythos.eval.puzzle import PuzzleCodec
    from openmythos.interop.hub import local_folder
    from openmythos.tokenizer import Tokenizer
    from openmythos.tokenizer_folder import has_tokenizer

    folder = local_folder(checkpoint)
    puzzle = None if has_tokenizer(folder) else puzzle_of(folder)
    if puzzle is not None:
        return load_pretrained(folder, device=device, weights=weights), PuzzleCodec(puzzle)
    require_text(folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.change is not None:
        typer.echo(f"note: the tokenizer changes text: {tokenizer.change}", err=True)
    return load_pretrained(folder, device=device, weights=weights), tokenizer


def require_well(event: "Event") -> None:
    """Check that a request goes on or has ended as it should.

    Raises:
        ValueError: It has failed; says why.
    """
    if event.error is not None:
        raise ValueError(event.error)


def nothing_said(answer: "TextStream") -> str:
    """Why an answer shows nothing, in words."""
    if answer.text:
        return "(no answer but white space)"
    if answer.stopped:
        return "(no answer: it began with a --stop text)"
    return "(no answer: the model ended it at once)"


def most_tokens(
    given: int | None, tokenizer: "Tokenizer | PuzzleCodec", usual: int, num_asked: int
) -> int:
    """The most tokens of an answer to so many: as given, else the usual number, or a puzzle's."""
    from openmythos.eval.puzzle import PuzzleCodec

    if given is not None:
        return given
    if isinstance(tokenizer, PuzzleCodec):
        return max(1, tokenizer.puzzle.answer_len(num_asked))
    return usual


def coloured(pieces: "Iterable[TextPiece]", loops: Sequence[int], scale: "LoopScale") -> Text:
    """Text whose background colours show the loops that each piece took.

    Args:
        pieces: The pieces of a ``TextStream``.
        loops: Loops of each token that the stream was given.
        scale: The colours.
    """
    from openmythos.report.page import Piece, Sample, render_sample

    shown = [Piece(text=piece.text, loops=loops[piece.tokens[-1]]) for piece in pieces]
    return render_sample(Sample(prompt="", pieces=shown), scale)
