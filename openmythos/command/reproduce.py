"""``openmythos reproduce``: the experiments of a checkout, done again or recomputed."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import openmythos

Scale = Literal["smoke", "small", "fresh", "full"]


def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="An experiment's folder, or all.", show_default=False)
    ] = None,
    scale: Annotated[
        Scale,
        typer.Option(
            help="smoke: a few steps, seconds; small: what the pages say; fresh: the same with "
            "seeds that were not used; full."
        ),
    ] = "smoke",
    workers: Annotated[int, typer.Option(help="Runs at once, one thread each.", min=1)] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="Do runs that were lost again.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Delete the stored results first; git has them.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Recompute every verdict and page from the stored results."),
    ] = False,
) -> None:
    """Do experiments again, run by run; --check recomputes the pages from stored results."""
    root = Path(openmythos.__file__).parent.parent
    if not (root / "experiments" / "study.py").is_file():
        raise ValueError(
            "the experiments are not part of the package; run this in a checkout of the repository"
        )
    if check:
        if name is not None:
            raise ValueError(f"--check is about all experiments; leave {name} out")
        raise typer.Exit(_run(root, "experiments.check"))
    known = [
        path.parent.name
        for path in sorted((root / "experiments").glob("*/run.py"))
        if "\nSTUDY = " in path.read_text(encoding="utf-8")
    ]
    if name != "all" and name not in known:
        given = "no experiment is named" if name is None else f"there is no experiment {name!r}"
        raise ValueError(f"{given}; give one of {', '.join(known)}, or all")
    options = ["--scale", scale, "--workers", str(workers), *(["--retry"] if retry else [])]
    options += ["--again"] if again else []
    worst = 0
    for one in known if name == "all" else [name]:
        worst = max(worst, _run(root, f"experiments.{one}.run", *options))
    raise typer.Exit(worst)


def _run(root: Path, module: str, *options: str) -> int:
    """The exit status of a module that runs in the checkout.

    Raises:
        typer.Exit: A signal ended it; whoever ends this process ends the module, too.
    """
    child = subprocess.Popen([sys.executable, "-m", module, *options], cwd=root)
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        status = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if status < 0:
        raise typer.Exit(128 - status)  # as shells say it
    return status
