import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openmythos.config import ModelConfig, counts
from openmythos.config.presets import PRESETS, preset
from openmythos.config.schema import apply_overrides, from_dict, to_dict
from openmythos.ops.cpu import choice
from tests.command.conftest import Invoke, refused

TABLE_WIDTH = 100  # characters: what a terminal shows without wrapping


def error(invoke: Invoke, *arguments: str) -> str:
    message = refused(invoke, *arguments)
    assert "\n" not in message
    return message


def inspected(invoke: Invoke, *arguments: str) -> dict[str, Any]:
    return json.loads(invoke("inspect", *arguments, "--json"))


def test_inspect_as_json_is_exact(invoke: Invoke) -> None:
    report = inspected(invoke, "mythos-1b", "--num-loops", "1,8", "--context-length", "100")
    config = preset("mythos-1b")
    assert from_dict(ModelConfig, report["config"]) == config
    assert report["total_params"] == sum(part["params"] for part in report["parts"])
    assert report["active_params"] == sum(part["active_params"] for part in report["parts"])
    assert [row["num_loops"] for row in report["depths"]] == [1, 8]
    figures = counts.count(config, num_loops=8, context_length=100)
    row = report["depths"][1]
    assert row["inference_flops_per_token"] == figures.inference_flops_per_token
    assert row["training_flops_per_token"] == figures.training_flops_per_token
    assert row["kv_bytes_per_token"]["per_loop"] == figures.kv_bytes_per_token
    assert (
        row["kv_bytes_per_token"]["last_loop"]
        == report["depths"][0]["kv_bytes_per_token"]["per_loop"]
    )
    assert report["weight_bytes"]["bfloat16"] == 2 * report["total_params"]
    assert report["training_bytes"] == 16 * report["total_params"]


def test_inspect_huginn_states_flops_and_cache_by_depth(invoke: Invoke) -> None:
    """Cache: 2 + 4 r + 2 layers of 55 heads of 96, two bytes a number (huginn.md, section 2.2)."""
    report = inspected(invoke, "huginn-3.5b", "--num-loops", "4,32,64", "--context-length", "1")
    mib = [row["kv_bytes_per_token"]["per_loop"] / 2**20 for row in report["depths"]]
    assert mib == [pytest.approx(size, abs=0.005) for size in (0.403, 2.66, 5.24)]
    block, width = 4 * 5280**2 + 3 * 5280 * 17_920, 5280
    for row, loops in zip(report["depths"], (4, 32, 64), strict=True):
        macs = (4 + 4 * loops) * (block + 2 * width) + (1 + loops) * width**2 + 65_536 * width
        assert row["inference_flops_per_token"] == 2 * macs
    text = invoke("inspect", "huginn-3.5b", "--num-loops", "4,32,64")
    assert all(size in text for size in ("412 KiB", "2.66 MiB", "5.24 MiB", "118 GFLOP"))


def test_inspect_parts_add_up_to_a_forward(invoke: Invoke) -> None:
    report = inspected(invoke, "mythos-1b", "--num-loops", "3")
    flops = sum(part["flops_per_token"] * (3 if part["looped"] else 1) for part in report["parts"])
    assert flops == counts.forward_flops(preset("mythos-1b"), num_loops=3)


@pytest.mark.parametrize("name", PRESETS)
def test_inspect_tables_fit(invoke: Invoke, name: str) -> None:
    output = invoke("inspect", name)
    tables = output[output.index("Parameters by part") : output.index("Memory of all")]
    assert max(map(len, tables.splitlines())) <= TABLE_WIDTH
    for words in ("Parameters by part", "core.attention", "last_loop", "Memory of training"):
        assert words in output


def test_inspect_depths_default_to_the_configs_neighbourhood(invoke: Invoke) -> None:
    usual = preset("tiny").num_loops
    depths = [row["num_loops"] for row in inspected(invoke, "tiny")["depths"]]
    assert depths[0] == 1
    assert {usual, 2 * usual} <= set(depths)
    assert inspected(invoke, "tiny")["context_length"] <= preset("tiny").max_seq_len


def test_inspect_applies_overrides_in_turn(invoke: Invoke) -> None:
    report = inspected(invoke, "tiny", "--set", "d_model=64", "--set", "injection=add")
    assert report["config"]["d_model"] == 64
    assert report["config"]["injection"] == {"kind": "add"}
    assert report["total_params"] < inspected(invoke, "tiny")["total_params"]


def test_inspect_reads_files_and_folders(invoke: Invoke, tmp_path: Path) -> None:
    config = apply_overrides(preset("tiny"), ["d_model=48"])
    plain = tmp_path / "some.json"
    plain.write_text(json.dumps(to_dict(config)), encoding="utf-8")
    checkpoint, run_folder = tmp_path / "checkpoint", tmp_path / "run"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    run_folder.mkdir()
    nested = {"steps": 3, "model": to_dict(config)}
    (run_folder / "config.json").write_text(json.dumps(nested), encoding="utf-8")
    for source in (plain, checkpoint, run_folder, run_folder / "config.json"):
        report = inspected(invoke, str(source))
        assert report["source"] == str(source)
        assert from_dict(ModelConfig, report["config"]) == config


def test_inspect_reads_a_checkpoints_own_config(invoke: Invoke, tmp_path: Path) -> None:
    config = apply_overrides(preset("tiny"), ["d_model=48"])
    file = tmp_path / "config.json"
    data = {"format": "openmythos", "format_version": 1, **to_dict(config)}
    file.write_text(json.dumps(data), encoding="utf-8")
    for source in (file, tmp_path):
        assert from_dict(ModelConfig, inspected(invoke, str(source))["config"]) == config


# --- baselines -----------------------------------------------------------------------------------


def test_baselines_as_json(invoke: Invoke) -> None:
    context = 100
    report = inspected(invoke, "parcae-140m", "--baselines", "--context-length", str(context))
    rows = report["baselines"]
    assert [row["match"] for row in rows] == ["parameters", "flops", "memory"]
    compared = ("total_params", "inference_flops_per_token", "memory_bytes")
    for row, name in zip(rows, compared, strict=True):
        config = from_dict(ModelConfig, row["config"])
        figures = counts.count(config, context_length=context)
        assert row["total_params"] == figures.total_params
        assert row["inference_flops_per_token"] == figures.inference_flops_per_token
        memory = 2 * figures.total_params + context * figures.kv_bytes_per_token
        assert row["memory_bytes"] == memory
        assert row["value"] == row[name]
        assert row["num_loops"] == config.num_loops == 1
        assert abs(row["deviation"]) < 0.02
    assert rows[0]["target"] == report["total_params"]
    at_default = [row for row in report["depths"] if row["num_loops"] == 8]
    assert rows[1]["target"] == at_default[0]["inference_flops_per_token"]
    assert "baselines" not in inspected(invoke, "parcae-140m")


@pytest.mark.parametrize("name", PRESETS)
def test_baselines_as_a_table(invoke: Invoke, name: str) -> None:
    lines = invoke("inspect", name, "--baselines").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Plain models that match"))
    assert max(map(len, lines[start:])) <= TABLE_WIDTH
    names = [line.split("  ")[0] for line in lines[start + 1 : start + 6]]
    assert names == ["equal in", "(this model)", "parameters", "flops", "memory"]


def test_errors_say_what_is_wrong(invoke: Invoke, tmp_path: Path) -> None:
    unknown = error(invoke, "inspect", "mythos-1x")
    assert "'mythos-1x' is neither a file nor a folder" in unknown
    assert "did you mean 'mythos-1" in unknown
    assert "holds no config.json" in error(invoke, "inspect", str(tmp_path))
    file = tmp_path / "config.json"
    file.write_text("{", encoding="utf-8")
    assert f"{file} is not JSON" in error(invoke, "inspect", str(tmp_path))
    file.write_text('{"vocab_siz": 3}', encoding="utf-8")
    wrong = error(invoke, "inspect", str(file))
    assert wrong.startswith(f"{file}: unknown key 'vocab_siz'; did you mean 'vocab_size'?")
    for data, said in (([1] * 900_000, "a list"), ("tiny", "text"), (None, "null")):
        file.write_text(json.dumps(data), encoding="utf-8")
        whole = f"{file} holds {said}; a model's configuration is an object"
        assert error(invoke, "inspect", str(file)) == whole


@pytest.mark.parametrize("text", ["0", "1,x", "", "4,-1"])
def test_bad_num_loops(invoke: Invoke, text: str) -> None:
    assert f"--num-loops is {text!r}" in error(invoke, "inspect", "tiny", "--num-loops", text)


def test_bad_context_length_and_override(invoke: Invoke) -> None:
    most = preset("tiny").max_seq_len
    for context in (0, most + 1):
        message = error(invoke, "inspect", "tiny", "--context-length", str(context))
        assert message == (
            f"--context-length is {context}; it must be 1 to {most}, the model's max_seq_len"
        )
    assert "did you mean 'd_model'" in error(invoke, "inspect", "tiny", "--set", "d_modl=3")


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys; from openmythos.command import inspect; "
        "inspect.inspect('mythos-1t', as_json=True); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"


def test_kernels_of_this_machine(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "timings.json"
    monkeypatch.setattr(choice, "timings_file", lambda num_threads: path)
    report = json.loads(invoke("inspect", "--kernels", "--json"))
    assert report["mode"] == "ours" and report["products"] == {}
    assert "no product has been timed yet" in invoke("inspect", "--kernels")
    timing = {"ours": 1e-6, "torch": 2e-6}
    path.write_text(json.dumps({"linear 4 x 8, rows 1": timing}), encoding="utf-8")
    table = invoke("inspect", "--kernels")
    assert "linear 4 x 8, rows 1" in table and "ours" in table and "2.0" in table
    assert "MODEL is 'tiny'; it must be left out" in error(invoke, "inspect", "tiny", "--kernels")
    assert "give a MODEL" in error(invoke, "inspect")
