"""The arms: the demo's text model, the same with experts, and three plain stacks that match it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from experiments.equal_accuracy import keeping_checkpoints
from experiments.matching import Size, training_flops
from openmythos import baseline
from openmythos.config import ModelConfig, MoEConfig, counts
from openmythos.config.counts import FORWARD_AND_BACKWARD
from openmythos.demo.text import text_config
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth
from openmythos.train.recipe import RunConfig, TextData

LOOP, MOE = "loop", "loop_moe"
STACKS = ("stack_parameters", "stack_training_flops", "stack_test_flops")
ARMS = (LOOP, MOE, *STACKS)
ZOO = "zoo_text"  # the model that ships; shown beside the arms, and decides nothing
SEQ_LEN = 256
MEAN_CONTEXT = (SEQ_LEN + 1) // 2  # tokens that a token of a row attends to on average
DEMO = text_config(0, 1.0)
TRAINED_LOOPS = DEMO.model.num_loops  # the mean of what training draws
# The demo ramps the depth up from one loop and ends gradients at the last, to save time; in so few
# steps, its loops then gain nothing. Here depth is around 4 from the first step on.
GRAD_LOOPS = 2
DEPTH = replace(DEMO.train.depth, ramp=0.0, mean_backprop_depth=GRAD_LOOPS)
SAVE_EVERY = 10  # steps between two checkpoints, at which equal training loss is looked for
LEVELS = (2.4, 2.0)  # bits per byte of training text that count as equal
EXPERTS = MoEConfig(num_experts=8, num_experts_per_token=2, d_expert=8)


@cache
def model_of(arm: str) -> ModelConfig:
    """The model of an arm; the vocabulary is set by the data."""
    looped = DEMO.model
    if arm == LOOP:
        return looped
    if arm == MOE:
        return _of_width(
            [replace(looped, core_feed_forward=EXPERTS.with_width(w)) for w in range(8, 641, 8)],
            test_flops,
            test_flops(looped),
        )
    if arm == "stack_parameters":
        return baseline(looped, match="parameters").config
    if arm == "stack_test_flops":
        return baseline(looped, match="flops", context_length=MEAN_CONTEXT).config
    as_deep = replace(looped, num_loops=TRAINED_LOOPS - 1)
    near = baseline(as_deep, match="flops", context_length=MEAN_CONTEXT).config
    widths = range(8, 1281, 8)
    return _of_width(
        [replace(near, feed_forward=near.feed_forward.with_width(w)) for w in widths],
        lambda config: FORWARD_AND_BACKWARD * test_flops(config),
        training_flops(size_of(LOOP), MEAN_CONTEXT),
    )


def size_of(arm: str) -> Size:
    """What the table of the arms is computed from."""
    looped = arm in (LOOP, MOE)
    return Size(
        config=model_of(arm),
        training_loops=mean_loops() if looped else 1.0,
        test_loops=TRAINED_LOOPS if looped else 1,
        grad_loops=GRAD_LOOPS if looped else None,
    )


@cache
def mean_loops() -> float:
    """Mean number of loops of a training step."""
    steps = 2000
    drawn = [
        DEPTH.sample(seed=0, step=step, progress=step / steps, batch_size=1)[0]
        for step in range(steps)
    ]
    return float(sum(int(depth) for depth in drawn)) / steps


def test_flops(config: ModelConfig) -> float:
    """Of a forward, per token."""
    return float(counts.forward_flops(config, context_length=MEAN_CONTEXT))


def run_config(arm: str, seed: int, settings: Mapping[str, Any], source: str) -> RunConfig:
    """The training of an arm: the demo's, by steps, its rates all scaled with ``rate``."""
    train, factor = DEMO.train, settings["rate"] / (DEMO.train.optimizer.muon_lr or 1.0)
    own = train.optimizer
    optimizer = replace(
        own,
        lr=own.lr * factor,
        embedding_lr=(own.embedding_lr or own.lr) * factor,
        muon_lr=settings["rate"],
    )
    plain = DepthSchedule(sampling=FixedDepth(mean_recurrence=1))
    train = replace(
        train,
        seed=seed,
        max_seconds=None,
        max_steps=settings["steps"],
        batch_size=settings["batch_size"],
        optimizer=optimizer,
        depth=plain if arm in STACKS else DEPTH,
        log_every=5,
    )
    data = TextData(source=source, seq_len=settings["seq_len"])
    return RunConfig(model=model_of(arm), train=keeping_checkpoints(train, SAVE_EVERY), data=data)


def _of_width(candidates: list[ModelConfig], size: Any, target: float) -> ModelConfig:
    return min(candidates, key=lambda config: abs(size(config) - target))
