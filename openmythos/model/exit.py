"""Exit rules: decide after each loop whether a token stops. They have no learned parameters.

A rule is a frozen dataclass with a ``kind``, read from JSON and the command line like the members
of the model's seams. What it remembers between loops is an ``ExitState`` with one entry per row, so
rows may leave, join and be at different loops. A rule can only stop a token before the number of
loops that was asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from openmythos.config import schema
from openmythos.config.schema import as_integer, as_number, require
from openmythos.model.loop import ExitState, Memory


def join_states(states: Sequence[ExitState]) -> ExitState:
    """Concatenate the rows of several states of the same rule."""
    columns = []
    for tensors in zip(*(state.memory for state in states), strict=True):
        shape = max(tensor.shape[1:] for tensor in tensors)
        columns.append(torch.cat([tensor.expand(-1, *shape) for tensor in tensors]))
    return ExitState(torch.cat([state.loops for state in states]), tuple(columns))


def split_states(state: ExitState) -> list[ExitState]:
    """The state of each row, without a copy."""
    columns = [tensor.split(1) for tensor in (state.loops, *state.memory)]
    return [ExitState(loops, tuple(memory)) for loops, *memory in zip(*columns, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of all rules: ``_memory`` is what a rule remembers, ``_decide`` says when to stop.

    A rule is asked after every ``check_every``-th loop, and compares with what it saw when it was
    last asked: where the head is large, asking costs more than a loop. No token stops before
    ``min_loops`` loops, but the rule is asked in these loops too. Every integer field is at least
    1, and every other number above 0.
    """

    kind: ClassVar[str]
    needs_logits: ClassVar[bool] = False
    needs_halting: ClassVar[bool] = False
    min_loops: int = 1
    check_every: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = f"exit_rule.{field.name}", getattr(self, field.name)
            if field.type is int:
                value = as_integer(name, value, 1)
            else:
                value = as_number(name, value, "a number above 0")
                require(value > 0, name, value, "a number above 0")
            object.__setattr__(self, field.name, value)  # the dataclass is frozen

    def start(self, h: Float[Tensor, "B D"]) -> ExitState:
        """The state before the first loop, from h_0."""
        loops = torch.zeros(h.shape[0], dtype=torch.int64, device=h.device)
        return ExitState(loops, self._memory(h))

    def is_due(self, loops: int) -> bool:
        """Whether the rule is asked after so many loops."""
        return loops % self.check_every == 0

    def check(
        self,
        state: ExitState,
        h: Float[Tensor, "B D"],
        logits: Float[Tensor, "B V"] | None = None,
        mass: Float[Tensor, "B"] | None = None,
    ) -> tuple[Bool[Tensor, "B"], ExitState]:
        """Whether each row stops after the loop that gave ``h``, and the state for the next check.

        Args:
            state: The result of ``start`` or of the previous check, ``check_every`` loops ago.
            h: The model's state after the loop.
            logits: The logits if the row stopped here; only if ``needs_logits``.
            mass: The halting head's exit probabilities summed so far; only if ``needs_halting``.

        Raises:
            ValueError: Logits or mass are needed and not given.
        """
        if self.needs_logits and logits is None:
            raise ValueError(f"exit rule {self.kind!r} needs the logits of every loop")
        if self.needs_halting and mass is None:
            raise ValueError(
                f"exit rule {self.kind!r} needs a halting head; set the model's halting, or use a "
                "rule that reads states or logits"
            )
        stop, memory = self._decide(state.memory, _wide(h), logits, mass)
        loops = state.loops + self.check_every
        return stop & (loops >= self.min_loops), ExitState(loops, memory)

    def _memory(self, h: Tensor) -> Memory:
        return ()

    def _decide(
        self, memory: Memory, h: Tensor, logits: Tensor | None, mass: Tensor | None
    ) -> tuple[Tensor, Memory]:
        return torch.zeros(h.shape[0], dtype=torch.bool, device=h.device), memory


@dataclass(frozen=True, kw_only=True)
class Fixed(Rule):
    """Never stops early: every token takes the number of loops asked for."""

    kind: ClassVar[str] = "fixed"

    def is_due(self, loops: int) -> bool:
        """Never."""
        return False


@dataclass(frozen=True, kw_only=True)
class CumulativeThreshold(Rule):
    """Stops when the halting head's exit probabilities sum to at least ``threshold``.

    Source: Ouro (arXiv 2510.25741), section 3, t_exit = min{m : CDF(m) >= q}.
    """

    kind: ClassVar[str] = "cumulative_threshold"
    needs_halting: ClassVar[bool] = True
    threshold: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.threshold <= 1, "exit_rule.threshold", self.threshold, "in (0, 1]")

    def _decide(
        self, memory: Memory, h: Tensor, logits: Tensor | None, mass: Tensor | None
    ) -> tuple[Tensor, Memory]:
        assert mass is not None
        return mass >= self.threshold, memory


@dataclass(frozen=True, kw_only=True)
class KLExit(Rule):
    """Stops when ``KL(p_{t-1} || p_t) < threshold``, in nats; p_0 is uniform.

    Source: Huginn (arXiv 2502.05171), section 6.1; the direction is that of its published code.
    """

    kind: ClassVar[str] = "kl"
    needs_logits: ClassVar[bool] = True
    threshold: float = 5e-4

    def _memory(self, h: Tensor) -> Memory:
        return (_wide(h).new_zeros(h.shape[0], 1),)

    def _decide(
        self, memory: Memory, h: Tensor, logits: Tensor | None, mass: Tensor | None
    ) -> tuple[Tensor, Memory]:
        assert logits is not None
        before, now = _log_probs(memory[0], logits), _log_probs(logits, logits)
        return _kl(before, now) < self.threshold, (now,)


@dataclass(frozen=True, kw_only=True)
class EntropyKLExit(Rule):
    """Stops when ``KL(p_t || p_{t-1}) < kl`` and ``H(p_t) < entropy``, in nats; p_0 is uniform.

    The condition on the entropy H keeps it from stopping while the prediction is still flat, where
    KL alone would stop.

    Source: Loop, Think, & Generalize (arXiv 2604.07822), its adaptive exit.
    """

    kind: ClassVar[str] = "entropy_kl"
    needs_logits: ClassVar[bool] = True
    kl: float = 0.01
    entropy: float = 3.0

    def _memory(self, h: Tensor) -> Memory:
        return (_wide(h).new_zeros(h.shape[0], 1),)

    def _decide(
        self, memory: Memory, h: Tensor, logits: Tensor | None, mass: Tensor | None
    ) -> tuple[Tensor, Memory]:
        assert logits is not None
        before, now = _log_probs(memory[0], logits), _log_probs(logits, logits)
        entropy = torch.special.entr(now.exp()).sum(dim=-1)
        return (_kl(now, before) < self.kl) & (entropy < self.entropy), (now,)


@dataclass(frozen=True, kw_only=True)
class LatentDifferenceExit(Rule):
    """Stops when ``|s_t - s_{t-1}| / |s_t| < threshold``, where s_t is the state after loop t.

    Source: Huginn (arXiv 2502.05171), published code, "latent-diff".
    """

    kind: ClassVar[str] = "latent_difference"
    threshold: float = 0.03

    def _memory(self, h: Tensor) -> Memory:
        return (_wide(h),)

    def _decide(
        self, memory: Memory, h: Tensor, logits: Tensor | None, mass: Tensor | None
    ) -> tuple[Tensor, Memory]:
        return _relative_norm(h - memory[0], h) < self.threshold, (h,)


@dataclass(frozen=True, kw_only=True)
class AccelerationExit(Rule):
    """Stops when ``|D_t - D_{t-1}| / |s_t| < threshold`` ``patience`` times in a row.

    D_t = s_t - s_{t-1}, where s_t is the state after loop t; the first value exists at loop 2. The
    quotient does not depend on the scale of the states.

    Source: Two-Scale Latent Dynamics (arXiv 2509.23314), the second-order exit.
    """

    kind: ClassVar[str] = "acceleration"
    threshold: float
    patience: int = 2

    def _memory(self, h: Tensor) -> Memory:
        # An infinite D_0 makes the acceleration of loop 1 infinite, hence never small.
        return _wide(h), torch.full_like(_wide(h), float("inf")), _zero_streak(h)

    def _decide(
        self, memory: Memory, h: Tensor, logits: Tensor | None, mass: Tensor | None
    ) -> tuple[Tensor, Memory]:
        before, step_before, streak = memory
        step = h - before
        small = _relative_norm(step - step_before, h) < self.threshold
        streak = (streak + 1) * small
        return streak >= self.patience, (h, step, streak)


@dataclass(frozen=True, kw_only=True)
class ArgmaxStableExit(Rule):
    """Stops when the most likely token has not changed for ``patience`` checks.

    Source: Huginn (arXiv 2502.05171), published code, "argmax-stability".
    """

    kind: ClassVar[str] = "argmax_stable"
    needs_logits: ClassVar[bool] = True
    patience: int = 5

    def _memory(self, h: Tensor) -> Memory:
        return _zero_streak(h) - 1, _zero_streak(h)  # -1 differs from every token

    def _decide(
        self, memory: Memory, h: Tensor, logits: Tensor | None, mass: Tensor | None
    ) -> tuple[Tensor, Memory]:
        assert logits is not None
        before, streak = memory
        token = logits.argmax(dim=-1)
        streak = (streak + 1) * (token == before)
        return streak >= self.patience, (token, streak)


ExitRule = (
    Fixed
    | CumulativeThreshold
    | KLExit
    | EntropyKLExit
    | LatentDifferenceExit
    | AccelerationExit
    | ArgmaxStableExit
)
EXIT_RULES: dict[str, type[Rule]] = {rule.kind: rule for rule in get_args(ExitRule)}


def make_exit_rule(kind: str, **fields: Any) -> Rule:
    """The rule named ``kind`` with these fields.

    Raises:
        ValueError: An unknown kind or field, a missing field, or a bad value.
    """
    require(kind in EXIT_RULES, "exit_rule.kind", kind, f"one of {', '.join(EXIT_RULES)}")
    return schema.from_dict(EXIT_RULES[kind], fields, f"exit_rule {kind!r}")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _zero_streak(h: Tensor) -> Tensor:
    return torch.zeros(h.shape[0], dtype=torch.int64, device=h.device)


def _log_probs(logits: Float[Tensor, "B W"], like: Float[Tensor, "B V"]) -> Tensor:
    """Log-probabilities in at least fp32; a single column is expanded to a uniform prediction."""
    return _wide(logits).expand(like.shape).log_softmax(dim=-1)


def _kl(log_p: Float[Tensor, "B V"], log_q: Float[Tensor, "B V"]) -> Float[Tensor, "B"]:
    """KL(p || q) in nats; tokens with p = 0 contribute 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(dim=-1)


def _relative_norm(x: Float[Tensor, "B D"], h: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
    """|x| / |h|, and 0 where both are 0."""
    return torch.linalg.vector_norm(x, dim=-1) / torch.linalg.vector_norm(h, dim=-1).clamp(
        min=torch.finfo(h.dtype).tiny
    )
