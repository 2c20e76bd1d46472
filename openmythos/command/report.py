"""``openmythos report``: a page of a run, whether it trains, was stopped or is done."""

import json
from pathlib import Path
from typing import Annotated

import typer

from openmythos.command.option import AsJson
from openmythos.terminal import note


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[
        Path | None, typer.Option(help="The page's file; default: report.html in the folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a page of a run: curves, loops, samples, experts' load, speed, configuration."""
    note("reading the run ...")
    from openmythos.config.schema import json_ready
    from openmythos.report.run import read_run, write_run_page

    record = read_run(run)
    page = write_run_page(run, out)
    if not as_json:
        typer.echo(page)
        return
    said = {"folder": str(run), "page": str(page), "status": record.status, "step": record.step}
    held_out = [
        {"num_loops": n, record.metric: value} for n, value in sorted(record.newest().items())
    ]
    typer.echo(json.dumps(json_ready({**said, "seconds": record.seconds, "held_out": held_out})))
