"""What a layout over processes refuses."""

import pytest

from openmythos.config.parallel import ParallelConfig
from openmythos.config.schema import from_dict, to_dict


def test_ranks_of_a_layout() -> None:
    layout = ParallelConfig(dp_replicate=2, dp_shard=4)
    assert (layout.num_ranks, layout.num_row_ranks) == (8, 8)
    assert ParallelConfig().num_ranks == 1
    assert from_dict(ParallelConfig, to_dict(layout)) == layout


def test_only_ranks_that_exchange_in_a_loop_run_the_same_loops() -> None:
    assert not ParallelConfig(dp_shard=4).same_loops
    assert ParallelConfig(dp_shard=4, core_gather="loop").same_loops
    assert not ParallelConfig(core_gather="loop").same_loops


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dp_shard": 0}, "dp_shard is 0; it must be at least 1"),
        ({"dp_shard": 4, "ep": 3}, "ep is 3; it must be a divisor of parallel.dp_shard=4"),
        ({"core_gather": "never"}, "core_gather is 'never'; allowed: 'step', 'loop'"),
        ({"dp_shard": 2, "ep": 2}, "parallel.ep is 2; it must be 1"),
        ({"tp": 2}, "parallel.tp is 2; it must be 1"),
    ],
)
def test_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_dict(ParallelConfig, given)
