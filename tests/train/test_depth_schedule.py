from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from openmythos.train.depth_schedule import (
    ClippedPoissonDepth,
    DepthSchedule,
    FixedDepth,
    LogNormalPoissonDepth,
    PoissonDepth,
    UniformDepth,
)
from tests.strategies import seeded, unchecked

NUM_DRAWS = 200_000


def sample(schedule: DepthSchedule, step: int = 0, **changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {"seed": 1, "step": step, "progress": 1.0, "batch_size": 8}
    return schedule.sample(**{**arguments, **changes})[0]


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize(
    "sampling",
    [FixedDepth(), PoissonDepth(), ClippedPoissonDepth(), LogNormalPoissonDepth(), UniformDepth()],
)
def test_a_pure_function_of_seed_and_step(sampling: Any, per_sequence: bool) -> None:
    schedule = DepthSchedule(sampling=sampling, per_sequence=per_sequence)
    before = torch.get_rng_state()
    first = [sample(schedule, step) for step in range(20)]
    torch.rand(3)
    again = [sample(schedule, step) for step in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.set_rng_state(before)
    if not isinstance(sampling, FixedDepth) or type(sampling) is not FixedDepth:
        others = [sample(schedule, step, seed=2) for step in range(20)]
        assert any(not torch.equal(a, b) for a, b in zip(first, others, strict=True))


def test_a_batch_shares_its_depth_unless_sequences_have_their_own() -> None:
    together = DepthSchedule(sampling=PoissonDepth(mean_recurrence=8))
    apart = DepthSchedule(sampling=PoissonDepth(mean_recurrence=8), per_sequence=True)
    assert all(len(set(sample(together, step).tolist())) == 1 for step in range(10))
    assert all(len(set(sample(apart, step).tolist())) > 1 for step in range(10))
    assert sample(apart).shape == sample(together).shape == (8,)


def test_consecutive_rows_share_a_draw() -> None:
    sampling = PoissonDepth(mean_recurrence=8)
    groups = DepthSchedule(sampling=sampling, per_sequence=True, rows_per_draw=4)
    drawn = torch.stack([sample(groups, step, batch_size=10) for step in range(10)])
    first, second, rest = drawn[:, :4], drawn[:, 4:8], drawn[:, 8:]
    assert all(torch.equal(part, part[:, :1].expand_as(part)) for part in (first, second, rest))
    assert not torch.equal(first, second)


def test_ranks_that_deal_the_rows_of_a_group_never_disagree() -> None:
    """Each has the same depths in the same order, in each of 500 steps."""
    sampling = PoissonDepth(mean_recurrence=8)
    groups = DepthSchedule(sampling=sampling, per_sequence=True, rows_per_draw=6)
    for step in range(500):
        drawn = sample(groups, step, batch_size=14)  # the last group is not whole
        assert torch.equal(drawn[0::2], drawn[1::2])
    apart = DepthSchedule(sampling=sampling, per_sequence=True, rows_per_draw=3)
    drawn = sample(apart, 0, batch_size=14)
    assert not torch.equal(drawn[0::2], drawn[1::2])


def test_poisson_over_steps_and_over_sequences() -> None:
    sampling = PoissonDepth(mean_recurrence=4)
    rows = sampling.draw(4.0, NUM_DRAWS, seeded()).float()
    # max(1, Poisson(4)): the mass at 0 moves to 1.
    assert rows.mean() == pytest.approx(4 + torch.exp(torch.tensor(-4.0)).item(), abs=0.02)
    assert rows.min() == 1
    schedule = DepthSchedule(sampling=sampling)
    steps = torch.stack([sample(schedule, step)[0] for step in range(3000)]).float()
    assert steps.mean() == pytest.approx(4.018, abs=0.15)  # 4 standard errors
    assert steps.var() == pytest.approx(3.87, abs=0.45)
    pairs = torch.corrcoef(torch.stack((steps[:-1], steps[1:])))[0, 1]
    assert abs(pairs) < 0.08  # neighbouring seeds are not alike


def test_clipped_poisson_has_the_published_distribution() -> None:
    draws = ClippedPoissonDepth(mean_recurrence=4, low=2, high=8).draw(4.0, NUM_DRAWS, seeded())
    found = Counter(draws.tolist())
    expected = {2: 0.238, 3: 0.195, 4: 0.195, 5: 0.156, 6: 0.104, 7: 0.060, 8: 0.051}
    assert set(found) == set(expected)
    for loops, share in expected.items():
        assert found[loops] / NUM_DRAWS == pytest.approx(share, abs=0.004)
    assert draws.float().mean() == pytest.approx(4.08, abs=0.02)


def test_uniform_is_chens() -> None:
    draws = UniformDepth(low=5, high=8).draw(6.5, NUM_DRAWS, seeded())  # block I
    found = Counter(draws.tolist())
    assert set(found) == {5, 6, 7, 8}
    assert all(count / NUM_DRAWS == pytest.approx(0.25, abs=0.004) for count in found.values())
    assert UniformDepth(low=5, high=8).mean_recurrence == 6.5
    once = UniformDepth(low=1, high=1)
    assert set(once.draw(1.0, 10, seeded()).tolist()) == {1}


def test_a_ramp_moves_both_ends_of_the_uniform() -> None:
    schedule = DepthSchedule(sampling=UniformDepth(low=3, high=9), ramp=1.0, per_sequence=True)
    for progress, ends in ((0.0, (1, 1)), (0.5, (2, 5)), (1.0, (3, 9))):
        depths = sample(schedule, progress=progress, batch_size=1000)
        assert (int(depths.min()), int(depths.max())) == ends


def test_log_normal_poisson_is_huginns() -> None:
    draws = LogNormalPoissonDepth(mean_recurrence=32, sigma=0.5).draw(32.0, NUM_DRAWS, seeded())
    wide = draws.double()
    assert wide.mean() == pytest.approx(33, abs=0.2)
    assert wide.std() == pytest.approx(17.9, abs=0.3)
    assert wide.median() == 29
    quantiles = torch.quantile(wide, torch.tensor([0.05, 0.95, 0.99], dtype=torch.float64))
    assert quantiles.tolist() == pytest.approx([12, 66, 94], abs=1.01)
    assert (wide <= 8).double().mean() == pytest.approx(0.015, abs=0.003)


def test_ramp_raises_the_mean_linearly() -> None:
    schedule = DepthSchedule(sampling=FixedDepth(mean_recurrence=9), ramp=0.5)
    depths = [int(sample(schedule, progress=p)[0]) for p in (0.0, 0.125, 0.25, 0.5, 1.0)]
    assert depths == [1, 3, 5, 9, 9]
    noisy = DepthSchedule(
        sampling=PoissonDepth(mean_recurrence=9), ramp=0.5, per_sequence=True, max_loops=64
    )
    many = sample(noisy, progress=0.25, batch_size=20_000).float()
    assert many.mean() == pytest.approx(5, abs=0.1)


def test_ramps_of_the_retrofit_recipe_have_exact_values() -> None:
    """ceil(32 f) over the first half of the run, f = p or 1 - sqrt(1 - p), and 1 at the start."""
    sampling = FixedDepth(mean_recurrence=32)
    progress = (0.0, 0.01, 0.125, 0.25, 0.375, 0.495, 0.5, 0.75, 1.0)
    line = DepthSchedule(sampling=sampling, ramp=0.5, ramp_shape="ceil_linear")
    assert [line.mean(p) for p in progress] == [1, 1, 8, 16, 24, 32, 32, 32, 32]
    root = DepthSchedule(sampling=sampling, ramp=0.5, ramp_shape="ceil_one_minus_sqrt")
    # 32 (1 - sqrt(1 - p)) at p = .25, .5, .75, .99: 4.29, 9.37, 16, 28.8
    assert [root.mean(p) for p in progress] == [1, 1, 5, 10, 16, 29, 32, 32, 32]
    assert all(a.mean(0.3) == 32 for a in (replace(line, ramp=0.0), replace(root, ramp=0.25)))
    for schedule in (line, root):
        drawn = [int(sample(schedule, progress=p)[0]) for p in progress]
        assert drawn == [schedule.mean(p) for p in progress]


def test_max_loops_and_grad_loops() -> None:
    schedule = DepthSchedule(
        sampling=PoissonDepth(mean_recurrence=6), per_sequence=True, max_loops=7
    )
    assert sample(schedule, batch_size=1000).max() == 7
    assert schedule.sample(seed=0, step=0, progress=0.0, batch_size=2)[1] is None
    truncated = DepthSchedule(sampling=FixedDepth(), mean_backprop_depth=3)
    assert truncated.sample(seed=0, step=0, progress=0.0, batch_size=2)[1] == 3


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: FixedDepth(mean_recurrence=0), "mean_recurrence is 0"),
        (lambda: ClippedPoissonDepth(low=5, high=4), "depth.high is 4; .* low=5"),
        (lambda: UniformDepth(low=5, high=4), "depth.high is 4; .* low=5"),
        (lambda: UniformDepth(low=0), "low is 0; it must be at least 1"),
        (lambda: LogNormalPoissonDepth(sigma=-1.0), "depth.sigma is -1.0"),
        (lambda: DepthSchedule(sampling=FixedDepth(), ramp=2.0), "depth.ramp is 2.0"),
        (lambda: DepthSchedule(sampling=FixedDepth(), mean_backprop_depth=0), "is 0"),
        (
            lambda: DepthSchedule(sampling=FixedDepth(mean_recurrence=65)),
            "is 65; it must be at most max_loops=64, which --set train.depth.max_loops=N raises",
        ),
    ],
)
def test_bad_fields(build: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()


def test_a_misspelt_shape_is_refused() -> None:
    with unchecked(), pytest.raises(ValueError, match="ramp_shape is 'sqrt'"):
        DepthSchedule(sampling=FixedDepth(), ramp=0.5, ramp_shape="sqrt")
