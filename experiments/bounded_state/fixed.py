"""Fixed random weights: the state's norm over thousands of loops, and what bounds it."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from openmythos.config import (
    AddInjectionConfig,
    CopyInitConfig,
    GateInjectionConfig,
    GQAConfig,
    InjectionConfig,
    LinearInjectionConfig,
    LTIInjectionConfig,
    ModelConfig,
    NoInjectionConfig,
    OriginalLTIInjectionConfig,
    ReLUSquaredConfig,
    ZerosInitConfig,
)
from openmythos.model.attention import GQA
from openmythos.model.block import Block
from openmythos.model.feedforward import ReLUSquared
from openmythos.model.inference import inference
from openmythos.model.injection import LinearInjection, LTIInjection, OriginalLTIInjection
from openmythos.model.loop import start_loops, unroll
from openmythos.model.norm import RMSNorm
from openmythos.model.recurrent import RecurrentDepthLM

INJECTIONS: dict[str, InjectionConfig] = {
    "lti": LTIInjectionConfig(),
    "original_lti": OriginalLTIInjectionConfig(),
    "linear": LinearInjectionConfig(),
    "add": AddInjectionConfig(),
    "gate": GateInjectionConfig(),
    "none": NoInjectionConfig(),
}
NUM_TOKENS = 5


def model_config(
    injection: InjectionConfig, d_model: int, num_loops: int = 4, vocab_size: int = 20
) -> ModelConfig:
    """One looped pre-norm layer, without prelude and coda."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_prelude_layers=0,
        num_core_layers=1,
        num_coda_layers=0,
        num_loops=num_loops,
        max_seq_len=16,
        attention=GQAConfig(num_heads=2, num_kv_heads=2, head_dim=d_model // 2),
        feed_forward=ReLUSquaredConfig(d_ff=2 * d_model),
        injection=injection,
        state_init=ZerosInitConfig() if injection.adds_e else CopyInitConfig(),
    )


def random_model(
    injection: InjectionConfig, scale: float, rho: float | None, seed: int, d_model: int = 32
) -> RecurrentDepthLM:
    """A model whose matrices have entries of ``scale`` times a standard normal.

    ``rho`` sets all of A (of ``linear``, W_h is rho times the identity); None leaves it.
    """
    model = RecurrentDepthLM(model_config(injection, d_model), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.core.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if rho is not None:
            _set_rho(model, rho)
    return model


def _set_rho(model: RecurrentDepthLM, rho: float) -> None:
    part = model.injection
    if isinstance(part, LinearInjection):
        part.h_weight.copy_(rho * torch.eye(len(part.h_weight)))
    elif isinstance(part, LTIInjection):  # A = exp(-exp(log_delta + a_log))
        part.a_log.copy_(math.log(-math.log(rho)) - part.log_delta())
    elif isinstance(part, OriginalLTIInjection):
        part.log_a.copy_(torch.full_like(part.log_a, math.log(-math.log(rho))))
    else:
        raise ValueError(f"{type(part).__name__} has no A")


def loops_shown(last: int) -> list[int]:
    """1, 2, 4, 10, 20, 40 ... and ``last``."""
    return sorted({*_one_two_four(last), last})


def _one_two_four(last: int) -> Iterator[int]:
    power = 1
    while power <= last:
        yield from (step * power for step in (1, 2, 4) if step * power <= last)
        power *= 10


@torch.no_grad()
def norms(model: RecurrentDepthLM, shown: list[int]) -> list[float | None]:
    """The largest norm of a token's state after each of these loops; None: not finite."""
    tokens = torch.arange(NUM_TOKENS)[None]
    found: list[float | None] = []
    with inference(model):
        ctx = model.context(tokens)
        state = start_loops(model, model.encode(tokens, ctx), ctx, [max(shown)])
        for loop, each in enumerate(unroll(model, state, ctx), start=1):
            if loop in shown:
                norm = float(each.h.norm(dim=-1).max())
                found.append(norm if math.isfinite(norm) else None)
    return found


@torch.no_grad()
def bound(model: RecurrentDepthLM) -> dict[str, float] | None:
    """The state's bound (|B e| + max |R|) / (1 - rho); None if there is no A with rho < 1.

    With pre-norm layers R, what the core adds, is bounded by the weights alone: a norm has at most
    sqrt(d) times its largest gain, attention averages values, ReLU squared is bounded on bounded
    inputs. Of the original injection, whose core reads a norm, that norm is part of R.
    """
    decay = model.injection.decay()
    if decay is None:
        return None
    rho, tokens = float(decay.double().max()), torch.arange(NUM_TOKENS)[None]
    with inference(model):
        ctx = model.context(tokens)
        driven = model.encode(tokens, ctx)  # of LTI Delta B e already
    if isinstance(model.injection, OriginalLTIInjection):
        driven = driven * model.injection.weight
    residual = sum(_largest_output(layer) for layer in model.core)
    if isinstance(model.injection, OriginalLTIInjection):
        residual += _norm_bound(model.injection.norm)
    drive = float(driven.norm(dim=-1).max())
    most = (drive + residual) / (1 - rho)
    return {"rho": rho, "drive": drive, "residual": residual, "bound": most}


def _norm_bound(norm: RMSNorm) -> float:
    return float(norm.weight.abs().max()) * math.sqrt(norm.weight.numel())


def _largest_output(block: Block) -> float:
    """A bound of what one pre-norm layer adds to the stream."""
    attention, feed_forward = block.attention, block.feed_forward
    assert isinstance(attention, GQA) and isinstance(feed_forward, ReLUSquared)
    heads, width = attention.config.num_kv_heads, attention.config.head_dim
    values = attention.qkv.weight.double()[-heads * width :].view(heads, width, -1)
    spread = math.sqrt(sum(_largest_stretch(head) ** 2 for head in values))
    attended = _largest_stretch(attention.out.weight) * spread * _norm_bound(block.attention_norm)
    seen = _norm_bound(block.feed_forward_norm)
    up = feed_forward.up.weight.double()
    squares = _largest_stretch(up) * seen * float(up.norm(dim=1).max()) * seen
    return attended + _largest_stretch(feed_forward.down.weight) * feed_forward.scale * squares


def _largest_stretch(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))
