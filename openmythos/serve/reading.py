"""Reading maps of puzzles, beside the engine: which loop of a model reads which token.

A map is computed in a thread of its own, on a copy of the model on the CPU, so that no stream waits
for it. It is computed column by column; between two columns it ends if nobody waits for it any
more or if it has taken too long.
"""

import asyncio
import copy
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from openmythos.analysis.difference import loop_difference
from openmythos.analysis.pairs import Pairs, puzzle_pairs
from openmythos.analysis.reading import ReadingMap, reading_map, side_by_side
from openmythos.config.counts import count
from openmythos.data.puzzle import Puzzle
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.serve.error import APIError
from openmythos.serve.schema import (
    LEAST_EXAMPLES,
    MOST_EXAMPLES,
    Difference,
    ReadingAnswer,
    ReadingBody,
)
from openmythos.serve.served import ServedModel
from openmythos.serve.stream import ClientGone

MOST_FLOPS = 1e11  # some seconds of one core
MOST_SECONDS = 20.0
NUM_SAMPLES, NUM_SHUFFLES = 300, 100
RETRY_AFTER = 5  # seconds


class Readings:
    """Makes reading maps of served models, one at a time."""

    def __init__(self) -> None:
        self._copies: dict[str, RecurrentDepthLM] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reading")
        self._busy = threading.Lock()

    async def read(self, served: ServedModel, body: ReadingBody) -> ReadingAnswer:
        """The map that a body asks for.

        Raises:
            APIError: The model knows no puzzle, a number is out of range, another map is being
                made, or this one takes too long.
        """
        puzzle, num_loops = _asked(served, body)
        if not self._busy.acquire(blocking=False):
            said = "another reading map is being made; come again"
            raise APIError(429, said, code="reading", retry_after=RETRY_AFTER)
        gone = threading.Event()
        try:
            if served.name not in self._copies:  # the engine's own is for its thread
                model = served.model
                self._copies[served.name] = await served.worker.call(lambda: copy.deepcopy(model))
                self._copies[served.name].to("cpu")
            model = self._copies[served.name]
            work = self._thread.submit(_read, model, puzzle, body, num_loops, gone)
        except BaseException:
            self._busy.release()
            raise
        work.add_done_callback(self._ended)
        try:
            found = await asyncio.wrap_future(work)
        finally:
            gone.set()
        return answer_of(found, served.name, puzzle, body.size)

    def _ended(self, work: "Future[ReadingMap]") -> None:
        self._busy.release()


def _asked(served: ServedModel, body: ReadingBody) -> tuple[Puzzle, int]:
    """The puzzle and the loops of a body; refuses what this model cannot."""
    puzzle, loops = served.puzzle, body.num_loops or served.default_loops
    if puzzle is None:
        said = f"{served.name} knows no puzzle; a reading map is of a model that does"
        raise APIError(400, said, param="model")
    if loops > served.max_loops:
        said = f"num_loops is {loops}; {served.name} has 1 to {served.max_loops}"
        raise APIError(400, said, param="num_loops")
    try:
        puzzle.check(body.size)
    except ValueError as error:
        raise APIError(400, str(error), param="size") from None
    length = puzzle.question_len(body.size)
    if length > served.model.config.max_seq_len:
        said = (
            f"a {puzzle.noun} of {body.size} {puzzle.size_word} has {length} tokens; {served.name} "
            f"reads up to {served.model.config.max_seq_len}"
        )
        raise APIError(400, said, param="size")
    return puzzle, loops


def num_examples(
    model: RecurrentDepthLM, puzzle: Puzzle, size: int, num_loops: int, given: int | None
) -> int:
    """How many examples a map is made of.

    Raises:
        APIError: Those that are given are too much work, or the fewest that there may be are.
    """
    length = puzzle.question_len(size)
    passes = (num_loops + 5) * length  # of every column: each loop begins two runs to the end
    each = count(model.config, num_loops=num_loops).inference_flops_per_token * length * passes
    most = min(MOST_EXAMPLES, int(MOST_FLOPS // each))
    if (given or LEAST_EXAMPLES) > most:
        give = f"give up to {most} examples, or" if most >= LEAST_EXAMPLES else "give"
        said = (
            f"this map would take {each * (given or LEAST_EXAMPLES):.1e} operations, and "
            f"{MOST_FLOPS:.1e} are allowed; {give} fewer loops or {puzzle.size_word}"
        )
        raise APIError(400, said, param="num_examples")
    return given or most


def _read(
    model: RecurrentDepthLM,
    puzzle: Puzzle,
    body: ReadingBody,
    num_loops: int,
    gone: threading.Event,
) -> ReadingMap:
    end = time.monotonic() + MOST_SECONDS
    examples = num_examples(model, puzzle, body.size, num_loops, body.num_examples)
    try:
        pairs = puzzle_pairs(puzzle, body.size, examples, body.seed)
    except ValueError as error:
        raise APIError(400, str(error), param="size") from None
    return _column_by_column(model, pairs, num_loops, end, gone)


def _column_by_column(
    model: RecurrentDepthLM, pairs: Pairs, num_loops: int, end: float, gone: threading.Event
) -> ReadingMap:
    found = []
    for column in pairs.each_column():
        if gone.is_set():
            raise ClientGone
        if time.monotonic() > end:
            said = (
                f"the map took longer than {MOST_SECONDS:.0f} s beside other work; come again, or "
                "give fewer loops or examples"
            )
            raise APIError(503, said, code="reading", retry_after=RETRY_AFTER)
        found.append(reading_map(model, column, num_loops))
    return side_by_side(found)


def answer_of(found: ReadingMap, model: str, puzzle: Puzzle, size: int) -> ReadingAnswer:
    """A map as it is sent."""
    difference = loop_difference(found, num_samples=NUM_SAMPLES, num_shuffles=NUM_SHUFFLES)
    told = {**found.to_dict(NUM_SAMPLES), "difference": Difference(**difference.to_dict())}
    return ReadingAnswer(model=model, puzzle=puzzle.kind, size=size, **told)
