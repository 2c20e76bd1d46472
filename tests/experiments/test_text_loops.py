import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.claim import Conclusion
from experiments.matching import training_flops
from experiments.run_store import Result, Results, Run
from experiments.text_loops import arm, curve, held_out, verdicts
from experiments.text_loops.bigram import Bigrams
from experiments.text_loops.run import DEPTHS, RATES, SIZES, STUDY, measure_zoo
from openmythos.config import MoEConfig, counts
from openmythos.data.prepare import prepare
from openmythos.engine.reference import generate
from openmythos.model.exit import KLExit
from openmythos.tokenizer import byte_tokenizer
from openmythos.train.validation import held_out_bits_per_byte
from tests.strategies import random_model
from tests.train.examples import loader, tiny_model, write_text

# --- the laws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", curve.LAWS, ids=lambda law: law.__name__)
def test_a_law_is_found_in_its_own_curve_and_the_other_is_not(law: Any) -> None:
    loops = list(range(1, 9))
    losses = 2.0 + 0.3 * law(np.array(loops, dtype=float), 0.8)
    own = curve.fit(law, loops, losses.tolist())
    (other,) = (one for one in curve.LAWS if one is not law)
    assert own.residual < 1e-4 and own.rate == pytest.approx(0.8, rel=0.01)
    assert own.limit == pytest.approx(2.0, abs=1e-3) and own.size == pytest.approx(0.3, abs=1e-3)
    assert curve.fit(other, loops, losses.tolist()).residual > 20 * own.residual
    again = curve.values(law, own, loops)
    np.testing.assert_allclose(again, losses, atol=1e-3)


def test_three_points_are_too_few_for_three_numbers() -> None:
    with pytest.raises(ValueError, match="at least four"):
        curve.fit(curve.power, [1, 2, 3], [3.0, 2.0, 1.0])


# --- the arms -------------------------------------------------------------------------------------


def test_the_arms_match_within_two_percent() -> None:
    looped = arm.model_of(arm.LOOP)
    parameters, training, test = (arm.model_of(name) for name in arm.STACKS)
    for found, target in (
        (counts.total_params(parameters), counts.total_params(looped)),
        (3 * arm.test_flops(training), training_flops(arm.size_of(arm.LOOP), arm.MEAN_CONTEXT)),
        (arm.test_flops(test), arm.test_flops(looped)),
        (arm.test_flops(arm.model_of(arm.MOE)), arm.test_flops(looped)),
    ):
        assert found == pytest.approx(target, rel=0.02)


def test_rates_are_scaled_together() -> None:
    demo = arm.DEMO.train.optimizer
    assert demo.muon_lr == RATES[1] and demo.embedding_lr is not None
    settings = {**SIZES["small"], "rate": 2 * RATES[1]}
    train = arm.run_config(arm.LOOP, 7, settings, "docs").train
    assert (train.optimizer.muon_lr, train.optimizer.lr) == (2 * RATES[1], 2 * demo.lr)
    assert train.optimizer.embedding_lr == 2 * demo.embedding_lr
    assert (train.max_steps, train.max_seconds, train.seed) == (200, None, 7)
    assert (train.depth.mean_backprop_depth, train.depth.ramp) == (2, 0)
    assert train.depth.sampling == arm.DEMO.train.depth.sampling
    plain = arm.run_config(arm.STACKS[0], 7, settings, "docs")
    assert plain.train.depth.sampling.mean_recurrence == plain.model.num_loops == 1


# --- on held-out text -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    prepare(str(write_text(folder)), folder / "data", tokenizer=byte_tokenizer())
    return folder / "data"


def test_losses_and_exits_are_those_of_plain_forwards(text: Path) -> None:
    model, split = random_model(tiny_model(max_seq_len=32)), loader(text)
    found = held_out.token_losses(model, split, (1, 3, 5), 4, max_batches=2)
    for loops in (1, 3, 5):
        expected = held_out_bits_per_byte(model, split, loops, 2)
        assert found.bits_per_byte(loops) == pytest.approx(expected, rel=1e-5)
    assert set(found.exits.tolist()) <= {2, 3, 4} and len(found.exits) == len(found.targets)
    tokens = next(iter(split.validation_batches(1))).tokens[:1, :1]
    rule = KLExit(threshold=held_out.EXIT_KL)
    taken = generate(model, tokens, max_new_tokens=1, num_loops=4, exit_rule=rule).loops[0][0]
    assert found.exits[0] == max(taken, 2) and not model.training


def test_the_last_loops_cache_is_exact_at_one_loop_only(text: Path) -> None:
    model, split = random_model(tiny_model(max_seq_len=32)), loader(text)
    one, three = (held_out.cache_losses(model, split, loops, 1) for loops in (1, 3))
    assert one["last_loop"] == pytest.approx(one["exact"], rel=1e-5)
    assert three["last_loop"] != pytest.approx(three["exact"], rel=1e-5)


def test_expert_sets_of_a_loop_with_itself_and_with_another(text: Path) -> None:
    experts = MoEConfig(num_experts=4, num_experts_per_token=2, d_expert=8)
    config = tiny_model(max_seq_len=32, core_feed_forward=experts)
    found = held_out.expert_sets(random_model(config), loader(text), 3, 1)
    for loop in range(3):
        assert found["same"][loop][loop] == found["jaccard"][loop][loop] == 1
        assert found["disjoint"][loop][loop] == 0
    for name in ("same", "disjoint", "jaccard"):
        shares = np.array(found[name])
        assert ((shares >= 0) & (shares <= 1)).all()
        np.testing.assert_allclose(shares, shares.T)
    assert found["other_same"][0][0] < 1


def test_bigram_surprisal_by_hand() -> None:
    pairs = np.array([[0, 3, 1], [0, 0, 0], [2, 0, 0]])
    single = np.array([0.5, 0.25, 0.25])
    found = Bigrams(pairs, single).surprisal(np.array([0, 0, 1]), np.array([1, 0, 2]))
    by_hand = [(3 + 2 * 0.25) / 6, (0 + 2 * 0.5) / 6, 0.25]  # the second token was never followed
    np.testing.assert_allclose(found, [-math.log2(share) for share in by_hand])


def test_bigrams_are_probabilities(text: Path) -> None:
    bigrams = Bigrams.of(loader(text, "train"))
    size = len(bigrams.single)
    for token in (0, 5, 100):
        bits = bigrams.surprisal(np.full(size, token), np.arange(size))
        assert float((2.0**-bits).sum()) == pytest.approx(1.0)


# --- the verdicts ---------------------------------------------------------------------------------


def planted(seed: int, bits: Mapping[int, float], **changes: Any) -> dict[str, Any]:
    """The data of a run; seeds differ a little."""
    shift = 0.0001 * seed
    sets = {name: [[0.1] * 9 for _ in range(9)] for name in ("jaccard", "same", "disjoint")}
    data = {
        "training_bits": 2.0 + shift,
        "by_step": [[100, 2.5], [200, 2.2]],
        "equal_loss": {
            "2.4": {"step": 150, "training": 2.39, "held_out": 2.5 + shift, "one_loop": 2.6},
            "2.0": None,
        },
        "held_out": bits[arm.TRAINED_LOOPS] + shift,
        "by_loops": {str(loops): value + shift for loops, value in bits.items()},
        "surprisal": {
            "rank_correlation": 0.3 + shift,
            "fifths": [
                {"bigram_bits": n, "model_bits": n, "loops": 2 + n, "bits_gained": 0.01 * n}
                for n in range(5)
            ],
        },
        "cache": {"exact": 8.0, "last_loop": 8.004 + shift, "bytes_per_token": 4.0},
        "experts": {**sets, **{f"other_{name}": rows for name, rows in sets.items()}},
    }
    return data | changes


def results_of(planting: Mapping[str, Mapping[str, Any]] | None = None) -> Results:
    """Three seeds per arm; ``planting`` changes the data of an arm."""
    bits = {n: float(2.0 + 0.3 * curve.exponential(np.array(float(n)), 0.9)) for n in DEPTHS}
    found = Results()
    for name in arm.ARMS:
        changes = (planting or {}).get(name, {})
        for seed in range(3):
            data = copy.deepcopy(planted(seed, bits, **changes))
            run = Run(name, seed, {**SIZES["small"], "rate": 0.02})
            found.append(Result(run, data, None, 100.0, 90.0, "a processor", "2.13"))
    return found


def decisions(planting: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, str]:
    found = verdicts.conclude(STUDY.claims, results_of(planting))
    return {verdict.claim: verdict.decision for verdict in found.verdicts}


def with_curve(bits: Mapping[int, float]) -> dict[str, Any]:
    return {"by_loops": {str(loops): value for loops, value in bits.items()}}


def test_every_claim_has_a_verdict_and_every_figure_is_drawn() -> None:
    found = STUDY.conclude(results_of())
    assert [verdict.claim for verdict in found.verdicts] == list(STUDY.claims)
    pictures = STUDY.draw(found)
    assert pictures.keys() == found.figures.keys()


def test_missing_seeds_are_no_result_and_still_drawn() -> None:
    found = STUDY.conclude(Results(results_of()[:1]))
    assert {verdict.decision for verdict in found.verdicts} == {"no result"}
    assert STUDY.draw(found).keys() == found.figures.keys()
    assert isinstance(STUDY.conclude(Results()), Conclusion)


def test_the_curve_decides() -> None:
    name, loops = "saturating-exponential", np.array([float(n) for n in DEPTHS])
    assert decisions()[name] == "holds"
    falls = 2.0 + 0.3 * np.exp(-0.9 * (loops - 1)) + 0.05 * (loops == verdicts.FAR)
    power = 2.0 + 0.3 / loops
    steps = 2.0 + 0.3 * (loops < 4)
    at_once = 2.0 + 0.3 * (loops == 1)
    for heights, expected in (
        (falls, "in part"),
        (power, "fails"),
        (steps, "fails"),
        (at_once, "not decidable here"),
    ):
        bits = dict(zip(DEPTHS, heights.tolist(), strict=True))
        assert decisions({arm.LOOP: with_curve(bits)})[name] == expected
    flat = dict.fromkeys(DEPTHS, 2.0)
    assert decisions({arm.LOOP: with_curve(flat)})[name] == "no result"


def test_experts_decide() -> None:
    def sets(**shares: float) -> dict[str, Any]:
        rows = {name: [[share] * 9 for _ in range(9)] for name, share in shares.items()}
        base = planted(0, dict.fromkeys(DEPTHS, 2.0))["experts"]
        return {arm.MOE: {"experts": base | rows}}

    name = "different-experts-at-loops-3-and-9"
    for own, other, expected in ((0.3, 0.5, "holds"), (0.1, 0.5, "in part"), (0.005, 0.5, "fails")):
        assert decisions(sets(disjoint=own, other_disjoint=other))[name] == expected
    for same, expected in ((0.4, "holds"), (0.6, "fails")):
        assert decisions(sets(same=same))["subsets-by-depth"] == expected


def test_differences_between_arms_decide() -> None:
    for held, expected in ((1.9, "holds"), (2.3, "fails")):
        changed = {arm.LOOP: {"held_out": held}}
        found = decisions(changed)
        assert [found[name] for name in verdicts.EQUAL] == [expected] * 3
    assert {decisions()[name] for name in verdicts.EQUAL} == {"no result"}
    assert decisions()["capacity-without-compute"] == "in part"
    for held, expected in ((1.9, "holds"), (2.3, "fails")):
        assert decisions({arm.MOE: {"held_out": held}})["capacity-without-compute"] == expected


def test_the_table_at_equal_training_loss() -> None:
    (table,) = (t for t in STUDY.conclude(results_of()).tables if "equal training loss" in t.title)
    first, last = table.rows[0], table.rows[-1]
    per_token = training_flops(arm.size_of(arm.LOOP), arm.MEAN_CONTEXT)
    tera = 150 * 12 * arm.SEQ_LEN * per_token / 1e12
    assert first == ["2.4", arm.LOOP, "3 of 3", "150", f"{tera:.1f}", "2.3900", "2.5001", "+0.0999"]
    assert last == ["2", arm.STACKS[-1], "0 of 3", "", "", "", "", ""]
    assert table.rows[2][1] in arm.STACKS and table.rows[2][-1] == ""  # a stack has one loop


def test_cache_and_difficulty_decide() -> None:
    for last, expected in ((8.004, "holds"), (8.04, "in part"), (8.4, "fails")):
        cache = {"exact": 8.0, "last_loop": last, "bytes_per_token": 4.0}
        assert decisions({arm.LOOP: {"cache": cache}})["last-loop-cache"] == expected
    fifths = planted(0, dict.fromkeys(DEPTHS, 2.0))["surprisal"]["fifths"]
    for rank, expected in ((0.3, "holds"), (0.1, "in part"), (-0.1, "fails"), (None, "fails")):
        surprisal = {"rank_correlation": rank, "fifths": fifths}
        found = decisions({arm.LOOP: {"surprisal": surprisal}})
        assert found["harder-tokens-more-loops"] == expected


# --- the whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [arm.MOE, arm.STACKS[0]])
def test_a_smoke_run_measures_what_the_verdicts_read(name: str, tmp_path: Path) -> None:
    (run,) = (run for run in STUDY.runs("smoke", Results()) if run.arm == name)
    data = STUDY.measure(run, "smoke", tmp_path)
    expected = planted(0, dict.fromkeys(DEPTHS, 2.0)).keys() | {"text"}
    if name in arm.STACKS:
        assert data.keys() == {"text", "training_bits", "held_out", "by_step", "equal_loss"}
    else:
        assert data.keys() == expected
        assert data["held_out"] == data["by_loops"]["4"]


def test_every_arm_is_tuned_before_its_seeds() -> None:
    runs = STUDY.runs("small", Results())
    assert runs[0].arm == arm.ZOO and not runs[0].tuning
    assert len(runs) == 16 and all(run.tuning for run in runs[1:])


@pytest.mark.slow
def test_the_model_of_the_zoo_is_measured_and_stands_in_the_table(tmp_path: Path) -> None:
    run = Run(arm.ZOO, 0, {"held_out_batches": 1})
    data = measure_zoo(run, tmp_path, str(write_text(tmp_path)))
    assert [int(loops) for loops in data["by_loops"]] == list(DEPTHS)
    assert all(0 < bits < 8 for bits in data["by_loops"].values())
    result = Result(run, data, None, 1.0, 1.0, "a processor", "2.13")
    found = STUDY.conclude(Results([*results_of(), result]))
    (table,) = (table for table in found.tables if "test-time" in table.title)
    assert [row[0] for row in table.rows] == ["seed 0", "seed 1", "seed 2", "zoo:text"]
