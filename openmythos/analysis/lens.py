"""Lenses: what the head says of a state inside the loop, as ranks of tokens.

The logit lens reads a state with the last norm and the head alone, the coda lens with everything
that follows the loop. A lens says how a state would be read, not what the loop uses: it is blind to
the length of a state, and a block whose basis is not the head's looks empty. So ranks stand beside
those of a control token, and no verdict rests on them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.analysis.budget import rows_within
from openmythos.analysis.example import Examples
from openmythos.analysis.observe import observe
from openmythos.analysis.trace import Mean
from openmythos.data.packing import IGNORED_TARGET
from openmythos.model.context import ForwardContext
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM

LENSES = ("logit", "coda")
CHOICE, ANSWER = "the model's choice", "the right answer"


@dataclass(frozen=True, kw_only=True)
class LensRanks:
    """Mean ranks of some tokens under one lens.

    Attributes:
        lens: One of ``LENSES``.
        places: Where the state is read: the outputs of the core's blocks, and the state after the
            loop.
        targets: The tokens: the one that the model chooses after all loops, the right one, and the
            examples' concepts, among them the control.
        rank: By target, place and loop: the mean rank, 1 for the token with the largest logit.
        first: By target, place and loop: the share of positions where it has rank 1.
        num_positions: Positions that are read; a target may be absent at some.
        vocab_size: The largest possible rank; half of it is the rank of a token drawn blindly.

    Source: Lu et al. 2025 (arXiv 2507.02199), section 3.
    """

    lens: str
    places: tuple[str, ...]
    targets: tuple[str, ...]
    rank: tuple[tuple[tuple[float | None, ...], ...], ...]
    first: tuple[tuple[tuple[float | None, ...], ...], ...]
    num_positions: int
    vocab_size: int

    def to_dict(self) -> dict[str, Any]:
        """The record, ready for JSON."""
        return asdict(self)


def logit_lens(model: RecurrentDepthLM, h: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
    """The head on the normalised state."""
    x = model.final_norm(h)
    logits: Tensor = model.embed(states=x) if model.head is None else model.head(x)
    return logits


def coda_lens(
    model: RecurrentDepthLM, h: Float[Tensor, "B T D"], ctx: ForwardContext
) -> Float[Tensor, "B T V"]:
    """Readout, coda and head: the logits if the loop ended with this state."""
    return model.decode(h, ctx)


def ranks(logits: Float[Tensor, "N V"], target: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """1 plus the number of tokens with a larger logit; NaN where the target is -100."""
    known = target != IGNORED_TARGET
    own = logits.gather(1, target.clamp(min=0)[:, None])
    found = 1.0 + (logits > own).sum(dim=1)
    return found.masked_fill(~known, torch.nan)


@dataclass
class LensSums:
    """Sums over positions from which ranks follow; batches are added one after the other."""

    _sums: dict[tuple[str, int], list[Mean]] = field(default_factory=dict)
    _targets: tuple[str, ...] = ()
    _num_positions: int = 0
    _num_blocks: int = 0
    _vocab_size: int = 0

    def add(self, model: RecurrentDepthLM, examples: Examples, num_loops: int) -> None:
        """Read a batch with both lenses after every block of ``num_loops`` loops."""
        asked = examples.asked
        ctx = examples.context(model)
        with inference(model):
            final = model(examples.tokens, num_loops=num_loops, ctx=ctx).logits[asked].argmax(-1)
            wanted = {CHOICE: final, ANSWER: examples.answers[asked]}
            wanted |= {name: tokens[asked] for name, tokens in examples.concepts.items()}
            self._targets = tuple(wanted)
            self._num_positions += len(final)
            for loop in observe(model, examples.tokens, num_loops, ctx):
                states = (*loop.places[1:], loop.state.h)
                self._num_blocks = len(states) - 1
                for lens in LENSES:
                    found: list[Tensor] = []
                    for place, h in enumerate(states):
                        # With most injections the state is what the last block returned.
                        if place == 0 or h is not states[place - 1]:
                            found = self._read(model, lens, h, examples, ctx, wanted)
                        loops = self._sums.setdefault((lens, place), [])
                        if loop.number > len(loops):
                            loops.append(Mean(len(found)))
                        loops[loop.number - 1].add(found)

    def _read(
        self,
        model: RecurrentDepthLM,
        lens: str,
        h: Float[Tensor, "B T D"],
        examples: Examples,
        ctx: ForwardContext,
        wanted: Mapping[str, Int[Tensor, " N"]],
    ) -> list[Float[Tensor, " N"]]:
        """The rank of each target, then whether it is the first."""
        asked = examples.asked
        if lens == "logit":
            logits = logit_lens(model, h[asked][None])[0]
        else:
            logits = coda_lens(model, h, ctx)[asked]
        self._vocab_size = logits.shape[1]
        found = [ranks(logits, target) for target in wanted.values()]
        first = [torch.where(rank.isnan(), rank, (rank == 1).float()) for rank in found]
        return [*found, *first]

    def lenses(self) -> list[LensRanks]:
        """The mean ranks of all that was added, by lens."""
        blocks = [f"block {number + 1}" for number in range(self._num_blocks)]
        places = (*blocks, "state")
        size = len(self._targets)
        found = []
        for lens in LENSES:
            values = [
                [mean.values() for mean in self._sums[lens, place]] for place in range(len(places))
            ]
            rank, first = (
                tuple(
                    tuple(tuple(row[start + target] for row in loops) for loops in values)
                    for target in range(size)
                )
                for start in (0, size)
            )
            found.append(
                LensRanks(
                    lens=lens,
                    places=places,
                    targets=self._targets,
                    rank=rank,
                    first=first,
                    num_positions=self._num_positions,
                    vocab_size=self._vocab_size,
                )
            )
        return found


def measure_lenses(
    model: RecurrentDepthLM, examples: Examples, num_loops: int, max_bytes: int
) -> list[LensRanks]:
    """Both lenses over ``num_loops`` loops, in batches that fit into ``max_bytes``.

    Raises:
        OverBudget: Not even one row fits.
    """
    one = examples.rows(0, 1)
    size = rows_within(max_bytes, lambda: LensSums().add(model, one, num_loops), model)
    sums = LensSums()
    for part in examples.batches(size):
        sums.add(model, part, num_loops)
    return sums.lenses()
