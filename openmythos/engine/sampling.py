"""From logits to a token: greedy, temperature, top-k, top-p, each row with its own settings.

Every token takes one uniform number from its row's generator and reads it off the row's cumulative
distribution, so what a row draws does not depend on its neighbours, nor on the device.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.config.schema import as_integer, plain, require


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How one row is sampled; the defaults are greedy.

    The logits are divided by ``temperature`` (0: the most likely token), then only the ``top_k``
    most likely tokens are kept (a number past the vocabulary keeps all), then of these the fewest
    whose probabilities reach ``top_p``.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        temperature, top_p = plain(self.temperature), plain(self.top_p)
        finite = isinstance(temperature, int | float) and 0 <= temperature < math.inf
        require(finite, "temperature", temperature, "a number of at least 0 (0 is greedy)")
        object.__setattr__(self, "temperature", float(temperature))
        if self.top_k is not None:
            top_k = as_integer("top_k", self.top_k)
            require(top_k >= 1, "top_k", top_k, "at least 1, or None for all tokens")
            object.__setattr__(self, "top_k", top_k)
        if top_p is not None:
            inside = isinstance(top_p, int | float) and 0 < top_p <= 1
            require(inside, "top_p", top_p, "in (0, 1], or None for all tokens")
            object.__setattr__(self, "top_p", float(top_p))


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities at one position, as the model gives them.

    Temperature, top-k and top-p do not change them.

    Attributes:
        chosen: Of the token that was sampled.
        top: The most likely tokens and theirs, the likeliest first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: Float[Tensor, "V"], token: int, count: int) -> Logprobs:
    """Those of ``token`` and of the ``count`` most likely tokens (past the vocabulary: of all)."""
    logprobs = logits.double().log_softmax(dim=-1)
    ranked, tokens = logprobs.sort(descending=True, stable=True)
    top = zip(tokens[:count].tolist(), ranked[:count].tolist(), strict=True)
    return Logprobs(float(logprobs[token]), tuple(top))


def row_generator(seed: int, row: int) -> torch.Generator:
    """The generator of one row, seeded from (seed, row) alone.

    It lives on the CPU, so that every device draws the same tokens. The pair is hashed because
    generators whose seeds differ by one are correlated at first.
    """
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def token_probs(
    logits: Float[Tensor, "B V"], configs: Sequence[SamplingConfig]
) -> Float[Tensor, "B V"]:
    """The distribution that each row is drawn from, in fp64; greedy rows have a single one.

    Raises:
        ValueError: A row's logits have no largest finite value.
    """
    _check_finite(logits)
    wide = logits.double()
    top = wide.amax(dim=-1, keepdim=True)
    best = torch.zeros_like(wide).scatter_(1, logits.argmax(dim=-1, keepdim=True), 1.0)
    if all(config.temperature == 0 for config in configs):
        return best
    temperatures = wide.new_tensor([[config.temperature or 1.0] for config in configs])
    probs = ((wide - top) / temperatures).softmax(dim=-1)
    if any(config.top_k is not None or config.top_p is not None for config in configs):
        probs = _filtered(probs, configs)
    greedy = torch.tensor([[config.temperature == 0] for config in configs], device=logits.device)
    return torch.where(greedy, best, probs)


def _check_finite(logits: Float[Tensor, "B V"]) -> None:
    finite = logits.amax(dim=-1).isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(f"the logits of row {row} are not finite numbers; the model has diverged")


def _filtered(
    probs: Float[Tensor, "B V"], configs: Sequence[SamplingConfig]
) -> Float[Tensor, "B V"]:
    """Each row within its top-k, then within the top-p of what is left, summing to 1 again."""
    vocab_size = probs.shape[-1]
    top_k = [vocab_size if config.top_k is None else config.top_k for config in configs]
    top_p = [1.0 if config.top_p is None else config.top_p for config in configs]
    ranked, token = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab_size, device=probs.device)
    ranked = ranked * (rank < torch.tensor(top_k, device=probs.device)[:, None])
    ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    before = ranked.cumsum(dim=-1) - ranked
    limit = probs.new_tensor(top_p)[:, None]
    # The first token always stays; at 1 rounding of the sum must not drop the last ones.
    ranked = ranked * ((before < limit) | (limit >= 1) | (rank == 0))
    kept = torch.zeros_like(probs).scatter_(1, token, ranked)
    return kept / kept.sum(dim=-1, keepdim=True)


def sample(
    logits: Float[Tensor, "B V"],
    configs: Sequence[SamplingConfig],
    generators: Sequence[torch.Generator],
) -> Int[Tensor, "B"]:
    """One token a row.

    Args:
        logits: Of the next token.
        configs: One a row.
        generators: One a row (``row_generator``); each gives one number.

    Raises:
        ValueError: Not as many configs or generators as rows, or logits that are not finite.
    """
    num_rows = logits.shape[0]
    if not num_rows == len(configs) == len(generators):
        raise ValueError(
            f"{num_rows} rows of logits came with {len(configs)} configs and {len(generators)} "
            "generators; give one of each a row"
        )
    draws = [torch.rand((), dtype=torch.float64, generator=generator) for generator in generators]
    if all(config.temperature == 0 for config in configs):
        _check_finite(logits)
        return logits.argmax(dim=-1)
    probs = token_probs(logits, configs)
    uniform = torch.stack(draws).to(logits.device)[:, None]
    cumulative = probs.cumsum(dim=-1)
    # Strictly below the total, even after rounding: the token found then has a probability.
    total = cumulative[:, -1:]
    target = (uniform * total).clamp(max=torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
