"""Every file of a checkpoint and of prepared data, damaged in every way, for every reader.

A reader must say so, or do what it does with the intact file: nothing else.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from openmythos.interop.loading import load_pretrained
from tests.stress.examples import Reference, Row, checkpoints, seeded
from tests.stress.process import Ended, run

NUM_BITS = 4  # flipped in turn, in each file
Answer = tuple[Ended, object]  # what a reader said, and its result


def damages(
    path: Path, before: Path, other: Path, num_bits: int
) -> Iterator[tuple[str, bytes | None]]:
    """Names of damages of a file, and what it then holds; None: it is missing."""
    content = path.read_bytes()
    yield "missing", None
    yield "empty", b""
    yield "cut", content[: len(content) // 2]
    for number in range(num_bits):
        place = seeded(f"bit {number} of {path.name}").randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        yield f"bit {place} flipped", bytes(flipped)
    for name, source in (("of the step before", before), ("of another run", other)):
        if source.exists() and source.read_bytes() != content:
            yield name, source.read_bytes()


class Victim:
    """A run that was stopped after step 6 of 8, with two checkpoints; another one of another seed.

    Args:
        room: Where it is made.
    """

    def __init__(self, room: Path) -> None:
        room.mkdir(parents=True)
        self.room, self.reference = room, Reference("text", room / "text", 8)
        self.run, self.other = room / "run", room / "other"
        shutil.copytree(self.reference.folder, self.run)
        for path in checkpoints(self.run):
            if path.name not in ("step-00000005", "step-00000006"):
                shutil.rmtree(path)
        command = [
            *self.reference.command(self.other),
            "--seed",
            "4",
            "--set",
            "data.val_fraction=0.2",
        ]
        ended = run([*command, "--set", "train.keep_checkpoints=100"], self.reference.log)
        assert ended.status == 0, ended.said
        self.checkpoint = max(checkpoints(self.run))
        self.data = next((self.run / "data").glob("data-*"))

    def readers(self, run_folder: Path) -> dict[str, Callable[[], Answer]]:
        """What reads a checkpoint or data, by its name."""
        log = self.room / "log.txt"
        checkpoint = run_folder / "checkpoints" / self.checkpoint.name

        def command(*words: object) -> Answer:
            ended = run([*words, "--json"], log)
            return ended, ended.answer

        def resume_its_own() -> Answer:
            ended = run(["train", "--config", run_folder / "config.json", "--out", run_folder], log)
            return ended, self.reference.differs(run_folder)

        def load() -> Answer:
            ended = run(lambda: weights(load_pretrained(checkpoint)), log)
            return ended, ended.answer

        def resume() -> Answer:
            ended = run(self.reference.command(run_folder), log)
            return ended, self.reference.differs(run_folder)

        prompt = ("--prompt", "the a", "--max-new-tokens", 8)
        return {
            "resume": resume,
            "resume --config of the run": resume_its_own,
            "load_pretrained": load,
            "generate": lambda: command("generate", run_folder, *prompt),
            "eval": lambda: command("eval", run_folder, "--num-loops", 2),
        }


def weights(model: object) -> list[str]:
    """Digests of all weights of a model."""
    state = model.state_dict()  # type: ignore[attr-defined]
    return [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in state.values()]


def corrupted(room: Path, say: Callable[[str], None], *, quick: bool) -> list[Row]:
    """All damages; if ``quick``, one for each reader."""
    victim = Victim(room)
    say("made the run that is damaged")
    copy = room / "copy"
    intact = {}
    for name in victim.readers(copy):
        shutil.copytree(victim.run, copy)
        intact[name] = victim.readers(copy)[name]()
        shutil.rmtree(copy)
        assert intact[name][0].status == 0, intact[name][0].said
    older = {("checkpoint", "resume"): intact["resume"]}
    shutil.copytree(victim.run, copy)
    shutil.rmtree(copy / "checkpoints" / victim.checkpoint.name)
    for name in ("generate", "eval"):
        older["checkpoint", name] = victim.readers(copy)[name]()
    shutil.rmtree(copy)
    resumes = [name for name in intact if name.startswith("resume")]
    readers = {
        "checkpoint": [name for name in intact if name != resumes[1]],
        "data": ["resume", "eval"],
        "configuration": resumes,
    }
    rows = []
    for part, names in readers.items():
        for name in names:
            rows.append(Row(f"{part} damaged, read by {name}"))
            tried = list(cases(victim, part, num_bits=1 if quick else NUM_BITS))
            if quick:  # another one for every reader
                tried = [tried[len(rows) * 9 % len(tried)]]
            for where, what, content in tried:
                shutil.copytree(victim.run, copy)
                path = copy / where
                path.unlink()
                if content is not None:
                    path.write_bytes(content)
                answer = victim.readers(copy)[name]()
                judge(rows[-1], f"{where} {what}", answer, intact[name], older.get((part, name)))
                shutil.rmtree(copy)
                say(f"{name}: {where} {what}")
    return rows


def cases(victim: Victim, part: str, num_bits: int) -> Iterator[tuple[Path, str, bytes | None]]:
    """The damages of a part of the run: which file of it, which damage, and what it then holds."""
    run_folder, other = victim.run, victim.other
    here = victim.checkpoint.relative_to(run_folder)
    if part == "checkpoint":
        files = [here / path.name for path in sorted(victim.checkpoint.iterdir())]
    elif part == "configuration":
        files = [Path("config.json")]
    else:
        files = [
            Path("data/index.json"),
            *(p.relative_to(run_folder) for p in sorted(victim.data.iterdir())),
        ]
    content = next((other / "data").glob("data-*")).relative_to(other)
    for file in files:
        before = run_folder / "checkpoints" / "step-00000005" / file.name
        elsewhere = other / (content / file.name if file.parent.name == victim.data.name else file)
        found = list(
            damages(
                run_folder / file,
                before,
                elsewhere,
                4 * num_bits if file.suffix == ".json" else num_bits,
            )
        )
        yield from ((file, what, damaged) for what, damaged in found)


def judge(row: Row, what: str, answer: Answer, intact: Answer, older: Answer | None) -> None:
    """Whether a damage was detected or harmless."""
    ended, result = answer
    row.count += 1
    if ended.refused and older is not None:
        row.fail(f"{row.kind}: {what}: the checkpoint before is not used: {ended.said}", lost=True)
    elif ended.refused:
        row.note("detected: refused")
    elif ended.status != 0:
        row.fail(f"{row.kind}: {what}: status {ended.status}: {ended.said[-600:]}")
    elif "is damaged" in ended.said and older is not None:
        row.note("detected: the checkpoint before was used")
        if result != older[1]:
            row.fail(f"{row.kind}: {what}: the checkpoint before gives another result: {result}")
    elif result == intact[1]:
        row.note("harmless")
    elif " from now on (it was " in ended.said:
        row.note("said what changes")
    else:
        row.fail(f"{row.kind}: {what}: silently used: {result} instead of {intact[1]}")
