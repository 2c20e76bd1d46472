"""A training run without its memory: real shards and a real step, on tensors that hold no numbers.

One process takes the place of one rank among many fake ones, whose exchanges return at once. What
``train.parallel`` builds is compared with what ``plan`` has computed from the configuration: the
shards to the byte, the exchanges of a step by their number and bytes.
"""

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from openmythos.checkpoint.load import empty_model
from openmythos.checkpoint.parts import own_values
from openmythos.config import ModelConfig
from openmythos.config.parallel import ParallelConfig
from openmythos.config.schema import require
from openmythos.config.weights import Shapes
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cpu import build as native
from openmythos.ops.moe import moe_experts
from openmythos.plan.placement import local_shapes
from openmythos.plan.training import Exchange, Work, exchanges
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth
from openmythos.train.gradients import reshard
from openmythos.train.parallel import parallelize
from openmythos.train.ranks import Ranks, join
from openmythos.train.recipe import TrainConfig

# What torch calls the exchanges of one step, and what the plan calls them.
KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
}


@dataclass(frozen=True)
class Shards:
    """One rank's shards.

    Attributes:
        rank: The rank.
        planned: Bytes that the plan computes, in float32.
        built: Bytes of the real shards.
        differing: Names of parameters whose shapes differ.
    """

    rank: int
    planned: int
    built: int
    differing: tuple[str, ...]


@dataclass(frozen=True)
class Exchanged:
    """Exchanges of one kind in a step, planned and counted: number and bytes."""

    kind: str
    planned: tuple[int, int]
    counted: tuple[int, int]


def dry_run_shards(
    config: ModelConfig, layout: ParallelConfig, rank: int, work: Work | None = None
) -> Shards:
    """Build one rank's shards and compare them with the plan.

    Raises:
        ValueError: The model cannot be laid out so.
    """
    with fake_rank(rank, layout.num_ranks):
        recipe = _recipe(config, layout, work)
        built = _local_shapes(_built(config, recipe, _ranks(recipe)))
    planned = local_shapes(config, layout, rank)
    names = sorted(planned.keys() | built.keys())
    return Shards(
        rank=rank,
        planned=_float32_bytes(planned),
        built=_float32_bytes(built),
        differing=tuple(name for name in names if planned.get(name) != built.get(name)),
    )


def dry_run_step(config: ModelConfig, layout: ParallelConfig, work: Work) -> tuple[Exchanged, ...]:
    """Run one micro-batch of a step, forward and backward, and compare its exchanges.

    Raises:
        ValueError: The model cannot be laid out so.
    """
    if layout.num_ranks == 1:
        return ()
    work = replace(work, accumulation=1)
    recipe = _recipe(config, layout, work)
    with fake_rank(0, layout.num_ranks):
        model = _built(config, recipe, _ranks(recipe))  # a mesh looks at numbers, so not fake
        counted = _FakeStep(_pairs(config, layout, work), layout.ep)
        with FakeTensorMode(allow_non_fake_inputs=True), counted:
            _step(model, config, recipe, work)
    planned = _by_kind(exchanges(config, layout, work))
    kinds = sorted(planned.keys() | counted.number.keys())
    return tuple(
        Exchanged(kind, planned.get(kind, (0, 0)), (counted.number[kind], counted.size[kind]))
        for kind in kinds
    )


@contextlib.contextmanager
def fake_rank(rank: int, world: int) -> Iterator[None]:
    """This process as one rank of ``world``; a world of one has no process group.

    Raises:
        ValueError: The process is one of a real group already.
    """
    if dist.is_initialized():
        raise ValueError("a dry run takes the place of all ranks: start it without torchrun")
    if world == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with warnings.catch_warnings():  # torch's, of how its meshes will be named
            warnings.filterwarnings("ignore", "Slicing a flattened dim", UserWarning)
            yield
    finally:
        dist.destroy_process_group()


def _recipe(config: ModelConfig, layout: ParallelConfig, work: Work | None) -> TrainConfig:
    return TrainConfig(
        max_steps=1,
        batch_size=layout.num_row_ranks * (1 if work is None else work.rows),
        depth=DepthSchedule(
            sampling=FixedDepth(mean_recurrence=config.num_loops), max_loops=config.num_loops
        ),
        autocast="bfloat16",
        recompute=work is not None and work.recompute,
        parallel=layout,
    )


def _pairs(config: ModelConfig, layout: ParallelConfig, work: Work) -> int:
    """(token, expert) pairs that one rank sends to the owners of their experts."""
    chosen = getattr(config.core_ff, "num_experts_per_token", 0)
    tokens = work.tokens // layout.tp if layout.ep > 1 else work.tokens
    pairs = tokens * chosen
    allowed = f"a multiple of ep={layout.ep} in a dry run of a step: change --context-length"
    require(pairs % layout.ep == 0, "the number of pairs of a rank", pairs, allowed)
    return pairs


def _ranks(recipe: TrainConfig) -> Ranks:
    return join(recipe.parallel) if dist.is_initialized() else Ranks.alone()


def _built(config: ModelConfig, recipe: TrainConfig, ranks: Ranks) -> RecurrentDepthLM:
    model = empty_model(config)
    parallelize(model, recipe, ranks)
    return model


def _local_shapes(model: nn.Module) -> Shapes:
    return {name: tuple(own_values(p).shape) for name, p in model.named_parameters()}


def _float32_bytes(shapes: Shapes) -> int:
    return 4 * sum(map(math.prod, shapes.values()))


# --- a step -------------------------------------------------------------------------------------


def _step(model: RecurrentDepthLM, config: ModelConfig, recipe: TrainConfig, work: Work) -> None:
    """What the loop does for one micro-batch, on fake tensors."""
    model.to_empty(device="cpu")
    model.train()
    with _real():
        tokens = torch.zeros(work.rows, work.context_length, dtype=torch.int64)
        ctx = model.context(tokens)
    ctx = replace(ctx, experts=moe_experts)  # the way of a GPU, which reads no numbers
    depths = torch.full((work.rows,), config.num_loops)
    kept = native.KEPT.set(())
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            output = model(
                tokens,
                ctx=ctx,
                num_loops=config.num_loops,
                grad_loops=work.grad_loops,
                recompute=work.recompute,
            )
            loss, _ = recipe.objective.loss(model, output, tokens, ctx, depths)
        loss.backward()
    finally:
        native.KEPT.reset(kept)
    reshard(model)


@contextlib.contextmanager
def _real() -> Iterator[None]:
    """Tensors with numbers, inside of a mode of fake ones."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


class _FakeStep(TorchDispatchMode):
    """Counts exchanges and their bytes, those of the larger of what goes in and comes out.

    What a step reads of a device's numbers is how many (token, expert) pairs go where: here every
    rank of an expert group sends as many to every other.
    """

    def __init__(self, pairs: int, ranks: int) -> None:
        super().__init__()
        self.pairs, self.ranks = pairs, ranks
        self.number: Counter[str] = Counter()
        self.size: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as operations on local tensors
        namespace, _, rest = str(func).partition(".")
        name = rest.partition(".")[0]
        if namespace in ("c10d", "_c10d_functional") and name in KINDS:
            tensors = _tensors(args)
            self.number[KINDS[name]] += 1
            self.size[KINDS[name]] += max(each.numel() * each.element_size() for each in tensors)
        elif name == "_local_scalar_dense":
            return self.pairs // self.ranks
        elif name == "repeat_interleave":
            return args[0].new_empty(self.pairs)
        elif name == "bincount":
            return args[0].new_empty(kwargs["minlength"] if kwargs else args[2])
        return func(*args, **(kwargs or {}))


def _tensors(arguments: Any) -> list[torch.Tensor]:
    flat, _ = torch.utils._pytree.tree_flatten(arguments)
    return [each for each in flat if isinstance(each, torch.Tensor)]


def _by_kind(planned: tuple[Exchange, ...]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for each in planned:
        number, size = found.get(each.kind, (0, 0))
        found[each.kind] = (number + each.number, size + each.num_bytes)
    return found
