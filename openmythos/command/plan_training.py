"""The training mode of ``openmythos plan``: memory, exchanges and FLOPs per device, a layout."""

import json
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from openmythos.command.table import human_bytes, human_count, human_flops, number_table
from openmythos.config import ModelConfig
from openmythos.config.schema import require, to_dict
from openmythos.plan.choice import Plan, plan_training
from openmythos.plan.serving import Machine
from openmythos.plan.training import Cost, Links, Work, cost_of
from openmythos.terminal import console, print_table

GIB = 2**30
DRY_RUNS = ("shards", "step")
OPTIMIZERS = ("muon", "adamw")
GATHERS = ("step", "loop")

Devices = Annotated[
    int | None, typer.Option(help="Plan its training on so many devices.", min=1, max=2**20)
]
MemoryGib = Annotated[float | None, typer.Option(help="Of one device, in 2^30 bytes.")]
Rows = Annotated[int, typer.Option(help="Rows that a device trains at once.", min=1)]
Accumulation = Annotated[int, typer.Option(help="Micro-batches of a step.", min=1)]
GradLoops = Annotated[
    int | None,
    typer.Option(help="Last loops with gradients (mean_backprop_depth); default: all.", min=1),
]
Optimizer = Annotated[str, typer.Option(help="muon (with AdamW for vectors and tables) or adamw.")]
DpReplicate = Annotated[
    int | None, typer.Option(help="Copies of the model, each sharded; default: chosen.")
]
Tp = Annotated[int | None, typer.Option(help="Ranks that share every layer; default: chosen.")]
Ep = Annotated[int | None, typer.Option(help="Ranks that share the experts; default: chosen.")]
CoreGather = Annotated[
    str | None, typer.Option(help="Gather the core per step or per loop; default: chosen.")
]
Recompute = Annotated[
    bool | None,
    typer.Option(help="Run every loop again in the backward pass; default: chosen."),
]
NetworkGb = Annotated[
    float, typer.Option(help="What a device sends to other machines, in 10^9 bytes/s.")
]
LinkGb = Annotated[float, typer.Option(help="What it sends inside of its machine of 8 devices.")]
DryRun = Annotated[
    str | None,
    typer.Option(
        help="shards: build the real ones without memory and compare; step: count the exchanges "
        "of a real step, too."
    ),
]


def work(
    context_length: int, rows: int, accumulation: int, optimizer: str, grad_loops: int | None
) -> Work:
    """What a device trains, as the options say."""
    require(optimizer in OPTIMIZERS, "--optimizer", optimizer, f"one of {', '.join(OPTIMIZERS)}")
    return Work(
        context_length=context_length,
        rows=rows,
        accumulation=accumulation,
        optimizer=optimizer,  # type: ignore[arg-type]
        grad_loops=grad_loops,
    )


def run(
    source: str,
    config: ModelConfig,
    devices: int,
    machine: Machine,
    work: Work,
    links: Links,
    fixed: dict[str, Any],
    dry: str | None,
    as_json: bool,
) -> None:
    """Print the plan, and what a dry run finds; ends with status 1 if that differs."""
    require(dry in (None, *DRY_RUNS), "--dry-run", dry, f"one of {', '.join(DRY_RUNS)}")
    plan, report = training_plan(config, devices, machine, work, links, fixed)
    screen = console()
    if not as_json:
        print_training(screen, source, report)
    found = None if dry is None else dry_run(config, plan, dry)
    if as_json:
        print(json.dumps({"source": source, **report, "dry_run": found}, indent=2))
    elif found is not None:
        print_dry_run(screen, found)
    if found is not None and differs(found):
        raise typer.Exit(1)


def training_plan(
    config: ModelConfig,
    devices: int,
    machine: Machine,
    work: Work,
    links: Links,
    fixed: dict[str, Any],
) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what ``plan --devices --json`` prints of it."""
    if fixed.get("core_gather") is not None:
        gather = fixed["core_gather"]
        require(gather in GATHERS, "--core-gather", gather, f"one of {', '.join(GATHERS)}")
    given = {name: value for name, value in fixed.items() if value is not None}
    plan = plan_training(config, devices, machine, work, links=links, fixed=given)
    chosen = plan.chosen
    variants = [
        _cost(
            cost_of(
                config,
                replace(chosen.layout, core_gather=gather),  # type: ignore[arg-type]
                replace(chosen.work, recompute=recompute),
                machine,
                links,
            )
        )
        for gather in (GATHERS if devices > 1 else GATHERS[:1])
        for recompute in (False, True)
    ]
    return plan, {
        "devices": devices,
        "machine": asdict(machine),
        "links": asdict(links),
        "work": {name: value for name, value in asdict(work).items() if name != "recompute"},
        "num_loops": config.num_loops,
        "fits": plan.fits,
        "chosen": _cost(chosen),
        "refused": [{**_cost(each.cost), "reason": each.reason} for each in plan.refused],
        "variants": variants,
    }


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "layout": to_dict(cost.layout),
        "recompute": cost.work.recompute,
        "in_words": cost.in_words,
        "memory": cost.memory,
        "core_gradients": cost.core_gradients,
        "num_bytes": cost.num_bytes,
        "largest": cost.largest,
        "exchanges": [asdict(each) for each in cost.exchanges],
        "flops": cost.flops,
        "compute_seconds": cost.compute_seconds,
        "exchange_seconds": cost.exchange_seconds,
        "limit": cost.limit,
        "tokens": cost.tokens,
        "tokens_per_second": cost.tokens_per_second,
    }


def dry_run(config: ModelConfig, plan: Plan, kind: str) -> dict[str, Any]:
    """Build the chosen layout without memory: at the first, the middle and the last rank."""
    from openmythos.train.dry_run import dry_run_shards, dry_run_step

    layout, world = plan.chosen.layout, plan.chosen.layout.num_ranks
    ranks = sorted({0, world // 2, world - 1})
    found: dict[str, Any] = {
        "shards": [asdict(dry_run_shards(config, layout, rank)) for rank in ranks]
    }
    if kind == "step":
        step = dry_run_step(config, layout, plan.chosen.work)
        found["step"] = [asdict(each) for each in step]
    return found


def differs(found: dict[str, Any]) -> bool:
    """Whether a dry run found anything but what was planned."""
    shards = any(each["differing"] for each in found["shards"])
    return shards or any(each["planned"] != each["counted"] for each in found.get("step", ()))


# --- printing -------------------------------------------------------------------------------------


def print_training(screen: Console, source: str, report: dict[str, Any]) -> None:
    """The tables of a plan."""
    chosen, work, machine = report["chosen"], report["work"], report["machine"]
    usable = machine["memory_bytes"] * (1 - machine["reserve"])
    screen.print(
        f"{source} on {report['devices']:,} device{'s' if report['devices'] > 1 else ''} of "
        f"{machine['memory_bytes'] / GIB:.1f} GiB, of them {usable / GIB:.1f} used; "
        f"{report['num_loops']} loops, rows of {work['context_length']:,} tokens, "
        f"{work['optimizer']}\n"
    )
    print_table(screen, _memory_table(report))
    screen.print()
    if chosen["exchanges"]:
        print_table(screen, _exchange_table(report))
        screen.print()
    seconds = max(chosen["compute_seconds"], chosen["exchange_seconds"])
    screen.print(
        f"A step at best: {human_flops(chosen['flops'])} per device in "
        f"{chosen['compute_seconds']:.3g} s, exchanges in {chosen['exchange_seconds']:.3g} s; "
        f"{chosen['limit']} limits it, at {chosen['compute_seconds'] / seconds:.0%} of the peak "
        f"and {human_count(round(chosen['tokens_per_second']))} tokens/s on all devices."
    )
    if chosen["core_gradients"]:
        screen.print(
            f"In the loops' backward passes the core's whole gradients take "
            f"{human_bytes(chosen['core_gradients'])}."
        )
    largest = f"{_words(chosen['largest'])} take {human_bytes(chosen['memory'][chosen['largest']])}"
    if report["fits"]:
        screen.print(f"Chosen: {chosen['in_words']}; {largest}.")
    else:
        screen.print(
            f"No layout fits. The smallest is {chosen['in_words']}, with "
            f"{human_bytes(chosen['num_bytes'])}; {largest}. More devices, shorter rows "
            "(--context-length) or more memory would help."
        )
    for each in report["refused"]:
        screen.print(f"Refused: {each['in_words']}: {each['reason']}.")


def print_dry_run(screen: Console, found: dict[str, Any]) -> None:
    """What a dry run has found."""
    screen.print()
    for each in found["shards"]:
        names = each["differing"]
        said = f"{each['built'] - each['planned']:+,} bytes off" if names else "0 bytes off"
        where = f": {', '.join(names[:5])}" if names else ""
        screen.print(f"Shards of rank {each['rank']:,}: {each['built']:,} bytes, {said}{where}")
    for each in found.get("step", ()):
        (planned, size), (counted, counted_size) = each["planned"], each["counted"]
        same = each["planned"] == each["counted"]
        said = "as planned" if same else f"planned: {planned:,}, {human_bytes(size)}"
        screen.print(
            f"Exchanges of a step, {_words(each['kind'])}: {counted:,}, "
            f"{human_bytes(counted_size)}, {said}"
        )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _variant(row: dict[str, Any]) -> str:
    again = ", recomputed" if row["recompute"] else ""
    return f"per {row['layout']['core_gather']}{again}"


def _memory_table(report: dict[str, Any]) -> Table:
    rows = report["variants"]
    at = report["chosen"]["layout"]
    copies = f"{at['dp_replicate']} copies, " if at["dp_replicate"] > 1 else ""
    title = (
        f"Memory of a device, GiB ({copies}dp_shard {at['dp_shard']}, ep {at['ep']}, "
        f"tp {at['tp']}; the core gathered)"
    )
    table = number_table("what", *map(_variant, rows), title=title)
    for name in rows[0]["memory"]:
        table.add_row(_words(name), *(f"{row['memory'][name] / GIB:.2f}" for row in rows))
    table.add_row("all", *(f"{row['num_bytes'] / GIB:.2f}" for row in rows))
    return table


def _exchange_table(report: dict[str, Any]) -> Table:
    """Those of the two ways to gather the core, recomputed or not as chosen."""
    again = report["chosen"]["recompute"]
    rows = [row for row in report["variants"] if row["recompute"] is again]
    ways = [row["layout"]["core_gather"] for row in rows]
    columns = [f"{word} per {way}" for way in ways for word in ("number", "GiB")]
    title = f"Exchanges of a step{', loops recomputed' if again else ''}, the core gathered"
    table = number_table("what", "exchange", "ranks", *columns, title=title)
    first, *others = [row["exchanges"] for row in rows]
    for index, each in enumerate(first):
        same = [each, *(other[index] for other in others)]
        cells = [(f"{one['number']:,}", f"{one['num_bytes'] / GIB:.2f}") for one in same]
        flat = [cell for pair in cells for cell in pair]
        table.add_row(each["what"], _words(each["kind"]), f"{each['ranks']:,}", *flat)
    return table
