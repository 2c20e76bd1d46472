import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import openmythos as om
from openmythos.config import PonderNetConfig
from openmythos.engine.request import Request, token_ids
from openmythos.engine.sampling import SamplingConfig
from openmythos.model.exit import CumulativeThreshold, KLExit
from tests.strategies import small_config, unchecked

CONFIG = small_config()  # 32 tokens, 64 positions, 4 loops


@pytest.fixture(autouse=True)
def without_the_type_checker() -> Iterator[None]:
    """The annotations are of the fields as they are afterwards; here comes what users give."""
    with unchecked():
        yield


def test_the_defaults_ask_for_greedy_text_at_the_models_depth() -> None:
    request = om.Request(tokens=[1, 2])
    assert om.Request is Request
    assert dataclasses.asdict(request) == {
        "tokens": (1, 2),
        "max_new_tokens": None,
        "forced_tokens": (),
        "min_new_tokens": 0,
        "num_loops": None,
        "exit_rule": None,
        "sampling": {
            "temperature": 0.0,
            "top_k": None,
            "top_p": None,
            "num_ids": None,
            "logit_bias": (),
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
        },
        "stop_tokens": frozenset(),
        "seed": 0,
        "sample_idx": 0,
        "logprobs": None,
    }
    request.check(CONFIG)


def test_a_request_is_a_value() -> None:
    one, same = Request(tokens=[1], seed=2), Request(tokens=torch.tensor([1]), seed=np.int64(2))
    assert one == same and hash(one) == hash(same)
    assert one != Request(tokens=[1], seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "ids",
    [
        [3, 4],
        (3, 4),
        range(3, 5),
        iter([3, 4]),
        np.array([3, 4], dtype=np.uint16),
        torch.tensor([3, 4]),
        torch.tensor([3, 4], dtype=torch.int32),
        [np.int64(3), torch.tensor(4)],
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_ids_become_plain_numbers(ids: Any) -> None:
    request = Request(tokens=ids)
    assert request.tokens == (3, 4)
    assert {type(token) for token in request.tokens} == {int}
    stops = Request(tokens=[], stop_tokens=request.tokens).stop_tokens
    assert stops == {3, 4} and type(stops) is frozenset


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, torch.tensor, np.array])
def test_counts_become_plain_integers(kind: Any) -> None:
    counts = {"max_new_tokens": 5, "num_loops": 2, "seed": 7, "sample_idx": 3, "logprobs": 0}
    request = Request(tokens=[1], **{name: kind(value) for name, value in counts.items()})
    for name, value in counts.items():
        assert getattr(request, name) == value
        assert type(getattr(request, name)) is int


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tokens": "hello"}, "tokens is text; give token ids: encode it with a tokenizer first"),
        ({"tokens": b"hello"}, "tokens is text"),
        ({"tokens": ["hello"]}, "tokens is text"),
        ({"tokens": 3}, "tokens is 3; it must be a list of token ids"),
        ({"tokens": None}, "tokens is None; it must be a list"),
        ({"tokens": [1.5]}, r"tokens is \[1.5\]; it must be a list of token ids"),
        ({"tokens": torch.ones(2)}, r"tokens is \[1.0, 1.0\]; it must be"),
        ({"tokens": torch.ones(2, 2).long()}, r"tokens is \[\[1, 1\], \[1, 1\]\]; it must be"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be an integer of at least 1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0; it must be an integer"),
        ({"num_loops": 0}, "num_loops is 0; it must be an integer of at least 1"),
        ({"num_loops": True}, "num_loops is True; it must be an integer"),
        ({"num_loops": "8"}, "num_loops is '8'; it must be an integer"),
        ({"num_loops": torch.tensor([2])}, r"num_loops is \[2\]; it must be an integer"),
        ({"exit_rule": "kl"}, "exit_rule is 'kl'; it must be None or a rule of openmythos.model"),
        ({"sampling": 0.7}, "sampling is 0.7; it must be a SamplingConfig"),
        ({"stop_tokens": 3}, "stop_tokens is 3; it must be a list of token ids"),
        ({"stop_tokens": ["END"]}, "stop_tokens is text; give token ids"),
        ({"seed": None}, "seed is None; it must be an integer"),
        (
            {"seed": 2**64},
            r"seed is 18446744073709551616; it must be an integer in 0\.\.",
        ),
        ({"sample_idx": -1}, "sample_idx is -1; it must be an integer of at least 0"),
        ({"forced_tokens": "a"}, "forced_tokens is text; give token ids"),
        (
            {"forced_tokens": [1, 2], "max_new_tokens": 1},
            "the number of forced_tokens is 2; it must be at most max_new_tokens=1",
        ),
        ({"logprobs": -1}, "logprobs is -1; it must be an integer of at least 0"),
    ],
)
def test_bad_fields_are_refused_in_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        Request(**({"tokens": [1]} | fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "options", "said"),
    [
        ({"tokens": []}, {}, r"tokens is \[\]; it must be at least one token long"),
        ({"tokens": [1, 32]}, {}, r"tokens is \[1, 32\]; it must be of token ids in 0..31"),
        ({"tokens": [-1]}, {}, "token ids in 0..31"),
        ({"forced_tokens": [32]}, {}, r"forced_tokens is \[32\]; it must be of token ids in 0..31"),
        ({"tokens": [32]}, {"row": 2}, r"prompt 2 is \[32\]"),
        ({"stop_tokens": [40]}, {}, "a stop token is 40; it must be in 0..31"),
        ({"max_new_tokens": 64}, {}, "the request has 1 tokens and asks for 64 new ones"),
        (
            {"max_new_tokens": 4},
            {"num_before": 60, "row": 1},
            "row 1 has 61 tokens and asks for 4 new ones, and the model has room for 64 in all",
        ),
        ({"tokens": [1] * 64}, {}, "the request has 64 tokens, which leave no room for a new one"),
        ({}, {"max_loops": 3}, "num_loops is 4; it must be at most 3, the max_loops of the cache"),
        ({"num_loops": 9}, {"max_loops": 8}, "num_loops is 9; it must be at most 8"),
        ({"exit_rule": CumulativeThreshold(threshold=0.5)}, {}, "exit rule 'cumulative_threshold'"),
    ],
)
def test_what_a_model_cannot_do_is_refused_in_one_line(
    fields: dict[str, Any], options: dict[str, int], said: str
) -> None:
    request = Request(**({"tokens": [1]} | fields))
    with pytest.raises(ValueError, match=f"^{said}|{said}$") as caught:
        request.check(CONFIG, **options)
    assert "\n" not in str(caught.value)


def test_what_a_model_can_do_passes() -> None:
    Request(tokens=[0, 31], max_new_tokens=62, num_loops=100, stop_tokens=[31]).check(CONFIG)
    Request(tokens=[], max_new_tokens=4).check(CONFIG, num_before=60)
    Request(tokens=[1] * 63, exit_rule=KLExit()).check(CONFIG, max_loops=4)
    rule = CumulativeThreshold(threshold=0.5)
    Request(tokens=[1], exit_rule=rule).check(small_config(halting=PonderNetConfig()))


def test_budget_is_what_was_asked_for_or_all_that_fits() -> None:
    assert Request(tokens=[1], max_new_tokens=3).budget(10) == 3
    assert Request(tokens=[1]).budget(10) == 10


def test_sampling_is_converted_too() -> None:
    given = SamplingConfig(
        temperature=np.float32(0.5), top_k=torch.tensor(3), top_p=1, num_ids=np.int64(9)
    )
    assert given == SamplingConfig(temperature=0.5, top_k=3, top_p=1.0, num_ids=9)
    types = [type(v) for v in (given.temperature, given.top_k, given.top_p, given.num_ids)]
    assert types == [float, int, float, int]
    biased = SamplingConfig(logit_bias={np.int64(3): torch.tensor(0.5), 1: np.float32(2)})
    assert biased == SamplingConfig(logit_bias=[(1, 2.0), (3, 0.5)])
    assert biased.logit_bias == ((1, 2.0), (3, 0.5)) and hash(biased)


def test_token_ids_name_what_was_given() -> None:
    assert token_ids("prompt 3", [1, 2]) == (1, 2)
    with pytest.raises(ValueError, match=r"^prompt 3 is 1; it must be a list of token ids$"):
        token_ids("prompt 3", 1)
