"""Injection: how the prelude's output e enters the state h at every loop.

An injection is called in three ways: with e, once per forward, for the part that is the same in all
loops (``drive``); with e and h, for the core's input (``mix``); with e, h and the core's output y,
for the next state (``update``).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from openmythos.config import (
    AddInjectionConfig,
    GateInjectionConfig,
    InjectionConfig,
    LinearInjectionConfig,
    LTIInjectionConfig,
    ModelConfig,
    NoInjectionConfig,
    OriginalLTIInjectionConfig,
)
from openmythos.model.norm import RMSNorm

State = Float[Tensor, "B T D"]


class Injection(nn.Module):
    """``x = h``, ``h' = y``: e enters only through the initial state. Base of all injections."""

    def __init__(self, config: ModelConfig, part: InjectionConfig) -> None:
        super().__init__()

    def forward(self, e: State, h: State | None = None, y: State | None = None) -> State:
        """``drive(e)``, ``mix(h, e)`` or ``update(h, e, y)``, depending on the arguments given."""
        if h is None:
            return self.drive(e)
        return self.mix(h, e) if y is None else self.update(h, e, y)

    def drive(self, e: State) -> State:
        """The part that depends on e only, computed once per forward; later passed as e."""
        return e

    def mix(self, h: State, e: State) -> State:
        """The core's input x."""
        return h

    def update(self, h: State, e: State, y: State) -> State:
        """The next state, from the core's output y."""
        return y

    def decay(self) -> Float[Tensor, "D"] | None:
        """The diagonal of A, if there is one; its maximum is the spectral radius rho(A)."""
        return None


def _identity(dim: int) -> Float[Tensor, "D D"]:
    """As ``torch.eye``, which on the meta device would import the compiler."""
    return torch.zeros(dim, dim).fill_diagonal_(1)


def stable_decay(log_rate: Float[Tensor, "D"], dtype: torch.dtype) -> Float[Tensor, "D"]:
    """``exp(-exp(log_rate))``, below 1 in ``dtype`` for every finite parameter value.

    Where rounding gives exactly 1, the largest number below 1 is returned.
    """
    wide = log_rate.double() if dtype == torch.float64 else log_rate.float()
    decay = torch.exp(-torch.exp(wide.clamp(max=80.0))).to(dtype)
    return decay.clamp(max=1 - torch.finfo(dtype).eps / 2)


class LTIInjection(Injection):
    """``x = A h + Delta B e``, ``h' = core(x)`` with diagonal A = exp(-Delta exp(a_log)).

    rho(A) < 1 does not make the loop a contraction. At fixed weights, with a pre-norm core whose
    layers add R, it bounds the state by (|Delta B e| + max |R|) / (1 - rho), however many loops
    run; the bound moves with the weights and is useless near 1.

    Source: Parcae (arXiv 2604.12946), equation 3; xllm-loop, looped.py, OrthogonalInputInjection.
    """

    def __init__(self, config: ModelConfig, part: LTIInjectionConfig) -> None:
        super().__init__(config, part)
        dim, delta = config.d_model, -math.log(part.decay_init)  # a_log = 0, so A = exp(-delta)
        self.a_log = nn.Parameter(torch.zeros(dim))
        self.dt_bias = nn.Parameter(torch.full((dim,), math.log(math.expm1(delta))))
        self.weight, self.orthogonal = nn.Parameter(_identity(dim)), part.orthogonal

    def log_delta(self) -> Float[Tensor, "D"]:
        """log softplus(dt_bias), finite even where softplus rounds to zero."""
        bias = self.dt_bias.to(torch.promote_types(self.dt_bias.dtype, torch.float32))
        return torch.where(bias < -15, bias, functional.softplus(bias.clamp(min=-15)).log())

    def decay(self) -> Float[Tensor, "D"]:
        """A in the parameters' dtype."""
        return stable_decay(self.log_delta() + self.a_log, self.a_log.dtype)

    def drive(self, e: State) -> State:
        """Delta B e."""
        delta = self.log_delta().exp().to(e.dtype)
        return delta * functional.linear(e, self.weight).to(e.dtype)

    def mix(self, h: State, e: State) -> State:
        """A h + Delta B e, from ``drive``; with ``orthogonal``, A h without its part along it."""
        kept = stable_decay(self.log_delta() + self.a_log, h.dtype) * h
        if self.orthogonal:
            a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (kept, e))
            kept = (a - (a * b).sum(-1, True) / (b.square().sum(-1, True) + 1e-6) * b).to(h.dtype)
        return kept + e


class OriginalLTIInjection(Injection):
    """``x = norm(h + e)``, ``h' = A h + B e + core(x)``, A = exp(-exp(log_a + log_dt)).

    Source: kyegomez/OpenMythos, open_mythos/main.py, LTIInjection and RecurrentBlock.
    """

    def __init__(self, config: ModelConfig, part: OriginalLTIInjectionConfig) -> None:
        super().__init__(config, part)
        self.log_a = nn.Parameter(torch.zeros(config.d_model))
        self.log_dt = nn.Parameter(torch.zeros(1))
        self.weight = nn.Parameter(torch.full((config.d_model,), 0.1))
        self.norm = RMSNorm(config.d_model, config.block.norm_eps)

    def decay(self) -> Float[Tensor, "D"]:
        """A in the parameters' dtype."""
        return stable_decay(self.log_a + self.log_dt, self.log_a.dtype)

    def mix(self, h: State, e: State) -> State:
        """norm(h + e)."""
        return self.norm(h + e)

    def update(self, h: State, e: State, y: State) -> State:
        """A h + B e + y."""
        decay = stable_decay(self.log_a + self.log_dt, h.dtype)
        return torch.addcmul(torch.addcmul(y, decay, h), self.weight.to(h.dtype), e)


class LinearInjection(Injection):
    """``x = W_h h + W_e e``, plus a bias if asked for; both matrices start as the identity.

    Source: Huginn (arXiv 2502.05171), section 3.2.
    """

    def __init__(self, config: ModelConfig, part: LinearInjectionConfig) -> None:
        super().__init__(config, part)
        self.h_weight, self.e_weight = (nn.Parameter(_identity(config.d_model)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(config.d_model)) if part.bias else None

    def drive(self, e: State) -> State:
        """W_e e, and the bias if there is one."""
        return functional.linear(e, self.e_weight, self.bias).to(e.dtype)

    def mix(self, h: State, e: State) -> State:
        """W_h h + W_e e; e comes from ``drive``."""
        return functional.linear(h, self.h_weight).to(h.dtype) + e  # h keeps its dtype in autocast


class AddInjection(Injection):
    """``x = h + e``."""

    def mix(self, h: State, e: State) -> State:
        """h + e."""
        return h + e


class GateInjection(Injection):
    """``y = core(h + e)``, ``z = sigmoid(W [y; h] + b)``, ``h' = z y + (1 - z) h``.

    The bias starts below zero, so that a loop starts near the identity. With ``add_e`` False,
    y = core(h). The core's input has the loop embedding added, the h in z and h' has not.

    Source: Chen 2026 (arXiv 2603.21676), the identity-biased gate.
    """

    def __init__(self, config: ModelConfig, part: GateInjectionConfig) -> None:
        super().__init__(config, part)
        self.gate = nn.Linear(2 * config.d_model, config.d_model)
        self.bias_init, self.add_e = part.bias_init, part.add_e

    def init_weights(self) -> None:
        """Set the gate's bias, so that a loop starts near the identity."""
        self.gate.bias.fill_(self.bias_init)

    def mix(self, h: State, e: State) -> State:
        """h + e, or h without ``add_e``."""
        return h + e if self.add_e else h

    def update(self, h: State, e: State, y: State) -> State:
        """z y + (1 - z) h."""
        gate = torch.sigmoid(self.gate(torch.cat((y, h), dim=-1)))
        return torch.lerp(h, y.to(h.dtype), gate.to(h.dtype))


INJECTIONS: dict[type, type[Injection]] = {
    LTIInjectionConfig: LTIInjection,
    OriginalLTIInjectionConfig: OriginalLTIInjection,
    LinearInjectionConfig: LinearInjection,
    AddInjectionConfig: AddInjection,
    NoInjectionConfig: Injection,
    GateInjectionConfig: GateInjection,
}


def make_injection(config: ModelConfig) -> Injection:
    """The injection that the config names."""
    return INJECTIONS[type(config.injection)](config, config.injection)
