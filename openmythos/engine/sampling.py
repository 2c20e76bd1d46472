"""Sampling a token from logits: greedy, temperature, top-k, top-p, with settings per row.

Each token uses one uniform random number from its row's generator and inverts the cumulative
distribution with it. What a row samples therefore depends neither on other rows nor on the device's
random numbers.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.config.schema import as_integer, as_number, as_seed, plain, require


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How one row is sampled; greedy by default.

    The logits are divided by ``temperature`` (0 means greedy). Then only the ``top_k`` most likely
    tokens are kept (all, if it exceeds the vocabulary), and of these the smallest set of most
    likely ones whose probabilities, renormalised, sum to at least ``top_p``.

    Only ids below ``num_ids`` are sampled: a model's vocabulary is often padded past that of its
    tokenizer, and an id without a token means nothing. None: all ids.

    Before all this, ``adjusted`` changes the logits by what the text already has:

    - ``logit_bias``, numbers by id (kept as pairs), is added to the logits; -inf forbids an id;
    - of every token in the text, given or new, a positive logit is divided by
      ``repetition_penalty`` and a negative one is multiplied by it;
    - ``frequency_penalty`` times the number of times that a token was newly generated, and
      ``presence_penalty`` if it was at all, is subtracted.

    Source: OpenAI API reference, chat completions (bias, frequency and presence penalties); CTRL,
        Keskar et al. 2019 (arXiv 1909.05858), section 4.1 (repetition penalty).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    num_ids: int | None = None
    logit_bias: Sequence[tuple[int, float]] = ()  # or a mapping
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
            positive = name == "repetition_penalty"
            allowed = "a number above 0" if positive else "a number"
            value = as_number(name, getattr(self, name), allowed)
            require(value > 0 or not positive, name, value, allowed)
            object.__setattr__(self, name, value)
        if self.num_ids is not None:
            object.__setattr__(self, "num_ids", as_integer("num_ids", self.num_ids, 1))
        allowed = "a number of at least 0 (0 is greedy)"
        temperature = as_number("temperature", self.temperature, allowed)
        require(temperature >= 0, "temperature", temperature, allowed)
        object.__setattr__(self, "temperature", temperature)
        if self.top_k is not None:
            object.__setattr__(self, "top_k", as_integer("top_k", self.top_k, 1))
        if self.top_p is not None:
            allowed = "a number above 0 and at most 1 (1 keeps all tokens)"
            top_p = as_number("top_p", self.top_p, allowed)
            require(0 < top_p <= 1, "top_p", top_p, allowed)
            object.__setattr__(self, "top_p", top_p)

    @property
    def adjusts(self) -> bool:
        """Whether ``adjusted`` changes any logit."""
        penalties = (self.frequency_penalty, self.presence_penalty)
        return bool(self.logit_bias) or self.repetition_penalty != 1 or any(penalties)


def _pairs(given: Any) -> tuple[tuple[int, float], ...]:
    """The pairs of id and number of a ``logit_bias``, by id."""
    allowed = "numbers by token id, for example {17: -100.0}; -inf forbids an id"
    pairs = list(given.items()) if isinstance(given, Mapping) else plain(given)
    known = isinstance(pairs, list | tuple)
    require(known, "logit_bias", given, allowed)
    known = all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs)
    require(known, "logit_bias", given, allowed)
    biases = {}
    for biased, bias in pairs:
        low = bias == -math.inf
        number = -math.inf if low else as_number("a bias of logit_bias", bias, allowed)
        biases[as_integer("an id of logit_bias", biased, 0)] = number
    return tuple(sorted(biases.items()))


def adjusted(
    logits: Float[Tensor, "B V"],
    configs: Sequence[SamplingConfig],
    texts: Sequence[Sequence[int]],
    num_new: Sequence[int],
) -> Float[Tensor, "B V"]:
    """The logits after each row's bias and penalties.

    Args:
        logits: The next token's.
        configs: One per row.
        texts: The tokens so far of each row.
        num_new: How many of them, at the end, are newly generated.

    Raises:
        ValueError: A row's bias forbids every token.
    """
    if not any(config.adjusts for config in configs):
        return logits
    logits = logits.clone()
    for row, config, text, new in zip(logits, configs, texts, num_new, strict=True):
        for biased, bias in config.logit_bias:
            row[biased] += bias
        if config.logit_bias and row.amax() == -math.inf:
            raise ValueError("logit_bias forbids every token; leave at least one")
        if config.repetition_penalty != 1:
            ids = torch.tensor(sorted(set(text)), device=row.device)
            seen, penalty = row[ids], config.repetition_penalty
            row[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
        counts = Counter(text[len(text) - new :])
        if counts and (config.frequency_penalty or config.presence_penalty):
            ids = torch.tensor(list(counts), device=row.device)
            times = row.new_tensor(list(counts.values()))
            row[ids] -= config.frequency_penalty * times + config.presence_penalty
    return logits


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities (natural) at one position, before all that a ``SamplingConfig`` does.

    Attributes:
        chosen: The sampled token's log-probability.
        top: (token, log-probability) of the most likely tokens, in descending order.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: Float[Tensor, "V"], token: int, count: int) -> Logprobs:
    """Log-probabilities of ``token`` and of the ``count`` most likely tokens, or all if fewer."""
    logprobs = _in_double(logits).log_softmax(dim=-1)
    if not count:
        return Logprobs(float(logprobs[token]), ())
    ranked, tokens = logprobs.sort(descending=True, stable=True)
    top = zip(tokens[:count].tolist(), ranked[:count].tolist(), strict=True)
    return Logprobs(float(logprobs[token]), tuple(top))


def row_generator(seed: int, row: int) -> torch.Generator:
    """The generator of one row, seeded from (seed, row) alone.

    It is a CPU generator, so that the numbers are the same for every device. The pair is hashed,
    because the first numbers of generators whose seeds differ by one are correlated.
    """
    seed, row = as_seed("seed", seed), as_integer("row", row, 0)
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def token_probs(
    logits: Float[Tensor, "B V"], configs: Sequence[SamplingConfig]
) -> Float[Tensor, "B V"]:
    """The distribution that each row is sampled from, in fp64; one-hot for greedy rows.

    Of logits on MPS, which has no fp64, it is on the CPU.

    Raises:
        ValueError: Not one config per row, or a row's largest logit is not finite.
    """
    _check_rows(logits, configs)
    logits = _with_tokens(logits, configs)
    _check_finite(logits)
    wide = _in_double(logits)
    top = wide.amax(dim=-1, keepdim=True)
    best = torch.zeros_like(wide).scatter_(1, wide.argmax(dim=-1, keepdim=True), 1.0)
    if all(config.temperature == 0 for config in configs):
        return best
    temperatures = wide.new_tensor([[config.temperature or 1.0] for config in configs])
    probs = ((wide - top) / temperatures).softmax(dim=-1)
    if any(config.top_k is not None or config.top_p is not None for config in configs):
        probs = _filtered(probs, configs)
    greedy = torch.tensor([[config.temperature == 0] for config in configs], device=wide.device)
    return torch.where(greedy, best, probs)


def _in_double(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The logits in fp64, which MPS does not have: those are moved to the CPU."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()


def _with_tokens(
    logits: Float[Tensor, "B V"], configs: Sequence[SamplingConfig]
) -> Float[Tensor, "B V"]:
    """The logits with -inf at ids from each row's ``num_ids`` on."""
    size = logits.shape[-1]
    limits = [size if config.num_ids is None else config.num_ids for config in configs]
    if min(limits) >= size:
        return logits
    ids = torch.arange(size, device=logits.device)
    return logits.masked_fill(ids >= ids.new_tensor(limits)[:, None], -math.inf)


def _check_rows(logits: Tensor, configs: Sequence[SamplingConfig]) -> None:
    known = isinstance(logits, Tensor) and logits.ndim == 2 and logits.is_floating_point()
    require(known and logits.numel() > 0, "logits", logits, "a tensor of floats, [B, V]")
    known = isinstance(configs, Sequence) and all(isinstance(c, SamplingConfig) for c in configs)
    require(known, "configs", configs, "a list of SamplingConfig, one per row")
    if len(configs) != len(logits):
        raise ValueError(
            f"{len(logits)} rows of logits came with {len(configs)} configs; give one per row"
        )


def _check_finite(logits: Float[Tensor, "B V"]) -> None:
    finite = logits.amax(dim=-1).isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(f"the logits of row {row} are not finite numbers; the model has diverged")


def _filtered(
    probs: Float[Tensor, "B V"], configs: Sequence[SamplingConfig]
) -> Float[Tensor, "B V"]:
    """Apply each row's top-k, renormalise, apply its top-p, and renormalise again."""
    vocab_size = probs.shape[-1]
    top_k = [min(vocab_size, config.top_k or vocab_size) for config in configs]
    top_p = [1.0 if config.top_p is None else config.top_p for config in configs]
    ranked, token = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab_size, device=probs.device)
    ranked = ranked * (rank < torch.tensor(top_k, device=probs.device)[:, None])
    ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    before = ranked.cumsum(dim=-1) - ranked
    limit = probs.new_tensor(top_p)[:, None]
    # The most likely token is always kept. With top_p = 1 all are kept, even if rounding makes the
    # cumulative sum reach 1 early.
    ranked = ranked * ((before < limit) | (limit >= 1) | (rank == 0))
    kept = torch.zeros_like(probs).scatter_(1, token, ranked)
    return kept / kept.sum(dim=-1, keepdim=True)


def sample(
    logits: Float[Tensor, "B V"],
    configs: Sequence[SamplingConfig],
    generators: Sequence[torch.Generator],
) -> Int[Tensor, "B"]:
    """Sample one token per row.

    Args:
        logits: The next token's.
        configs: One per row.
        generators: One per row (see ``row_generator``); each gives one number if its row is not
            greedy.

    Raises:
        ValueError: Not one config and one generator per row, or logits that are not finite.
    """
    _check_rows(logits, configs)
    made = "a list of torch.Generator, one per row (see row_generator)"
    known = isinstance(generators, Sequence)
    known = known and all(isinstance(generator, torch.Generator) for generator in generators)
    require(known, "generators", generators, made)
    if len(generators) != len(configs):
        raise ValueError(
            f"{len(configs)} rows of logits came with {len(generators)} generators; "
            "give one per row"
        )
    if all(config.temperature == 0 for config in configs):
        logits = _with_tokens(logits, configs)
        _check_finite(logits)
        return logits.argmax(dim=-1)
    draws = torch.zeros(len(configs), dtype=torch.float64)
    for row, (config, generator) in enumerate(zip(configs, generators, strict=True)):
        if config.temperature:
            draws[row] = torch.rand((), dtype=torch.float64, generator=generator)
    probs = token_probs(logits, configs)
    uniform = draws.to(probs.device)[:, None]
    cumulative = probs.cumsum(dim=-1)
    # Even after rounding, the target must be below the total, so that a token of probability 0 is
    # never chosen.
    total = cumulative[:, -1:]
    target = (uniform * total).clamp(max=torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].to(logits.device)
