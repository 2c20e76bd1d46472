import json
from functools import partial

from tests.stress.ranks import HERE, all_cases, table_of
from tests.train.launch import name_of, on_ranks


def trains(name: str) -> None:
    """A case with arms."""


@on_ranks(2)
def stops_on_two() -> None:
    """A case without."""


def test_the_table_says_what_passed_what_failed_and_what_did_not_run() -> None:
    cases = [*(partial(trains, name) for name in ("dense", "mla", "tied")), stops_on_two]
    found = {"loss": 1e-15, "grad_norm": 2e-15, "weights": 3e-16, "rho": 0.0}
    name = f"{__name__}:trains"
    ranks = {
        "1": {f"{name}:dense": {"found": found}, f"{name}:mla": {"error": "too far"}},
        "2": {f"{__name__}:stops_on_two": {"found": None}},
    }
    page = table_of(50, cases, ranks)
    assert "fp64, 50 steps" in page and page.endswith(".\n")
    one, two = page.split("## 1 rank\n")[1].split("## 2 ranks\n")
    assert one.strip().split("\n\n") == [
        "| arm | loss | gradient norm | weights |\n|---|---|---|---|\n"
        "| dense | 1e-15 | 2e-15 | 3e-16 |",
        "Failed: trains: mla.",
        "Not run: trains: tied.",
    ]
    assert "Passed, too: stops on two.\n\n" in two
    assert "Not run: trains: dense; trains: mla; trains: tied.\n" in two


def test_the_page_is_what_the_results_say() -> None:
    stored = json.loads((HERE / "ranks.json").read_text(encoding="utf-8"))
    cases = all_cases()
    assert table_of(stored["steps"], cases, stored["ranks"]) == (HERE / "ranks.md").read_text()
    names = [name_of(case) for case in cases]
    assert len(set(names)) == len(names) > 60
    assert all(set(results) <= set(names) for results in stored["ranks"].values())
    errors = [
        name for found in stored["ranks"].values() for name in found if "error" in found[name]
    ]
    assert errors == []
