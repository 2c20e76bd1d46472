"""The command table of ``openmythos``. Commands import torch only when they run."""

import io
import re
import sys
import warnings
from typing import Annotated

import typer

from openmythos.command import (
    analyze,
    calibrate_exit,
    chat,
    config,
    convert,
    demo,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    prepare,
    presets,
    report,
    reproduce,
    retrofit,
    scaling_law,
    serve,
    train,
)
from openmythos.folder import in_a_sentence
from openmythos.plan.memory import is_out_of_memory

LONGEST_MESSAGE = 2000  # characters: a given value may be a whole file
TOO_LARGE = ("overflow", "unpack long", "too large to convert")

app = typer.Typer(
    help="Recurrent-depth (looped) language models: train, generate, inspect.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in a user's words are no markup
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> bool:
    """Print the version and end, if ``--version`` was given."""
    if wanted:
        from openmythos import __version__

        print(f"openmythos {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Recurrent-depth (looped) language models: train, generate, inspect."""


app.command()(demo.demo)
app.command()(train.train)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(prepare.prepare)
app.command("eval")(evaluate.evaluate)
app.command()(retrofit.retrofit)
app.command()(presets.presets)
app.command()(inspect.inspect)
app.command()(plan.plan)
app.command("scaling-law")(scaling_law.scaling_law)
app.command()(report.report)
app.command()(analyze.analyze)
app.command()(reproduce.reproduce)
app.command()(config.config)
app.command()(export.export)
app.command()(convert.convert)
app.command("calibrate-exit")(calibrate_exit.calibrate_exit)
app.command()(serve.serve)


def main() -> None:
    """Run a command; what a user can cause ends in one line and exit status 2."""
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a narrow encoding loses no output
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = fault_of_user(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def fault_of_user(error: Exception) -> str | None:
    """One line about an error that a user can cause; None for a fault of the program.

    These are refused values, files and disks, memory that is not there, and numbers that do not fit
    into a machine's word. Torch and safetensors have no classes of their own for all of them.
    """
    said = in_a_sentence(error)
    if isinstance(error, OSError) and error.strerror is not None and error.filename is not None:
        said = f"{error.filename} cannot be used: {error.strerror.lower()}"
    said = " ".join(said.split())
    if len(said) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        said = f"{said[:half]} ... {said[-half:]}"
    if isinstance(error, (ValueError, OSError)) or type(error).__name__ == "SafetensorError":
        return said or type(error).__name__
    lower = said.lower()
    if is_out_of_memory(error):
        size = re.search(r"(\d[\d.]*) ?([KMGTPE]iB|bytes)", said)
        asked = f" (asked for {size[1].rstrip('.')} {size[2]})" if size else ""
        return f"out of memory{asked}; take a smaller model, batch or depth"
    if isinstance(error, (OverflowError, RuntimeError, TypeError)) and any(
        words in lower for words in TOO_LARGE
    ):
        return "a number is too large for this machine; give smaller ones"
    return None


def _show_warning(message: Warning | str, *where: object, **options: object) -> None:
    """One line, without the place in the code that Python names."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
