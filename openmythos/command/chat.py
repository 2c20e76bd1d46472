"""``openmythos chat``: talk to a model, each token coloured by the loops it took."""

from typing import TYPE_CHECKING

from rich.console import Console
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
from openmythos.command.option import Device, Overrides, Seed
from openmythos.terminal import console

if TYPE_CHECKING:
    from openmythos.engine.reference import Session

MIN_ANSWER = 8  # tokens of the context that must be left for an answer


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
    from openmythos.engine.request import Request
    from openmythos.engine.sampling import SamplingConfig
    from openmythos.text_stream import TextStream

    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    screen, notes = console(), console(notes=True)
    depth = model.config.num_loops if num_loops is None else num_loops
    deepest = max(4 * model.config.num_loops, depth)

    def fresh() -> "Session":
        return Session(model, max_loops=deepest, cache_layout=layout)

    session, prefix = fresh(), [tokenizer.bos_id]
    notes.print(Text("/loops N, /reset, /quit; a base model continues text.", "dim"))
    while (line := ask(notes)) is not None and line != "/quit":
        if line == "/reset":
            session, prefix = fresh(), [tokenizer.bos_id]
            continue
        if line.startswith("/"):
            depth = read_depth(notes, line, depth, deepest)
            continue
        words = tokenizer.encode(f"{line}\n")
        if len(words) > session.max_len - MIN_ANSWER:
            said = f"that line has {len(words)} tokens: too long for this model"
            notes.print(Text(said, "red"))
            continue
        if 1 + len(words) + MIN_ANSWER > session.room():
            notes.print(Text("the context is full; starting again", "dim"))
            session, prefix = fresh(), [tokenizer.bos_id]
        prompt = [*prefix, *words]
        request = Request(
            tokens=prompt,
            max_new_tokens=min(max_new_tokens, session.room() - len(prompt)),
            num_loops=depth,
            exit_rule=rule,
            sampling=sampling,
            stop_tokens=[tokenizer.eos_id],
            seed=seed,
        )
        answer, loops, ended = TextStream(tokenizer), list[int](), False
        for new in session.stream([request]):
            loops.append(new.num_loops)
            screen.print(coloured(answer.push(new.token), loops, deepest), end="")
            ended = new.finish_reason == "stop"
        screen.print(coloured(answer.finish(), loops, deepest))
        # In training, an eos is always followed by the bos of another document.
        prefix = [tokenizer.bos_id] if ended else []


def ask(notes: Console) -> str | None:
    """The user's next line; None at the end of input."""
    try:
        return notes.input(Text("> ", "bold cyan"))
    except EOFError:
        return None


def read_depth(notes: Console, line: str, depth: int, deepest: int) -> int:
    """The number of loops after a user's command that may change it."""
    words = line.split()
    number = int(words[1]) if len(words) == 2 and words[1].isdigit() else 0
    if words[0] == "/loops" and 1 <= number <= deepest:
        return number
    notes.print(Text(f"{line!r}: give /loops 1..{deepest}, /reset or /quit", "red"))
    return depth
