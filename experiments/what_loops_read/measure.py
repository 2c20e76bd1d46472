"""What is measured on one model: maps, novelty, operator difference, the coda, many loops."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.depth_dial.grid import path
from experiments.what_loops_read.arms import ARMS, NEW_HOPS, SIGNALS, STACK_GROUPS, TRAINED_HOPS
from openmythos.analysis.difference import loop_difference
from openmythos.analysis.intervention import answer_logits
from openmythos.analysis.novelty import novelty
from openmythos.analysis.operator_difference import operator_difference
from openmythos.analysis.pairs import puzzle_pairs
from openmythos.analysis.reading import reading_map
from openmythos.analysis.stack import LayersAsLoops
from openmythos.data.packing import on_device
from openmythos.data.synthetic import Walks
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM

POINT = 0.01
MANY_LOOPS = 32


def measure(arm: str, model: RecurrentDepthLM, walks: Walks, size: int) -> dict[str, Any]:
    """Everything that an arm's verdicts and figures need."""
    is_stack = ARMS[arm].is_stack
    view = LayersAsLoops(model, STACK_GROUPS) if is_stack else model
    trained = STACK_GROUPS if is_stack else model.config.num_loops
    found = maps(arm, model, walks, size)
    found["at_trained_loops"] = read(view, walks, TRAINED_HOPS, trained, size)
    loops = found["maps"][str(TRAINED_HOPS)]["loops"]
    pairs = puzzle_pairs(walks, TRAINED_HOPS, size)
    if loops > 1:
        fit = walks.held_out_batch(TRAINED_HOPS, size, seed=5).tokens
        new = novelty(view, pairs.tokens, pairs.answers, loops, fit=fit, num_samples=200)
        found["novelty"] = list(new.ridge_novelty)
    if not is_stack:
        apart = operator_difference(model, pairs.tokens, trained)
        found["operator"] = [list(row) for row in apart.relative]
        found["curve"] = curve(model, walks, size)
    if arm in SIGNALS:
        found["as_first_loop"] = as_first_loop(model, pairs.tokens, pairs.answers, trained)
    if arm == "coda":
        found["coda"] = coda(model, walks, trained, size)
    return _rounded(found)


def maps(arm: str, model: RecurrentDepthLM, walks: Walks, size: int) -> dict[str, Any]:
    """The reading maps at T*, on trained and on longer walks."""
    is_stack, found = ARMS[arm].is_stack, {}
    view = LayersAsLoops(model, STACK_GROUPS) if is_stack else model
    for hops in (TRAINED_HOPS, NEW_HOPS):
        # An untrained model is at chance after any number of loops: the trained number.
        if is_stack:
            loops = STACK_GROUPS
        elif ARMS[arm].trained:
            loops = fewest_loops(model, walks, hops, size)
        else:
            loops = model.config.num_loops
        found[str(hops)] = read(view, walks, hops, loops, size)
    return _rounded({"maps": found})


def fewest_loops(model: RecurrentDepthLM, walks: Walks, hops: int, size: int) -> int:
    """T*: the fewest loops within a point of the best of 1 to 16."""
    accuracy = path(model, walks.held_out_batch(hops, size, seed=1), 16).right.double().mean(dim=1)
    return 1 + int((accuracy >= accuracy.max() - POINT).double().argmax())


def read(model: RecurrentDepthLM, walks: Walks, hops: int, loops: int, size: int) -> dict[str, Any]:
    """The reading map and the difference of its rows."""
    found = reading_map(model, puzzle_pairs(walks, hops, size), loops)
    bits = loop_difference(found, num_samples=200, num_shuffles=50)
    numbers = found.to_dict(num_samples=2)
    kept = ("necessity", "sufficiency", "necessity_sum", "sufficiency_sum", "accuracy")
    kept += ("logits_through_loops", "logits_whole")
    return {
        "loops": loops,
        **{name: numbers[name] for name in kept},
        "bits": list(bits.bits),
        "mean_bits": bits.mean_bits,
        "mean_interval": bits.mean_interval,
        "null": bits.null,
        "working": len(bits.working),
    }


def curve(model: RecurrentDepthLM, walks: Walks, size: int) -> list[float]:
    """Accuracy on the longest trained walks after 1 to 32 loops."""
    batch = walks.held_out_batch(TRAINED_HOPS, size, seed=1)
    return path(model, batch, MANY_LOOPS).right.double().mean(dim=1).tolist()


def as_first_loop(
    model: RecurrentDepthLM, tokens: Tensor, answers: Tensor, loops: int
) -> dict[str, float]:
    """Accuracy with every loop's own signal, and with the first loop's at every loop."""
    own, first = (
        float((answer_logits(model, tokens, schedule).argmax(dim=-1) == answers).double().mean())
        for schedule in (range(loops), [0] * loops)
    )
    return {"own": own, "first": first}


def coda(model: RecurrentDepthLM, walks: Walks, loops: int, size: int) -> dict[str, float]:
    """Accuracy of the model, and of a linear map of the state at the last token before the coda."""
    x, y = states(model, walks, loops, 4 * size, seed=6)
    test, answers = states(model, walks, loops, size, seed=1)
    wanted = torch.nn.functional.one_hot(y, walks.config.num_entities).double()
    gram = x.T @ x
    penalty = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    linear = torch.linalg.solve(gram + penalty, x.T @ wanted)
    right = (test @ linear).argmax(dim=-1) == answers
    model_right = path(model, walks.held_out_batch(TRAINED_HOPS, size, seed=1), loops).right[-1]
    return {"model": float(model_right.double().mean()), "linear": float(right.double().mean())}


def states(
    model: RecurrentDepthLM, walks: Walks, loops: int, size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The last tokens' states after the loops, with a constant, and the answers."""
    batch, ctx = on_device(model, walks.held_out_batch(TRAINED_HOPS, size, seed=seed))
    with inference(model):
        h = model(batch.tokens, num_loops=loops, ctx=ctx).h[:, -1].double()
    return torch.cat([h, torch.ones_like(h[:, :1])], dim=1), batch.targets[:, -1]


def _rounded(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [_rounded(value) for value in data]
    return round(data, 4) if isinstance(data, float) else data
