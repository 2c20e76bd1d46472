"""``openmythos generate``: continue prompts, each token coloured by the loops it took."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from openmythos.command.decoding import (
    Checkpoint,
    ExitKind,
    Layout,
    NewTokens,
    NumLoops,
    Temperature,
    TopK,
    TopP,
    coloured,
    decoding_of,
    load,
)
from openmythos.command.option import AsJson, Device, Overrides, Seed
from openmythos.folder import write_whole
from openmythos.terminal import console


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
    from openmythos.text_stream import decode_pieces

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
    answers, notes = console(), console(notes=True)
    for text, tokens, loops in zip(prompt, result.tokens, result.loops, strict=True):
        answers.print(Text(text, style="bold"), end="")
        pieces = decode_pieces(tokenizer, tokens)
        answers.print(coloured(pieces, loops, most))
        if loops:
            said = f"{sum(loops) / len(loops):.2f} of {most} loops per token"
            notes.print(Text(said, "dim"))
