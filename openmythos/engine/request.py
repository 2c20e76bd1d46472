"""What one row of generation wants, as data: checked and converted here, once."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from openmythos.config import ModelConfig
from openmythos.config.schema import as_integer, plain, require
from openmythos.engine.sampling import SamplingConfig
from openmythos.model.exit import Rule


@dataclass(frozen=True, kw_only=True)
class Request:
    """Tokens to go on from, and how.

    Ids may come as any list, range, array or tensor, numbers as those of any library; here they
    become a tuple, a frozenset and Python's own integers. ``check`` asks whether a model can do it.

    Attributes:
        tokens: Ids to read first; none only where a session goes on.
        max_new_tokens: At most so many new ones; None: as many as there is room for.
        num_loops: The most loops a position takes; None: the model's default.
        exit_rule: Stops single positions earlier; None: each takes ``num_loops``.
        sampling: How the next token is chosen; default: greedily.
        stop_tokens: Ids that end the row; the one that was produced belongs to the result.
        seed: Of the initial states and of what is sampled.
        sample_idx: Tells requests of one seed apart: the same initial states, other draws.
        logprobs: With every new token report the log-probability of it and of so many most likely
            ones; None: no report.

    Raises:
        ValueError: A field that no model could serve.
    """

    tokens: Sequence[int]
    max_new_tokens: int | None = None
    num_loops: int | None = None
    exit_rule: Rule | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop_tokens: Collection[int] = frozenset()
    seed: int = 0
    sample_idx: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "tokens", token_ids("tokens", self.tokens))
        set_field(self, "stop_tokens", frozenset(token_ids("stop_tokens", self.stop_tokens)))
        for name, least in (("max_new_tokens", 1), ("num_loops", 1), ("logprobs", 0)):
            if getattr(self, name) is not None:
                set_field(self, name, as_integer(name, getattr(self, name), least))
        set_field(self, "sample_idx", as_integer("sample_idx", self.sample_idx, 0))
        set_field(self, "seed", as_integer("seed", self.seed))
        inside = -(2**63) <= self.seed < 2**64  # what torch.Generator takes
        require(inside, "seed", self.seed, "an integer below 2**64, and not below -2**63")
        rule, made = self.exit_rule, "None or a rule of openmythos.model.exit, for example KLExit()"
        require(rule is None or isinstance(rule, Rule), "exit_rule", rule, made)
        made = "a SamplingConfig of openmythos.engine.sampling"
        require(isinstance(self.sampling, SamplingConfig), "sampling", self.sampling, made)

    def depth(self, config: ModelConfig) -> int:
        """The most loops of a position."""
        return config.num_loops if self.num_loops is None else self.num_loops

    def budget(self, room: int) -> int:
        """The most new tokens, where there is room for ``room``."""
        return room if self.max_new_tokens is None else self.max_new_tokens

    def check(
        self,
        config: ModelConfig,
        *,
        max_loops: int | None = None,
        num_before: int = 0,
        row: int | None = None,
    ) -> None:
        """Whether a model can do it.

        Args:
            config: The model's.
            max_loops: Of its cache, if there is one.
            num_before: Tokens that the row has before these.
            row: Its place in a batch, named in errors.

        Raises:
            ValueError: Ids outside the vocabulary, nothing to go on from, more tokens or loops than
                there is room for, or a rule that needs a halting head where the model has none.
        """
        prompt = "tokens" if row is None else f"prompt {row}"
        whole = "the request" if row is None else f"row {row}"
        ids = f"0..{config.vocab_size - 1}"
        known = all(0 <= token < config.vocab_size for token in self.tokens)
        require(known, prompt, list(self.tokens), f"of token ids in {ids}")
        length = num_before + len(self.tokens)
        require(length > 0, prompt, list(self.tokens), "at least one token long")
        for stop in self.stop_tokens:
            require(0 <= stop < config.vocab_size, "a stop token", stop, f"in {ids}")
        limit = config.max_seq_len
        if self.max_new_tokens is not None and length + self.max_new_tokens > limit:
            raise ValueError(
                f"{whole} has {length} tokens and max_new_tokens={self.max_new_tokens}, which "
                f"together exceed max_seq_len={limit}; shorten one of them"
            )
        if length >= limit:
            raise ValueError(
                f"{whole} has {length} tokens, which leave no room for a new one in "
                f"max_seq_len={limit}; shorten it"
            )
        depth = self.depth(config)
        if max_loops is not None:
            deep = f"at most {max_loops}, the max_loops of the cache; raise that"
            require(depth <= max_loops, "num_loops", depth, deep)
        if self.exit_rule is not None and self.exit_rule.needs_halting and config.halting is None:
            raise ValueError(
                f"exit rule {self.exit_rule.kind!r} needs a halting head and the model has none; "
                "use a rule that reads states or logits, or a model with config.halting"
            )


def token_ids(name: str, value: Any, allowed: str = "a list of token ids") -> tuple[int, ...]:
    """The ids in a list, range, array or tensor as Python's own integers.

    Args:
        name: Of the value, in errors.
        value: What was given.
        allowed: What may be given, in errors.

    Raises:
        ValueError: Text, or something else that is no list of integers.
    """
    ids = plain(value)
    words = ids if isinstance(ids, Sequence) else ()
    if isinstance(ids, str | bytes) or any(isinstance(word, str | bytes) for word in words):
        raise ValueError(f"{name} is text; give token ids: encode it with a tokenizer first")
    if isinstance(ids, Iterable):
        ids = [plain(token) for token in ids]
        if all(type(token) is int for token in ids):  # True is none
            return tuple(ids)
    raise ValueError(f"{name} is {ids!r}; it must be {allowed}")
