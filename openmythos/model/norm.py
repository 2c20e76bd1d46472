"""Root-mean-square normalisation."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openmythos.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """``weight * x / rms(x)``; the quotient is cast to the input's dtype before the product.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Normalise the last dimension."""
        return rms_norm(x, self.eps, self.weight)
