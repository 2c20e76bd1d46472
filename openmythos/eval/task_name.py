"""Names of tasks, checked without torch and the harness, which take seconds to load."""

import difflib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

TEXT_NAMES = ("python_docs_choice", "python_docs_word", "python_docs_bits")
HELD_OUT = "held_out"
KINDS = ("hops", "products", "recall", "facts", "induction", "addition")  # of puzzles
SHIPPED = (*TEXT_NAMES, HELD_OUT, *(f"{kind}_N" for kind in KINDS))
PUZZLE = re.compile(rf"({'|'.join(KINDS)})_([1-9]\d*)")
NAME_IN_FILE = re.compile(rb"^(?:task|group): *[\"']?([\w.-]+)", re.MULTILINE)


def require_harness() -> Path:
    """The folder of lm-evaluation-harness' task files.

    Raises:
        ValueError: It is not installed; says how to install it.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "only the tasks that ship run without lm-evaluation-harness; run: "
            'pip install "openmythos[eval]"'
        )
    return Path(found.submodule_search_locations[0]) / "tasks"


def require_names(names: Sequence[str]) -> None:
    """Check that every name may be a task: one that ships, a path, or a word in the harness' files.

    The harness itself knows its tasks for certain, but needs 20 seconds to read its files. A name
    that stands in none of them is no task, and looking for it takes a second.

    Raises:
        ValueError: A name is none of these, or the harness is not installed.
    """
    left = [name for name in names if not _is_ours(name)]
    if not left:
        return
    try:
        folder = require_harness()
    except ValueError as error:
        close = [shown for name in left if (shown := did_you_mean(name, []))]
        raise ValueError(f"no task {left[0]!r} ships{''.join(close[:1])}; {error}") from None
    unseen, known = set(left), set[str]()
    for file in folder.rglob("*.yaml"):
        content = file.read_bytes()
        unseen -= {name for name in unseen if name.encode() in content}
        if not unseen:
            return
        known.update(name.decode() for name in NAME_IN_FILE.findall(content))
    name = next(name for name in left if name in unseen)
    raise ValueError(no_such_task(name, sorted(known)))


def no_such_task(name: str, known: Sequence[str]) -> str:
    """A message about a name that is no task.

    Args:
        name: The name.
        known: Names of the harness' tasks.
    """
    near = did_you_mean(name, known)
    give = f"{near} Give" if near else "; give"
    ours = ", ".join(SHIPPED)
    return f"no task {name!r}{give} a name of lm-evaluation-harness, one of {ours}, or a task file"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The nearest name as a question, ours first; empty if none is near."""
    size = "".join(filter(str.isdigit, name)).lstrip("0") or "1"
    ours = (*TEXT_NAMES, *(f"{kind}_{size}" for kind in KINDS))
    for candidates, cutoff in ((ours, 0.75), ((*ours, *known), 0.6)):
        if near := difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff):
            return f"; did you mean {near[0]!r}?"
    return ""


def _is_ours(name: str) -> bool:
    path = Path(name)
    is_path = path.suffix in (".yaml", ".yml") or path.is_dir()
    return is_path or name in (*TEXT_NAMES, HELD_OUT) or PUZZLE.fullmatch(name) is not None
