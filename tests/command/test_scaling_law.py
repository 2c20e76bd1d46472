import json
from pathlib import Path
from typing import Any

import pytest

from openmythos.plan.run_table import read_runs
from openmythos.plan.scaling_law import PARCAE
from tests.command.conftest import Invoke, refused


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.command.conftest import invoke_app

    out = tmp_path_factory.mktemp("laws") / "parcae.csv"
    said = invoke_app("scaling-law", "simulate", "parcae-140m", "--noise", 0.002, "--out", out)
    assert str(out) in said and "T* ~ C^0.40, D* ~ C^0.78" in said
    return out


def fitted(invoke: Invoke, *arguments: object) -> dict[str, Any]:
    return json.loads(invoke("scaling-law", "fit", *arguments, "--json"))


def test_fit_of_a_simulated_table(invoke: Invoke, table: Path) -> None:
    report = fitted(invoke, table, "--resamples", 50)
    law = report["laws"]["unrolled"]
    assert law["num_losses"] == 36 and law["formula"] == "E + A N^-a + B D^-b"
    for name, value in PARCAE["parcae-140m"].values.items():
        low, high = law["intervals"][name]
        assert low < law["values"][name] < high
        assert law["values"][name] == pytest.approx(value, rel=1.0 if name == "A" else 0.2)
    assert report["refused"].keys() >= {"test_time", "unified"}
    assert len(report["optimum"]) == 2
    half = report["optimum"][0]
    assert "half of the loops" in half["convention"]
    assert half["loops_exponent"] == pytest.approx(0.47, abs=0.05)
    assert half["tokens_exponent"] == pytest.approx(0.63, abs=0.03)


def test_fit_prints_constants_refusals_and_the_optimum(
    invoke: Invoke, table: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "laws.png"
    output = invoke("scaling-law", "fit", table, "--resamples", 20, "--plot", picture)
    assert "unrolled: L = E + A N^-a + B D^-b (36 losses, " in output
    assert "not fitted: test_time: the runs have no test_loops" in output
    assert "The optimum of unrolled" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    one = fitted(invoke, table, "--law", "unrolled", "--resamples", 0)
    assert list(one["laws"]) == ["unrolled"] and one["laws"]["unrolled"]["intervals"] == {}


def test_simulate_as_json_has_the_runs(invoke: Invoke) -> None:
    report = json.loads(invoke("scaling-law", "simulate", "parcae-370m", "--json"))
    assert report["num_runs"] == len(report["runs"]) == 18
    assert report["values"] == PARCAE["parcae-370m"].values
    assert set(report["runs"][0]) == {"once", "loop", "num_loops", "tokens", "loss"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fit",), "give RUNS: run folders, or a .csv or .jsonl table of runs"),
        (("fit", "TABLE", "--law", "none"), "law is 'none'; it must be one of unrolled, "),
        (("fit", "TABLE", "--law", "test_time"), "test_time: the runs have no test_loops"),
        (("fit", "pyproject.toml"), "is no run folder and no .csv or .jsonl table"),
        (("simulate", "tiny"), "give one of parcae-140m, parcae-370m"),
        (("simulate",), "give one of parcae-140m, parcae-370m"),
    ],
)
def test_refused_in_one_line(
    invoke: Invoke, table: Path, arguments: tuple[str, ...], said: str
) -> None:
    given = [str(table) if word == "TABLE" else word for word in arguments]
    message = refused(invoke, "scaling-law", *given)
    assert said in message and "\n" not in message


def test_a_runs_folder_is_read(invoke: Invoke, text_run: Path) -> None:
    runs = read_runs([text_run])
    assert runs["test_loops"].tolist() == [1.0, 2.0] and (runs["loss"] > 0).all()
    assert runs["tokens"].tolist() == [4.0 * 4 * 32] * 2
    message = refused(invoke, "scaling-law", "fit", text_run, "--law", "test_time")
    assert message == "test_time: 2 losses cannot determine 3 constants (E, Z, z)"
