"""A generation request for one row, checked and converted to Python's own types."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from openmythos.config import ModelConfig
from openmythos.config.schema import as_integer, as_seed, plain, require
from openmythos.engine.sampling import SamplingConfig
from openmythos.model.exit import Rule

TEXT = str | bytes | bytearray | memoryview  # what is text, although it can be read as numbers


@dataclass(frozen=True, kw_only=True)
class Request:
    """The tokens to continue, and how to continue them.

    Ids may be given as a list, range, array or tensor, and numbers in the types of any library;
    they are converted to a tuple, a frozenset and Python integers. ``check`` tests whether a given
    model can serve the request.

    Attributes:
        tokens: Ids to read first; may be empty if the row of a session already has tokens.
        max_new_tokens: The maximum number of new tokens; None: as many as there is room for.
        forced_tokens: The first new tokens, which are given and not sampled: a text is then scored
            as it would be generated, each token with its own loops.
        min_new_tokens: No stop token is sampled before so many new tokens.
        num_loops: The maximum number of loops per token; None: the model's default.
        exit_rule: Stops single tokens earlier; None: every token takes ``num_loops``.
        sampling: How the next token is chosen; default: greedily.
        stop_tokens: Ids that end the row when they are sampled; the result includes them.
        seed: Seed of the initial states and of the sampling.
        sample_idx: Gives requests of the same seed other random numbers when sampling, but the same
            initial states.
        logprobs: How many of the most likely tokens to report log-probabilities of, besides the
            sampled token's, with every new token; None: no report.

    Raises:
        ValueError: A value that is not valid for any model.
    """

    tokens: Sequence[int]
    max_new_tokens: int | None = None
    forced_tokens: Sequence[int] = ()
    min_new_tokens: int = 0
    num_loops: int | None = None
    exit_rule: Rule | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop_tokens: Collection[int] = frozenset()
    seed: int = 0
    sample_idx: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        for name in ("tokens", "forced_tokens"):
            set_field(self, name, token_ids(name, getattr(self, name)))
        stops = list(self.stop_tokens) if isinstance(self.stop_tokens, Set) else self.stop_tokens
        set_field(self, "stop_tokens", frozenset(token_ids("stop_tokens", stops)))
        for name, least in (("max_new_tokens", 1), ("num_loops", 1), ("logprobs", 0)):
            if getattr(self, name) is not None:
                set_field(self, name, as_integer(name, getattr(self, name), least))
        set_field(self, "min_new_tokens", as_integer("min_new_tokens", self.min_new_tokens, 0))
        set_field(self, "sample_idx", as_integer("sample_idx", self.sample_idx, 0))
        set_field(self, "seed", as_seed("seed", self.seed))
        fits = self.max_new_tokens is None or len(self.forced_tokens) <= self.max_new_tokens
        most = f"at most max_new_tokens={self.max_new_tokens}"
        require(fits, "the number of forced_tokens", len(self.forced_tokens), most)
        rule, made = self.exit_rule, "None or a rule of openmythos.model.exit, for example KLExit()"
        require(rule is None or isinstance(rule, Rule), "exit_rule", rule, made)
        made = "a SamplingConfig of openmythos.engine.sampling"
        require(isinstance(self.sampling, SamplingConfig), "sampling", self.sampling, made)

    def depth(self, config: ModelConfig) -> int:
        """The maximum number of loops per token."""
        return config.num_loops if self.num_loops is None else self.num_loops

    def sampling_after(self, num_new: int) -> SamplingConfig:
        """How the token after ``num_new`` new ones is chosen; no stop token too early."""
        if num_new >= self.min_new_tokens or not self.stop_tokens:
            return self.sampling
        forbidden = [(stop, -math.inf) for stop in self.stop_tokens]
        return replace(self.sampling, logit_bias=[*self.sampling.logit_bias, *forbidden])

    def new_token(self, num_new: int, sampled: int) -> int:
        """The token after ``num_new`` new ones: the forced one if there is one."""
        return self.forced_tokens[num_new] if num_new < len(self.forced_tokens) else sampled

    def budget(self, room: int) -> int:
        """The maximum number of new tokens; by default ``room``, as many as fit."""
        return room if self.max_new_tokens is None else self.max_new_tokens

    def check(
        self,
        config: ModelConfig,
        *,
        max_loops: int | None = None,
        num_before: int = 0,
        row: int | None = None,
    ) -> None:
        """Check that a model can serve the request.

        Args:
            config: The model's.
            max_loops: The cache's, if there is one.
            num_before: Number of tokens that the row already has.
            row: The row's index in its batch, for error messages.

        Raises:
            ValueError: Ids outside the vocabulary, no token to continue, more tokens or loops than
                there is room for, or an exit rule that needs a halting head and a model without.
        """
        prompt = "tokens" if row is None else f"prompt {row}"
        whole = "the request" if row is None else f"row {row}"
        ids = f"0..{config.vocab_size - 1}"
        known = all(0 <= token < config.vocab_size for token in self.tokens)
        require(known, prompt, list(self.tokens), f"of token ids in {ids}")
        known = all(0 <= token < config.vocab_size for token in self.forced_tokens)
        require(known, "forced_tokens", list(self.forced_tokens), f"of token ids in {ids}")
        length = num_before + len(self.tokens)
        require(length > 0, prompt, list(self.tokens), "at least one token long")
        for stop in self.stop_tokens:
            require(0 <= stop < config.vocab_size, "a stop token", stop, f"in {ids}")
        for biased, _ in self.sampling.logit_bias:
            require(biased < config.vocab_size, "an id of logit_bias", biased, f"in {ids}")
        limit = config.max_seq_len
        if self.max_new_tokens is not None and length + self.max_new_tokens > limit:
            raise ValueError(
                f"{whole} has {length} tokens and asks for {self.max_new_tokens} new ones, and the "
                f"model has room for {limit} in all (max_seq_len): lower max_new_tokens or shorten "
                "the prompt"
            )
        if length >= limit:
            raise ValueError(
                f"{whole} has {length} tokens, which leave no room for a new one: the model has "
                f"room for {limit} (max_seq_len); shorten the prompt"
            )
        depth = self.depth(config)
        if max_loops is not None:
            deep = f"at most {max_loops}, the max_loops of the cache; raise that"
            require(depth <= max_loops, "num_loops", depth, deep)
        if self.exit_rule is not None and self.exit_rule.needs_halting and config.halting is None:
            raise ValueError(
                f"exit rule {self.exit_rule.kind!r} needs a halting head and the model has none; "
                "use a rule that reads states or logits, or a model that was trained with one"
            )


class Room(NamedTuple):
    """What the longest and the deepest of some requests need: tokens that are read, and loops."""

    max_len: int
    max_loops: int


def room_for(config: ModelConfig, requests: Sequence[Request]) -> Room:
    """The room that a cache needs for each of some requests, which are checked.

    Raises:
        ValueError: A request that the model cannot serve; says which.
    """
    for row, request in enumerate(requests):
        request.check(config, row=row)
    lengths = [len(request.tokens) for request in requests]
    budgets = [
        request.budget(config.max_seq_len - length)
        for request, length in zip(requests, lengths, strict=True)
    ]
    longest = max(length - 1 + new for length, new in zip(lengths, budgets, strict=True))
    return Room(longest, max(request.depth(config) for request in requests))


def token_ids(name: str, value: Any, allowed: str = "a list of token ids") -> tuple[int, ...]:
    """Convert a list, range, array or tensor of token ids to a tuple of Python integers.

    Args:
        name: The value's name in error messages.
        value: The given value.
        allowed: The description of allowed values in error messages.

    Raises:
        ValueError: The value is text, or anything else that is not a list of integers.
    """
    ids = value if isinstance(value, TEXT) else plain(value)
    words = ids if isinstance(ids, Sequence) else ()
    if isinstance(ids, TEXT) or any(isinstance(word, TEXT) for word in words):
        raise ValueError(f"{name} is text; give token ids: encode it with a tokenizer first")
    if isinstance(ids, Iterable) and not isinstance(ids, Set | Mapping):  # those have no order
        ids = [plain(token) for token in ids]
        if all(type(token) is int for token in ids):  # excludes bool
            return tuple(ids)
    require(False, name, ids, allowed)
    raise AssertionError
