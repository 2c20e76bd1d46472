from dataclasses import replace

from experiments.matching import Size, matching
from openmythos.config import counts
from tests.strategies import small_config


def test_the_table_counts_parameters_and_flops() -> None:
    looped = small_config(num_loops=4)
    stack = replace(looped.unlooped(), num_core_layers=2)
    table = matching(
        {"loop": Size(looped, 4.5, 8), "stack": Size(stack, 1, 1, passes=2)}, "loop", 9
    )
    loop, plain = table.rows
    low, high = (counts.training_flops(looped, num_loops=n, context_length=9) for n in (4, 5))
    assert loop[1:3] == [f"{counts.total_params(looped):,}", f"{(low + high) / 2:,.0f}"]
    test = 2 * counts.forward_flops(stack, num_loops=1, context_length=9)
    whole = counts.forward_flops(looped, num_loops=8, context_length=9)
    assert plain[3] == f"{test:,} ({test / whole - 1:+.1%})"


def test_truncated_gradients_make_training_cheaper() -> None:
    config = small_config(num_loops=4)
    table = matching({"loop": Size(config, 5.0, 4, grad_loops=2)}, "loop", 9)
    exact = counts.training_flops(config, num_loops=5, grad_loops=2, context_length=9)
    assert table.rows[0][2] == f"{exact:,}"
