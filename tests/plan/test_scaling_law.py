import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.scaling_law import PHI_LAW, RESULT, calibrate, iso_depth_runs
from openmythos.config.presets import preset
from openmythos.plan import scaling_law
from openmythos.plan.scaling_law import (
    FLOPS,
    LAWS,
    PARCAE,
    Fit,
    Runs,
    UnidentifiedError,
    fit,
    optimum,
    simulate,
    sizes,
    unrolled_params,
    used_by,
)


def parcae(name: str = "parcae-140m", noise: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    return simulate(PARCAE[name], preset(name), noise=noise, seed=seed)


# --- recovery -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number"), [("parcae-140m", 36), ("parcae-370m", 18)])
def test_parcaes_constants_come_back_from_its_own_grid(name: str, number: int) -> None:
    found, truth = fit("unrolled", parcae(name)), PARCAE[name].values
    assert found.num_runs == number
    for constant in ("E", "a", "b"):
        assert found.values[constant] == pytest.approx(truth[constant], rel=1e-3)
    for constant in ("A", "B"):
        assert found.values[constant] == pytest.approx(truth[constant], rel=1e-2)
    assert found.deviation < 1e-9


def test_with_noise_the_exponents_come_back() -> None:
    """With 0.002 nats; A is not asserted, as it trades with its exponent."""
    truth = PARCAE["parcae-140m"].values
    for seed in range(8):
        found = fit("unrolled", parcae(noise=0.002, seed=seed))
        for constant, within in (("E", 0.03), ("a", 0.08), ("b", 0.01)):
            assert found.values[constant] == pytest.approx(truth[constant], abs=within)
        assert 0.001 < found.deviation < 0.003


def test_phi_comes_back_from_simulated_runs() -> None:
    runs = iso_depth_runs(0.0, 0)
    assert len(runs["loss"]) == 116
    exact = fit("iso_depth", runs)
    assert exact.values == pytest.approx(PHI_LAW, rel=1e-3)
    for seed in range(3):
        found = fit("iso_depth", iso_depth_runs(0.002, seed), resamples=50)
        assert found.values["phi"] == pytest.approx(0.46, abs=0.01)
        low, high = found.intervals["phi"]
        assert low < found.values["phi"] < high and high - low < 0.03


@pytest.mark.parametrize(
    ("losses", "off"), [((70.5, 17.2, 14.08, 13.59), 0.8), ((17.9, 10.49, 10.09, 10.11), -0.1)]
)
def test_published_perplexities_at_few_loops_predict_those_at_16(
    losses: tuple[float, ...], off: float
) -> None:
    """Parcae, appendix G, per-sequence sampling, 100M and 350M: at 1, 4 and 8 loops, then 16."""
    nats = np.log(losses)
    found = fit("test_time", {"test_loops": np.array([1.0, 4.0, 8.0]), "loss": nats[:3]})
    predicted = found.predict({"test_loops": np.array([16.0])})[0]
    assert round(100 * (predicted / nats[3] - 1), 1) == off
    assert found.intervals == {} and found.deviation == 0.0


def test_the_unified_law_comes_back() -> None:
    truth = {"E": 2.5, "A": 5e5, "B": 25_000.0, "Z": 3.0, "a": 0.77, "b": 0.52, "z": 4.0}
    base, loops = parcae(), np.array([0.25, 0.5, 1.0, 2.0])
    runs: dict[str, np.ndarray] = {
        name: np.repeat(column, len(loops)) for name, column in base.items()
    }
    runs["test_loops"] = np.tile(loops, len(base["loss"])) * runs["num_loops"]
    runs["loss"] = Fit("unified", truth, {}, 0.0, 1).predict(runs)
    assert fit("unified", runs).values == pytest.approx(truth, rel=1e-2)
    # The laws of training see each model at its own number of loops only.
    used = used_by("unrolled", runs)
    assert len(used["loss"]) == 36 and (used["test_loops"] == used["num_loops"]).all()
    assert fit("unrolled", runs).values["b"] == pytest.approx(0.52, rel=1e-2)
    assert used_by("test_time", runs) is runs


def test_no_other_exponents_fit_better() -> None:
    """The search against a fine grid around it, with one plain least squares each."""
    runs = parcae("parcae-370m", noise=0.002, seed=3)
    found = fit("unrolled", runs)
    sizes_of = unrolled_params(runs), runs["tokens"]

    def rest(a: float, b: float) -> float:
        columns = [
            np.ones_like(runs["loss"]),
            (sizes_of[0] / 1e9) ** -a,
            (sizes_of[1] / 1e10) ** -b,
        ]
        return float(np.linalg.lstsq(np.stack(columns, 1), runs["loss"], rcond=None)[1][0])

    a, b = found.values["a"], found.values["b"]
    best = rest(a, b)
    assert best == pytest.approx(found.deviation**2 * (18 - 5), rel=1e-6)
    around = (rest(a * u, b * v) for u in (0.9, 0.999, 1.001, 1.1) for v in (0.9, 1, 1.1))
    assert all(other > best for other in around)


# --- intervals ------------------------------------------------------------------------------------


def test_bootstrap_is_that_of_single_fits() -> None:
    """All resamples together are fitted as each would be alone."""
    runs = parcae(noise=0.002, seed=1)
    form, losses = LAWS["unrolled"], np.stack([parcae(noise=0.002, seed=s)["loss"] for s in (1, 2)])
    together, _, rest = scaling_law._best(form, runs, losses)
    for row in range(2):
        alone, _, one = scaling_law._best(form, runs, losses[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-6)
        np.testing.assert_allclose(rest[row], one[0], rtol=1e-8)
    first, again, other = (fit("unrolled", runs, resamples=40, seed=s) for s in (1, 1, 2))
    assert first == again != other
    for name, (low, high) in first.intervals.items():
        assert low < first.values[name] < high


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """The stored result of ``python -m benchmarks.scaling_law``, and that it can be made."""
    stored = json.loads(RESULT.read_text(encoding="utf-8"))["laws"]
    assert stored.keys() == {*PARCAE, "iso_depth"}
    for law in stored.values():
        assert law["num_sets"] == 100 and law["refused"] == 0
        assert all(80 <= number <= 98 for number in law["held"].values()), law
    again = calibrate("parcae-370m", 2)
    assert again["num_runs"] == 18 and all(0 <= held <= 2 for held in again["held"].values())


# --- refusals -------------------------------------------------------------------------------------


def changed(runs: Runs, **columns: object) -> dict[str, np.ndarray]:
    size = len(runs["loss"])
    return {**runs, **{name: np.broadcast_to(c, size) for name, c in columns.items()}}  # type: ignore[call-overload]


def refusal(law: str, runs: Runs) -> str:
    with pytest.raises(UnidentifiedError) as caught:
        fit(law, runs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_the_grid_cannot_identify_is_refused_by_name() -> None:
    runs = parcae()
    size = np.linspace(1, 2, 36)
    cases = [
        ("unrolled", changed(runs, num_loops=2.0), "1 different model size; at least 3"),
        ("unrolled", changed(runs, tokens=1e9), "1 different tokens; at least 3"),
        ("unrolled", changed(runs, tokens=20 * unrolled_params(runs)), "cannot be told apart"),
        ("iso_depth", changed(runs, num_loops=2.0, loop=1e7 * size), "1 different num_loops"),
        ("unrolled", {name: c[:4] for name, c in runs.items()}, "4 losses cannot determine 5"),
        ("unrolled", {"loss": runs["loss"]}, "the runs have no once, loop, num_loops, tokens"),
        ("test_time", runs, "the runs have no test_loops"),
        ("test_time", changed(runs, test_loops=runs["num_loops"]), "losses of 36 models"),
        # Where all is looped, only the product of phi and a is seen.
        ("iso_depth", changed(runs, once=1e-3), "do not determine a: others make up for it"),
    ]
    for law, given, said in cases:
        assert said in refusal(law, given), said
    with pytest.raises(ValueError, match=r"^law is 'none'; it must be one of unrolled, "):
        fit("none", runs)


def test_a_term_within_the_noise_is_refused() -> None:
    rng = np.random.default_rng(0)
    flat = changed(parcae(), loss=3.0 + 0.01 * rng.standard_normal(36))
    assert refusal("unrolled", flat)
    tokens_only = changed(
        parcae(), loss=2 + 1e4 * parcae()["tokens"] ** -0.5 + 0.001 * flat["loss"]
    )
    assert refusal("unrolled", tokens_only)


def test_decays_that_vanish_at_every_run_are_harmless() -> None:
    """Large numbers of loops make most of the searched decays 0 everywhere."""
    loops = np.array([200.0, 400.0, 600.0, 900.0, 1200.0])
    runs = {"test_loops": loops, "loss": 2 + 5 * np.exp(-0.02 * loops)}
    assert fit("test_time", runs).values == pytest.approx({"E": 2, "Z": 5, "z": 0.02}, rel=1e-3)
    assert "z runs to the end" in refusal("test_time", {**runs, "loss": 2 + np.exp(-loops / 400)})


def test_plans_need_no_torch() -> None:
    names = ("choice", "memory", "placement", "run_table", "scaling_law", "serving", "training")
    program = "import sys\n" + "".join(f"import openmythos.plan.{name}\n" for name in names)
    subprocess.run(
        [sys.executable, "-c", f"{program}assert 'torch' not in sys.modules"], check=True
    )


# --- the optimum ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "x", "y"), [("parcae-140m", 0.47, 0.63), ("parcae-370m", 0.42, 0.67)]
)
def test_the_laws_own_optimum_is_not_the_published_one(name: str, x: float, y: float) -> None:
    published, (once, loop) = PARCAE[name], map(float, sizes(preset(name)))
    law = Fit("unrolled", published.values, {}, 0.0, 0)
    half, full = (
        optimum(
            law,
            once=once,
            loop=loop,
            compute=(published.compute[0], published.compute[-1]),
            convention=convention,
        )
        for convention in FLOPS
    )
    assert (round(half.loops_exponent, 2), round(half.tokens_exponent, 2)) == (x, y)
    assert (published.loops_exponent, published.tokens_exponent) == (0.40, 0.78)
    assert full.loops_exponent > half.loops_exponent and (full.loops < half.loops).all()
    for best in (half, full):  # no neighbour at equal compute is better
        spent = best.tokens * FLOPS[best.convention](once, loop, best.loops)
        np.testing.assert_allclose(spent, best.compute, rtol=1e-9)
        losses = []
        for factor in (0.97, 1.0, 1.03):
            loops = factor * best.loops
            tokens = best.compute / FLOPS[best.convention](once, loop, loops)
            ones = np.ones_like(loops)
            runs = {"once": once * ones, "loop": loop * ones, "num_loops": loops, "tokens": tokens}
            losses.append(law.predict(runs))
        assert (losses[1] < losses[0]).all() and (losses[1] < losses[2]).all()


def test_sizes_are_multiply_adds_outside_and_inside_the_loop() -> None:
    once, loop = sizes(preset("parcae-140m"))
    layer = 4 * 768**2 + 2 * 768 * 3072
    gates = once - (4 * layer + 32_768 * 768 + 2 * 768**2)  # of the value embeddings
    assert 0 < gates < 1000 and 0 <= loop - 2 * layer < 1000
