"""``openmythos chat``: talk to a model, each token coloured by the loops it took."""

import contextlib
import signal
from collections.abc import Callable, Iterator
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
    most_tokens,
    nothing_said,
    require_well,
    sampling_of,
)
from openmythos.command.option import Device, Seed, Weights
from openmythos.terminal import console, note

if TYPE_CHECKING:
    from openmythos.engine.engine import Engine
    from openmythos.engine.request import Request
    from openmythos.eval.puzzle import PuzzleCodec
    from openmythos.report.page import LoopScale
    from openmythos.text_stream import TextStream
    from openmythos.tokenizer import Tokenizer

MIN_ANSWER = 8  # tokens of the context that must be left for an answer


def chat(
    checkpoint: Checkpoint,
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
    seed: Seed = 0,
    device: Device = "cpu",
    weights: Weights = "stored",
) -> None:
    """Talk to a model, in its chat template; without one, each line continues the text."""
    note("loading the model ...")
    rule, layout = decoding_of(exit_rule, cache_layout, overrides or [])
    model, tokenizer = load(checkpoint, device, weights)
    from openmythos.engine.engine import Engine, EngineConfig
    from openmythos.engine.request import Request
    from openmythos.engine.sampling import SamplingConfig
    from openmythos.report.page import LoopScale
    from openmythos.text_stream import TextStream

    default = SamplingConfig(temperature=0.8, top_k=50)
    sampling = sampling_of(tokenizer, default, temperature, top_k, top_p)
    screen, notes = console(), console(notes=True)
    depth = model.config.num_loops if num_loops is None else num_loops
    deepest = max(4 * model.config.num_loops, depth)
    # What every line asks for; made and checked now, so that no answer is needed to learn of an
    # option that cannot be.
    asked = Request(
        tokens=[0],
        max_new_tokens=most_tokens(max_new_tokens, tokenizer, 128, 1),
        num_loops=depth,
        exit_rule=rule,
        sampling=sampling,
        stop_tokens=tokenizer.end_ids,
        seed=seed,
    )
    replace(asked, max_new_tokens=1).check(model.config, max_loops=deepest)
    TextStream(tokenizer, stop or ())
    engine = Engine(model, EngineConfig(max_rows=1, max_loops=deepest, cache_layout=layout))
    talk, max_len = Talk(tokenizer, special), engine.capacity.max_len
    notes.print(Text(f"/loops N, /reset, /quit; {talk.how}.", "dim"))
    while (line := ask(notes)) is not None and line != "/quit":
        if line == "/reset":
            talk = Talk(tokenizer, special)
            continue
        if line.startswith("/"):
            depth = read_depth(notes, line, depth, deepest)
            continue
        said = why_not(line, Talk(tokenizer, special), max_len)
        if said is not None:
            notes.print(Text(said, "red"))
            continue
        if len(talk.prompt(line)) + MIN_ANSWER > max_len:
            notes.print(Text("the context is full; starting again", "dim"))
            talk = Talk(tokenizer, special)
        tokens = talk.prompt(line)
        longest = most_tokens(max_new_tokens, tokenizer, 128, len(tokens))
        request = replace(
            asked,
            tokens=tokens,
            max_new_tokens=min(longest, max_len - len(tokens)),
            num_loops=depth,
            sample_idx=talk.num_answers,
        )
        answer = TextStream(tokenizer, stop or ())
        new = say(screen, engine, request, answer, LoopScale(1, depth))
        if not answer.text.strip() and (new or answer.stopped):
            notes.print(Text(nothing_said(answer), "dim"))
        talk.answered(line, answer.text, [*tokens, *new])


def why_not(line: str, talk: "Talk", max_len: int) -> str | None:
    """Why a line cannot be read even in a new talk; None: it can be."""
    try:
        alone = len(talk.prompt(line))
    except ValueError as error:  # what is no walk
        return str(error)
    too_long = alone > max_len - MIN_ANSWER
    return f"that line has {alone} tokens: too long for this model" if too_long else None


def say(
    screen: Console, engine: "Engine", request: "Request", answer: "TextStream", scale: "LoopScale"
) -> list[int]:
    """Print an answer while it comes, up to its end, a stop text or Ctrl-C; return its tokens.

    Raises:
        ValueError: The model has diverged.
    """
    tokens: list[int] = []
    loops: list[int] = []
    number = engine.add(request)
    with interrupts() as interrupted:
        while not (engine.is_idle or answer.stopped or interrupted()):
            for event in engine.step():
                require_well(event)
                if event.id == number and event.token is not None:  # not the end of one before
                    tokens.append(event.token)
                    loops.append(event.num_loops)
                    screen.print(coloured(answer.push(event.token), loops, scale), end="")
        engine.abort(number)
    screen.print(coloured(answer.finish(), loops, scale))
    return tokens


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C was pressed; a second time it interrupts as everywhere.

    The exception could come between any two lines of the engine, which would be lost with it.
    """
    before, pressed = signal.getsignal(signal.SIGINT), []

    def press(*_: object) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


class Talk:
    """What has been said; without a template, as tokens.

    The engine finds the turns that it has read already. An answer is read again, as a part of the
    next prompt, with all loops.
    """

    def __init__(self, tokenizer: "Tokenizer | PuzzleCodec", special: bool) -> None:
        self.tokenizer, self.special = tokenizer, special
        self.messages: list[dict[str, str]] = []
        self.seen: list[int] = []

    @property
    def num_answers(self) -> int:
        """Number of answers so far."""
        return len(self.messages) // 2

    @property
    def how(self) -> str:
        """How the lines are read, in words."""
        from openmythos.eval.puzzle import PuzzleCodec

        if isinstance(self.tokenizer, PuzzleCodec):
            return f"each line is a question: {self.tokenizer.puzzle.form}"
        templated = self.tokenizer.chat_template is not None
        return "in its template" if templated else "each line continues the text"

    def prompt(self, line: str) -> list[int]:
        """The tokens of everything up to the answer to ``line``.

        Raises:
            ValueError: The line is no question of the puzzle that the model knows.
        """
        from openmythos.eval.puzzle import PuzzleCodec

        if isinstance(self.tokenizer, PuzzleCodec):  # every line is a question of its own
            return self.tokenizer.encode_prompt(line)
        if self.tokenizer.chat_template is not None:
            messages = [*self.messages, {"role": "user", "content": line}]
            return self.tokenizer.encode_chat(messages, special=self.special)
        if self.seen and self.seen[-1] not in self.tokenizer.end_ids:
            return [*self.seen, *self.tokenizer.encode(f"{line}\n", special=self.special)]
        # In training, an end is always followed by the beginning of another document.
        return [*self.seen, *self.tokenizer.encode_prompt(f"{line}\n", special=self.special)]

    def answered(self, line: str, answer: str, seen: list[int]) -> None:
        """Keep a line and its answer, which ends the tokens ``seen`` so far."""
        self.messages.append({"role": "user", "content": line})
        self.messages.append({"role": "assistant", "content": answer})
        self.seen = seen


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
