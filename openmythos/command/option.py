"""Options that several commands share; importing this module does not load torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openmythos.config.model import MAX_LOOPS
from openmythos.config.schema import as_seed

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")


def set_option(example: str) -> Any:
    """The option ``--set`` of a command; the example names a field that this command has."""
    return typer.Option("--set", help=f"Override a field, for example {example}. Repeatable.")


def _seed_in_range(seed: int | None) -> int | None:
    return None if seed is None else as_seed("--seed", seed)


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or mps.")]
Out = Annotated[Path, typer.Option(help="Folder to write into.")]
Source = Annotated[
    Path,
    typer.Argument(
        help="A checkpoint or run folder of any known family, zoo:NAME, or a .gguf file."
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16; default: as stored.")
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights", help="stored, or int8: in 8 bits, for a CPU, in a quarter of the memory."
    ),
]
Seed = Annotated[
    int, typer.Option(help="Seed of everything that is random.", callback=_seed_in_range)
]
TrainSeed = Annotated[
    int | None,
    typer.Option(
        help="Seed of everything that is random, --config's or 0 by default; short for "
        "--set train.seed=N.",
        callback=_seed_in_range,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON and nothing else; notes go to standard error.")
]
Loops = Annotated[str, typer.Option(help="Numbers of loops, separated by commas.")]


def parse_loops(text: str) -> tuple[int, ...]:
    """Parse numbers of loops such as ``1,2,4``.

    Raises:
        ValueError: A part is not a positive whole number.
    """
    try:
        loops = tuple(int(part) for part in text.split(","))
    except ValueError:
        loops = ()
    if not loops or min(loops) < 1 or max(loops) > MAX_LOOPS:
        raise ValueError(
            f"--num-loops is {text!r}; give whole numbers of 1 to {MAX_LOOPS:,}, like 1,2,4"
        )
    return loops


def with_shorthands(
    overrides: list[str], short: Mapping[str, tuple[str, object | None]]
) -> list[str]:
    """The overrides, and those that options such as ``--steps`` stand for.

    Args:
        overrides: What ``--set`` was given.
        short: The field and the value of each option; None if it was not given.

    Raises:
        ValueError: A field is set in both ways.
    """
    given = {option: field for option, field in short.items() if field[1] is not None}
    for option, (name, value) in given.items():
        require_once(overrides, option, name, value)
    return [*overrides, *(f"{name}={value}" for name, value in given.values())]


def require_once(overrides: list[str], option: str, name: str, value: object | None) -> None:
    """Refuse a field that an option and ``--set`` both give.

    Raises:
        ValueError: They do; names both.
    """
    for override in overrides if value is not None else ():
        one, other = f"{name}.", f"{override.partition('=')[0]}."
        if one.startswith(other) or other.startswith(one):
            raise ValueError(
                f"{option} {value} and --set {override} set the same field; give one of them"
            )


def check_device(device: str) -> str:
    """Return ``device`` if torch can use it.

    Raises:
        ValueError: Torch cannot use it.
    """
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = torch.device("meta")
    mps = int(torch.backends.mps.is_available())
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": mps}
    if wanted.type not in counts:
        raise ValueError(f"--device is {device!r}; give cpu, cuda, cuda:N or mps")
    if (wanted.index or 0) >= counts[wanted.type]:
        raise ValueError(
            f"--device is {device!r}, but this machine has {counts[wanted.type]} of {wanted.type}; "
            "use another or cpu"
        )
    return device


def parse_dtype(name: str | None) -> "torch.dtype | None":
    """The dtype that ``--dtype`` names; None stays None.

    Raises:
        ValueError: It is not one of ``DTYPES``.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"--dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    import torch

    return None if name is None else getattr(torch, name)
