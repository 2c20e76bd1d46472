"""What a trained model does on held-out text: losses by loops, by surprisal and by cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from experiments.text_loops.bigram import Bigrams
from openmythos.analysis.expert import jaccard
from openmythos.analysis.observe import observe
from openmythos.data.loader import TokenLoader
from openmythos.data.packing import IGNORED_TARGET, on_device
from openmythos.demo.walks import rank_correlation
from openmythos.model.cache import KVCache, LastLoop
from openmythos.model.inference import inference
from openmythos.model.loop import readout, start_loops, unroll
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cross_entropy import cross_entropy

EXIT_KL = 1e-3  # as the demo's samples


@dataclass(frozen=True)
class TokenLosses:
    """N held-out tokens.

    Attributes:
        tokens: The token before each.
        targets: The tokens.
        sizes: Their bytes.
        nats: The loss of each after a number of loops.
        exits: The loops that the KL rule takes for each, at most ``most_exits``.
    """

    tokens: Int[np.ndarray, " N"]
    targets: Int[np.ndarray, " N"]
    sizes: Int[np.ndarray, " N"]
    nats: dict[int, Float[np.ndarray, " N"]]
    exits: Int[np.ndarray, " N"]

    def bits_per_byte(self, loops: int) -> float:
        """At a number of loops."""
        return float(self.nats[loops].sum() / self.sizes.sum() / math.log(2))


def token_losses(
    model: RecurrentDepthLM,
    loader: TokenLoader,
    depths: Sequence[int],
    most_exits: int,
    max_batches: int,
) -> TokenLosses:
    """Losses at every depth from one pass through the loops: no loop knows how many will follow."""
    columns: list[list[np.ndarray]] = []
    with inference(model):
        for batch in loader.validation_batches(max_batches):
            counted = (batch.targets != IGNORED_TARGET).numpy()
            before, targets = batch.tokens.numpy()[counted], batch.targets.numpy()[counted]
            sizes = loader.tokenizer.token_num_bytes[targets]
            batch, ctx = on_device(model, batch)
            e = model.encode(batch.tokens, ctx)
            start = start_loops(model, e, ctx, [max(depths)] * len(batch.tokens))
            nats, exits = [], np.full(len(targets), most_exits)
            last = None
            for loops, state in enumerate(unroll(model, start, ctx), start=1):
                if loops not in depths and loops > most_exits:
                    continue
                logits = model.decode(readout(model, state), ctx)
                if loops in depths:
                    losses = cross_entropy(logits, batch.targets)
                    nats.append(losses.double().numpy()[counted])
                now = logits.log_softmax(dim=-1)
                if last is not None and loops <= most_exits:
                    moved = (now.exp() * (now - last)).sum(dim=-1).numpy()[counted]
                    exits = np.where((moved < EXIT_KL) & (exits == most_exits), loops, exits)
                last = now
            columns.append([before, targets, sizes, exits, *nats])
    joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
    by_loops = dict(zip(sorted(depths), joined[4:], strict=True))
    return TokenLosses(joined[0], joined[1], joined[2], by_loops, joined[3])


def by_surprisal(found: TokenLosses, bigrams: Bigrams, few: int, many: int) -> dict[str, Any]:
    """Fifths of the tokens by their surprisal under a bigram model: loops taken, bits gained."""
    surprise = bigrams.surprisal(found.tokens, found.targets)
    order = np.argsort(surprise, kind="stable")
    rows = []
    for part in np.array_split(order, 5):
        gained = (found.nats[few][part] - found.nats[many][part]) / math.log(2)
        rows.append({
            "tokens": len(part),
            "bigram_bits": float(surprise[part].mean()),
            "model_bits": float(found.nats[many][part].mean() / math.log(2)),
            "loops": float(found.exits[part].mean()),
            "bits_gained": float(gained.mean()),
        })  # fmt: skip
    pairs = list(zip(surprise.tolist(), found.exits.tolist(), strict=True))
    return {"fifths": rows, "rank_correlation": rank_correlation(pairs)}


def cache_losses(
    model: RecurrentDepthLM, loader: TokenLoader, num_loops: int, max_batches: int
) -> dict[str, float]:
    """Bits per token if every token reads the last loop's keys and values of those before it.

    Rows are read as one document each, token by token, as when text is generated; ``exact`` is a
    forward without a cache, which a cache of every loop equals.
    """
    tokens = torch.cat([batch.tokens for batch in loader.validation_batches(max_batches)])
    targets = tokens[:, 1:]
    with inference(model):
        exact = model(tokens, num_loops=num_loops).logits[:, :-1]
        last = last_loop_logits(model, tokens, num_loops)
    sizes = loader.tokenizer.token_num_bytes[targets.numpy()]
    return {
        "exact": bits_per_token(exact, targets),
        "last_loop": bits_per_token(last, targets),
        "bytes_per_token": float(sizes.mean()),
    }


def last_loop_logits(
    model: RecurrentDepthLM, tokens: Int[Tensor, "B T"], num_loops: int
) -> Float[Tensor, "B S V"]:
    """Logits after all tokens but the last, read one by one through a cache of the last loop."""
    rows, length = tokens.shape
    cache = KVCache(
        model.config, batch_size=rows, max_len=length, max_loops=num_loops, layout=LastLoop()
    )
    read = []
    for place in range(length - 1):
        ctx = model.context(tokens[:, place : place + 1], cache=cache)
        read.append(model(ctx.tokens, num_loops=num_loops, ctx=ctx).logits)
    return torch.cat(read, dim=1)


def bits_per_token(logits: Float[Tensor, "B S V"], targets: Int[Tensor, "B S"]) -> float:
    """The mean loss."""
    return float(cross_entropy(logits, targets).double().mean()) / math.log(2)


def expert_sets(
    model: RecurrentDepthLM, loader: TokenLoader, most_loops: int, max_batches: int
) -> dict[str, Any]:
    """How often a token's experts at two loops are the same set, and how often disjoint ones.

    Of the core's only layer; rows and columns are loops. ``other_*`` compares the token's experts
    with those of another token, half a text away.
    """
    chosen = []
    with inference(model):
        for batch in loader.validation_batches(max_batches):
            real = batch.documents >= 0
            batch, ctx = on_device(model, batch)
            loops = observe(model, batch.tokens, most_loops, ctx)
            chosen.append([loop.experts[0][real] for loop in loops])
    sets = [torch.cat(parts) for parts in zip(*chosen, strict=True)]  # per loop [N K]
    shifted = [part.roll(len(part) // 2, dims=0) for part in sets]
    found: dict[str, Any] = {"tokens": len(sets[0])}
    for name, others in (("", sets), ("other_", shifted)):
        agree = [[jaccard(one, two) for two in others] for one in sets]
        found[f"{name}jaccard"] = [[float(share.mean()) for share in row] for row in agree]
        found[f"{name}same"] = [[_share(share == 1) for share in row] for row in agree]
        found[f"{name}disjoint"] = [[_share(share == 0) for share in row] for row in agree]
    return found


def _share(true: Bool[Tensor, " N"]) -> float:
    return float(true.double().mean())
