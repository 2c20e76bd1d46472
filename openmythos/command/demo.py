"""``openmythos demo``: a looped model on real text, then one on a puzzle of known difficulty."""

import ctypes
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from openmythos.command.option import Device, Overrides, Seed, check_device
from openmythos.config.schema import require

if TYPE_CHECKING:
    from openmythos.train.recipe import RunConfig

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # numbers of mallopt's parameters in malloc.h


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default: runs/demo, or runs/demo-2 ...")
    ] = None,
    text_seconds: Annotated[float, typer.Option(help="Training time of act 1.")] = 120.0,
    hops_seconds: Annotated[float, typer.Option(help="Training time of act 2.")] = 150.0,
    overrides: Overrides = None,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Train two small looped models and see what extra loops buy; about six minutes.

    The acts are set apart: --set text.model.num_loops=4, --set hops.train.batch_size=64.
    """
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

    require_matplotlib()  # now, not after the training
    keep_freed_memory()  # the models are small, the minutes short
    started = time.perf_counter()
    console = Console(highlight=False)
    folder = free_folder(out)
    try:
        console.rule("[bold]Act 1: real text")
        text = act_text(console, folder / "text", text_run, device)
        console.rule("[bold]Act 2: thinking")
        hops, original = act_hops(console, folder, hops_run, device)
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
    console.rule("[bold]What it shows")
    for act in takeaways(results).values():
        for found in act:
            mark = {True: "[green]yes[/]", False: "[red]no[/] ", None: "   "}[found.holds]
            console.print(f"  {mark} ", Text(found.text))
    console.rule("[bold]Done")
    for name in ("depth_curve.png", "hops_grid.png", report.name):
        console.print(f"  {folder / name}", soft_wrap=True)
    console.print(f"  {results.total_seconds:.0f} s in all")


def configs(
    seed: int, text_seconds: float, hops_seconds: float, overrides: list[str]
) -> "tuple[RunConfig, RunConfig]":
    """Both acts' configurations, with overrides like ``text.model.num_loops=4`` applied.

    Raises:
        ValueError: An unknown field or a bad value.
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
    """The folder to write: the one given, if it is empty, or the first free runs/demo.

    Raises:
        ValueError: The folder holds something.
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
    """Let this process keep what it frees for its next step; False where that is not glibc.

    By default large tensors come fresh from the system at every step, page by page, which costs
    a tenth of a small model's step on a CPU. The price is a peak of memory that is about 40 %
    higher, and it holds for the whole process: a program asks for it, not the training loop.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
