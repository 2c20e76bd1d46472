"""Training on two ranks: one launch for the cases of all modules."""

import pytest

from tests.train import ranks_expert, ranks_mix, ranks_save, ranks_shard
from tests.train.launch import Case, Outcome, launch, name_of

MODULES = (ranks_shard, ranks_save, ranks_expert, ranks_mix)
CASES: list[Case] = [case for module in MODULES for case in module.CASES]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return launch(2, CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(case).split(".")[-1])
def test_on_two_ranks(case: Case, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name_of(case)]
    assert outcome.error is None, outcome.error
