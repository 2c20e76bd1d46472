"""What an OpenMythos export does around its core: initial state, injection, signs of the loop.

``loop`` is the number of the current loop, counted from 0.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from .configuration_openmythos import OpenMythosConfig
from .layers_openmythos import make_norm

# Of the noise of a random initial state: the keys' start and rounds, and a rational approximation
# of sqrt(2) erfinv(x erf(3 / sqrt(2))) / x in 1 - x^2.
_WORD, _START = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3)
_ROUNDS = (0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
_OVER = (38576.2394, 275105.3, 174474.571, 20225.5052, 523.968420, 2.99999333)
_UNDER = (77356.9602, 225156.489, 95734.7664, 8706.52764, 192.895379, 1.0)


class Injection(nn.Module):
    """How the prelude's output e re-enters: once per call its drive, then twice per loop.

    Called as ``injection(e)``, ``injection(e, h)``, ``injection(e, h, y)``: where weights are
    offloaded or sharded, they are there only in ``forward``.
    """

    def __init__(self, config: OpenMythosConfig) -> None:
        super().__init__()
        self.part, self.kind, dim = config.injection, config.injection["kind"], config.hidden_size
        if self.kind == "lti":
            self.a_log, self.dt_bias = (nn.Parameter(torch.empty(dim)) for _ in range(2))
            self.weight = nn.Parameter(torch.empty(dim, dim))
        elif self.kind == "original_lti":
            self.log_a, self.log_dt = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(1))
            self.weight, self.norm = nn.Parameter(torch.empty(dim)), make_norm(config)
        elif self.kind == "linear":
            self.h_weight, self.e_weight = (nn.Parameter(torch.empty(dim, dim)) for _ in range(2))
        elif self.kind == "gate":
            self.gate = nn.Linear(2 * dim, dim)

    def reset(self, std: float) -> None:
        if self.kind == "lti":
            init.zeros_(self.a_log)
            rate = math.expm1(-math.log(self.part["decay_init"]))
            init.constant_(self.dt_bias, math.log(rate))
            _identity(self.weight)
        elif self.kind == "original_lti":
            init.zeros_(self.log_a)
            init.zeros_(self.log_dt)
            init.constant_(self.weight, 0.1)
        elif self.kind == "linear":
            _identity(self.h_weight)
            _identity(self.e_weight)
        elif self.kind == "gate":
            init.constant_(self.gate.bias, self.part["bias_init"])

    def forward(self, e: Tensor, h: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        if h is None:
            return self._drive(e)
        return self._mix(h, e) if y is None else self._update(h, e, y)

    def _log_delta(self) -> Tensor:
        bias = self.dt_bias.float()  # softplus itself rounds to zero far below
        return torch.where(bias < -15, bias, functional.softplus(bias.clamp(min=-15)).log())

    def _decay(self, log_rate: Tensor, dtype: torch.dtype) -> Tensor:
        decay = torch.exp(-torch.exp(log_rate.float().clamp(max=80.0))).to(dtype)
        return decay.clamp(max=1 - torch.finfo(dtype).eps / 2)

    def _drive(self, e: Tensor) -> Tensor:
        """What of e no loop changes."""
        if self.kind == "lti":
            return self._log_delta().exp().to(e.dtype) * functional.linear(e, self.weight)
        return functional.linear(e, self.e_weight) if self.kind == "linear" else e

    def _mix(self, h: Tensor, e: Tensor) -> Tensor:
        """The core's input."""
        if self.kind == "lti":
            return self._decay(self._log_delta() + self.a_log.float(), h.dtype) * h + e
        if self.kind == "original_lti":
            return self.norm(h + e)
        if self.kind == "linear":
            return functional.linear(h, self.h_weight) + e
        return h if self.kind == "none" else h + e

    def _update(self, h: Tensor, e: Tensor, y: Tensor) -> Tensor:
        """The next state, from the core's output y."""
        if self.kind == "original_lti":
            decay = self._decay(self.log_a + self.log_dt, h.dtype)
            return torch.addcmul(torch.addcmul(y, decay, h), self.weight.to(h.dtype), e)
        if self.kind == "gate":
            gate = torch.sigmoid(self.gate(torch.cat((y, h), -1)))
            return torch.lerp(h, y.to(h.dtype), gate.to(h.dtype))
        return y


def _identity(weight: Tensor) -> None:
    """``init.eye_`` mixes devices where an engine builds the model on the meta device."""
    init.copy_(weight, torch.eye(len(weight), dtype=weight.dtype, device=weight.device))


class LoopSignal(nn.Module):
    """What tells the core which loop it is in: a sinusoid or a learned vector, added to h."""

    def __init__(self, config: OpenMythosConfig) -> None:
        super().__init__()
        self.part = config.loop_embedding
        if self.part["kind"] == "learned":
            self.table = nn.Parameter(torch.empty(self.part["num_loops"], config.hidden_size))

    def reset(self, std: float) -> None:
        if self.part["kind"] == "learned":
            init.zeros_(self.table)

    def forward(self, hidden_states: Tensor, loop: int) -> Tensor:
        if self.part["kind"] == "learned":
            return hidden_states + self.table[min(loop, len(self.table) - 1)]
        channels, device = self.part["num_channels"], hidden_states.device
        exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
        angles = loop * self.part["theta"] ** -exponents
        signal = torch.cat((angles.sin(), angles.cos()))[:channels].to(hidden_states.dtype)
        return hidden_states + functional.pad(signal, (0, hidden_states.shape[-1] - channels))


class OutputLoRA(nn.Module):
    """``y + up((down y) * scale_t)`` on the core's output; past the table the last scale."""

    def __init__(self, config: OpenMythosConfig) -> None:
        super().__init__()
        dim, rank = config.hidden_size, config.loop_adapter["rank"]
        self.down, self.up = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)
        self.scale = nn.Parameter(torch.empty(config.loop_adapter["num_loops"], rank))

    def reset(self, std: float) -> None:
        init.zeros_(self.up.weight)
        init.ones_(self.scale)

    def forward(self, hidden_states: Tensor, loop: int) -> Tensor:
        scale = self.scale[min(loop, len(self.scale) - 1)]
        return hidden_states + self.up(self.down(hidden_states) * scale)


class CarriedGate(nn.Module):
    """The weights of an exit gate, which no loss reaches here: buffers, so that nobody trains them.

    DistributedDataParallel takes a trainable weight without a gradient as a fault.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", torch.zeros(1, dim))
        self.register_buffer("bias", torch.zeros(1))

    def reset(self, std: float) -> None:
        init.zeros_(self.weight)
        init.zeros_(self.bias)


def make_halting(config: OpenMythosConfig) -> Any:
    """ACT's head, which mixes states; the gate of another kind, which is carried; or None."""
    if config.halting is None:
        return None
    act = config.halting["kind"] == "act"
    return nn.Linear(config.hidden_size, 1) if act else CarriedGate(config.hidden_size)


def initial_state(config: OpenMythosConfig, e: Tensor, position_ids: Tensor) -> Tensor:
    """h_0: zeros, e, or noise that depends on (``state_seed``, position, channel) alone."""
    if config.state_init["kind"] == "copy":
        return e
    if config.state_init["kind"] == "zeros":
        return torch.zeros_like(e)

    low, high = _key(config.state_seed, position_ids)
    channels = torch.arange(e.shape[-1], device=e.device)
    bits = _mix(_mix(channels ^ low[..., None]) ^ high[..., None])
    uniform = ((bits >> 8) * 2 - (2**24 - 1)).float() * 2**-24
    x = (1 - uniform) * (1 + uniform)
    over, under = torch.full_like(x, _OVER[0]), torch.full_like(x, _UNDER[0])
    for a, b in zip(_OVER[1:], _UNDER[1:], strict=True):
        over, under = over * x + a, under * x + b
    noise = uniform * (over / under)  # of a normal distribution cut at 3 standard deviations
    return (config.state_init["std"] * noise).to(e.dtype).expand(e.shape)


def _key(*numbers: Any) -> tuple[Any, Any]:
    """Two words of 32 bits from numbers of 64 bits, by a Feistel network."""
    low, high = _START
    for number in numbers:
        low, high = low ^ (number & _WORD), high ^ ((number >> 32) & _WORD)
        for constant in _ROUNDS:
            low, high = high ^ _mix((low + constant) & _WORD), low
    return low, high


def _mix(word: Any) -> Any:
    """A hash of 32 bits, in int64."""
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _WORD
    return word ^ (word >> 15)
