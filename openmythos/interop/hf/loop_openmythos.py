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

CUT = 3.0  # the noise of a random initial state is cut at this many standard deviations


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
        init.normal_(self.weight, std=std)
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

    def mix(bits: Tensor) -> Tensor:  # a 31-bit integer hash
        bits = bits & 0x7FFFFFFF
        bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
        bits = ((bits ^ (bits >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
        return bits ^ (bits >> 16)

    channels = torch.arange(e.shape[-1], device=e.device)
    bits = mix(mix(position_ids + 1) + config.state_seed)[..., None] ^ mix(channels + 1)
    uniform = (mix(mix(bits)).double() + 0.5) / 2**31
    tail = math.erf(CUT / math.sqrt(2))
    noise = torch.erfinv((2 * uniform - 1) * tail) * math.sqrt(2)
    return (config.state_init["std"] * noise).to(e.dtype).expand(e.shape)
