"""Claims, the rules that decide them, and what a study concludes about them."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.interval import Gap, Interval
from experiments.run_store import digest

Decision = Literal["holds", "in part", "fails", "not decidable here", "no result"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
NOT_YET = "not run yet"
MIN_SEEDS = 3  # of every arm, for ``by_rule``
Found = tuple[Decision, Interval | None, str]  # the number that decided, and what was found


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim, word by word, and the rule that decides it, written before the run.

    Attributes:
        name: In small letters and hyphens.
        article: The file name of the article that makes it; "this library" for a question of ours.
        quote: Verbatim.
        rule: When it holds, holds in part, fails, and when there is no result.
        thresholds: The numbers in the rule, which ``Study.conclude`` reads.
        would_change: What would change the verdict.
    """

    name: str
    article: str
    quote: str
    rule: str
    thresholds: Mapping[str, float]
    would_change: str

    @property
    def rule_in_numbers(self) -> str:
        """The rule, with the number in place of each threshold's name in backticks."""
        named = re.compile("|".join(f"`{re.escape(name)}`" for name in self.thresholds) or "$^")
        return named.sub(lambda found: f"{self.thresholds[found[0][1:-1]]:g}", self.rule)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the results say about a claim.

    Attributes:
        claim: Its name.
        decision: One of the five.
        sentence: What was found, with its numbers.
        number: The one that decided; None if there is none.
        interval: Over seeds: its lower and upper end; None if there is none.
        figure: The figure that shows it.
    """

    claim: str
    decision: Decision
    sentence: str
    number: float | None = None
    interval: tuple[float, float] | None = None
    figure: str | None = None

    def __post_init__(self) -> None:
        if self.decision not in DECISIONS:
            raise ValueError(f"the decision is {self.decision!r}; give one of {DECISIONS}")
        if self.interval is not None and not all(map(math.isfinite, self.interval)):
            object.__setattr__(self, "interval", None)


@dataclass(frozen=True)
class Table:
    """A table of a study's page; cells are text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """Everything that a study's page shows, from stored results only.

    Attributes:
        verdicts: One per claim, in the order of the claims.
        tables: After the verdicts.
        figures: The data that each figure draws, JSON, by the figure's name. Floats are rounded to
            six digits, so that the digest does not depend on the machine.
    """

    verdicts: Sequence[Verdict]
    tables: Sequence[Table] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "figures", _rounded(dict(self.figures)))

    def digest(self, figure: str) -> str:
        """The digest of a figure's data, which the figure carries."""
        return digest(self.figures[figure])


def verdict(
    claim: str, decision: Decision, sentence: str, number: Interval, figure: str | None = None
) -> Verdict:
    """A verdict whose number has an interval."""
    ends = (number.low, number.high)
    return Verdict(
        claim=claim,
        decision=decision,
        sentence=sentence,
        number=number.mean,
        interval=ends,
        figure=figure,
    )


def no_result(claim: Claim, why: str) -> Verdict:
    """The verdict where runs are missing."""
    return Verdict(claim=claim.name, decision="no result", sentence=why)


def graded(parts: Iterable[bool]) -> Decision:
    """Holds if all parts do, in part if some do."""
    found = list(parts)
    return "holds" if all(found) else "in part" if any(found) else "fails"


def by_gap(found: Gap, least: float, said: str) -> Found:
    """Holds if a gap is a result of at least ``least``, in part if a smaller one, else fails."""
    if not found.is_result:
        return "no result", found.difference, said
    mean = found.difference.mean
    return "holds" if mean >= least else "fails" if mean < 0 else "in part", found.difference, said


def by_rule(
    claim: Claim,
    rule: Callable[[Mapping[str, float]], Found],
    seeds: Mapping[str, int],
    figure: str,
) -> Verdict:
    """What a rule finds with the claim's thresholds; no result if an arm has too few seeds.

    Args:
        claim: The claim.
        rule: Decides.
        seeds: Number of completed seeds by arm.
        figure: The figure that shows the number, if there is one.
    """
    short = [arm for arm, count in seeds.items() if count < MIN_SEEDS]
    if short:
        return no_result(claim, f"Fewer than {MIN_SEEDS} seeds of {', '.join(short)}.")
    decision, number, said = rule(claim.thresholds)
    if number is None:
        return Verdict(claim=claim.name, decision=decision, sentence=said)
    return verdict(claim.name, decision, said, number, figure)


def read_claims(path: Path) -> dict[str, Claim]:
    """The claims of an ``expected.json``, by name.

    Raises:
        ValueError: The file is damaged or a field is missing or unknown.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["claims"]
        claims = [Claim(**one) for one in stored]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not hold claims: {error}") from None
    named = {claim.name: claim for claim in claims}
    if len(named) != len(claims):
        raise ValueError(f"{path} names a claim twice")
    return named


def _rounded(data: Any) -> Any:
    """The same as plain JSON, floats with six significant digits."""
    if isinstance(data, Mapping):
        return {str(key): _rounded(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [_rounded(value) for value in data]
    if isinstance(data, float):
        return float(f"{data:.6g}")
    return data
