"""``openmythos plan``: what serving or training a model costs, without its weights."""

import functools
import json
from dataclasses import asdict, replace
from inspect import signature
from typing import Annotated, Any

import typer
from rich.table import Table

from openmythos.command import plan_training as training
from openmythos.command.inspect import read_config
from openmythos.command.option import AsJson, set_option
from openmythos.command.table import human_count, human_flops, number_table
from openmythos.config import ModelConfig, counts
from openmythos.config.matched_baseline import plain_model
from openmythos.config.schema import apply_overrides, as_number, require
from openmythos.plan.serving import (
    GPUS,
    MEASURES,
    PHI,
    Comparison,
    Load,
    Machine,
    Turns,
    load_of,
    plain_models,
    serve,
    turns,
)
from openmythos.plan.training import Links
from openmythos.terminal import console, print_table

PLANNED_CONTEXT = 8192  # tokens; or the model's max_seq_len if that is less
IN_WORDS = {"users": "users", "tokens_per_second": "tokens/s"}


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A preset, a config.json, a folder that holds one, zoo:NAME."
    ),
]
Serving = Annotated[
    bool, typer.Option("--serve", help="Plan its serving: users, tokens per second, cost.")
]
MeanLoops = Annotated[
    float | None, typer.Option(help="Mean loops of a token, if an exit rule stops some.")
]
ContextLength = Annotated[
    int | None,
    typer.Option(help="Tokens of every user or row; by default 8192, or max_seq_len if less."),
]
Rate = Annotated[float, typer.Option(help="Tokens per second that a user gets at least.")]
Phi = Annotated[
    float, typer.Option(help="T loops are worth T^phi layers (openmythos scaling-law fit).")
]
MemoryGb = Annotated[float | None, typer.Option(help="Of one GPU, in 10^9 bytes.")]
BandwidthTb = Annotated[float | None, typer.Option(help="Of one GPU, 10^12 bytes/s.")]
PeakTflops = Annotated[float | None, typer.Option(help="Of one GPU, dense products.")]
Price = Annotated[float, typer.Option(help="Of one GPU for an hour; 1 gives costs in GPU hours.")]


def plan(
    source: Model,
    serving: Serving = False,
    num_loops: Annotated[int | None, typer.Option(help="Loops; default: the model's.")] = None,
    mean_loops: MeanLoops = None,
    context_length: ContextLength = None,
    rate: Rate = 30.0,
    phi: Phi = PHI,
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "h100",
    gpus: Annotated[int, typer.Option(help="As one, exchanges not counted.", min=1)] = 1,
    memory_gb: MemoryGb = None,
    memory_gib: training.MemoryGib = None,
    bandwidth_tb: BandwidthTb = None,
    peak_tflops: PeakTflops = None,
    reserve: Annotated[float, typer.Option(help="Share of memory for all else.")] = 0.1,
    price: Price = 1.0,
    weight_bytes: Annotated[int, typer.Option(help="Bytes per weight.", min=1)] = 2,
    cache_bytes: Annotated[int, typer.Option(help="Bytes per cached number.", min=1)] = 2,
    devices: training.Devices = None,
    rows: training.Rows = 1,
    accumulation: training.Accumulation = 1,
    optimizer: training.Optimizer = "muon",
    grad_loops: training.GradLoops = None,
    dp_replicate: training.DpReplicate = None,
    tp: training.Tp = None,
    ep: training.Ep = None,
    core_gather: training.CoreGather = None,
    recompute: training.Recompute = None,
    network_gb: training.NetworkGb = 50.0,
    link_gb: training.LinkGb = 450.0,
    dry_run: training.DryRun = None,
    overrides: Annotated[list[str] | None, set_option("num_loops=8")] = None,
    as_json: AsJson = False,
) -> None:
    """Plan how a model is served (--serve) or trained (--devices N), without its weights.

    Serving: users, tokens/s, bytes and cost, beside plain models of equal depth, equal parameters
    and, by phi, equal predicted loss. Training: memory, exchanges and FLOPs of a device, a layout.
    """
    size = {"weight_bytes": weight_bytes, "cache_bytes": cache_bytes}
    fixed: dict[str, Any] = {"dp_replicate": dp_replicate, "tp": tp, "ep": ep}
    fixed |= {"core_gather": core_gather, "recompute": recompute}
    trained: dict[str, Any] = {"rows": rows, "accumulation": accumulation}
    trained |= {"optimizer": optimizer, "grad_loops": grad_loops}
    speeds = {"network_gb": network_gb, "link_gb": link_gb}
    prices = {"rate": rate, "phi": phi, "mean_loops": mean_loops, "gpus": gpus, "price": price}
    _one_plan(
        serving,
        devices is not None,
        {**fixed, **trained, **speeds, "dry_run": dry_run},
        {**size, **prices, "bandwidth_tb": bandwidth_tb},
    )
    sizes = {"memory_gb": memory_gb, "memory_gib": memory_gib, "bandwidth_tb": bandwidth_tb}
    _above_zero({**sizes, "peak_tflops": peak_tflops, "price": price, **speeds})
    config, context = _model(source, overrides or [], num_loops, context_length)
    one = _machine(gpu, memory_gb, memory_gib, bandwidth_tb, peak_tflops, reserve)
    if devices is not None:
        work = training.work(context, **trained)
        links = Links(inside=1e9 * link_gb, between=1e9 * network_gb)
        training.run(source, config, devices, one, work, links, fixed, dry_run, as_json)
        return
    require(as_number("--rate", rate, "a number") >= 0, "--rate", rate, "at least 0")
    machine = replace(
        one,
        memory_bytes=gpus * one.memory_bytes,
        bytes_per_second=gpus * one.bytes_per_second,
        flops_per_second=gpus * one.flops_per_second,
        price_per_hour=gpus * price,
    )
    report = serving_plan(config, machine, context, rate, phi, mean_loops, size)
    if as_json:
        print(json.dumps({"source": source, "gpus": gpus, **report}, indent=2))
    else:
        _print_serving(f"{source} on {gpus} GPU{'s' if gpus > 1 else ''}", report)


def _one_plan(
    serving: bool, training: bool, trained: dict[str, object], served: dict[str, object]
) -> None:
    """Check that one plan is asked for, and that no option of the other one is given."""
    if serving is training:
        raise ValueError(
            "say what to plan: its serving with --serve, or its training with --devices N; "
            "`openmythos inspect` shows parameters, FLOPs and memory"
        )
    defaults = signature(plan).parameters
    for name, value in (trained if serving else served).items():
        if value != defaults[name].default:
            asked = "--devices" if serving else "--serve"
            raise ValueError(f"--{name.replace('_', '-')} belongs to a plan with {asked}")


def _above_zero(options: dict[str, float | None]) -> None:
    """Check numbers under the names of their options."""
    for name, value in options.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            require(as_number(option, value, "a number above 0") > 0, option, value, "above 0")


def _model(
    source: str, overrides: list[str], num_loops: int | None, context_length: int | None
) -> tuple[ModelConfig, int]:
    """The model and the number of tokens that are planned."""
    config = apply_overrides(read_config(source), overrides)
    if num_loops is not None:
        config = apply_overrides(config, [f"num_loops={num_loops}"])
    context = min(PLANNED_CONTEXT, config.max_seq_len)
    context = context if context_length is None else context_length
    fits = 1 <= context <= config.max_seq_len
    allowed = f"1 to {config.max_seq_len}, the model's max_seq_len (--set max_seq_len=N)"
    require(fits, "--context-length", context, allowed)
    return config, context


def _machine(
    gpu: str,
    memory_gb: float | None,
    memory_gib: float | None,
    bandwidth_tb: float | None,
    peak_tflops: float | None,
    reserve: float,
) -> Machine:
    """One GPU, as the options describe it."""
    require(gpu in GPUS, "--gpu", gpu, f"one of {', '.join(GPUS)}")
    if memory_gb is not None and memory_gib is not None:
        raise ValueError(f"--memory-gb {memory_gb} and --memory-gib {memory_gib}: give one of them")
    one = GPUS[gpu]
    given = {
        "memory_bytes": 1e9 * memory_gb if memory_gb is not None else None,
        "bytes_per_second": 1e12 * bandwidth_tb if bandwidth_tb is not None else None,
        "flops_per_second": 1e12 * peak_tflops if peak_tflops is not None else None,
    }
    if memory_gib is not None:
        given["memory_bytes"] = float(2**30 * memory_gib)
    kept = {name: value for name, value in given.items() if value is not None}
    return replace(one, reserve=reserve, **kept)


def serving_plan(
    config: ModelConfig,
    machine: Machine,
    context_length: int,
    rate: float,
    phi: float,
    mean_loops: float | None,
    size: dict[str, int],
) -> dict[str, Any]:
    """What ``plan --serve --json`` prints."""

    def load(model: ModelConfig, **looped: Any) -> Load:
        return load_of(model, context_length=context_length, **size, **looped)

    @functools.cache
    def plain_load(layers: int) -> Load:
        return load(plain_model(config, layers))

    layouts: dict[int, list[str]] = {}
    for layout, kept in counts.loops_kept_by_layout(config.num_loops).items():
        layouts.setdefault(kept, []).append(layout)
    looped = {
        ", ".join(names): load(config, kept_loops=kept, mean_loops=mean_loops)
        for kept, names in layouts.items()
    }
    models = plain_models(config, phi)
    plain = {name: load(model) for name, model in models.items()}
    rows = [_row("looped", name, config, each, machine, rate) for name, each in looped.items()]
    rows += [_row(name, None, models[name], each, machine, rate) for name, each in plain.items()]
    verdicts = []
    for measure in MEASURES:
        for layout, ours in looped.items():
            against = {
                name: Comparison(ours, theirs, machine, measure) for name, theirs in plain.items()
            }
            verdicts.append(
                {
                    "measure": measure,
                    "layouts": layout.split(", "),
                    "ratios": {name: each.ratio(rate) for name, each in against.items()},
                    "wins": {name: each.wins(rate=rate) for name, each in against.items()},
                    "turns": asdict(turns(config, against["equal loss"], plain_load, rate)),
                }
            )
    return {
        "machine": asdict(machine),
        "context_length": context_length,
        "num_loops": config.num_loops,
        "mean_loops": config.num_loops if mean_loops is None else mean_loops,
        "rate": rate,
        "phi": phi,
        **size,
        "models": rows,
        "verdicts": verdicts,
    }


def _row(
    name: str,
    layouts: str | None,
    config: ModelConfig,
    load: Load,
    machine: Machine,
    rate: float,
) -> dict[str, Any]:
    full = serve(load, machine)
    return {
        "name": name,
        "layouts": layouts.split(", ") if layouts else [],
        "depth": config.effective_depth(),
        "total_params": counts.total_params(config),
        **asdict(load),
        "step_bytes": load.step_bytes(full.users),
        "prompt_seconds": load.prompt_flops / machine.flops_per_second,
        "full": asdict(full),
        "at_rate": asdict(serve(load, machine, rate=rate)),
    }


# --- printing -------------------------------------------------------------------------------------


def _print_serving(subject: str, report: dict[str, Any]) -> None:
    screen, machine = console(), report["machine"]
    screen.print(
        f"{subject}: {machine['memory_bytes'] / 1e9:,.0f} GB, "
        f"{machine['bytes_per_second'] / 1e12:.3g} TB/s, "
        f"{human_flops(round(machine['flops_per_second']))}/s; {report['num_loops']} loops, "
        f"{report['mean_loops']:g} on average; {report['context_length']:,} tokens per user\n"
    )
    print_table(screen, _models_table(report))
    screen.print()
    print_table(screen, _bytes_table(report))
    screen.print()
    if not any(row["full"]["users"] for row in report["models"] if row["layouts"]):
        screen.print(_lack(report))
        return
    print_table(screen, _verdicts_table(report))
    screen.print()
    print_table(screen, _turns_table(report))
    screen.print()
    screen.print(_in_a_sentence(report))


def _layout(names: list[str]) -> str:
    """One name for the layouts that keep equally many loops, and so the same bytes."""
    return next((name for name in ("per_loop", "last_loop") if name in names), names[0])


def _name(row: dict[str, Any]) -> str:
    return f"looped, {_layout(row['layouts'])}" if row["layouts"] else f"plain, {row['name']}"


def _models_table(report: dict[str, Any]) -> Table:
    at = f"at {report['rate']:g}/s"
    columns = (
        "model",
        "depth",
        "params",
        "GB",
        "users",
        "tok/s each",
        "total",
        at,
        "total",
        "cost/1M",
    )
    table = number_table(*columns, title="Decoding: full memory, then users who get the rate")
    for row in report["models"]:
        full, limited = row["full"], row["at_rate"]
        cost = limited["cost_per_million_tokens"]
        table.add_row(
            _name(row),
            str(row["depth"]),
            human_count(row["total_params"]),
            f"{row['weight_bytes'] / 1e9:.2f}",
            f"{full['users']:,}",
            f"{full['tokens_per_second_each']:.1f}",
            f"{full['tokens_per_second']:,.0f}",
            f"{limited['users']:,}",
            f"{limited['tokens_per_second']:,.0f}",
            "-" if cost is None else f"{cost:.3g}",
        )
    return table


def _bytes_table(report: dict[str, Any]) -> Table:
    columns = ("model", "keeps/user", "reads/user", "reads/step", "FLOP/byte", "limit", "prompt")
    table = number_table(*columns, title="Bytes: cache per user; a step at full memory; one prompt")
    for row in report["models"]:
        table.add_row(
            _name(row),
            f"{row['kept_bytes'] / 1e9:.3f} GB",
            f"{row['cache_read_bytes'] / 1e9:.3f} GB",
            f"{row['step_bytes'] / 1e9:,.1f} GB",
            f"{row['full']['flops_per_byte']:.1f}",
            row["full"]["limit"],
            f"{row['prompt_seconds']:.3f} s",
        )
    return table


def _lack(report: dict[str, Any]) -> str:
    """What is missing where not even one user of the looped model fits."""
    row, machine = report["models"][0], report["machine"]
    least = min(each["kept_bytes"] for each in report["models"] if each["layouts"])
    needed = (row["weight_bytes"] + least) / (1 - machine["reserve"])
    times = -(-needed // machine["memory_bytes"])
    return (
        f"It does not fit: weights and one user need {needed / 1e9:,.0f} GB with the reserve, "
        f"{times:,.0f} times this memory (--gpus)."
    )


def _in_a_sentence(report: dict[str, Any]) -> str:
    """The verdict against the plain model of equal predicted loss."""
    depth = next(row["depth"] for row in report["models"] if row["name"] == "equal loss")
    said = []
    for measure in MEASURES:
        each = [row for row in report["verdicts"] if row["measure"] == measure]
        won = [_layout(row["layouts"]) for row in each if row["wins"]["equal loss"]]
        every = "every layout" if len(won) == len(each) else ", ".join(won)
        said.append(f"{IN_WORDS[measure]}: {'wins with ' + every if won else 'loses'}")
    return (
        f"Against {depth} plain layers, which phi {report['phi']:g} says reach an equal loss, "
        f"looping in {'; in '.join(said)}."
    )


def _verdicts_table(report: dict[str, Any]) -> Table:
    names = list(report["verdicts"][0]["ratios"])
    title = f"Looping against plain models, at {report['rate']:g} tokens/s for each user"
    table = number_table("in", "looped", *names, title=title)
    for verdict in report["verdicts"]:
        cells = []
        for name in names:
            ratio, word = verdict["ratios"][name], "wins" if verdict["wins"][name] else "loses"
            if ratio is None:
                word = "wins, only it fits" if verdict["wins"][name] else "neither fits"
            cells.append(word if ratio in (None, 1) else f"{word} {ratio - 1:+.1%}")
            if ratio == 1:
                cells[-1] = "equal"
        table.add_row(IN_WORDS[verdict["measure"]], _layout(verdict["layouts"]), *cells)
    return table


def _turns_table(report: dict[str, Any]) -> Table:
    title = f"Where looping wins against equal loss (phi {report['phi']:g})"
    table = number_table("in", "looped", "phi", "rate of a user", "users at once", title=title)
    for verdict in report["verdicts"]:
        found = Turns(**verdict["turns"])
        table.add_row(
            IN_WORDS[verdict["measure"]],
            _layout(verdict["layouts"]),
            "none up to 1" if found.phi is None else f"{found.phi:.3f} or more",
            ", ".join(_rates(low, high) for low, high in found.rates) or "none",
            ", ".join(_batches(low, high) for low, high in found.batches) or "none",
        )
    return table


def _rates(low: float, high: float) -> str:
    return f"up to {high:.1f}" if low == 0 else f"{low:.1f} to {high:.1f}"


def _batches(low: int, high: int | None) -> str:
    return f"{low:,} or more" if high is None else f"{low:,} to {high:,}"
