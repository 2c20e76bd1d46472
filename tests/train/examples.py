"""Small runs for the tests of training and of the commands."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from openmythos.config import ModelConfig, MoEConfig
from openmythos.config.schema import to_dict
from openmythos.data.loader import TokenLoader
from openmythos.data.packing import Batch
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth, PoissonDepth
from openmythos.train.loop import TrainResult
from openmythos.train.metrics import read_metrics
from openmythos.train.optim import OptimizerConfig
from openmythos.train.recipe import HopsData, RunConfig, TextData, TrainConfig
from openmythos.train.run import set_up
from openmythos.train.task import Batches
from tests.strategies import seeded, small_config

TEXT = (
    "the a function returns value object list of items when called with an argument raises error "
    "if it is not found in this module and otherwise each string must be converted before use"
)
WORDS = TEXT.split()
MOE = MoEConfig(num_experts=4, num_experts_per_token=1, d_expert=8, bias_loops=3)
DEPTH = DepthSchedule(sampling=PoissonDepth(mean_recurrence=2), per_sequence=True, max_loops=4)


def write_text(folder: Path, num_paragraphs: int = 120) -> Path:
    """A file of made-up paragraphs with word frequencies as skewed as a language's."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, len(WORDS) + 1)
    paragraphs = [
        " ".join(rng.choice(WORDS, size=30, p=weights / weights.sum())) + "."
        for _ in range(num_paragraphs)
    ]
    path = folder / "text.txt"
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


def tiny_model(**changes: Any) -> ModelConfig:
    return small_config(num_core_layers=1, num_coda_layers=0, vocab_size=300, **changes)


def text_config(source: Path, **changes: Any) -> RunConfig:
    """MoE in the core, a Poisson depth for every sequence; ``changes`` are of the training."""
    settings: dict[str, Any] = {
        "seed": 3,
        "max_steps": 24,
        "batch_size": 4,
        "depth": DEPTH,
        "log_every": 1,
        "eval_every": 8,
        "eval_loops": (1, 3),
        "eval_batches": 1,
        "save_every": 1,
    }
    return RunConfig(
        model=tiny_model(core_feed_forward=MOE),
        train=TrainConfig(**{**settings, **changes}),
        data=TextData(source=str(source), seq_len=32),
    )


def hops_config(**changes: Any) -> RunConfig:
    """So few entities that the curriculum moves on within the first steps."""
    settings: dict[str, Any] = {
        "seed": 3,
        "max_steps": 60,
        "batch_size": 16,
        "optimizer": OptimizerConfig(lr=1e-2, warmup=0.0),
        "depth": DepthSchedule(sampling=FixedDepth(mean_recurrence=2)),
        "log_every": 1,
        "eval_every": 20,
        "eval_loops": (2,),
        "save_every": 2,
    }
    return RunConfig(
        model=tiny_model(),
        train=TrainConfig(**{**settings, **changes}),
        data=HopsData(num_entities=2, num_relations=2, max_train_hops=4, check_loops=2),
    )


def run(config: RunConfig, out: Path) -> TrainResult:
    """What ``openmythos train`` does, in this process."""
    return set_up(config, out).train()


def write_config(config: RunConfig, path: Path) -> Path:
    path.write_text(json.dumps(to_dict(config)), encoding="utf-8")
    return path


def measured(out: Path) -> list[dict[str, Any]]:
    """The rows of a run without the numbers that a clock gives."""
    clocks = ("seconds", "tokens_per_second")
    rows = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint: weights and optimiser."""
    from safetensors.torch import load_file

    folder = max((out / "checkpoints").glob("step-*"))
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_equal_runs(one: Path, other: Path) -> None:
    """Bitwise: every logged number and every tensor."""
    assert measured(one) == measured(other)
    expected, got = weights(one), weights(other)
    assert expected.keys() == got.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, got[name])]
    assert not different


def loader(folder: Path, split: str = "val", batch_size: int = 4) -> TokenLoader:
    return TokenLoader(folder, split, seq_len=32, batch_size=batch_size)


def small_walks() -> Walks:
    return Walks(HopsConfig(num_entities=8, num_relations=2, max_train_hops=4))


class Oracle(RecurrentDepthLM):
    """Answers walks of some lengths right, others with a fixed entity, whatever the weights."""

    walks: Walks
    right: bool = True
    hops: range = range(99)

    def forward(self, tokens: torch.Tensor, **options: object) -> object:  # type: ignore[override]
        output = super().forward(tokens, num_loops=1)
        answers = torch.from_numpy(self.walks.entities_along(tokens.numpy()))[:, -1]
        if not self.right or tokens.shape[1] - 1 not in self.hops:
            answers = torch.zeros_like(answers)
        output.logits[:, -1] = functional.one_hot(answers, output.logits.shape[-1]).float()
        return output


def oracle(walks: Walks, *, right: bool) -> Oracle:
    model = Oracle(tiny_model())
    model.walks, model.right = walks, right
    return model.train()


class FixedTask:
    """The same batch at every step."""

    def __init__(self, batch: Batch) -> None:
        self.only = batch

    def batches(self, start_step: int, batch_size: int) -> Batches:
        while True:
            yield self.only

    def before_first_step(self, model: RecurrentDepthLM) -> None:
        pass

    def after_step(self, model: RecurrentDepthLM, step: int) -> dict[str, float]:
        return {}

    def evaluate(self, model: RecurrentDepthLM, config: TrainConfig) -> list[dict[str, float]]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def random_batch(config: ModelConfig, rows: int, length: int, *, unequal: bool = False) -> Batch:
    """Random tokens; ``unequal`` leaves fewer targets in every row than in the one before."""
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=seeded(5))
    targets = tokens[:, 1:].clone()
    if unequal:
        for row in range(rows):
            targets[row, : row * length // rows] = -100
    positions = torch.arange(length).expand(rows, length).clone()
    return Batch(
        tokens=tokens[:, :-1].clone(),
        targets=targets,
        documents=torch.zeros_like(positions),
        positions=positions,
        num_bytes=0,
    )


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Strict JSON: NaN and Infinity are errors."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in {path}")

    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line, parse_constant=refuse)


@contextlib.contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Files of this process cannot grow beyond so many bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
