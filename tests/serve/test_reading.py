"""Reading maps beside the engine: equal to the library's, limited, and no stream waits for one."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from openmythos.analysis.pairs import puzzle_pairs
from openmythos.analysis.reading import reading_map
from openmythos.data.addition import Addition, AdditionConfig
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.eval.puzzle import PuzzleCodec
from openmythos.serve import reading
from openmythos.serve.error import APIError
from openmythos.serve.reading import Readings
from openmythos.serve.schema import ReadingBody
from openmythos.serve.stream import ClientGone
from openmythos.tokenizer import byte_tokenizer
from tests.serve.running import Running, running, small_model

WALKS = Walks(HopsConfig())
PUZZLES = {
    "walks": WALKS,
    "addition": Addition(AdditionConfig(), seed=1),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    models: dict[str, Any] = {
        name: (small_model(vocab_size=puzzle.vocab_size, max_seq_len=16), PuzzleCodec(puzzle))
        for name, puzzle in PUZZLES.items()
    }
    models["small"] = (small_model(), byte_tokenizer())
    with running(models, max_rows=2) as here:
        yield here


@pytest.mark.parametrize("name", PUZZLES)
def test_a_map_is_the_librarys(server: Running, name: str) -> None:
    puzzle = PUZZLES[name]
    asked = {"size": 3, "num_loops": 2, "num_examples": 8, "seed": 5}
    told = server.post("/v1/reading", model=name, **asked)
    assert told.status_code == 200, told.text
    body = told.json()
    model = small_model(vocab_size=puzzle.vocab_size, max_seq_len=16)
    found = reading_map(model, puzzle_pairs(puzzle, 3, 8, 5), 2)
    assert body["columns"] == [*found.columns]
    assert (body["puzzle"], body["size"], body["num_loops"]) == (puzzle.kind, 3, 2)
    assert body["accuracy"] == found.accuracy
    for key in ("necessity", "sufficiency"):
        rows = torch.tensor([[float("nan") if v is None else v for v in r] for r in body[key]])
        expected = getattr(found, key)
        assert torch.allclose(rows.double(), expected, equal_nan=True, atol=1e-4), key
    assert len(body["necessity_interval"]) == 2 and len(body["difference"]["bits"]) == 1


def test_what_is_not_given_is_chosen(server: Running) -> None:
    body = server.post("/v1/reading", size=2).json()
    assert (body["model"], body["num_loops"]) == ("walks", 4)
    assert max(body["num_examples"]) == 64


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"model": "small", "size": 2}, "small knows no puzzle"),
        ({"model": "walks", "size": 0}, "size: "),
        ({"model": "walks", "size": 16}, "has 17 tokens; walks reads up to 16"),
        ({"model": "walks", "size": 2, "num_loops": 9}, "walks has 1 to 8"),
        ({"model": "walks", "size": 2, "num_examples": 65}, "num_examples: "),
        ({"model": "addition", "size": 1}, "at least 2 to 8"),
        ({"model": "addition", "size": 9}, "at least 2 to 8"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    server: Running, body: dict[str, Any], said: str
) -> None:
    answer = server.post("/v1/reading", **body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert said in message and "\n" not in message
    assert server.post("/v1/reading", model="walks", size=2, num_examples=8).status_code == 200


def test_a_stream_does_not_wait_for_a_map(server: Running) -> None:
    """Nor a map for the engine: the engine's thread is held while one is made."""
    body = {"model": "walks", "size": 2, "num_loops": 1, "num_examples": 8}
    assert server.post("/v1/reading", **body).status_code == 200  # the copy is made
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        release.wait(30)

    walks = next(served for served in server.served if served.name == "walks")
    holding = threading.Thread(target=lambda: asyncio.run(walks.worker.call(hold)))
    holding.start()
    try:
        assert held.wait(30)
        assert server.post("/v1/reading", **body).status_code == 200
    finally:
        release.set()
        holding.join()


def test_one_map_at_a_time(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, release = threading.Event(), threading.Event()
    whole = reading.reading_map

    def slow(*given: Any, **more: Any) -> Any:
        entered.set()
        release.wait(30)
        return whole(*given, **more)

    monkeypatch.setattr(reading, "reading_map", slow)
    body = {"model": "walks", "size": 2, "num_loops": 1, "num_examples": 8}
    first: list[int] = []
    asking = threading.Thread(
        target=lambda: first.append(server.post("/v1/reading", **body).status_code)
    )
    asking.start()
    try:
        assert entered.wait(30)
        second = server.post("/v1/reading", **body)
        assert second.status_code == 429 and second.headers["retry-after"]
        # A stream goes on meanwhile.
        answer = server.post("/v1/completions", model="walks", prompt="e1 r1", max_tokens=1)
        assert answer.status_code == 200
    finally:
        release.set()
        asking.join()
    assert first == [200]
    assert server.post("/v1/reading", **body).status_code == 200


def test_work_and_time_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(vocab_size=WALKS.vocab_size)
    monkeypatch.setattr(reading, "MOST_FLOPS", 3e7)
    most = reading.num_examples(model, WALKS, 4, 1, None)
    assert reading.LEAST_EXAMPLES <= most < reading.MOST_EXAMPLES
    for given, said in ((most + 1, f"up to {most} examples, or fewer"), (None, "give fewer loops")):
        loops = 1 if given else 16
        with pytest.raises(APIError, match=said):
            reading.num_examples(model, WALKS, 4, loops, given)
    monkeypatch.setattr(reading, "MOST_SECONDS", -1.0)
    body = ReadingBody(size=2, num_examples=8)
    with pytest.raises(APIError, match="took longer"):
        reading._read(model, WALKS, body, 1, threading.Event())


def test_nobody_is_worked_for_in_vain(server: Running) -> None:
    gone = threading.Event()
    gone.set()
    pairs = puzzle_pairs(WALKS, 2, 8)
    with pytest.raises(ClientGone):
        reading._column_by_column(server.served[0].model, pairs, 1, float("inf"), gone)


def test_a_map_that_is_given_up_frees_the_next(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hangs up while a map is made ends it after its column."""
    entered, release = threading.Event(), threading.Event()
    whole, count = reading.reading_map, []

    def slow(*given: Any, **more: Any) -> Any:
        count.append(1)
        entered.set()
        release.wait(30)
        return whole(*given, **more)

    monkeypatch.setattr(reading, "reading_map", slow)
    served = server.served[0]

    async def give_up() -> int:
        readings = Readings()
        readings._copies[served.name] = served.model
        asked = asyncio.ensure_future(readings.read(served, ReadingBody(size=4, num_examples=8)))
        await asyncio.to_thread(entered.wait, 30)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        release.set()
        await asyncio.to_thread(readings._thread.shutdown)
        free = readings._busy.acquire(blocking=False)
        return int(free)

    assert asyncio.run(give_up()) == 1
    assert len(count) == 1
