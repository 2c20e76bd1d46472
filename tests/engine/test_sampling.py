import math
import re
from typing import Any

import pytest
import torch

from openmythos.engine.sampling import (
    SamplingConfig,
    adjusted,
    row_generator,
    sample,
    token_logprobs,
    token_probs,
)
from tests.strategies import unchecked

PROBS = [0.4, 0.3, 0.15, 0.1, 0.05]
LOGITS = torch.tensor([PROBS], dtype=torch.float64).log()


def probs_of(**settings: float | None) -> list[float]:
    return token_probs(LOGITS, [SamplingConfig(**settings)])[0].tolist()


def draw(count: int, **settings: float | None) -> torch.Tensor:
    """``count`` draws a row, from 500 rows."""
    configs = [SamplingConfig(**settings)] * 500
    generators = [row_generator(0, row) for row in range(500)]
    logits = LOGITS.expand(500, -1)
    return torch.cat([sample(logits, configs, generators) for _ in range(count)])


def test_temperature_zero_is_greedy_and_draws_are_not_needed() -> None:
    assert probs_of() == [1, 0, 0, 0, 0]
    assert draw(2).unique().tolist() == [0]
    assert probs_of(temperature=0.0, top_k=3, top_p=0.5) == [1, 0, 0, 0, 0]


def test_temperature_sharpens_and_flattens() -> None:
    assert probs_of(temperature=1.0) == pytest.approx(PROBS)
    squared = [p**2 for p in PROBS]
    assert probs_of(temperature=0.5) == pytest.approx([p / sum(squared) for p in squared])
    assert probs_of(temperature=1e-300) == [1, 0, 0, 0, 0]
    assert probs_of(temperature=1e300) == pytest.approx([0.2] * 5)


def test_top_k_keeps_the_k_best() -> None:
    assert probs_of(temperature=1.0, top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0])
    assert probs_of(temperature=1.0, top_k=1) == [1, 0, 0, 0, 0]
    ties = torch.zeros(1, 5)
    kept = token_probs(ties, [SamplingConfig(temperature=1.0, top_k=2)])
    assert int((kept > 0).sum()) == 2


@pytest.mark.parametrize("top_k", [5, 6, 50, 10**9])
def test_top_k_past_the_vocabulary_keeps_all(top_k: int) -> None:
    assert probs_of(temperature=1.0, top_k=top_k) == pytest.approx(PROBS)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.96, 5), (1.0, 5)]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: int) -> None:
    left = PROBS[:kept] + [0.0] * (5 - kept)
    expected = [p / sum(left) for p in left]
    assert probs_of(temperature=1.0, top_p=top_p) == pytest.approx(expected)


def test_top_p_counts_what_top_k_left() -> None:
    # Of 4/7 and 3/7 the first alone reaches 0.5; of the full distribution it would not.
    assert probs_of(temperature=1.0, top_k=2, top_p=0.5) == [1, 0, 0, 0, 0]
    assert probs_of(temperature=1.0, top_p=0.5)[1] > 0


def test_top_p_of_one_keeps_tiny_probabilities() -> None:
    logits = torch.linspace(0, -60, 1000)[None]
    probs = token_probs(logits, [SamplingConfig(temperature=1.0, top_p=1.0)])
    assert bool((probs > 0).all())


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.9}], ids=str
)
def test_frequencies_follow_the_probabilities(settings: dict[str, float]) -> None:
    expected = torch.tensor(probs_of(temperature=1.0, **settings)) * 4000
    seen = draw(8, temperature=1.0, **settings).bincount(minlength=5)
    assert bool((seen[expected == 0] == 0).all())
    kept = expected > 0
    chi_square = float(((seen - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < 18.5  # the 0.1 % point at four degrees of freedom


def test_rows_have_their_own_settings_and_draws() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 9, generator=generator)
    configs = [
        SamplingConfig(),
        SamplingConfig(temperature=0.7),
        SamplingConfig(temperature=1.3, top_k=4),
        SamplingConfig(temperature=1.0, top_p=0.6),
    ]
    together, alone = [], []
    generators = [row_generator(5, row) for row in range(4)]
    for _ in range(30):
        together.append(sample(logits, configs, generators).tolist())
    for row in range(4):
        own = row_generator(5, row)
        alone.append([int(sample(logits[[row]], [configs[row]], [own])) for _ in range(30)])
    assert [list(column) for column in zip(*together, strict=True)] == alone
    assert len({tuple(column) for column in alone[1:]}) == 3


def test_seed_and_row_choose_the_draws() -> None:
    def first(seed: int, row: int) -> float:
        return float(torch.rand((), generator=row_generator(seed, row)))

    assert first(1, 2) == first(1, 2)
    assert len({first(seed, row) for seed in range(5) for row in range(5)}) == 25


def test_half_precision_logits() -> None:
    logits = LOGITS.bfloat16()
    assert token_probs(logits, [SamplingConfig(temperature=1.0)])[0].tolist() == pytest.approx(
        PROBS, abs=0.01
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 0}, "top_k is 0; it must be an integer of at least 1"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be an integer"),
        ({"top_p": None, "top_k": "3"}, "top_k is '3'"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"logit_bias": 3}, "logit_bias is 3; it must be numbers by token id"),
        ({"logit_bias": [3]}, r"logit_bias is \[3\]; it must be numbers by token id"),
        ({"logit_bias": {-1: 1.0}}, "an id of logit_bias is -1"),
        ({"logit_bias": {"1": 1.0}}, "an id of logit_bias is '1'"),
        ({"logit_bias": {1: math.nan}}, "a bias of logit_bias is nan"),
        ({"logit_bias": {1: math.inf}}, "a bias of logit_bias is inf"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be a number above 0"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf; it must be a number"),
        ({"presence_penalty": "1"}, "presence_penalty is '1'; it must be a number"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with unchecked(), pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_diverged_logits_are_named(bad: float) -> None:
    logits = torch.zeros(2, 3)
    logits[1, 2] = bad
    with pytest.raises(ValueError, match="logits of row 1 are not finite"):
        token_probs(logits, [SamplingConfig()] * 2)


def test_one_config_and_generator_a_row() -> None:
    with pytest.raises(ValueError, match="2 rows of logits came with 1 configs"):
        sample(torch.zeros(2, 3), [SamplingConfig()], [row_generator(0, 0)])


GENERATOR = row_generator(0, 0)
GREEDY = SamplingConfig()


@unchecked()
@pytest.mark.parametrize(
    ("logits", "configs", "said"),
    [
        (None, [GREEDY], "logits is None; it must be a tensor of floats, [B, V]"),
        ([[0.0, 1.0]], [GREEDY], "logits is [[0.0, 1.0]]; it must be a tensor"),
        (LOGITS[0], [GREEDY], "logits is [-0.9"),
        (LOGITS[None], [GREEDY], "logits is [[[-0.9"),
        (torch.ones(1, 3).long(), [GREEDY], "logits is [[1, 1, 1]]; it must be a tensor of floats"),
        (torch.ones(1, 0), [GREEDY], "logits is [[]]; it must be"),
        (torch.ones(0, 3), [], "logits is []; it must be"),
        (LOGITS, GREEDY, "configs is SamplingConfig("),
        (LOGITS, None, "configs is None; it must be a list of SamplingConfig, one per row"),
        (LOGITS, [None], "configs is [None]; it must be a list of SamplingConfig"),
        (LOGITS, [{"temperature": 1.0}], "configs is [{'temperature': 1.0}]; it must be a list"),
        (LOGITS, (), "1 rows of logits came with 0 configs; give one per row"),
        (LOGITS, [GREEDY] * 2, "1 rows of logits came with 2 configs; give one per row"),
        (LOGITS * math.nan, [GREEDY], "the logits of row 0 are not finite numbers"),
        (LOGITS - math.inf, [GREEDY], "the logits of row 0 are not finite numbers"),
        (
            torch.tensor([[-math.inf, 1.0]]),
            [SamplingConfig(num_ids=1)],
            "the logits of row 0 are not finite numbers",
        ),
    ],
)
def test_wrong_values_are_refused_in_one_line(logits: Any, configs: Any, said: str) -> None:
    for call in (
        lambda: token_probs(logits, configs),
        lambda: sample(logits, configs, [GENERATOR]),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}") as caught:
            call()
        assert "\n" not in str(caught.value)


@unchecked()
@pytest.mark.parametrize(
    ("generators", "said"),
    [
        ([], "1 rows of logits came with 0 generators; give one per row"),
        ([GENERATOR] * 2, "1 rows of logits came with 2 generators; give one per row"),
        (None, "generators is None; it must be a list of torch.Generator, one per row"),
        (GENERATOR, "generators is <torch"),
        (3, "generators is 3; it must be a list of torch.Generator, one per row"),
        ([3], "generators is [3]; it must be a list of torch.Generator, one per row"),
        ([None], "generators is [None]; it must be a list of torch.Generator"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_wrong_generators_are_refused_in_one_line(
    generators: Any, said: str, temperature: float
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}") as caught:
        sample(LOGITS, [SamplingConfig(temperature=temperature)], generators)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("seed", "row", "said"),
    [
        (None, 0, "seed is None; it must be an integer in 0.."),
        (1.0, 0, "seed is 1.0; it must be an integer in 0.."),
        (True, 0, "seed is True; it must be an integer in 0.."),
        ("1", 0, "seed is '1'; it must be an integer in 0.."),
        (-1, 0, "seed is -1; it must be an integer in 0.."),
        (0, -1, "row is -1; it must be an integer of at least 0"),
        (0, 0.5, "row is 0.5; it must be an integer of at least 0"),
    ],
)
@unchecked()
def test_wrong_seeds_are_refused_in_one_line(seed: Any, row: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        row_generator(seed, row)


def test_logprobs_are_those_of_the_model() -> None:
    expected = torch.tensor(PROBS, dtype=torch.float64).log()
    found = token_logprobs(LOGITS[0] + 3, 3, 2)  # whatever the logits' level
    assert found.chosen == pytest.approx(float(expected[3]))
    assert [token for token, _ in found.top] == [0, 1]
    assert [value for _, value in found.top] == pytest.approx(expected[:2].tolist())


def test_logprobs_of_none_and_of_more_than_there_are() -> None:
    assert token_logprobs(LOGITS[0], 1, 0).top == ()
    assert token_logprobs(LOGITS[0], 1, 0).chosen == pytest.approx(math.log(0.3))
    assert [token for token, _ in token_logprobs(LOGITS[0], 1, 99).top] == [0, 1, 2, 3, 4]
    ties = token_logprobs(torch.zeros(4, dtype=torch.bfloat16), 0, 2)
    assert [token for token, _ in ties.top] == [0, 1]
    assert ties.chosen == pytest.approx(-math.log(4))


def test_ids_past_the_tokenizers_are_never_sampled() -> None:
    """Greedily, sampled, and in one batch with a row that may take all ids."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 50.0]]).expand(2, 4)
    for temperature in (0.0, 1.0):
        cut = SamplingConfig(temperature=temperature, num_ids=3)
        every = SamplingConfig(temperature=temperature)
        drawn = [
            sample(logits, [cut, every], [row_generator(seed, 0), row_generator(seed, 1)]).tolist()
            for seed in range(20)
        ]
        assert all(first < 3 and second == 3 for first, second in drawn)
        assert len({first for first, _ in drawn}) == (1 if temperature == 0 else 3)
    probs = token_probs(logits[:1], [SamplingConfig(temperature=1.0, num_ids=3)])
    assert torch.allclose(probs[0, :3], torch.tensor([0.0, 1.0, 2.0]).double().softmax(0))
    with pytest.raises(ValueError, match="num_ids is 0"):
        SamplingConfig(num_ids=0)


# --- bias and penalties ---------------------------------------------------------------------------


def adjust(text: list[int], num_new: int, **settings: Any) -> list[float]:
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0]])
    return adjusted(logits, [SamplingConfig(**settings)], [text], [num_new])[0].tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2.0, -1.0, 0.5, 0.0]),
        ({"logit_bias": [(3, 4.0), (1, -math.inf)]}, [2.0, -math.inf, 0.5, 4.0]),
        # In the text are 0, 1 (given) and 0, 0, 2 (new).
        ({"repetition_penalty": 2.0}, [1.0, -2.0, 0.25, 0.0]),
        ({"frequency_penalty": 0.5}, [1.0, -1.0, 0.0, 0.0]),
        ({"presence_penalty": 0.5}, [1.5, -1.0, 0.0, 0.0]),
        ({"frequency_penalty": -0.5, "presence_penalty": 0.25}, [2.75, -1.0, 0.75, 0.0]),
        # The bias comes first, then the division, then what is subtracted.
        (
            {"logit_bias": [(0, 2.0)], "repetition_penalty": 2.0, "frequency_penalty": 0.25},
            [1.5, -2.0, 0.0, 0.0],
        ),
    ],
)
def test_bias_and_penalties_by_numbers(settings: dict[str, Any], expected: list[float]) -> None:
    assert adjust([0, 1, 0, 0, 2], 3, **settings) == expected


def test_rows_are_adjusted_alone_and_the_given_logits_stay() -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    plain, biased = SamplingConfig(), SamplingConfig(logit_bias=[(2, 9.0)])
    changed = adjusted(logits, [plain, biased, plain], [[1], [], [2, 2]], [0, 0, 2])
    assert torch.equal(logits, before)
    assert (changed != logits).nonzero().tolist() == [[1, 2]]
    assert adjusted(logits, [plain] * 3, [[]] * 3, [0] * 3) is logits


def test_forbidding_every_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^logit_bias forbids every token; leave at least one$"):
        adjust([0], 0, logit_bias=[(i, -math.inf) for i in range(4)])
