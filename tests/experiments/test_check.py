from experiments.board import studies
from experiments.check import complaints
from experiments.own_process import ROOT


def test_every_page_is_what_the_committed_results_say() -> None:
    assert complaints(studies(ROOT / "experiments"), ROOT) == []
