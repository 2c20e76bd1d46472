import functools
import json

import pytest
import torch

from openmythos.analysis.difference import (
    LoopDifference,
    is_working,
    loop_difference,
    neighbour_bits,
)
from openmythos.analysis.reading import reading_map
from tests.analysis.planted import (
    HOPS,
    Average,
    IndexedRelay,
    OneShot,
    Planted,
    Relay,
    planted_pairs,
)

PAIRS = planted_pairs(200)


@functools.cache
def differences(planted: type[Planted]) -> LoopDifference:
    return loop_difference(reading_map(planted(), PAIRS, HOPS), num_samples=200)


@pytest.mark.parametrize("planted", [Relay, IndexedRelay])
def test_a_relay_has_one_bit_between_all_loops(planted: type[Planted]) -> None:
    found = differences(planted)
    assert found.num_working == HOPS
    assert found.bits == pytest.approx([1.0] * (HOPS - 1), abs=1e-6)
    assert found.mean_bits > 0.95 and found.mean_interval[0] > 0.95
    assert found.null[1] < 0.05
    assert found.num_working_interval == (HOPS, HOPS)


def test_an_average_has_no_bits_and_all_loops_work() -> None:
    found = differences(Average)
    assert found.num_working == HOPS
    assert found.mean_bits < 0.05 and found.mean_interval[1] < 0.05
    assert found.mass == pytest.approx([1.0] * HOPS, abs=1e-5)
    assert found.mean_interval[1] < differences(Relay).mean_interval[0]


def test_of_one_shot_one_loop_works() -> None:
    found = differences(OneShot)
    assert found.working == (0,)
    assert found.num_working_interval == (1, 1)
    assert found.mean_bits is None and found.mean_interval is None
    assert set(found.bits) == {None} == set(found.bits_interval)
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["num_working"] == 1 and stored["mean_bits"] is None


def test_bits_by_hand() -> None:
    rows = [[0.5, 0.5, 0.0], [0.0, 0.8, 0.8], [0.0, 0.0, 0.04], [0.3, -9.0, 0.0], [0.2, 0.0, 0.6]]
    shares = torch.tensor([rows], dtype=torch.float64)
    works = is_working(shares)
    assert works.tolist() == [[True, True, False, True, True]]
    (bits,) = neighbour_bits(shares, works)
    # (1/2, 1/2, 0) and (0, 1/2, 1/2): the mean (1/4, 1/2, 1/4) has 1.5 bits, each row has 1.
    assert float(bits[0]) == pytest.approx(0.5)
    assert bits[1:3].isnan().all()
    # (1, 0, 0) and (1/4, 0, 3/4): H(5/8, 3/8) - H(1/4, 3/4) / 2
    assert float(bits[3]) == pytest.approx(0.954434003 - 0.811278124 / 2)


def test_no_work_is_an_answer() -> None:
    found = reading_map(Relay(), planted_pairs(20), HOPS)
    none = loop_difference(
        type(found)(
            **{
                **vars(found),
                "corrupted_at": torch.zeros_like(found.corrupted_at),
                "always": torch.zeros_like(found.always),
            }
        ),
        num_samples=20,
        num_shuffles=5,
    )
    assert none.num_working == 0 and none.working == ()
    assert none.mass == (0.0,) * HOPS
    assert none.mean_bits is None and none.null is None
