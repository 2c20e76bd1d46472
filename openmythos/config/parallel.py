"""How a training run is laid out over processes. No torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from openmythos.config.model import ModelConfig
from openmythos.config.schema import require, require_literals, require_positive


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout of a run over its ranks, which are ``dp_replicate x dp_shard x tp`` processes.

    Ranks that differ in ``dp_replicate`` or ``dp_shard`` train different rows of a batch.

    Attributes:
        dp_replicate: Copies of the model, each of them sharded over the ranks of its own.
        dp_shard: Ranks that share one copy of every parameter, gradient and optimiser state.
        ep: Ranks, of those of dp_shard, that share a layer's experts; a divisor of dp_shard.
        tp: Ranks that share the heads and the widths of every layer, and train the same rows.
        core_gather: When the sharded weights of the core are gathered: once per step, and kept, or
            again in every loop of the forward and of the backward pass.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    tp: int = 1
    core_gather: Literal["step", "loop"] = "step"

    def __post_init__(self) -> None:
        require_positive(self, "dp_replicate", "dp_shard", "ep", "tp")
        require_literals(self)
        allowed = f"a divisor of parallel.dp_shard={self.dp_shard}"
        require(self.dp_shard % self.ep == 0, "parallel.ep", self.ep, allowed)

    @property
    def num_ranks(self) -> int:
        """Processes of the run."""
        return self.num_row_ranks * self.tp

    @property
    def num_row_ranks(self) -> int:
        """Parts into which the rows of a batch are split."""
        return self.dp_replicate * self.dp_shard

    @property
    def same_loops(self) -> bool:
        """Whether all ranks must run the same number of loops: they exchange in every loop."""
        return self.ep > 1 or self.tp > 1 or (self.core_gather == "loop" and self.dp_shard > 1)

    def check(self, model: ModelConfig) -> None:
        """Check that a model can be laid out like this.

        Raises:
            ValueError: It has no experts, or a number of experts, heads or channels that ``ep`` or
                ``tp`` does not divide, or a part that neither can divide.
        """
        num_experts = getattr(model.core_ff, "num_experts", 0)
        if self.ep > 1 and not num_experts:
            raise ValueError(f"parallel.ep is {self.ep}, and the model has no experts: set it to 1")
        allowed, name = (
            f"a multiple of parallel.ep={self.ep}",
            "model.core_feed_forward.num_experts",
        )
        require(num_experts % self.ep == 0, name, num_experts, allowed)
        allowed = f"a multiple of parallel.tp={self.tp}"
        for name, number in _divided_by_tp(model):
            require(number % self.tp == 0, name, number, allowed)
        if self.tp > 1 and model.depth_attention is not None:
            raise ValueError(
                f"parallel.tp is {self.tp}, and model.depth_attention cannot be divided over ranks:"
                " set it to 1"
            )


def _divided_by_tp(model: ModelConfig) -> Iterator[tuple[str, int]]:
    """Names and numbers of what tensor parallelism divides."""
    for name in ("num_heads", "num_kv_heads"):
        if hasattr(model.attention, name):
            yield f"model.attention.{name}", getattr(model.attention, name)
    for name in ("feed_forward", "core_feed_forward"):
        part = getattr(model, name)
        if hasattr(part, "d_ff"):
            yield f"model.{name}.d_ff", part.d_ff
        elif hasattr(part, "shared_width"):
            shared = part.num_shared_experts * part.shared_width
            yield f"the width of model.{name}'s shared experts", shared


def started_rank() -> int | None:
    """This process's rank if ``torchrun`` started it; else None."""
    rank = os.environ.get("RANK")
    return None if rank is None else int(rank)
