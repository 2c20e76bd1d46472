import pytest

from openmythos.config.parallel import ParallelConfig
from openmythos.config.presets import preset
from openmythos.plan.choice import plan_training
from openmythos.plan.serving import Machine
from openmythos.plan.training import Links, Work, cost_of

GIB = 2**30
H100_80 = Machine(memory_bytes=80.0 * GIB)
ONE_T = preset("mythos-1t")


def test_a_plan_fits_and_says_why_others_were_refused() -> None:
    plan = plan_training(preset("mythos-100b"), 128, H100_80, Work(context_length=4096))
    assert plan.fits and plan.chosen.num_bytes <= H100_80.usable_bytes
    assert plan.chosen.layout.num_ranks == 128 and plan.chosen.layout.ep > 1
    assert len(plan.refused) == 2
    for each in plan.refused:
        assert each.cost.layout.num_ranks == 128 and each.reason
        fits = each.cost.num_bytes <= H100_80.usable_bytes
        assert fits is not each.reason.startswith("needs ")


def test_the_choice_is_the_quickest_that_fits() -> None:
    config, work = preset("mythos-10b"), Work(context_length=4096)
    plan = plan_training(config, 8, H100_80, work)
    small = Machine(memory_bytes=40.0 * GIB)
    less = plan_training(config, 8, small, work)
    assert less.chosen.num_bytes <= small.usable_bytes < plan.chosen.num_bytes
    assert less.chosen.tokens_per_second <= plan.chosen.tokens_per_second
    given = plan_training(config, 8, H100_80, work, fixed={"tp": 2, "recompute": True})
    assert given.chosen.layout.tp == 2 and given.chosen.work.recompute
    assert given.chosen.tokens_per_second <= 1.05 * plan.chosen.tokens_per_second


def test_what_does_not_fit_is_said_with_the_smallest() -> None:
    plan = plan_training(ONE_T, 8, H100_80, Work(context_length=1024))
    assert not plan.fits and plan.chosen.num_bytes > H100_80.usable_bytes
    assert all(each.cost.num_bytes >= plan.chosen.num_bytes for each in plan.refused)


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        ({"tp": 3}, "8 devices have no layout with tp 3"),
        ({"tp": 0}, "8 devices have no layout with tp 0"),
        ({"ep": 5}, "8 devices have no layout with ep 5"),
        ({"dp_replicate": 3}, "8 devices have no layout with dp_replicate 3"),
    ],
)
def test_impossible_layouts_are_refused(fixed: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_training(preset("mythos-1b"), 8, H100_80, Work(context_length=64), fixed=fixed)


def test_copies_are_chosen_where_they_are_quicker_and_fit() -> None:
    config, work = preset("parcae-370m"), Work(context_length=2048)
    plan = plan_training(config, 1024, H100_80, work)
    assert plan.chosen.layout == ParallelConfig(dp_replicate=128, dp_shard=8)
    whole = cost_of(config, ParallelConfig(dp_shard=1024), work, H100_80, Links())
    assert plan.chosen.tokens_per_second > 4 * whole.tokens_per_second
    given = plan_training(config, 1024, H100_80, work, fixed={"dp_replicate": 1})
    assert given.chosen.layout.dp_replicate == 1
    # A trillion parameters leave no room for a copy in 80 GiB.
    least = plan_training(ONE_T, 1024, H100_80, work).chosen
    assert least.layout.dp_replicate == 1


def test_what_is_given_is_tried_though_it_would_not_be_chosen() -> None:
    plan = plan_training(
        preset("huginn-3.5b"), 5, H100_80, Work(context_length=64), fixed={"tp": 5}
    )
    assert plan.chosen.layout == ParallelConfig(dp_shard=1, tp=5)  # 55 heads
