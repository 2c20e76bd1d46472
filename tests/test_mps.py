"""Everything runs on a pretended MPS, which has no fp64 and mixes no devices."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import openmythos as om
from openmythos import config as configs
from openmythos.analysis.trace import trace_loops
from openmythos.config import ModelConfig
from openmythos.config.schema import from_dict
from openmythos.engine.sampling import (
    SamplingConfig,
    adjusted,
    row_generator,
    sample,
    token_logprobs,
)
from openmythos.eval.scoring import Scorer
from openmythos.model.cache import EveryK, FirstLoop, LastLoop, PerLoop
from openmythos.model.exit import EXIT_RULES, make_exit_rule
from openmythos.tokenizer import byte_tokenizer
from openmythos.train.objective import (
    ExitGainObjective,
    ExitWeightedObjective,
    FinalLoopObjective,
    PerLoopObjective,
)
from openmythos.train.recipe import RunConfig
from openmythos.train.run import set_up
from tests.mps import MPS, OnMps, pretended_mps, to_mps
from tests.strategies import SEAMS, examples, random_model, random_tokens, small_config
from tests.train.examples import hops_config, measured, text_config, write_text


def test_the_pretended_device_refuses_what_mps_refuses() -> None:
    with pretended_mps():
        x = torch.zeros(3, device="mps")
        assert (x + 1).device == x.new_tensor([1.0]).device == torch.tensor(1, device=MPS).device
        assert x.cpu().device.type == "cpu" and torch.zeros(2).to(x).device == MPS
        for make in (x.double, lambda: torch.zeros(2, dtype=torch.float64, device="mps")):
            with pytest.raises(TypeError, match="MPS has no float64"):
                make()
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.zeros(3)
        with pytest.raises(TypeError, match=r"use Tensor.cpu\(\) first"):
            x.numpy()
        x += torch.tensor(2.0)  # without dimensions it may be anywhere
        x[torch.tensor([0])] = 1.0
        assert x.tolist() == [1.0, 2.0, 2.0]


def members() -> Iterator[ModelConfig]:
    """A model for every member of every seam."""
    for seam, parts in SEAMS.items():
        for part in parts:
            yield small_config(**{seam: from_dict(part, examples(part)[-1])})


def logits_and_gradients(model: om.RecurrentDepthLM, tokens: Tensor) -> list[Tensor]:
    out = model(tokens, num_loops=3)
    out.logits.logsumexp(dim=-1).mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [x.inner if isinstance(x, OnMps) else x for x in (out.logits.detach(), *grads)]


@pytest.mark.slow
def test_forward_and_backward_of_every_member(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMYTHOS_KERNELS_OFF", "attention,experts")  # as on MPS
    for config in members():
        tokens, model = random_tokens(config, 2, 7), random_model(config)
        expected = logits_and_gradients(model, tokens)
        model = random_model(config)
        with pretended_mps():
            to_mps(model)
            found = logits_and_gradients(model, OnMps(tokens))
        torch.testing.assert_close(found, expected)  # sums are taken in another order


FIELDS: dict[str, dict[str, float]] = {
    "cumulative_threshold": {"threshold": 0.5},
    "acceleration": {"threshold": 0.1},
}
SAMPLED = {"temperature": 0.8, "top_k": 10, "top_p": 0.9, "seed": 3}


@pytest.mark.parametrize("kind", EXIT_RULES)
def test_generation(kind: str) -> None:
    gate = configs.PonderNetConfig() if kind == "cumulative_threshold" else None
    model = random_model(small_config(halting=gate))
    layout = {"kl": LastLoop(), "entropy_kl": FirstLoop(), "acceleration": EveryK(k=2)}
    options: dict[str, Any] = {
        "exit_rule": make_exit_rule(kind, **FIELDS.get(kind, {})),
        "cache_layout": layout.get(kind, PerLoop()),
        "max_new_tokens": 2,
        "prefill_chunk": 2,
        **SAMPLED,
    }
    prompts = [[1, 2], [4, 5, 6]]
    expected = om.generate(model, prompts, **options)
    with pretended_mps():
        to_mps(model)
        found = om.generate(model, prompts, **options)
    assert (found.tokens, found.loops) == (expected.tokens, expected.loops)


def test_sampling_is_as_exact_as_elsewhere() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": [(3, 1.0)]}
    ways = [SamplingConfig(temperature=0.7, top_p=0.8, **penalties), SamplingConfig(num_ids=9)]

    def draw(x: Tensor) -> Tensor:
        x = adjusted(x, ways, [[1, 2, 2], [4]], [2, 0])
        return sample(x, ways, [row_generator(1, row) for row in range(2)])

    expected, report = draw(logits), token_logprobs(logits[0], 3, 4)
    with pretended_mps():
        there = OnMps(logits)
        drawn = draw(there)
        assert drawn.device == MPS and drawn.tolist() == expected.tolist()
        assert token_logprobs(there[0], 3, 4) == report


def runs(text: Path) -> Iterator[RunConfig]:
    short: dict[str, Any] = {"max_steps": 2, "eval_every": 2}
    yield text_config(text, **short, grad_accumulation=2, recompute=True)
    yield hops_config(**short)
    gate = {"halting": configs.PonderNetConfig()}
    for objective, parts in (
        (PerLoopObjective(), {}),
        (ExitWeightedObjective(kl_weight=0.1, entropy_weight=0.1), gate),
        (ExitGainObjective(), gate),
        (FinalLoopObjective(ponder_weight=0.01), {"halting": configs.ACTConfig()}),
    ):
        config = text_config(text, **short)
        train = replace(config.train, objective=objective)
        yield replace(config, model=replace(config.model, **parts), train=train)


@pytest.mark.slow
def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMYTHOS_KERNELS_OFF", "attention,experts")
    for number, config in enumerate(runs(write_text(tmp_path))):
        here, there = (set_up(config, tmp_path / f"{number}-{place}") for place in ("cpu", "mps"))
        for run in (here, there):  # safetensors reads memory, which is not pretended
            monkeypatch.setattr(run.folder, "save", lambda *state, wait: None)
        here.train()
        with pretended_mps():
            to_mps(there.model)
            there.train()
        found, expected = (measured(run.folder.path) for run in (there, here))
        assert len(found) == len(expected) > 2
        for row, same in zip(found, expected, strict=True):
            assert row.keys() == same.keys() and row["kind"] == same["kind"]
            # Sums are taken in another order; after a step, Muon multiplies in bf16 off the CPU.
            near = 1e-4 if row["step"] == 1 else 0.05
            for name in {"loss", "nats_per_token", "bits_per_byte"} & same.keys():
                assert row[name] == pytest.approx(same[name], rel=near), name


def test_traces_and_scores() -> None:
    codec = byte_tokenizer()
    model = random_model(small_config(vocab_size=codec.vocab_size))
    tokens = random_tokens(model.config, 2, 7)

    def scores() -> list[Any]:
        scorer = Scorer(model=model, codec=codec, num_loops=2)
        pairs = [("a b", " c"), ("", "long text")]
        return [*scorer.loglikelihood(pairs), *scorer.rolling(["some text"])]

    expected, trace = scores(), trace_loops(model, tokens, 4)
    with pretended_mps():
        to_mps(model)
        assert trace_loops(model, OnMps(tokens), 4) == trace
        assert scores() == expected
