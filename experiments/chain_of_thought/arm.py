"""The arms: a silent loop, and models that write every entity on the way."""

from dataclasses import dataclass, replace
from typing import Any

from experiments.equal_accuracy import keeping_checkpoints
from openmythos.config import ModelConfig, counts
from openmythos.config.rope import RopeConfig
from openmythos.demo.walks import hops_config
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth
from openmythos.train.recipe import HopsData, RunConfig

TRAINED_HOPS = range(1, 9)
SAVE_EVERY = 50  # steps between two checkpoints, at which equal training accuracy is looked for
RATES = (0.5, 1.0, 2.0)  # times the learning rates of the demo's walks


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model and how it answers.

    Attributes:
        name: In results and tables.
        in_words: On the page.
        layers: Of the core, looped.
        loops: In training.
        writes: Whether it writes the entities on the way; otherwise the answer alone.
        sums: Whether relations add numbers; otherwise they are permutations.
    """

    name: str
    in_words: str
    layers: int
    loops: int
    writes: bool
    sums: bool = False

    @property
    def model(self) -> ModelConfig:
        """The demo's, with these layers and loops."""
        # A written chain has to find its place in the question, a silent walk is read in order.
        return replace(
            hops_config(0, seconds=1.0).model,
            num_core_layers=self.layers,
            num_loops=self.loops,
            rope=RopeConfig() if self.writes else None,
        )

    def settings(self, steps: int, walks: int) -> dict[str, Any]:
        """Everything that determines a run but its seed and rate."""
        return {
            "layers": self.layers,
            "loops": self.loops,
            "writes": self.writes,
            "sums": self.sums,
            "steps": steps,
            "walks": walks,
        }

    def config(self, seed: int, rate: float, steps: int) -> RunConfig:
        """The training run."""
        demo = hops_config(seed, seconds=1.0)
        rates = demo.train.optimizer
        assert rates.muon_lr is not None and isinstance(demo.data, HopsData)
        train = replace(
            demo.train,
            max_seconds=None,
            max_steps=steps,
            optimizer=replace(rates, lr=rate * rates.lr, muon_lr=rate * rates.muon_lr),
            depth=DepthSchedule(sampling=FixedDepth(mean_recurrence=self.loops)),
        )
        data = replace(
            demo.data,
            check_loops=self.loops,
            mixed=False,
            written_out=self.writes,
            shifts=self.sums,
        )
        return RunConfig(model=self.model, train=keeping_checkpoints(train, SAVE_EVERY), data=data)

    def num_tokens(self, hops: int) -> int:
        """Tokens that are read for one answer: the question, and what is written on the way."""
        return hops + 1 + (hops - 1 if self.writes else 0)

    def test_flops(self, hops: int, loops: int) -> float:
        """FLOPs of one answer, each token read once after a KV cache."""
        tokens, model = self.num_tokens(hops), self.model

        def of_token(place: int) -> int:
            return counts.forward_flops(model, num_loops=loops, context_length=place, cached=True)

        first, last = of_token(1), of_token(tokens)  # linear in the tokens before
        return tokens * (first + last) / 2

    def training_flops(self, hops: int) -> float:
        """FLOPs of one training walk of so many hops."""
        tokens = self.num_tokens(hops)
        each = counts.training_flops(
            self.model, num_loops=self.loops, context_length=(tokens + 1) // 2
        )
        return float(tokens * each)


def _arms(sums: bool) -> list[Arm]:
    end, task = ("_sums", "sums") if sums else ("", "walks")
    return [
        Arm(
            name=f"silent{end}",
            in_words=f"silent loop, {task}",
            layers=2,
            loops=4,
            writes=False,
            sums=sums,
        ),
        Arm(
            name=f"stack_writes{end}",
            in_words=f"chain of thought, stack of 4 layers, {task}",
            layers=4,
            loops=1,
            writes=True,
            sums=sums,
        ),
        Arm(
            name=f"loop_writes{end}",
            in_words=f"chain of thought, 2 layers in 2 loops, {task}",
            layers=2,
            loops=2,
            writes=True,
            sums=sums,
        ),
    ]


WALKS, SUMS = _arms(sums=False), _arms(sums=True)[:2]
ARMS = {arm.name: arm for arm in (*WALKS, *SUMS)}
SILENT, STACK, LOOP = WALKS
