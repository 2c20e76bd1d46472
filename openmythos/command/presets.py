"""``openmythos presets``: the named models and what they cost."""

import json
from typing import Any

from openmythos.command.option import AsJson
from openmythos.command.table import human_bytes, human_count, number_table
from openmythos.config import MoEConfig, counts
from openmythos.config.presets import PRESETS, preset
from openmythos.terminal import console, print_table


def presets(as_json: AsJson = False) -> None:
    """List the presets with their sizes, depths and cache bytes."""
    rows = [preset_row(name) for name in PRESETS]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = ("preset", "total", "active", "experts", "vocabulary", "d_model", "layers", "loops")
    table = number_table(*columns, "depth", "KV/token")
    for row in rows:
        experts = f"{row['num_experts']}, top {row['num_experts_per_token']}"
        table.add_row(
            row["name"],
            human_count(row["total_params"]),
            human_count(row["active_params"]),
            experts if row["num_experts"] else "dense",
            f"{row['vocab_size']:,}",
            f"{row['d_model']:,}",
            "/".join(str(number) for number in row["layers"]),
            str(row["num_loops"]),
            str(row["effective_depth"]),
            human_bytes(row["kv_bytes_per_token"]),
        )
    screen = console()
    print_table(screen, table)
    screen.print(
        "layers: prelude/core/coda; depth: layers a token passes; KV: bfloat16, every loop"
    )


def preset_row(name: str) -> dict[str, Any]:
    """One preset as ``presets --json`` lists it; ``layers`` counts prelude, core and coda."""
    config = preset(name)
    figures = counts.count(config)
    experts = config.core_ff if isinstance(config.core_ff, MoEConfig) else None
    return {
        "name": name,
        "total_params": figures.total_params,
        "active_params": figures.active_params,
        "effective_depth": figures.effective_depth,
        "num_loops": figures.num_loops,
        "kv_bytes_per_token": figures.kv_bytes_per_token,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "layers": [config.num_prelude_layers, config.num_core_layers, config.num_coda_layers],
        "attention": config.attention.kind,
        "max_seq_len": config.max_seq_len,
        "num_experts": experts.num_experts if experts else 0,
        "num_experts_per_token": experts.num_experts_per_token if experts else 0,
        "num_shared_experts": experts.num_shared_experts if experts else 0,
    }
