"""The command table of ``openmythos``. Commands import torch only when they run."""

import sys
import warnings

import typer

from openmythos.command import (
    chat,
    convert,
    demo,
    evaluate,
    export,
    generate,
    inspect,
    prepare,
    presets,
    retrofit,
    train,
)

app = typer.Typer(
    help="Recurrent-depth (looped) language models: train, generate, inspect.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command()(train.train)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(prepare.prepare)
app.command("eval")(evaluate.evaluate)
app.command()(retrofit.retrofit)
app.command()(presets.presets)
app.command()(inspect.inspect)
app.command()(export.export)
app.command()(convert.convert)


def main() -> None:
    """Run a command; what a user can get wrong ends in one line and exit status 2."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _show_warning(message: Warning | str, *where: object, **options: object) -> None:
    """One line, without the place in the code that Python names."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
