"""Where the parameters of a model lie over the ranks of a training run. No torch.

The rules are those of ``train.parallel``, written again from shapes and names alone;
``train.dry_run`` builds the real shards and compares.

- Ranks form a grid, ``dp_replicate x efsdp x ep x tp``; ``dp_shard`` is efsdp and ep together.
- Tensor parallel: a block's first matrices lose output channels, its second ones input channels.
- Expert parallel: each rank of ``ep`` holds whole experts.
- Every parameter is then cut along one dimension into equal chunks, the last ones shorter or empty:
  experts of a divided layer along their channels, over the ranks that hold the same experts; all
  else along the first dimension, over ``dp_shard``.
- Parameters are gathered by unit: one per block, embedding and head, in bfloat16. What that would
  harm is in float32: the routers, which are units of their own, and one unit of all that is left.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from openmythos.config import ModelConfig
from openmythos.config.counts import parameter_shapes
from openmythos.config.parallel import ParallelConfig
from openmythos.config.weights import Shapes

Shape = tuple[int, ...]

# By the end of a parameter's name in its block, the dimension that tensor parallel divides. The
# weights of one-dimensional norms and of what follows here with None are whole on every rank.
TENSOR_DIMS = {
    **dict.fromkeys(("qkv.weight", "q_up.weight", "kv_up.weight", "qk_bias"), 0),
    **dict.fromkeys(("value_gate.weight", "feed_forward.up.weight"), 0),
    **dict.fromkeys(("feed_forward.gate_up.weight", "shared.gate_up.weight"), 0),
    **dict.fromkeys(("attention.out.weight", "value_table.weight"), 1),
    **dict.fromkeys(("feed_forward.down.weight", "shared.down.weight"), 1),
    **dict.fromkeys(("qkv.lora_up", "q_up.lora_up", "up.lora_up", "gate_up.lora_up"), 1),
    **dict.fromkeys(
        ("attention.out.lora_down", "feed_forward.down.lora_down", "shared.down.lora_down"), 2
    ),
}
EXPERTS = ("feed_forward.gate_up", "feed_forward.down")  # stacked, without a ``.weight``
WIDE = ("feed_forward.router", "halting.proj")  # units of their own in float32
STAGES = ("prelude", "core", "coda")
TABLES = ("embed", "head")  # units of their own outside the blocks


@dataclass(frozen=True)
class Held:
    """One parameter, as the ranks hold it.

    Attributes:
        name: Its name in the model.
        shape: What a rank computes with once it is gathered: its heads, its experts.
        dim: The dimension along which it is cut.
        ranks: The number of cuts.
        is_expert: Whether it is cut over the ranks that hold the same experts.
    """

    name: str
    shape: Shape
    dim: int
    ranks: int
    is_expert: bool = False

    @property
    def chunk(self) -> int:
        """The length of every cut but the last ones."""
        return -(-self.shape[self.dim] // self.ranks)

    def shard(self, index: int) -> Shape:
        """The shape of cut number ``index``."""
        left = max(0, self.shape[self.dim] - index * self.chunk)
        return self._with(min(self.chunk, left))

    @property
    def stored(self) -> int:
        """Numbers for which every rank has memory: the longest cut's."""
        return math.prod(self._with(self.chunk))

    @property
    def gathered(self) -> int:
        """Numbers of all cuts together, each as long as the longest: what an exchange moves."""
        return self.stored * self.ranks

    def _with(self, length: int) -> Shape:
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together.

    Attributes:
        name: The module that they belong to.
        held: They.
        wide: Whether they are gathered in float32, not in bfloat16.
        in_core: Whether they are of the core's blocks.
    """

    name: str
    held: tuple[Held, ...]
    wide: bool
    in_core: bool

    @cached_property
    def groups(self) -> tuple[tuple[Held, ...], ...]:
        """Those that one exchange moves: experts and all else have meshes of their own."""
        experts = tuple(each for each in self.held if each.is_expert)
        others = tuple(each for each in self.held if not each.is_expert)
        return tuple(group for group in (others, experts) if group)

    @property
    def weight_bytes(self) -> int:
        """Bytes of one gathered number, and of its gradient before it is reduced."""
        return 4 if self.wide else 2

    @property
    def gathered(self) -> int:
        """Numbers once it is gathered."""
        return sum(math.prod(each.shape) for each in self.held)


def check_layout(config: ModelConfig, layout: ParallelConfig) -> None:
    """Check that a model can be laid out so.

    Raises:
        ValueError: Heads, channels or experts cannot be divided; says which.
    """
    layout.check(config)
    for each in place(config, layout):
        length = each.shape[each.dim]
        if each.is_expert and length % each.ranks:
            raise ValueError(
                f"{each.name} has {length} channels per expert, which {each.ranks} ranks with the "
                "same experts (dp_shard / ep x tp) do not divide; choose another ep or tp"
            )


@lru_cache(maxsize=64)
def place(config: ModelConfig, layout: ParallelConfig) -> tuple[Held, ...]:
    """Every parameter, as the ranks of a layout hold it."""
    return tuple(_held(name, shape, layout) for name, shape in parameter_shapes(config).items())


def local_shapes(config: ModelConfig, layout: ParallelConfig, rank: int) -> Shapes:
    """The shapes of one rank's shards, by the names of the parameters."""
    tp, rest = rank % layout.tp, rank // layout.tp
    dense = rest % layout.dp_shard
    # Ranks with the same experts are numbered by (efsdp, tp).
    expert = dense // layout.ep * layout.tp + tp
    return {
        each.name: each.shard(expert if each.is_expert else dense) for each in place(config, layout)
    }


@lru_cache(maxsize=64)
def units(config: ModelConfig, layout: ParallelConfig) -> tuple[Unit, ...]:
    """All units, in the order in which a forward begins to use them."""
    sorted_in: dict[str, list[Held]] = {"": []}
    for each in place(config, layout):
        sorted_in.setdefault(_unit_of(each.name), []).append(each)
    return tuple(
        Unit(
            name,
            tuple(held),
            wide=not name or name.endswith(WIDE),
            in_core=name.startswith("core."),
        )
        for name, held in sorted_in.items()
    )


def in_block(name: str) -> bool:
    """Whether a parameter is a block's."""
    return name.partition(".")[0] in STAGES


def tensor_dim(name: str) -> int | None:
    """The dimension of a parameter that tensor parallel divides, if there is one."""
    dims = (dim for end, dim in TENSOR_DIMS.items() if name.endswith(end))
    return next(dims, None) if in_block(name) else None


def _unit_of(name: str) -> str:
    for wide in WIDE:
        if wide in name:
            return name[: name.index(wide) + len(wide)]
    stage, *rest = name.split(".")
    if stage in TABLES:
        return stage
    return f"{stage}.{rest[0]}" if stage in STAGES else ""


def _held(name: str, shape: Shape, layout: ParallelConfig) -> Held:
    if layout.ep > 1 and name.endswith(EXPERTS):
        shape = (shape[0] // layout.ep, *shape[1:])
        return Held(name, shape, 1, layout.dp_shard // layout.ep * layout.tp, is_expert=True)
    dim = tensor_dim(name)
    if dim is not None:
        shape = (*shape[:dim], shape[dim] // layout.tp, *shape[dim + 1 :])
    return Held(name, shape, 0, layout.dp_shard)
