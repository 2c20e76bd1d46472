"""Optimisers: Muon for the matrices of the blocks, AdamW for everything else."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openmythos.checkpoint.parts import is_laid_out, own_values
from openmythos.config.schema import require
from openmythos.model.attention import LatentExpansion
from openmythos.model.feedforward import MoE
from openmythos.model.loop_signal import LoopLinear
from openmythos.train.owner import Axis, axes_of, by_owner

# Source: the Polar Express (arXiv 2505.16932), algorithm 1, five steps with safety factor 2e-2.
POLAR_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(matrices: Float[Tensor, "N R C"]) -> Float[Tensor, "N R C"]:
    """The nearest (semi-)orthogonal matrices, with singular values within about 10 % of 1.

    Computed in fp32 on a CPU, where bf16 products are about a hundred times slower, else in bf16;
    matrices in fp64 in fp64.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tiny = torch.finfo(torch.float32).tiny
    # Divide by the largest entry first, or the squares of a tiny matrix underflow in the norm. A
    # matrix of zeros stays zero.
    x = x / x.abs().amax(dim=(1, 2), keepdim=True).clamp(min=tiny)
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x / (norms * 1.02).clamp(min=tiny)
    x = x if x.device.type == "cpu" or x.dtype == torch.float64 else x.bfloat16()
    for a, b, c in POLAR_COEFFICIENTS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum; matrices of equal shape share one batch.

    Of matrices that are sharded over ranks, each is orthogonalised by one of them.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            alike: dict[Any, list[nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    alike.setdefault((param.shape[-2:], axes_of(param)), []).append(param)
            for (_, axes), params in alike.items():
                self._step_alike(params, axes, group)

    def _step_alike(
        self, params: list[nn.Parameter], axes: tuple[Axis, ...], group: dict[str, Any]
    ) -> None:
        """Update parameters whose matrices have one shape and are divided in one way."""
        updates = []
        for param in params:
            assert param.grad is not None
            state = self.state[param]
            if not state:
                state["momentum"] = torch.zeros_like(param)
            grad, momentum = own_values(param.grad), own_values(state["momentum"])
            momentum.lerp_(grad, 1 - group["momentum"])
            nesterov = grad.lerp(momentum, group["momentum"])
            updates.append(nesterov.reshape(-1, *nesterov.shape[-2:]))
        rows, cols = params[0].shape[-2:]
        scale = group["lr"] * max(1, rows / cols) ** 0.5
        batch = by_owner(orthogonalise, torch.cat(updates), axes)
        for param, update in zip(params, batch.split([len(u) for u in updates]), strict=True):
            part = own_values(param)
            part.mul_(1 - group["lr"] * group["weight_decay"])
            part.add_(update.view_as(part), alpha=-scale)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Learning rates and their schedule; the defaults suit short runs from scratch.

    ``train --from`` begins with lower rates, ``FINE_TUNING`` or ``ADAPTING``. The rates rise over
    the first part of the run and fall linearly over its last part.

    Attributes:
        lr: AdamW's learning rate, of vectors, norms and whatever has no rate of its own.
        embedding_lr: AdamW's learning rate of embeddings and head; null: ``lr``.
        muon_lr: Muon's learning rate of the blocks' matrices; null: AdamW trains them too, at
            ``lr``.
        muon_momentum: Momentum of Muon.
        betas: AdamW's decay rates of the first and the second moment.
        weight_decay: Weight decay of the blocks' matrices.
        warmup: Share of the run over which the rates rise.
        decay: Share of the run, at its end, over which the rates fall.
        final_lr: What the rates fall to, as a factor of the full ones.
        clip_norm: Gradients of a larger norm are scaled down to this one.
    """

    kind: ClassVar[str] = "muon_adamw"
    lr: float = 3e-3
    embedding_lr: float | None = 1e-2
    muon_lr: float | None = 0.02
    muon_momentum: float = 0.95
    betas: tuple[float, ...] = (0.8, 0.95)
    weight_decay: float = 0.0
    warmup: float = 0.02
    decay: float = 0.6
    final_lr: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "embedding_lr", "muon_lr", "clip_norm"):
            value = getattr(self, name)
            require(value is None or value > 0, f"optimizer.{name}", value, "above 0")
        for name in ("warmup", "decay", "final_lr"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name}", value, "in 0..1")
        momentum, betas = self.muon_momentum, self.betas
        require(0 <= momentum < 1, "optimizer.muon_momentum", momentum, "in [0, 1)")
        inside = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        require(inside, "optimizer.betas", betas, "two numbers in [0, 1)")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0")

    def rate(self, progress: float) -> float:
        """The factor of all learning rates when ``progress`` (0..1) of the run is done."""
        warm = min(1.0, (progress + 1e-6) / self.warmup) if self.warmup else 1.0
        left = min(1.0, (1 - progress) / self.decay) if self.decay else 1.0
        return warm * (self.final_lr + (1 - self.final_lr) * max(0.0, left))


# Rates that keep what a checkpoint knows; those from scratch erase it in twenty steps.
FINE_TUNING = OptimizerConfig(lr=2e-4, embedding_lr=None, muon_lr=3e-4)
ADAPTING = OptimizerConfig(lr=1e-3, embedding_lr=None, muon_lr=None)


def make_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Muon for block matrices, AdamW for embeddings, vectors, the injection and the head.

    Of a frozen model with an adapter, AdamW trains the adapter.

    Only block matrices get weight decay. Each group keeps its unscaled rate as ``base_lr``. Sharded
    parameters are grouped by their mesh, too, because no fused update takes several.
    """
    matrices, embeddings, rest = [], [], []
    owners = (LoopLinear, LatentExpansion, MoE)  # of the matrices that Muon trains
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if not param.requires_grad:
                continue
            if isinstance(module, nn.Embedding) or module is getattr(model, "head", None):
                embeddings.append(param)
            elif isinstance(module, owners) and not name.startswith("lora"):
                matrices.append(param)
            else:
                rest.append(param)
    betas = (config.betas[0], config.betas[1])
    embedding_lr = config.lr if config.embedding_lr is None else config.embedding_lr
    groups = [{"params": embeddings, "lr": embedding_lr}, {"params": rest, "lr": config.lr}]
    optimizers: list[torch.optim.Optimizer] = []
    if config.muon_lr is None:
        groups.append({"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay})
    elif matrices:
        momentum, decay = config.muon_momentum, config.weight_decay
        optimizers.append(Muon(matrices, lr=config.muon_lr, momentum=momentum, weight_decay=decay))
    groups = [{**group, "params": same} for group in groups for same in _by_mesh(group["params"])]
    optimizers.append(torch.optim.AdamW(groups, betas=betas, weight_decay=0.0, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def _by_mesh(params: Any) -> list[list[nn.Parameter]]:
    """The parameters by the mesh over which they are sharded, in order."""
    found: dict[Any, list[nn.Parameter]] = {}
    for param in params:
        mesh = param.device_mesh if is_laid_out(param) else None
        found.setdefault(mesh, []).append(param)
    return list(found.values())
