"""What is trained of a model whose own weights stay as they are. No torch."""

from dataclasses import dataclass

from openmythos.config.schema import require


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """LoRA: changes of low rank of some linear layers, which all loops share or which differ.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1; one per loop: Relaxed Recursive
        Transformers (arXiv 2410.20672), section 3.

    Attributes:
        rank: Rank of each layer's change.
        alpha: The changes are multiplied by ``alpha / rank``.
        targets: Names of layers, as transformers calls them, or of what they are in: ``q_proj``,
            ``mlp``, ``core``, ``core.0.self_attn``; empty: all linear layers of attention and
            feed-forward.
        num_loops: Loops in which the core's layers have a change of their own, later loops use the
            last one; null: all loops share one. It needs a model whose loops differ already.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    num_loops: int | None = None

    def __post_init__(self) -> None:
        require(self.rank >= 1, "adapter.rank", self.rank, "at least 1")
        is_finite = 0 < self.alpha < float("inf")
        require(is_finite, "adapter.alpha", self.alpha, "above 0, and finite")
        fits = self.num_loops is None or self.num_loops >= 1
        require(fits, "adapter.num_loops", self.num_loops, "at least 1, or null")

    @property
    def scale(self) -> float:
        """What the changes are multiplied by."""
        return self.alpha / self.rank
