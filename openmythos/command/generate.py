"""``openmythos generate``: continue prompts, each token coloured by the loops it took."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from openmythos.command.decoding import (
    Checkpoint,
    DecodingFields,
    ExitKind,
    Layout,
    NewTokens,
    NumLoops,
    Special,
    Stop,
    Temperature,
    TopK,
    TopP,
    coloured,
    decoding_of,
    load,
    most_tokens,
    nothing_said,
    require_well,
    sampling_of,
)
from openmythos.command.option import AsJson, Device, Seed, Weights
from openmythos.folder import require_writable, write_whole
from openmythos.terminal import console, note
from openmythos.text_stream import TextPiece, TextStream

if TYPE_CHECKING:
    from openmythos.engine.engine import Event


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue. Repeatable.")] = None,
    max_new_tokens: NewTokens = None,
    num_loops: NumLoops = None,
    exit_rule: ExitKind = "fixed",
    cache_layout: Layout = "per_loop",
    overrides: DecodingFields = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    stop: Stop = None,
    special: Special = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Wait for the compiler, then decode faster.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    weights: Weights = "stored",
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts, all in one batch; greedily, unless the checkpoint asks to be sampled."""
    if not prompt:
        raise ValueError('give at least one --prompt "..."')
    if out is not None:
        require_writable(out)
    note("loading the model ...")
    rule, layout = decoding_of(exit_rule, cache_layout, overrides or [])
    model, tokenizer = load(checkpoint, device, weights)
    from openmythos.engine.engine import Engine
    from openmythos.engine.request import Request
    from openmythos.engine.sampling import SamplingConfig
    from openmythos.report.page import LoopScale

    sampling = sampling_of(tokenizer, SamplingConfig(), temperature, top_k, top_p)
    asked_tokens = [tokenizer.encode_prompt(text, special=special) for text in prompt]
    requests = [
        Request(
            tokens=tokens,
            max_new_tokens=most_tokens(max_new_tokens, tokenizer, 64, len(tokens)),
            num_loops=num_loops,
            exit_rule=rule,
            sampling=sampling,
            stop_tokens=tokenizer.end_ids,
            seed=seed,
            sample_idx=row,
        )
        for row, tokens in enumerate(asked_tokens)
    ]
    engine = Engine.fitting(model, requests, cache_layout=layout, compiled=compiled)
    answers = [Answer(TextStream(tokenizer, stop or ())) for _ in prompt]
    asked = {engine.add(request): answer for request, answer in zip(requests, answers, strict=True)}
    while not engine.is_idle:
        for event in engine.step():
            asked[event.id].add(event)
            if asked[event.id].ended:
                engine.abort(event.id)
    rows = [
        {"prompt": text, "text": a.stream.text, "tokens": a.tokens, "loops": a.loops}
        for text, a in zip(prompt, answers, strict=True)
    ]
    if out is not None:
        write_whole(out, json.dumps(rows, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(rows))
        return
    most = model.config.num_loops if num_loops is None else num_loops
    scale = LoopScale.of(n for answer in answers for n in answer.loops)
    screen, notes = console(), console(notes=True)
    for text, answer in zip(prompt, answers, strict=True):
        screen.print(Text(text, style="bold"), end="")
        screen.print(coloured(answer.pieces, answer.loops, scale))
        if not answer.stream.text.strip():
            notes.print(Text(nothing_said(answer.stream), "dim"))
        if answer.loops:
            mean = sum(answer.loops) / len(answer.loops)
            notes.print(Text(f"{mean:.2f} of {most} loops per token", "dim"))


@dataclass
class Answer:
    """What one prompt got: its tokens, their loops and the text, up to a stop text or end token."""

    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)
    pieces: list[TextPiece] = field(default_factory=list)
    ended: bool = False

    def add(self, event: "Event") -> None:
        """Take a new token, unless the answer has ended.

        Raises:
            ValueError: The model has diverged.
        """
        require_well(event)
        if self.ended or event.token is None:
            return
        self.tokens.append(event.token)
        self.loops.append(event.num_loops)
        self.pieces += self.stream.push(event.token)
        self.ended = self.stream.stopped or event.finish_reason is not None
        if self.ended:
            self.pieces += self.stream.finish()
