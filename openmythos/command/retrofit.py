"""``openmythos retrofit``: convert a pretrained stack into a looped model, without training."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openmythos.command.option import AsJson, Out
from openmythos.command.origin import companions_of
from openmythos.folder import DEPTH_FILE
from openmythos.terminal import note

if TYPE_CHECKING:
    from openmythos.config import StateInitConfig
    from openmythos.retrofit.split import Layers

RECIPE_STD = 0.0087  # standard deviation of h_0 in the published retrofits
STATE_INITS = ("zeros", "copy", "normal")
LayerList = "Layers of the source, as 0-3 or 0-3,7."
Carry = Annotated[
    float,
    typer.Option(
        help="Share of the state that the next loop reads before any training, as adapters need; "
        "with --state-init copy."
    ),
]


def retrofit(
    source: Annotated[
        Path, typer.Argument(help="A Llama-type checkpoint: a folder or a .gguf file.")
    ],
    prelude: Annotated[str, typer.Option(help=LayerList)] = "",
    core: Annotated[str, typer.Option(help=f"{LayerList} Default: those between.")] = "",
    coda: Annotated[str, typer.Option(help=LayerList)] = "",
    num_loops: Annotated[
        int | None, typer.Option(help="Default depth of the result; 4, or with --tie what fits.")
    ] = None,
    state_init: Annotated[
        str, typer.Option(help=f"h_0: zeros, copy, or normal (std {RECIPE_STD}).")
    ] = "zeros",
    carry: Carry = 0.0,
    untie: Annotated[bool, typer.Option(help="Copy a tied embedding to a head.")] = False,
    tie: Annotated[
        int | None, typer.Option(help="Tie the core into so many layers that are looped.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of each loop's low-rank change of tied weights.")
    ] = None,
    start: Annotated[
        str, typer.Option(help="Tied weights: average, stepwise or lower.")
    ] = "average",
    out: Out = Path("retrofit"),
    as_json: AsJson = False,
) -> None:
    """Turn a Llama-type checkpoint into a looped model.

    Without --tie: prelude, core and coda with a linear injection; one loop is the kept layers run
    once. With --tie K --rank R: the core's layers share K layers' weights, and each loop changes
    them by rank R; at full rank the result is the source.
    """
    note("reading the checkpoint ...")
    given = [parse_layers(t, o) for t, o in ((prelude, "--prelude"), (core, "--core"))]
    parts = (*given, parse_layers(coda, "--coda"))
    if tie is None and rank is not None:
        raise ValueError(f"--rank {rank} needs --tie K: only tied layers have low-rank changes")
    if tie is not None and (untie or carry or state_init != "zeros"):
        left_out = "leave --untie, --carry, --state-init out"
        raise ValueError(f"--tie keeps head, h_0 and input as they are; {left_out}")
    initial = state_init_of(state_init)

    from openmythos.checkpoint.save import save_pretrained
    from openmythos.interop.hub import local_folder
    from openmythos.interop.loading import load_pretrained, usable_tokenizer
    from openmythos.retrofit.split import retrofit as split
    from openmythos.retrofit.tie import tie as tie_layers

    folder = local_folder(source)
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out {out} is the source itself; choose another folder")
    model = load_pretrained(folder)
    layers = choose_layers(model.config.num_core_layers, *parts)
    said: dict[str, Any] = describe(layers, model.config.num_core_layers)
    if tie is None:
        depth = 4 if num_loops is None else num_loops
        made = split(model, layers, num_loops=depth, state_init=initial, untie=untie, carry=carry)
    else:
        chosen = 0 if rank is None else rank
        result = tie_layers(model, layers, num_core_layers=tie, rank=chosen, start=start)
        made, fits = result.model, result.model.config.num_loops
        if num_loops not in (None, fits):
            raise ValueError(f"--num-loops is {num_loops}; {tie} tied layers need {fits} loops")
        said |= {"tied_layers": tie, "rank": chosen, "relative_error": result.error}
    tokenizer, remark = usable_tokenizer(folder)
    if remark:
        note(f"note: {remark}")
    companions = companions_of(folder, measured=False)
    companions.pop(DEPTH_FILE, None)  # nobody has trained the new loop yet
    save_pretrained(made, out, tokenizer, companions=companions)
    said |= {"folder": str(out), "num_loops": made.config.num_loops}
    said["total_params"] = sum(p.numel() for p in made.parameters())
    if as_json:
        typer.echo(json.dumps(said))
        return
    for name, value in said.items():
        typer.echo(f"{name.replace('_', ' ')}: {shown(value)}")


def parse_layers(text: str, option: str) -> tuple[int, ...]:
    """Parse layers such as ``0-3,7``; an empty text gives none.

    Raises:
        ValueError: The text is not of this form; names the option.
    """
    layers: list[int] = []
    for part in text.split(",") if text else []:
        first, dash, last = part.strip().partition("-")
        whole = first.isdecimal() and (not dash or last.isdecimal())
        if not whole or (dash and int(first) > int(last)):
            raise ValueError(f"{option} is {text!r}; give layers like 0-3 or 0-3,7")
        layers += range(int(first), int(last if dash else first) + 1)
    return tuple(layers)


def choose_layers(
    num_layers: int, prelude: tuple[int, ...], core: tuple[int, ...], coda: tuple[int, ...]
) -> "Layers":
    """The layers of each part; an empty ``core`` gets all layers between prelude and coda.

    Raises:
        ValueError: The layers do not rise, or none is left for the core.
    """
    from openmythos.retrofit.split import Layers

    between = range(max(prelude, default=-1) + 1, min(coda, default=num_layers))
    return Layers(prelude=prelude, core=core or tuple(between), coda=coda)


def describe(layers: "Layers", num_layers: int) -> dict[str, Any]:
    """The layers of each part and the dropped ones, for the report."""
    return {
        "prelude": list(layers.prelude),
        "core": list(layers.core),
        "coda": list(layers.coda),
        "dropped": list(layers.dropped(num_layers)),
    }


def state_init_of(kind: str) -> "StateInitConfig":
    """The state init of this kind.

    Raises:
        ValueError: The kind is unknown.
    """
    from openmythos.config import CopyInitConfig, NormalInitConfig, ZerosInitConfig

    if kind not in STATE_INITS:
        raise ValueError(f"--state-init is {kind!r}; give {', '.join(STATE_INITS)}")
    if kind == "normal":
        return NormalInitConfig(std=RECIPE_STD)
    return CopyInitConfig() if kind == "copy" else ZerosInitConfig()


def shown(value: object) -> str:
    """A value of the report as text; consecutive layers as 4-9."""
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, list):
        return str(value)
    runs: list[list[int]] = []
    for layer in value:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs) or "none"
