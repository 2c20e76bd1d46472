"""``openmythos chat``: talk to a model, each token coloured by the loops it took."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
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
    sampling_of,
)
from openmythos.command.option import Device, Seed, Weights
from openmythos.terminal import console, note

if TYPE_CHECKING:
    from openmythos.engine.reference import NewToken, Session
    from openmythos.report.page import LoopScale
    from openmythos.text_stream import TextStream
    from openmythos.tokenizer import Tokenizer

MIN_ANSWER = 8  # tokens of the context that must be left for an answer


def chat(
    checkpoint: Checkpoint,
    max_new_tokens: NewTokens = 128,
    num_loops: NumLoops = None,
    exit_rule: ExitKind = "fixed",
    cache_layout: Layout = "per_loop",
    overrides: DecodingFields = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    stop: Stop = None,
    special: Special = False,
    seed: Seed = 0,
    device: Device = "cpu",
    weights: Weights = "stored",
) -> None:
    """Talk to a model, in its chat template; without one, each line continues the text."""
    note("loading the model ...")
    rule, layout = decoding_of(exit_rule, cache_layout, overrides or [])
    model, tokenizer = load(checkpoint, device, weights)
    from openmythos.engine.reference import Session
    from openmythos.engine.request import Request
    from openmythos.engine.sampling import SamplingConfig
    from openmythos.report.page import LoopScale
    from openmythos.text_stream import TextStream

    default = SamplingConfig(temperature=0.8, top_k=50)
    sampling = sampling_of(tokenizer, default, temperature, top_k, top_p)
    screen, notes = console(), console(notes=True)
    depth = model.config.num_loops if num_loops is None else num_loops
    deepest = max(4 * model.config.num_loops, depth)

    def fresh() -> "Session":
        return Session(model, max_loops=deepest, cache_layout=layout)

    # What every line asks for; made and checked now, so that no answer is needed to learn of an
    # option that cannot be.
    asked = Request(
        tokens=[0],
        max_new_tokens=max_new_tokens,
        num_loops=depth,
        exit_rule=rule,
        sampling=sampling,
        stop_tokens=tokenizer.end_ids,
        seed=seed,
    )
    replace(asked, max_new_tokens=1).check(model.config, max_loops=deepest)
    TextStream(tokenizer, stop or ())
    session, talk = fresh(), Talk(tokenizer, special)
    how = "each line continues the text" if tokenizer.chat_template is None else "in its template"
    notes.print(Text(f"/loops N, /reset, /quit; {how}.", "dim"))
    while (line := ask(notes)) is not None and line != "/quit":
        if line == "/reset":
            session, talk = fresh(), Talk(tokenizer, special)
            continue
        if line.startswith("/"):
            depth = read_depth(notes, line, depth, deepest)
            continue
        alone = len(Talk(tokenizer, special).prompt(line))
        if alone > session.max_len - MIN_ANSWER:
            said = f"that line has {alone} tokens: too long for this model"
            notes.print(Text(said, "red"))
            continue
        whole = talk.prompt(line)
        if len(whole) + MIN_ANSWER > session.max_len:
            notes.print(Text("the context is full; starting again", "dim"))
            session, talk = fresh(), Talk(tokenizer, special)
            whole = talk.prompt(line)
        if whole[: len(talk.seen)] != talk.seen:  # the template writes earlier turns otherwise
            session, talk.seen = fresh(), []
        request = replace(
            asked,
            tokens=whole[len(talk.seen) :],
            max_new_tokens=min(max_new_tokens, session.max_len - len(whole)),
            num_loops=depth,
        )
        answer = TextStream(tokenizer, stop or ())
        say(screen, session.stream([request]), answer, LoopScale(1, depth))
        (talk.seen,) = session.tokens
        talk.answered(line, answer.text)


def say(
    screen: Console, stream: Iterator["NewToken"], answer: "TextStream", scale: "LoopScale"
) -> None:
    """Print an answer while it comes, up to its end, a stop text or Ctrl-C."""
    loops: list[int] = []
    with contextlib.suppress(KeyboardInterrupt):
        for new in stream:
            loops.append(new.num_loops)
            screen.print(coloured(answer.push(new.token), loops, scale), end="")
            if answer.stopped:
                break
    screen.print(coloured(answer.finish(), loops, scale))


class Talk:
    """What has been said, and the tokens of it that the session has."""

    def __init__(self, tokenizer: "Tokenizer", special: bool) -> None:
        self.tokenizer, self.special = tokenizer, special
        self.messages: list[dict[str, str]] = []
        self.seen: list[int] = []

    def prompt(self, line: str) -> list[int]:
        """The tokens of everything up to the answer to ``line``."""
        if self.tokenizer.chat_template is not None:
            messages = [*self.messages, {"role": "user", "content": line}]
            return self.tokenizer.encode_chat(messages, special=self.special)
        if self.seen and self.seen[-1] not in self.tokenizer.end_ids:
            return [*self.seen, *self.tokenizer.encode(f"{line}\n", special=self.special)]
        # In training, an end is always followed by the beginning of another document.
        return [*self.seen, *self.tokenizer.encode_prompt(f"{line}\n", special=self.special)]

    def answered(self, line: str, answer: str) -> None:
        """Keep a line and its answer."""
        self.messages.append({"role": "user", "content": line})
        self.messages.append({"role": "assistant", "content": answer})


def ask(notes: Console) -> str | None:
    """The user's next line; None at the end of input, or if the user presses Ctrl-C."""
    try:
        return notes.input(Text("> ", "bold cyan"))
    except (EOFError, KeyboardInterrupt):
        return None


def read_depth(notes: Console, line: str, depth: int, deepest: int) -> int:
    """The number of loops after a user's command that may change it."""
    words = line.split()
    number = int(words[1]) if len(words) == 2 and words[1].isdigit() else 0
    if words[0] == "/loops" and 1 <= number <= deepest:
        return number
    notes.print(Text(f"{line!r}: give /loops 1..{deepest}, /reset or /quit", "red"))
    return depth
