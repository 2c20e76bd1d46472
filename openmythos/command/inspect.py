"""``openmythos inspect``: a model's parameters and costs, without its weights."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from openmythos.command.option import AsJson, parse_loops, set_option
from openmythos.command.table import (
    human_bytes,
    human_count,
    human_flops,
    number_table,
)
from openmythos.config import ModelConfig, counts
from openmythos.config.matched_baseline import MATCHES, baseline
from openmythos.config.presets import PRESETS, preset
from openmythos.config.schema import apply_overrides, from_dict, in_words, require, to_dict
from openmythos.terminal import console, note, print_table

INSPECTED_CONTEXT = 4096  # tokens; or the model's max_seq_len if that is less
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}
CHECKPOINT_FIELDS = ("format", "format_version")  # beside the model's fields in config.json
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}


def inspect(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A preset, a config.json, a folder that holds one, zoo:NAME or a .gguf file.",
        ),
    ] = None,
    num_loops: Annotated[
        str | None,
        typer.Option(help="Numbers of loops, as 1,4,8; by default around the config's."),
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Tokens; by default 4096, or max_seq_len where that is less.")
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Add plain models of equal parameters, FLOPs and memory."),
    ] = False,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Show which C++ kernels this machine uses, without MODEL."),
    ] = False,
    overrides: Annotated[list[str] | None, set_option("num_loops=8")] = None,
    as_json: AsJson = False,
) -> None:
    """Show parameters by part, and FLOPs, cache and memory by number of loops."""
    if kernels:
        require(source is None, "MODEL", source, "left out with --kernels")
        _print_kernels(as_json)
        return
    if source is None:
        raise ValueError("give a MODEL (a preset, a config.json or a folder), or --kernels")
    config = apply_overrides(read_config(source), overrides or [])
    depths = _usual_loops(config) if num_loops is None else parse_loops(num_loops)
    context = min(INSPECTED_CONTEXT, config.max_seq_len)
    if context_length is not None:
        context = context_length
    if not 1 <= context <= config.max_seq_len:
        allowed = f"1 to {config.max_seq_len}, the model's max_seq_len"
        raise ValueError(f"--context-length is {context}; it must be {allowed}")
    report = inspection(config, depths, context)
    if baselines:
        report["baselines"] = baseline_rows(config, context)
    if as_json:
        print(json.dumps({"source": source, **report}, indent=2))
    else:
        _print_inspection(source, report)


def inspection(config: ModelConfig, depths: Sequence[int], context_length: int) -> dict[str, Any]:
    """What ``inspect --json`` prints; bytes and FLOPs are per token unless named otherwise."""
    figures = counts.count(config)
    by_depth = []
    for num_loops in depths:
        at_depth = counts.count(config, num_loops=num_loops, context_length=context_length)
        row = asdict(at_depth)
        del row["total_params"], row["active_params"]
        row["kv_bytes_per_token"] = {
            layout: counts.kv_bytes_per_token(config, num_loops=num_loops, kept_loops=kept)
            for layout, kept in counts.loops_kept_by_layout(num_loops).items()
        }
        by_depth.append(row)
    return {
        "config": to_dict(config),
        "total_params": figures.total_params,
        "active_params": figures.active_params,
        "num_loops": figures.num_loops,
        "effective_depth": figures.effective_depth,
        "parts": [
            {
                "name": part.name,
                "params": part.weights.params,
                "active_params": part.weights.active,
                "flops_per_token": 2 * part.weights.macs,
                "looped": part.looped,
            }
            for part in counts.parts(config)
        ],
        "context_length": context_length,
        "depths": by_depth,
        "weight_bytes": {
            name: counts.weight_bytes(config, size) for name, size in DTYPE_BYTES.items()
        },
        "training_bytes": counts.training_bytes(config),
    }


def baseline_rows(config: ModelConfig, context_length: int) -> list[dict[str, Any]]:
    """The matched plain models, as ``inspect --baselines --json`` lists them."""
    rows = []
    for match in MATCHES:
        found = baseline(config, match=match, context_length=context_length)
        row = {"match": match, "target": found.target, "value": found.value}
        rows.append({**row, "deviation": found.deviation, **sizes(found.config, context_length)})
    return rows


def sizes(config: ModelConfig, context_length: int) -> dict[str, Any]:
    """Sizes by which baselines are compared; ``memory_bytes``: weights plus one bf16 cache."""
    figures = counts.count(config, context_length=context_length)
    cache = figures.kv_bytes_per_token * context_length
    return {
        "layers": [config.num_prelude_layers, config.num_core_layers, config.num_coda_layers],
        "num_loops": config.num_loops,
        "d_ff": config.core_ff.width,
        "total_params": figures.total_params,
        "inference_flops_per_token": figures.inference_flops_per_token,
        "memory_bytes": counts.weight_bytes(config) + cache,
        "config": to_dict(config),
    }


def read_config(source: str) -> ModelConfig:
    """The config of a preset, a JSON file, a GGUF file, or the folder of a run or checkpoint.

    A checkpoint's weights, of any family, must have the names and shapes that its config implies.

    Raises:
        ValueError: ``source`` is none of these, or the file is not a model's config.
    """
    path = Path(source)
    if source.startswith("zoo:"):
        from openmythos.interop.hub import local_folder

        path = local_folder(source)
    if source in PRESETS or not path.exists():
        try:
            return preset(source)
        except ValueError as error:
            raise ValueError(f"{source!r} is neither a file nor a folder, and {error}") from None
    holds_weights = path.is_dir() and any(
        file.suffix in WEIGHT_SUFFIXES or is_index(file) for file in path.iterdir()
    )
    if holds_weights or path.suffix == ".gguf":
        note("reading the shapes of the weights ...")
        from openmythos.interop.loading import load_config

        return load_config(path)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"{source!r} holds no config.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {in_words(data)}; a model's configuration is an object")
    if isinstance(data.get("model"), dict):
        data = data["model"]  # a run's config.json also holds train and data
    data = {key: value for key, value in data.items() if key not in CHECKPOINT_FIELDS}
    try:
        return from_dict(ModelConfig, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_index(file: Path) -> bool:
    """Whether a JSON file is the index of sharded weights."""
    return file.name.endswith(".index.json")


# --- printing -------------------------------------------------------------------------------------


def _usual_loops(config: ModelConfig) -> tuple[int, ...]:
    usual = config.num_loops
    return tuple(sorted({1, max(1, usual // 2), usual, 2 * usual}))


def _print_inspection(source: str, report: dict[str, Any]) -> None:
    screen = console()
    total, active = report["total_params"], report["active_params"]
    depth = f"{report['effective_depth']} layers deep at {report['num_loops']} loops"
    share = f"{human_count(active)} active for a token ({active / total:.1%})"
    said = f": {human_count(total)} parameters, {share}, {depth}\n"
    screen.print(Text.assemble((source, "bold"), said))
    summary = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _summary(report["config"]):
        summary.add_row(name, value)
    for table in (summary, _parts_table(report), _depths_table(report)):
        print_table(screen, table)
        screen.print()
    if "baselines" in report:
        print_table(screen, _baselines_table(report))
        screen.print()
    sizes = [f"{name} {human_bytes(size)}" for name, size in report["weight_bytes"].items()]
    screen.print("Memory of all weights:", ", ".join(sizes))
    training = human_bytes(report["training_bytes"])
    screen.print(f"Memory of training: {training} (weights, gradients, Adam's moments in float32)")


def _summary(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary's rows: the plain fields in one, each seam in its own."""
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    rows = [("model", _fields({key: value for key, value in plain.items() if value is not None}))]
    for key, value in config.items():
        if isinstance(value, dict):
            rest = {name: item for name, item in value.items() if name != "kind"}
            rows.append((key, f"{value.get('kind', '')} {_fields(rest)}".strip()))
    return rows


def _fields(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _parts_table(report: dict[str, Any]) -> Table:
    columns = ("part", "parameters", "share", "active", "compute/token", "runs")
    table = number_table(*columns, title="Parameters by part")
    for part in report["parts"]:
        table.add_row(
            part["name"],
            human_count(part["params"]) if part["params"] else "tied",
            f"{part['params'] / report['total_params']:.1%}",
            human_count(part["active_params"]),
            human_flops(part["flops_per_token"]) if part["flops_per_token"] else "-",
            "every loop" if part["looped"] else "once",
        )
    return table


def _depths_table(report: dict[str, Any]) -> Table:
    layouts = report["depths"][0]["kv_bytes_per_token"]
    context = f"{report['context_length']:,}"
    title = f"Per token at a context of {context}: decoding, training, bfloat16 cache by layout"
    table = number_table("loops", "depth", "decoding", "training", *layouts, title=title)
    for row in report["depths"]:
        table.add_row(
            str(row["num_loops"]),
            str(row["effective_depth"]),
            human_flops(row["inference_flops_per_token"]),
            human_flops(row["training_flops_per_token"]),
            *(human_bytes(size) for size in row["kv_bytes_per_token"].values()),
        )
    return table


def _baselines_table(report: dict[str, Any]) -> Table:
    """The table of the looped model and its plain baselines."""
    context = report["context_length"]
    title = f"Plain models that match at a context of {context:,} (memory in bfloat16)"
    columns = ("equal in", "layers", "loops", "d_ff", "parameters", "decoding", "memory", "off by")
    table = number_table(*columns, title=title)
    own = sizes(from_dict(ModelConfig, report["config"]), context)
    for row in ({"match": "(this model)", **own}, *report["baselines"]):
        table.add_row(
            row["match"],
            "/".join(map(str, row["layers"])),
            str(row["num_loops"]),
            f"{row['d_ff']:,}",
            human_count(row["total_params"]),
            human_flops(row["inference_flops_per_token"]),
            human_bytes(row["memory_bytes"]),
            f"{row['deviation']:+.2%}" if "deviation" in row else "-",
        )
    return table


def _print_kernels(as_json: bool) -> None:
    """Which kernels are built, and the timings by which products were chosen."""
    note("looking for kernels ...")
    import torch

    from openmythos.ops.cpu import build, choice

    compiler = build.find_compiler()
    path = choice.timings_file(torch.get_num_threads())
    timings = choice.read_timings(path)
    products = {
        name: {"ours": timing.ours, "torch": timing.torch, "uses_ours": timing.ours_wins}
        for name, timing in timings.items()
    }
    report = {
        "compiler": compiler,
        "mode": choice.mode(),
        "switched_off": build.switched_off(),
        "built": [name for name in build.KERNELS if build.library(name, compiler or []).exists()],
        "num_threads": torch.get_num_threads(),
        "timings": str(path),
        "products": products,
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    screen = console()
    for name in ("compiler", "mode", "switched_off", "built", "num_threads", "timings"):
        value = report[name]
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
        screen.print(f"{name.replace('_', ' ')}: {shown}")
    if not products:
        screen.print("no product has been timed yet: decode once with --compiled")
        return
    table = number_table("product", "ours, us", "torch's, us", "used")
    for name, timing in timings.items():
        used = "ours" if timing.ours_wins else "torch's"
        table.add_row(name, f"{1e6 * timing.ours:.1f}", f"{1e6 * timing.torch:.1f}", used)
    print_table(screen, table)
