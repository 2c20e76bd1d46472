"""Rotary position embeddings (RoPE), for both conventions of pairing channels.

The angles are computed from the positions once per forward and shared by all layers and loops. They
are not a buffer, so that casting the model does not reduce their precision.

Source: Su et al. 2021 (arXiv 2104.09864), equation 15.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.config import RopeConfig

Rope = tuple[Float[Tensor, "B T 1 K"], Float[Tensor, "B T 1 K"]]


def rope_frequencies(
    dim: int, config: RopeConfig, device: torch.device | None = None
) -> Float[Tensor, "K"]:
    """Radians per position of each pair j of channels, ``theta^(-2j/dim)``, in fp64.

    Source: for the scaling, Llama 3.1, as transformers implements the rope type "llama3".
    """
    place = "cpu" if device is not None and device.type == "mps" else device  # MPS has no fp64
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=place) / dim
    frequencies = config.theta**-exponents
    part = config.scaling
    if part is None:
        return frequencies
    turns = frequencies * part.original_max_seq_len / (2 * math.pi)
    kept = (turns - part.low_freq_factor) / (part.high_freq_factor - part.low_freq_factor)
    return torch.lerp(frequencies / part.factor, frequencies, kept.clamp(0, 1))


def rope_angles(
    positions: Int[Tensor, "B T"], dim: int, config: RopeConfig, dtype: torch.dtype
) -> Rope:
    """Cosine and signed sine of ``position * frequency`` for the K channels, in at least fp32.

    Both channels of a pair have the same cosine; the sine is negated for the first.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies = rope_frequencies(dim, config, positions.device).to(wide).to(positions.device)
    angles = positions[..., None, None].to(wide) * frequencies
    cos, sin = angles.cos(), angles.sin()
    if config.interleaved:
        return cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Float[Tensor, "B T N K"], rope: Rope, *, interleaved: bool) -> Tensor:
    """Rotate each pair of channels of ``x`` by its angle; computed in the angles' dtype."""
    cos, sin = rope
    wide = x.to(cos.dtype)
    if interleaved and not torch.compiler.is_compiling():  # which has no complex numbers
        turn = torch.complex(cos[..., ::2], sin[..., 1::2])
        # A pair can be viewed as a complex number if all strides and the offset are even.
        even = all(step % 2 == 0 for step in (*wide.stride()[:-1], wide.storage_offset()))
        wide = wide if even else wide.clone(memory_format=torch.contiguous_format)
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
    if interleaved:
        swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped = wide.roll(wide.shape[-1] // 2, dims=-1)
    return torch.addcmul(wide * cos, swapped, sin).to(x.dtype)
