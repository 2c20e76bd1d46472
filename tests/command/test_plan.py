import json
from pathlib import Path
from typing import Any

import pytest

from openmythos.config.schema import to_dict
from openmythos.plan.serving import GPUS, Machine, load_of, serve
from tests.command.conftest import Invoke, refused
from tests.plan.test_serving import TABLE_BY_HAND, looped

TABLE_WIDTH = 110


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "looped.json"
    path.write_text(json.dumps(to_dict(looped())), encoding="utf-8")
    return path


def planned(invoke: Invoke, *arguments: object) -> dict[str, Any]:
    return json.loads(invoke("plan", *arguments, "--serve", "--json"))


def test_plan_prints_the_three_baselines_and_what_would_turn_the_verdict(
    invoke: Invoke, file: Path
) -> None:
    text = " ".join(invoke("plan", file, "--serve").split())
    for name, (size, users, each, total, at_rate) in TABLE_BY_HAND.items():
        row = f"{size} {users} {each} {total} {at_rate}"
        assert row in text, name
    assert "users last_loop 0.530 or more up to 28.1 97 or more" in text
    assert "tokens/s per_loop wins +2.6% loses -60.6% loses -44.7%" in text
    assert "Against 19 plain layers" in text and "in users: loses; in tokens/s: loses." in text
    turned = " ".join(invoke("plan", file, "--serve", "--phi", "0.53").split())
    assert "looping in users: wins with every_2, last_loop; in tokens/s: loses." in turned


def test_plan_as_json_is_what_serving_computes(invoke: Invoke, file: Path) -> None:
    options = ("--rate", 12, "--gpus", 2, "--price", 3, "--mean-loops", 2.5, "--reserve", 0.2)
    report = planned(invoke, file, *options, "--context-length", 4096, "--cache-bytes", 1)
    assert report["machine"] == {
        "memory_bytes": 160e9,
        "bytes_per_second": 6.7e12,
        "flops_per_second": 1978e12,
        "reserve": 0.2,
        "price_per_hour": 6.0,
    }
    load = load_of(looped(), context_length=4096, mean_loops=2.5, cache_bytes=1)
    row = report["models"][0]
    assert row["layouts"] == ["per_loop"] and row["kept_bytes"] == load.kept_bytes
    served = serve(load, Machine(**report["machine"]), rate=12.0)
    assert row["at_rate"]["users"] == served.users
    assert row["at_rate"]["cost_per_million_tokens"] == served.cost_per_million_tokens
    layouts = [name for row in report["models"] for name in row["layouts"]]
    assert layouts == ["per_loop", "every_2", "every_4", "last_loop", "first_loop"]
    own = ("--memory-gb", 141, "--bandwidth-tb", 4.8, "--num-loops", 1)
    report = planned(invoke, file, *own)
    assert Machine(**report["machine"]) == GPUS["h200"] and report["num_loops"] == 1


@pytest.mark.parametrize("name", ["tiny", "huginn-3.5b"])
def test_plan_of_a_preset_fits_a_line(invoke: Invoke, name: str) -> None:
    output = invoke("plan", name, "--serve")
    assert max(map(len, output.splitlines()[:-1])) <= TABLE_WIDTH, output
    assert "plain, equal loss" in output


def test_plan_says_what_does_not_fit(invoke: Invoke) -> None:
    output = invoke("plan", "mythos-1t", "--serve")
    assert "weights and one user need 2,242 GB with the reserve, 29 times this memory" in output
    assert "does not fit" not in invoke("plan", "mythos-1t", "--serve", "--gpus", "29")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tiny",), "say what to plan: its serving with --serve, or its training with"),
        (("tiney", "--serve"), "did you mean 'tiny'"),
        (("tiny", "--serve", "--gpu", "h1"), "--gpu is 'h1'; it must be one of a100, h100, h200"),
        (("tiny", "--serve", "--rate", "-1"), "--rate is -1.0; it must be at least 0"),
        (("tiny", "--serve", "--rate", "nan"), "--rate is nan; it must be a number"),
        (("tiny", "--serve", "--phi", "3"), "phi is 3.0; it must be in 0..2"),
        (("tiny", "--serve", "--memory-gb", "0"), "--memory-gb is 0.0; it must be above 0"),
        (("tiny", "--serve", "--reserve", "1"), "reserve is 1.0; it must be in [0, 1)"),
        (("tiny", "--serve", "--mean-loops", "99"), "mean_loops is 99.0; it must be in 1.."),
        (("tiny", "--serve", "--num-loops", "0"), "num_loops"),
        (("tiny", "--serve", "--context-length", "0"), "--context-length is 0; it must be 1 to"),
    ],
)
def test_plan_refuses_in_one_line(invoke: Invoke, arguments: tuple[str, ...], said: str) -> None:
    message = refused(invoke, "plan", *arguments)
    assert said in message and "\n" not in message
