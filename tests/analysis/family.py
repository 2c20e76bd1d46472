"""Small models of every kind, and loops that are planted by hand."""

from functools import cache
from pathlib import Path

import torch

from openmythos.analysis.observe import Loop
from openmythos.config import (
    ACTConfig,
    DepthAttentionConfig,
    LearnedLoopConfig,
    NormalInitConfig,
    OutputLoRAConfig,
)
from openmythos.interop.loading import load_pretrained
from openmythos.model.loop import LoopState
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import MLA, MOE, random_model, small_config

GOLDEN = Path(__file__).parent.parent / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
OURS = {
    "plain": {},
    "moe": {"core_feed_forward": MOE, "attention": MLA},
    "act": {"halting": ACTConfig(bias_init=-1.0), "state_init": NormalInitConfig(std=0.7)},
    "depth-attention": {"depth_attention": DepthAttentionConfig(num_recent_loops=2)},
    "signals": {
        "loop_embedding": LearnedLoopConfig(num_loops=2),
        "loop_adapter": OutputLoRAConfig(rank=2, num_loops=3),
    },
}
KINDS = [*FAMILIES, *OURS]


@cache
def model_of(kind: str) -> RecurrentDepthLM:
    """A golden of a family, or a random model of ours."""
    if kind in FAMILIES:
        return load_pretrained(GOLDEN / kind)
    return random_model(small_config(**OURS[kind]))


def planted_loops(states: torch.Tensor, places: torch.Tensor | None = None) -> list[Loop]:
    """Loops with these states ``[L + 1, B, T, D]``, the first before the loops, and places.

    Places are ``[L, P, B, T, D]``; by default the state before and after.
    """
    loops: list[Loop] = []
    for number in range(1, len(states)):
        before, h = states[number - 1], states[number]
        zeros = torch.zeros(len(h), dtype=torch.int64)
        state = LoopState(h=h, e=h, loop_idx=zeros, loops=(0,), depths=(1,))
        inside = (before, h) if places is None else tuple(places[number - 1])
        earlier = loops[-1] if loops else None
        loops.append(Loop(number, before, state, inside, {}, earlier))
    return loops
