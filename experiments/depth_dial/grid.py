"""What is measured on a trained model: accuracy over hops and loops, exits, falls, two passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from openmythos.data.packing import Batch, on_device
from openmythos.data.synthetic import Walks
from openmythos.model.exit import (
    AccelerationExit,
    ArgmaxStableExit,
    EntropyKLExit,
    KLExit,
    LatentDifferenceExit,
    Rule,
)
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM

HOPS = (*range(1, 17), 20, 24, 32)
LOOPS = (*range(1, 17), 20, 24, 32)
LEAK_HOPS = (4, 8, 16)
EXIT_HOPS = (2, 4, 6, 8, 10, 12)
# None of them has seen the models: the thresholds are the demo's, the library's defaults, or 0.05.
RULES: Mapping[str, Rule] = {
    "entropy_kl": EntropyKLExit(kl=0.01, entropy=1.0),
    "kl": KLExit(),
    "latent_difference": LatentDifferenceExit(),
    "acceleration": AccelerationExit(threshold=0.05),
    "argmax_stable": ArgmaxStableExit(patience=2),
}
MOST_CONFIDENT = "most_confident"  # of all loops; no rule that can stop early
FALL = 0.1  # nats; a smaller loss between two loops is no fall


@dataclass(frozen=True)
class Path:
    """The answers to some walks after every loop.

    Attributes:
        log_prob: Log-probability of the right answer.
        right: Whether it is the most likely token.
        top: Probability of the most likely token.
        states: The state at the last token, before the first loop too.
        logits: The logits there.
    """

    log_prob: Float[Tensor, "L B"]
    right: Bool[Tensor, "L B"]
    top: Float[Tensor, "L B"]
    states: Float[Tensor, "M B D"]
    logits: Float[Tensor, "L B V"]


def path(model: RecurrentDepthLM, batch: Batch, num_loops: int) -> Path:
    """Run the walks once, and read every loop out."""
    answers = batch.targets[:, -1]
    batch, ctx = on_device(model, batch)
    with inference(model):
        output = model(batch.tokens, num_loops=num_loops, ctx=ctx, keep_states=True)
        start = model.init_state(model.encode(batch.tokens, ctx), ctx)
        logits = torch.stack([model.decode(h, ctx)[:, -1] for h in output.states])
    log_probs = logits.log_softmax(dim=-1)
    own = answers.expand(len(logits), -1)[..., None]
    return Path(
        log_prob=log_probs.gather(-1, own)[..., 0],
        right=logits.argmax(dim=-1) == answers,
        top=log_probs.amax(dim=-1).exp(),
        states=torch.stack([h[:, -1] for h in (start, *output.states)]),
        logits=logits,
    )


def grid(model: RecurrentDepthLM, walks: Walks, loops: Sequence[int], size: int) -> dict[str, Any]:
    """Accuracy and mean log-probability of the answer by hops (rows) and loops (columns)."""
    accuracy, log_prob = [], []
    for hops in HOPS:
        found = path(model, walks.held_out_batch(hops, size, seed=1), max(loops))
        chosen = [n - 1 for n in loops]
        accuracy.append(_rounded(found.right[chosen].double().mean(dim=1)))
        log_prob.append(_rounded(found.log_prob[chosen].double().mean(dim=1)))
    return {"loops": list(loops), "accuracy": accuracy, "log_prob": log_prob}


def exits(model: RecurrentDepthLM, walks: Walks, most: int, size: int) -> dict[str, Any]:
    """Accuracy and mean loops under each exit rule, by hops; no walk takes more than ``most``."""
    found: dict[str, Any] = {
        name: {"accuracy": [], "loops": []} for name in (*RULES, MOST_CONFIDENT)
    }
    for hops in EXIT_HOPS:
        one = path(model, walks.held_out_batch(hops, size, seed=1), most)
        taken = {name: loops_taken(rule, one) for name, rule in RULES.items()}
        taken[MOST_CONFIDENT] = one.top.argmax(dim=0) + 1
        for name, loops in taken.items():
            right = one.right.gather(0, (loops - 1)[None])[0]
            found[name]["accuracy"] += _rounded(right.double().mean()[None])
            found[name]["loops"] += _rounded(loops.double().mean()[None])
    return found


def loops_taken(rule: Rule, one: Path) -> Tensor:
    """The loop after which each walk stops; the last one if the rule never says so."""
    state, last = rule.start(one.states[0]), len(one.right)
    taken = torch.full((one.right.shape[1],), last)
    for loop in range(last):
        stop, state = rule.check(state, one.states[loop + 1], one.logits[loop])
        taken = torch.where(stop & (taken == last), loop + 1, taken)
    return taken


def falls(
    model: RecurrentDepthLM, walks: Walks, hops: int, loops: int, size: int
) -> dict[str, Any]:
    """Of the walks that are answered right after ``loops``: how often the answer lost on the way.

    ``share``: walks whose answer's log-probability fell by more than ``FALL`` from one loop to the
    next at least once, up to ``loops``. ``mean``: falls per walk.
    """
    one = path(model, walks.held_out_batch(hops, size, seed=1), loops)
    fell = one.log_prob.diff(dim=0) < -FALL
    answered = one.right[-1]
    count = fell[:, answered].sum(dim=0).double()
    known = len(count) > 0
    return {
        "loops": loops,
        "answered": round(float(answered.double().mean()), 4),
        "share": round(float((count > 0).double().mean()), 4) if known else None,
        "mean": round(float(count.mean()), 4) if known else None,
    }


def twice(model: RecurrentDepthLM, walks: Walks, size: int) -> list[float]:
    """Accuracy by hops of a stack that answers half of the walk, and then the rest from there."""
    found = []
    for hops in HOPS:
        batch = walks.held_out_batch(hops, size, seed=1)
        half = hops // 2  # 0 of a walk of one hop: its first half is the start alone
        first = batch.tokens[:, : half + 1]
        with inference(model):
            reached = first[:, 0]
            if half:
                reached = model(first, num_loops=1).logits[:, -1].argmax(dim=-1)
            rest = torch.cat([reached[:, None], batch.tokens[:, half + 1 :]], dim=1)
            answer = model(rest, num_loops=1).logits[:, -1].argmax(dim=-1)
        found += _rounded((answer == batch.targets[:, -1]).double().mean()[None])
    return found


def leaks(walks: Walks) -> dict[str, float]:
    """The best of the guessers that do not follow the walk, and chance, over some hops."""
    each = [walks.leak_baselines(hops) for hops in LEAK_HOPS]
    return {name: round(max(one[name] for one in each), 6) for name in each[0]}


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
