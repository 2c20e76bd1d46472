"""Every exit rule on sequences made by hand, with the loop at which it must stop."""

import math

import pytest
import torch
from torch import Tensor

from openmythos.config import schema
from openmythos.model.context import select_rows
from openmythos.model.exit import (
    EXIT_RULES,
    AccelerationExit,
    ArgmaxStableExit,
    CumulativeThreshold,
    EntropyKLExit,
    ExitRule,
    Fixed,
    KLExit,
    LatentDifferenceExit,
    Rule,
    join_states,
    make_exit_rule,
    split_states,
)


def logits_of(probs: list[float]) -> Tensor:
    return torch.tensor([probs], dtype=torch.float64).log()


def exits(
    rule: Rule,
    states: list[list[float]] | None = None,
    logits: list[Tensor] | None = None,
    masses: list[float] | None = None,
) -> list[bool]:
    """What one row decides after each loop; ``states`` begins with h_0."""
    count = len(logits or masses or (states or [])[1:])
    states = [[0.0, 0.0]] * (count + 1) if states is None else states
    h = torch.tensor(states, dtype=torch.float64)[:, None]
    memory, decided = rule.start(h[0]), []
    for loop in range(count):
        mass = None if masses is None else torch.tensor([masses[loop]])
        shown = None if logits is None else logits[loop]
        stop, memory = rule.check(memory, h[loop + 1], shown, mass)
        decided.append(bool(stop[0]))
    return decided


def test_fixed_never_stops() -> None:
    assert exits(Fixed(), states=[[1.0, 0.0]] * 5) == [False] * 4


def test_cumulative_threshold_stops_when_the_mass_is_reached() -> None:
    assert exits(CumulativeThreshold(threshold=0.5), masses=[0.2, 0.5, 0.7]) == [False, True, True]
    assert exits(CumulativeThreshold(threshold=1.0), masses=[0.5, 0.999, 1.0]) == [
        False,
        False,
        True,
    ]


def test_kl_is_from_the_old_to_the_new_prediction() -> None:
    q = [0.9, 0.1]
    # p = [.5, .5]: KL(p || q) = .5 ln(.5/.9) + .5 ln(.5/.1) = .5108; the other direction is .3681.
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    backward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert backward < 0.45 < forward
    sequence = [logits_of(q)]  # the prediction before the first loop is p, uniform
    assert exits(KLExit(threshold=forward * 1.001), logits=sequence) == [True]
    assert exits(KLExit(threshold=forward * 0.999), logits=sequence) == [False]
    assert exits(EntropyKLExit(kl=backward * 1.001, entropy=9.0), logits=sequence) == [True]
    assert exits(EntropyKLExit(kl=backward * 0.999, entropy=9.0), logits=sequence) == [False]


def test_kl_compares_neighbouring_loops() -> None:
    sharp, flat = logits_of([0.9, 0.05, 0.05]), logits_of([0.4, 0.3, 0.3])
    sequence = [sharp, flat, flat, sharp, sharp]
    assert exits(KLExit(threshold=1e-6), logits=sequence) == [False, False, True, False, True]


def test_kl_survives_tokens_that_cannot_occur() -> None:
    masked = torch.tensor([[0.0, 1.0, float("-inf")]], dtype=torch.float64)
    assert exits(KLExit(), logits=[masked, masked]) == [False, True]
    assert exits(EntropyKLExit(), logits=[masked, masked]) == [False, True]


def test_entropy_keeps_a_flat_plateau_running() -> None:
    flat = torch.zeros(1, 64, dtype=torch.float64)  # H = ln 64 = 4.16 nats
    sharp = torch.zeros(1, 64, dtype=torch.float64)
    sharp[0, 0] = 10.0
    sequence = [flat, flat, sharp, sharp]
    assert exits(KLExit(), logits=sequence) == [True, True, False, True]
    assert exits(EntropyKLExit(), logits=sequence) == [False, False, False, True]
    assert exits(EntropyKLExit(entropy=math.log(64) + 1e-9), logits=sequence)[:2] == [True, True]


def test_latent_difference_is_relative_to_the_new_state() -> None:
    # |[4,3]-[4,0]| / |[4,3]| = 3/5; then 0.
    states = [[4.0, 0.0], [4.0, 3.0], [4.0, 3.0]]
    assert exits(LatentDifferenceExit(threshold=0.601), states) == [True, True]
    assert exits(LatentDifferenceExit(threshold=0.6), states) == [False, True]
    assert exits(LatentDifferenceExit(), [[0.0, 0.0], [0.0, 0.0]]) == [True]  # 0/0 has settled


def test_acceleration_needs_two_small_values_in_a_row() -> None:
    # Steps 3, 1, 1, 1: differences -, 2, 0, 0 on states of norm 3, 4, 5, 6.
    states = [[0.0, 0.0], [3.0, 0.0], [4.0, 0.0], [5.0, 0.0], [6.0, 0.0]]
    assert exits(AccelerationExit(threshold=0.1), states) == [False, False, False, True]
    assert exits(AccelerationExit(threshold=0.1, patience=1), states) == [False, False, True, True]
    # Relative: 2 / 4 = 0.5 at loop 2.
    assert exits(AccelerationExit(threshold=0.51), states) == [False, False, True, True]
    assert exits(AccelerationExit(threshold=0.5), states) == [False, False, False, True]
    # A jump between two small values starts the count again.
    jump = [[0.0, 0.0], [10.0, 0.0], [20.0, 0.0], [25.0, 0.0], [30.0, 0.0], [35.0, 0.0]]
    assert exits(AccelerationExit(threshold=0.01), jump) == [False, False, False, False, True]


def test_argmax_stable_counts_unchanged_loops() -> None:
    a, b = logits_of([0.6, 0.4]), logits_of([0.4, 0.6])
    sequence = [a, a, b, b, b, b]
    assert exits(ArgmaxStableExit(patience=2), logits=sequence) == [False] * 4 + [True, True]
    assert exits(ArgmaxStableExit(patience=1), logits=sequence)[:3] == [False, True, False]


@pytest.mark.parametrize("min_loops", [1, 2, 4])
def test_min_loops_delays_but_the_rule_sees_all_loops(min_loops: int) -> None:
    still = [[1.0, 0.0]] * 6
    expected = [loop >= min_loops for loop in range(1, 6)]
    assert exits(LatentDifferenceExit(min_loops=min_loops), still) == expected
    same = [logits_of([0.6, 0.4])] * 5
    rule = ArgmaxStableExit(patience=2, min_loops=min_loops)
    assert exits(rule, logits=same) == [loop >= max(min_loops, 3) for loop in range(1, 6)]


def test_a_rule_is_asked_at_every_kth_loop_and_compares_with_its_last_check() -> None:
    rule = LatentDifferenceExit(threshold=0.25, check_every=2)
    assert [rule.is_due(loops) for loops in range(1, 7)] == [False, True] * 3
    assert not any(Fixed(check_every=2).is_due(loops) for loops in range(1, 7))
    # Shown are the states after loops 2 and 4: steps of 4 on 4, and of 2 on 6.
    assert exits(rule, [[0.0, 0.0], [4.0, 0.0], [6.0, 0.0]]) == [False, False]
    assert exits(LatentDifferenceExit(threshold=0.34, check_every=2), [[0.0], [4.0], [6.0]]) == [
        False,
        True,
    ]
    still = [[1.0, 0.0]] * 4  # after loops 2, 4 and 6
    later = LatentDifferenceExit(min_loops=3, check_every=2)
    assert exits(later, still) == [False, True, True]


RULES = [
    Fixed(),
    CumulativeThreshold(threshold=0.6),
    KLExit(threshold=0.3),
    EntropyKLExit(kl=0.3, entropy=1.4),
    LatentDifferenceExit(threshold=0.9),
    AccelerationExit(threshold=1.5, patience=1),
    ArgmaxStableExit(patience=1),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_rows_are_independent_when_selected_and_joined(rule: Rule) -> None:
    """Row 0 runs alone for two loops, then in a batch with rows that only start."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    logits = torch.randn(5, 3, 6, generator=generator, dtype=torch.float64)
    mass = torch.rand(5, 3, generator=generator, dtype=torch.float64)

    def advance(state: object, loops: list[int], rows: list[int]) -> tuple[list[bool], object]:
        stop, state = rule.check(state, h[loops, rows], logits[loops, rows], mass[loops, rows])
        return stop.tolist(), state

    alone = {}
    for row in range(3):
        state = rule.start(h[0, [row]])
        for loop in range(1, 5):
            stop, state = advance(state, [loop], [row])
            alone[row, loop] = stop[0]
    state = rule.start(h[0, [0]])
    for loop in (1, 2):
        _, state = advance(state, [loop], [0])
    joined = join_states([state, rule.start(h[0, [1, 2]])])
    assert joined.loops.tolist() == [2, 0, 0]
    stop, joined = advance(joined, [3, 1, 1], [0, 1, 2])
    assert stop == [alone[0, 3], alone[1, 1], alone[2, 1]]
    parts = split_states(joined)
    assert [part.loops.tolist() for part in parts] == [[3], [1], [1]]
    assert advance(parts[1], [2], [1])[0] == [alone[1, 2]]
    stop, joined = advance(select_rows(joined, torch.tensor([2, 0])), [2, 4], [2, 0])
    assert stop == [alone[2, 2], alone[0, 4]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_half_precision_is_widened(rule: Rule) -> None:
    h, logits = torch.randn(2, 4).bfloat16(), torch.randn(2, 6).bfloat16()
    state = rule.start(h)
    stop, state = rule.check(state, h, logits, torch.rand(2))
    assert stop.shape == (2,)
    floating = [tensor for tensor in state.memory if tensor.is_floating_point()]
    assert all(tensor.dtype == torch.float32 for tensor in floating)


def test_what_a_rule_needs_is_stated_and_missed_clearly() -> None:
    h = torch.zeros(1, 2)
    for rule in RULES:
        uses_logits = rule.kind in {"kl", "entropy_kl", "argmax_stable"}
        assert rule.needs_logits == uses_logits
        assert rule.needs_halting == (rule.kind == "cumulative_threshold")
    with pytest.raises(ValueError, match="'kl' needs the logits"):
        KLExit().check(KLExit().start(h), h)
    rule = CumulativeThreshold(threshold=0.5)
    with pytest.raises(ValueError, match="needs a halting head"):
        rule.check(rule.start(h), h)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("kl", {"threshold": 0.0}, "threshold is 0.0; it must be a number above 0"),
        ("kl", {"check_every": 0}, "check_every is 0; it must be an integer of at least 1"),
        ("kl", {"min_loops": 0}, "min_loops is 0; it must be an integer of at least 1"),
        ("entropy_kl", {"entropy": -1.0}, "entropy is -1.0"),
        ("entropy_kl", {"kl": 0.0}, "kl is 0.0"),
        ("latent_difference", {"threshold": -0.1}, "threshold is -0.1"),
        ("acceleration", {"threshold": 0.0}, "threshold is 0.0"),
        ("acceleration", {"threshold": 0.1, "patience": 0}, "patience is 0"),
        ("acceleration", {}, "missing threshold"),
        ("argmax_stable", {"patience": 0}, "patience is 0"),
        ("cumulative_threshold", {"threshold": 1.5}, r"threshold is 1.5; it must be in \(0, 1\]"),
        ("kl", {"treshold": 0.1}, "did you mean 'threshold'"),
        ("never", {}, "'never'; it must be one of fixed, cumulative_threshold, kl"),
    ],
)
def test_bad_fields_are_refused(kind: str, fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_exit_rule(kind, **fields)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_json_round_trip(rule: Rule) -> None:
    data = schema.to_dict(rule)
    kind = data.pop("kind")
    assert make_exit_rule(kind, **data) == rule
    assert schema.from_dict(EXIT_RULES[kind], {"kind": kind, **data}) == rule


def test_a_config_may_hold_the_union() -> None:
    import dataclasses

    holder = dataclasses.make_dataclass(
        "Holder", [("exit_rule", ExitRule, Fixed())], frozen=True, kw_only=True
    )
    changed = schema.apply_overrides(holder(), ["exit_rule.kind=kl", "exit_rule.threshold=0.1"])
    assert changed.exit_rule == KLExit(threshold=0.1)
    assert schema.from_dict(holder, schema.to_dict(changed)) == changed
    with pytest.raises(ValueError, match=r"exit_rule\.kind is 'kll'"):
        schema.apply_overrides(holder(), ["exit_rule=kll"])
