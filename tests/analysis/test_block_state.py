import json

import pytest
import torch

from openmythos.analysis.block_state import BlockStates, BlockStateSums
from tests.analysis.family import planted_loops

VALID = torch.ones(1, 1, dtype=torch.bool)


def states_of(places: list[list[list[float]]]) -> BlockStates:
    """From the places of each loop, for one token."""
    inside = torch.tensor(places)[:, :, None, None]
    sums = BlockStateSums()
    for loop in planted_loops(torch.zeros(len(places) + 1, 1, 1, 2), inside):
        sums.add(loop, VALID)
    return sums.states()


def test_a_cycle_has_distinct_limits_and_no_net_movement() -> None:
    cycle = [[3.0, 0.0], [3.0, 4.0], [-3.0, 4.0]]
    found = states_of([[[1.0, 0.0], *cycle[1:]], cycle, cycle])
    assert found.places == ("input", "block 1", "block 2")
    assert found.num_loops == 3
    assert found.norm[0] == (1.0, 3.0, 3.0) and found.norm[2] == (5.0, 5.0, 5.0)
    assert found.relative_step[0] == (None, pytest.approx(2 / 3), 0.0)
    assert found.relative_step[1] == (None, 0.0, 0.0)
    assert found.net_movement == (None, 0.0, 0.0)
    assert found.distance[2][1][2] == pytest.approx(6 / 5) == found.distance[2][2][1]
    assert found.distance[2][0][1] == pytest.approx(4 / 4)
    assert found.distance[2][1][1] == 0.0
    assert found.between_blocks == pytest.approx(6 / 5)


def test_a_straight_way_moves_on() -> None:
    line = torch.arange(1.0, 5.0)
    found = states_of([[[x, 0.0], [x + 1, 0.0]] for x in line.tolist()])
    assert found.net_movement == (None, 1.0, 1.0, 1.0)
    assert found.between_blocks is None
    assert json.loads(json.dumps(found.to_dict()))["between_blocks"] is None
