"""Two and three trainings started at once in one folder: one trains, the others are refused."""

import time
from collections.abc import Callable
from pathlib import Path

from tests.stress.examples import Reference, Row, seeded
from tests.stress.process import Process, run

STATES = ("new", "half done")


def at_once(count: int, room: Path, say: Callable[[str], None]) -> list[Row]:
    """``count`` times two at once and ``count`` times three, in new folders and half-done runs."""
    room.mkdir(parents=True)
    reference = Reference("text", room / "text", 16)
    return [_start(reference, number, count, say) for number in ((2, 3) if count > 1 else (2,))]


def _start(reference: Reference, number: int, count: int, say: Callable[[str], None]) -> Row:
    row = Row(f"{number} trainings at once in one folder")
    for attempt in range(count):
        out, rng = reference.room / f"{number}-{attempt}", seeded(f"together {number} {attempt}")
        if attempt % 2:  # go on with a run that was killed
            first = Process(reference.command(out), reference.log)
            first.wait_for(lambda: any((out / "checkpoints").glob("step-*")))  # noqa: B023
            first.kill()
        logs = [reference.room / f"log-{i}.txt" for i in range(number)]
        processes = []
        for log in logs:
            processes.append(Process(reference.command(out), log))
            time.sleep(rng.uniform(0, 0.02))
        ended = [process.wait() for process in processes]
        row.count += 1
        what = f"attempt {attempt} of {number} at once"
        told = [f"process {process.pid} on" for process in processes]
        for each in ended:
            named = each.refused and any(words in each.said for words in told)
            if each.status != 0 and not named:
                row.fail(f"{what}: status {each.status}: {each.said[-500:]}")
        row.note("refused", sum(each.status == 2 for each in ended))
        if all(each.status != 0 for each in ended):  # each met another one's lock: try again
            row.note("all refused")
            run(reference.command(out), reference.log)
        if problem := reference.differs(out):
            row.fail(f"{what}: {problem}")
        say(f"{number} at once, {attempt + 1} of {count}")
    return row
