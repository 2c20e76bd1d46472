"""The memory line: its estimate against the measured peak, and what it proposes."""

import json
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from openmythos.config import ModelConfig, SwiGLUConfig
from openmythos.config.schema import to_dict
from openmythos.plan.memory import DoesNotFitError
from openmythos.train import fits
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth, PoissonDepth
from openmythos.train.fits import TOLERANCE, memory_in_words, needed
from openmythos.train.objective import PerLoopObjective
from openmythos.train.optim import OptimizerConfig
from openmythos.train.recipe import RunConfig, TextData, TrainConfig
from tests.strategies import small_config

PLAIN = OptimizerConfig(muon_lr=None, embedding_lr=None)
CPU = torch.device("cpu")
MODELS: dict[str, ModelConfig] = {
    "dense": small_config(
        d_model=192, num_core_layers=2, vocab_size=512, feed_forward=SwiGLUConfig(d_ff=512)
    ),
    "wide": small_config(
        d_model=96, num_core_layers=1, vocab_size=8192, feed_forward=SwiGLUConfig(d_ff=256)
    ),
}
# Peak of a step over what was there before the model. Of /proc, because the peak of getrusage also
# counts the process that started this one.
MEASURE = """
import json, re, sys, torch
from openmythos.config import ModelConfig
from openmythos.config.schema import from_dict
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cross_entropy import cross_entropy

def memory(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

config, rows, length, loops, grad = json.loads(sys.argv[1])
def step(config, rows, length, loops, grad):
    model = RecurrentDepthLM(config, 0)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, config.vocab_size, (rows, length))
    for _ in range(2):
        logits = model(tokens, num_loops=loops, grad_loops=grad).logits
        cross_entropy(logits, tokens).mean().backward()
        del logits
        optimizer.step()
        optimizer.zero_grad()
config = from_dict(ModelConfig, config)
step(config, 1, 8, 1, None)  # what libraries keep for themselves
before = memory("VmRSS")
step(config, rows, length, loops, grad)
print(memory("VmHWM") - before)
"""


def of(model: ModelConfig, loops: int, backprop: int | None = None, **train: object) -> RunConfig:
    depth = DepthSchedule(sampling=FixedDepth(mean_recurrence=loops), mean_backprop_depth=backprop)
    settings = {"max_steps": 2, "batch_size": 16, "optimizer": PLAIN, "depth": depth, **train}
    return RunConfig(
        model=replace(model, max_seq_len=128),
        train=TrainConfig(**settings),  # type: ignore[arg-type]
        data=TextData(seq_len=128),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loops", "backprop"), [("dense", 6, None), ("wide", 6, 2)])
def test_the_estimate_is_near_the_measured_peak(
    name: str, loops: int, backprop: int | None
) -> None:
    config = of(MODELS[name], loops, backprop)
    given = json.dumps([to_dict(config.model), 16, 128, loops, backprop])
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, given], capture_output=True, text=True, check=True
    )
    peak, total = int(found.stdout), sum(needed(config).values())
    assert peak * (1 - TOLERANCE) <= total <= peak * (1 + TOLERANCE), (peak, needed(config))


def test_what_takes_less_is_counted() -> None:
    config = of(MODELS["dense"], 8)
    whole = needed(config)
    assert needed(of(MODELS["dense"], 8, 2))["activations"] < 0.5 * whole["activations"]
    assert needed(config, recompute=True)["activations"] < 0.5 * whole["activations"]
    one = needed(config, rows=1)
    assert one["activations"] * 16 == whole["activations"]
    adapter = needed(config, 1000)
    assert adapter["gradients"] == 4000 and adapter["optimizer"] == 8000
    assert adapter["parameters"] == whole["parameters"] + 4000
    every = needed(of(MODELS["dense"], 8, objective=PerLoopObjective()))
    assert every["logits"] - whole["logits"] == 7 * 4 * 16 * 128 * 512  # seven loops more, float32
    narrow = needed(of(MODELS["dense"], 8, autocast="bfloat16"))
    assert narrow["activations"] < 0.7 * whole["activations"]
    sampled = DepthSchedule(sampling=PoissonDepth(mean_recurrence=8))
    drawn = of(MODELS["dense"], 8, depth=sampled)
    deepest = sampled.deepest(seed=0, steps=2, batch_size=16)
    assert needed(drawn) == needed(of(MODELS["dense"], deepest))


def test_the_line_says_what_fits_and_proposes_what_does() -> None:
    config = of(MODELS["dense"], 8)
    total = sum(needed(config).values())
    with patch.object(fits, "free_bytes", lambda: 2 * total):
        said = memory_in_words(config, CPU)
    assert said.startswith("memory: about ") and "activations" in said and "\n" not in said
    assert "not suffice" not in said
    with patch.object(fits, "free_bytes", lambda: int(0.9 * total)):
        close = memory_in_words(config, CPU)
        assert "not suffice" not in memory_in_words(config, CPU, held=total)
    assert "--set train.recompute=true takes" in close and "the run begins" in close
    assert "--set train.grad_accumulation=16 takes" in close and "both take" in close
    with (
        patch.object(fits, "free_bytes", lambda: total // 2),
        pytest.raises(
            DoesNotFitError, match=r"does not suffice: --set train\.recompute=true takes"
        ),
    ):
        memory_in_words(config, CPU)
    done = of(MODELS["dense"], 8, recompute=True, grad_accumulation=16)
    with patch.object(fits, "free_bytes", lambda: 1), pytest.raises(DoesNotFitError) as caught:
        memory_in_words(done, CPU)
    assert "shorten data.seq_len" in str(caught.value)
    with patch.object(fits, "free_bytes", lambda: None):
        assert "this machine" not in memory_in_words(config, CPU)
