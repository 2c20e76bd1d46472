import pytest

from openmythos.analysis.budget import OverBudget
from openmythos.analysis.pairs import text_pairs
from openmythos.analysis.record import intervene_at
from tests.analysis.family import model_of
from tests.strategies import random_tokens, unchecked

MODEL = model_of("signals")
CORPUS = random_tokens(MODEL.config, 200)
PAIRS, FIT = text_pairs(CORPUS, 6, 12), text_pairs(CORPUS, 6, 12, seed=1).tokens


def test_batches_do_not_change_what_interventions_show() -> None:
    with unchecked():
        whole = intervene_at(MODEL, PAIRS, FIT, 2, 1 << 30)
        small = intervene_at(MODEL, PAIRS, FIT, 2, 400_000)
    for each in zip(whole.reading.necessity, small.reading.necessity, strict=True):
        assert each[0].tolist() == pytest.approx(each[1].tolist(), abs=1e-4, nan_ok=True)
    assert whole.operators.neighbours == pytest.approx(small.operators.neighbours, rel=1e-4)
    assert whole.novelty is not None and whole.left_out == {}
    assert min(whole.operators.neighbours) > 0
    assert whole.difference.num_working == small.difference.num_working


def test_what_does_not_fit_is_left_out_or_refused() -> None:
    with unchecked():
        one = intervene_at(MODEL, PAIRS, FIT, 1, 1 << 30)
        narrow = intervene_at(MODEL, PAIRS, FIT, 2, 60_000)
        with pytest.raises(OverBudget, match="one row needs more"):
            intervene_at(MODEL, PAIRS, FIT, 2, 2_000)
    assert one.novelty is None and "one loop" in one.left_out["novelty"]
    assert one.to_dict()["novelty"] is None
    assert narrow.novelty is None and "one row needs more" in narrow.left_out["novelty"]
