"""``openmythos demo``: a looped model on real text, then one on a puzzle of known difficulty."""

import ctypes
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from openmythos.command.option import AsJson, Device, Seed, check_device, set_option
from openmythos.config.schema import require
from openmythos.terminal import console, note

if TYPE_CHECKING:
    from openmythos.train.recipe import RunConfig

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # mallopt's parameter numbers, from malloc.h


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default: runs/demo, or runs/demo-2 ...")
    ] = None,
    text_seconds: Annotated[float, typer.Option(help="Training time of act 1.")] = 120.0,
    hops_seconds: Annotated[float, typer.Option(help="Training time of act 2.")] = 150.0,
    overrides: Annotated[list[str] | None, set_option("text.model.num_loops=4")] = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train two small looped models and see what extra loops buy; about six minutes.

    The acts are set apart: --set text.model.num_loops=4, --set hops.train.batch_size=64.
    """
    note("preparing act 1 ...")
    text_run, hops_run = configs(seed, text_seconds, hops_seconds, overrides or [])
    check_device(device)
    from openmythos import __version__
    from openmythos.analysis.picture import require_matplotlib
    from openmythos.demo.page import write_report
    from openmythos.demo.result import DemoResults
    from openmythos.demo.takeaway import takeaways
    from openmythos.demo.text import act_text
    from openmythos.demo.walks import act_hops
    from openmythos.train.loop import TrainingStopped

    require_matplotlib()  # fail before the training rather than after it
    keep_freed_memory()  # faster steps; the models are small enough
    started = time.perf_counter()
    screen = console(notes=as_json)
    folder = free_folder(out)
    try:
        screen.print(Text("\nAct 1: real text\n", "bold"))
        text = act_text(screen, folder / "text", text_run, device)
        screen.print(Text("\nAct 2: thinking\n", "bold"))
        hops, original = act_hops(screen, folder, hops_run, device)
    except TrainingStopped as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    results = DemoResults(
        text=text,
        hops=hops,
        original_halting=original,
        total_seconds=time.perf_counter() - started,
        machine=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        version=__version__,
        command=" ".join(["openmythos", *map(shlex.quote, sys.argv[1:])]),
    )
    report = write_report(results, folder)
    screen.print(Text("\nWhat it shows\n", "bold"))
    for act in takeaways(results).values():
        for found in act:
            mark, style = {True: ("yes", "green"), False: ("no ", "red"), None: ("   ", "")}[
                found.holds
            ]
            screen.print(Text.assemble("  ", (mark, style), f"  {found.text}"))
    screen.print("\n  ±: one standard error; clear: more than two of the paired differences")
    screen.print(Text("\nDone\n", "bold"))
    for name in ("depth_curve.png", "hops_grid.png", report.name):
        screen.print(f"  {folder / name}")
    screen.print(f"  {results.total_seconds:.0f} s in all")
    if as_json:
        said = {act: [vars(item) for item in found] for act, found in takeaways(results).items()}
        places = {"folder": str(folder), "report": str(report)}
        print(json.dumps({**places, "seconds": results.total_seconds, "takeaways": said}))


def configs(
    seed: int, text_seconds: float, hops_seconds: float, overrides: list[str]
) -> "tuple[RunConfig, RunConfig]":
    """Both acts' configurations, with overrides like ``text.model.num_loops=4`` applied.

    Raises:
        ValueError: A field is unknown, or a value is not allowed.
    """
    from openmythos.config.schema import apply_overrides
    from openmythos.demo.text import text_config
    from openmythos.demo.walks import hops_config
    from openmythos.train.recipe import RunConfig

    @dataclass(frozen=True)
    class Acts:
        text: RunConfig
        hops: RunConfig

    acts = Acts(text_config(seed, text_seconds), hops_config(seed, hops_seconds))
    acts = apply_overrides(acts, overrides)
    for kind in ("text", "hops"):
        given = getattr(acts, kind).data.kind
        require(given == kind, f"{kind}.data.kind", given, f"{kind!r} in this act")
    return acts.text, acts.hops


def free_folder(out: Path | None) -> Path:
    """The folder to write: ``out``, or by default the first free one of runs/demo, runs/demo-2 ...

    Raises:
        ValueError: ``out`` is not empty.
    """
    if out is not None:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty; choose another --out or delete it")
        return out
    number = 1
    while (folder := Path("runs/demo" if number == 1 else f"runs/demo-{number}")).exists():
        number += 1
    return folder


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory for reuse; returns False if the C library is not glibc.

    By default glibc returns the memory of large tensors to the system, and every step faults the
    pages in again, which costs a tenth of a small model's step on a CPU. Keeping it raises the peak
    of memory by about 40 %. The setting holds for the whole process, so the program decides, not
    the training loop.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
