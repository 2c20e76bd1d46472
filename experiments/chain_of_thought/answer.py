"""What an arm answers: silently at every number of loops, or by a chain that it writes itself."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from openmythos.data.packing import on_device
from openmythos.data.synthetic import Walks
from openmythos.model.inference import inference
from openmythos.model.loop import readout, start_loops, unroll
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.validation import puzzle_accuracy

TEST, CALIBRATION = 1, 2  # seeds of held-out walks: those that are reported, those that tune


def silently(
    model: RecurrentDepthLM, walks: Walks, hops: int, count: int, seed: int, most: int
) -> Int[Tensor, "L B"]:
    """The most likely last entity after each loop."""
    batch, ctx = on_device(model, walks.held_out_batch(hops, count, seed))
    said = []
    with inference(model):
        begun = start_loops(model, model.encode(batch.tokens, ctx), ctx, [most] * count)
        for state in unroll(model, begun, ctx):
            said.append(model.decode(readout(model, state), ctx)[:, -1].argmax(dim=-1))
    return torch.stack(said)


def in_writing(
    model: RecurrentDepthLM, walks: Walks, hops: int, count: int, seed: int, loops: int
) -> Int[Tensor, "B K"]:
    """The entities that the model writes after the question, each read before the next."""
    batch, _ = on_device(model, walks.held_out_batch(hops, count, seed))
    text = batch.tokens[:, : hops + 1]
    with inference(model):
        for _ in range(hops):
            positions = batch.positions[:, : text.shape[1]]
            ctx = model.context(text, positions=positions)
            new = model(text, num_loops=loops, ctx=ctx).logits[:, -1:].argmax(dim=-1)
            text = torch.cat([text, new], dim=1)
    return text[:, hops + 1 :]


def learnt(model: RecurrentDepthLM, walks: Walks, count: int) -> float:
    """Accuracy on the longest walks of training, at the trained number of loops.

    Of a model that writes, the whole answer has to be right.
    """
    loops = model.config.num_loops
    return puzzle_accuracy(model, walks, walks.config.max_train_hops, loops, count, CALIBRATION)


def record(
    model: RecurrentDepthLM, walks: Walks, hops: Iterable[int], count: int, most: int
) -> dict[str, Any]:
    """Everything that a run stores, JSON.

    ``learnt`` chooses the rate: on the longest walks of training, others than those reported, right
    at the trained number of loops. Right answers by hops: of a silent model after each loop, up to
    ``most``; of one that writes, at its own number of loops, the answer at the end and the whole
    chain. Of a silent model also what it would say after each loop on the longest walks of
    training, against each entity on the way.
    """
    longest, loops = walks.config.max_train_hops, model.config.num_loops
    found: dict[str, Any] = {
        "leaks": {str(n): walks.leak_baselines(n) for n in hops},
        "learnt": learnt(model, walks, count),
    }
    if not walks.config.written_out:
        said = {n: silently(model, walks, n, count, TEST, most) for n in hops}
        passed = {n: _passed(walks, n, count) for n in hops}
        found["right"] = {
            str(n): [_share(row == passed[n][:, -1]) for row in rows] for n, rows in said.items()
        }
        found["names"] = [
            [_share(row == entity) for entity in passed[longest].T] for row in said[longest]
        ]
        return found
    chains = {n: in_writing(model, walks, n, count, TEST, loops) for n in hops}
    passed = {n: _passed(walks, n, count) for n in hops}
    found["right"] = {
        str(n): [_share(chain[:, -1] == passed[n][:, -1])] for n, chain in chains.items()
    }
    found["whole"] = {
        str(n): _share((chain == passed[n]).all(dim=1)) for n, chain in chains.items()
    }
    return found


def _passed(walks: Walks, hops: int, count: int) -> Int[Tensor, "B K"]:
    """The entities after each hop."""
    tokens = walks.held_out_batch(hops, count, TEST).tokens[:, : hops + 1]
    return torch.from_numpy(walks.entities_along(tokens.numpy()))[:, 1:]


def _share(right: Bool[Tensor, " B"]) -> float:
    return float(right.double().mean())
