"""What exit rules are worth: quality and speed of rules and fixed depths, as texts are generated.

Every token is read alone and leaves the loop by itself, and what later tokens read of it is what it
left in the cache. So an early exit also costs what it spoils further on. Settings take turns on
parts of the texts, and speeds are compared part by part: whatever else the machine does slows all
settings of a part down alike.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.config.schema import require
from openmythos.data.loader import TokenLoader
from openmythos.data.packing import IGNORED_TARGET
from openmythos.data.puzzle import Puzzle
from openmythos.engine.engine import Engine
from openmythos.engine.request import Request
from openmythos.eval.score import Outcomes, Score, differences, summarise
from openmythos.model.exit import (
    AccelerationExit,
    ArgmaxStableExit,
    CumulativeThreshold,
    EntropyKLExit,
    KLExit,
    LatentDifferenceExit,
    Rule,
)
from openmythos.model.inference import inference
from openmythos.model.loop import readout, start_loops, unroll
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer

Metric = Literal["accuracy", "bits_per_byte"]
WORTH = 1.05  # times as fast as the shallowest sufficient depth a rule must be
SHARES = (0.25, 0.5, 0.75)  # of the loops that may be saved: where thresholds are tried
MOST_LOGITS = 2**19  # numbers that thresholds are looked for in, per loop
PARTS = 5  # of the texts, in which settings take turns
LEAST, MOST = -7.0, 2.0  # powers of ten between which thresholds are looked for


@dataclass(frozen=True)
class Text:
    """A text to be read token by token.

    Attributes:
        tokens: At least two, or one and an answer.
        num_bytes: Of all tokens but the first, which are scored; 0 if there is an answer.
        answer: The tokens that should follow, if it is a question.
    """

    tokens: tuple[int, ...]
    num_bytes: int = 0
    answer: tuple[int, ...] = ()

    @property
    def read(self) -> tuple[int, ...]:
        """All tokens that are read if the answer is right."""
        return self.tokens + self.answer[:-1]

    def request(self, setting: "Setting") -> Request:
        """Reads it with this setting."""
        return Request(
            tokens=self.tokens[:1],
            forced_tokens=self.tokens[1:],
            max_new_tokens=len(self.tokens) - 1 + len(self.answer),
            num_loops=setting.num_loops,
            exit_rule=setting.exit_rule,
            logprobs=None if self.answer else 0,
        )


def texts_of(loader: TokenLoader, num_rows: int) -> list[Text]:
    """Documents, or parts of them, from rows that are drawn from a split."""
    found = []
    sizes = loader.tokenizer.token_num_bytes
    batch = loader.batch(0).rows(0, num_rows)
    for tokens, targets, documents in zip(
        batch.tokens.tolist(), batch.targets.tolist(), batch.documents.tolist(), strict=True
    ):
        for number in sorted(set(documents) - {-1}):
            places = [place for place, own in enumerate(documents) if own == number]
            text = [tokens[place] for place in places]
            if targets[places[-1]] != IGNORED_TARGET:
                text.append(targets[places[-1]])
            if (num_bytes := int(sizes[text[1:]].sum())) > 0:
                found.append(Text(tuple(text), num_bytes))
    return found


def windows_of(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> Iterator[Text]:
    """Texts in windows of at most ``length`` tokens; the first of a text has its begin mark."""
    sizes = tokenizer.token_num_bytes
    for text in texts:
        ids = [*tokenizer.begin_ids, *tokenizer.encode(text)]
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length]
            if (num_bytes := int(sizes[window[1:]].sum())) > 0:
                yield Text(tuple(window), num_bytes)


def questions_of(puzzle: Puzzle, sizes: range, num_tokens: int, seed: int = 1) -> list[Text]:
    """Held-out questions of about so many tokens, as many of each size."""
    mean_length = sum(map(puzzle.num_tokens, sizes)) // len(sizes)
    each = -(-max(1, num_tokens // mean_length) // len(sizes))
    found = []
    for size in sizes:
        batch, asked = puzzle.held_out_batch(size, each, seed), puzzle.question_len(size)
        rows = zip(batch.tokens[:, :asked].tolist(), batch.targets.tolist(), strict=True)
        found += [Text(tuple(row), answer=tuple(right[asked - 1 :])) for row, right in rows]
    return found


# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """The most loops of a token, and what stops it earlier."""

    num_loops: int
    exit_rule: Rule | None = None

    def __str__(self) -> str:
        if self.exit_rule is None:
            return f"fixed {self.num_loops}"
        rule, own = self.exit_rule, []
        for name, value in vars(rule).items():
            if value != getattr(type(rule), name, None) or name in ("threshold", "patience"):
                own.append(f"{name} {value:g}")
        return f"{rule.kind.replace('_', ' ')}, {', '.join(own)}"


def depths_up_to(most: int) -> list[int]:
    """Numbers of loops to measure: all up to 8, then four in each doubling, and the most."""
    found, depth = [], 1
    while depth < most:
        found.append(depth)
        depth += max(1, (1 << depth.bit_length() - 1) // 4) if depth >= 8 else 1
    return [*found, most]


class Observed(NamedTuple):
    """What a rule sees of some tokens: before the first loop, and after each."""

    start: Float[Tensor, "N D"]
    h: list[Float[Tensor, "N D"]]
    logits: list[Float[Tensor, "N V"]]
    mass: list[Float[Tensor, "N"]] | None

    def loops(self, rule: Rule) -> Int[Tensor, "N"]:
        """The loops that each token would take if none of them had exited before."""
        most, state = len(self.h), rule.start(self.start)
        loops = torch.full((len(self.start),), most)
        for loop in range(1, most):
            if rule.is_due(loop):
                mass = None if self.mass is None else self.mass[loop - 1]
                stop, state = rule.check(state, self.h[loop - 1], self.logits[loop - 1], mass)
                loops = torch.where(stop.cpu() & (loops == most), loop, loops)
        return loops

    def mean_loops(self, rule: Rule) -> float:
        """The mean of ``loops``."""
        return float(self.loops(rule).double().mean())


def observe(model: RecurrentDepthLM, texts: Sequence[Text], num_loops: int) -> Observed:
    """Run some tokens of the texts through all loops, whole texts at once."""
    room = max(64, MOST_LOGITS // model.config.vocab_size)
    parts: list[Observed] = []
    with inference(model):
        for text in texts:
            tokens = torch.tensor([text.read], device=model.embed.weight.device)
            ctx = model.context(tokens)
            begun = start_loops(model, model.encode(tokens, ctx), ctx, [num_loops])
            h, logits, mass = [], [], []
            for state in unroll(model, begun, ctx):
                h.append(state.h[0])
                logits.append(model.decode(readout(model, state), ctx)[0])
                if state.halted is not None:
                    mass.append(state.halted.tracker.mass[0])
            parts.append(Observed(begun.h[0], h, logits, mass or None))
            room -= len(text.read)
            if room <= 0:
                break
    masses = [part.mass for part in parts if part.mass is not None]
    return Observed(
        torch.cat([part.start for part in parts]),
        _by_loop([part.h for part in parts]),
        _by_loop([part.logits for part in parts]),
        _by_loop(masses) if masses else None,
    )


def _by_loop(parts: Sequence[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def rules_to_try(model: RecurrentDepthLM, texts: Sequence[Text], num_loops: int) -> list[Rule]:
    """Rules of every kind that the model can follow, at thresholds that stop some of the tokens.

    The thresholds are those at which tokens would save a quarter, half and three quarters of the
    loops that can be saved.
    """
    if num_loops == 1:
        return []
    seen = observe(model, texts, num_loops)
    intervals = (1, 2) if num_loops >= 4 else (1,)
    kinds: list[tuple[Callable[[float, int], Rule], tuple[int, ...]]] = [
        (lambda x, k: LatentDifferenceExit(threshold=x, check_every=k), (1,)),
        (lambda x, k: AccelerationExit(threshold=x, patience=1, check_every=k), (1,)),
        (lambda x, k: KLExit(threshold=x, check_every=k), intervals),
        (lambda x, k: EntropyKLExit(kl=_rounded(x / 100), entropy=x, check_every=k), intervals),
    ]
    found: list[Rule] = []
    for make, every in kinds:
        for share in SHARES:
            threshold = _threshold(lambda x, make=make: make(x, 1), seen, share)  # type: ignore[misc]
            found += [make(threshold, k) for k in every]
    found += [
        ArgmaxStableExit(patience=patience, check_every=k)
        for k in intervals
        for patience in (1, 2, 3)
        if (patience + 1) * k < num_loops
    ]
    if model.config.halting is not None:
        found += [CumulativeThreshold(threshold=x) for x in (0.25, 0.5, 0.75, 0.9)]
    return list(dict.fromkeys(found))


def _threshold(make: Callable[[float], Rule], seen: Observed, share: float) -> float:
    """The smallest threshold, to two digits, at which this share of the loops is saved."""
    most = len(seen.h)
    wanted = most - share * (most - 1)
    low, high = LEAST, MOST
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if seen.mean_loops(make(10**middle)) <= wanted else (middle, high)
    return _rounded(10**high)


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What a setting gave.

    Attributes:
        outcomes: Per text: bits and bytes, or whether the answer was right and 1.
        num_tokens: Tokens that were read.
        num_loops: The loops that they took.
        speeds: Tokens per second, of each part of the texts.
    """

    setting: Setting
    outcomes: Outcomes
    num_tokens: int
    num_loops: int
    speeds: tuple[float, ...]

    @property
    def score(self) -> Score:
        """The quality."""
        return summarise(self.outcomes)

    @property
    def mean_loops(self) -> float:
        """Loops per token."""
        return self.num_loops / self.num_tokens

    def __add__(self, other: "Point") -> "Point":
        """Both, as one measurement of the same setting on other texts."""
        return Point(
            self.setting,
            self.outcomes + other.outcomes,
            self.num_tokens + other.num_tokens,
            self.num_loops + other.num_loops,
            self.speeds + other.speeds,
        )


def measure(
    engine: Engine,
    settings: Sequence[Setting],
    texts: Sequence[Text],
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Point]:
    """Read all texts with each setting; the points come in ``PARTS``, to be added up."""
    for part in range(PARTS):
        for setting in settings if len(texts[part::PARTS]) else ():
            yield read(engine, setting, texts[part::PARTS], clock)


def added_up(parts: Iterable[Point]) -> list[Point]:
    """One point for each setting."""
    found: dict[Setting, Point] = {}
    for part in parts:
        known = found.get(part.setting)
        found[part.setting] = part if known is None else known + part
    return list(found.values())


def read(
    engine: Engine,
    setting: Setting,
    texts: Sequence[Text],
    clock: Callable[[], float] = time.perf_counter,
) -> Point:
    """Read texts with a setting, as many at once as the engine has rows.

    Raises:
        ValueError: The model gives no finite numbers.
    """
    numbers = [engine.add(text.request(setting)) for text in texts]
    place = {number: index for index, number in enumerate(numbers)}
    new: list[list[int]] = [[] for _ in texts]
    bits, num_tokens, num_loops, start = [0.0] * len(texts), 0, 0, clock()
    while not engine.is_idle:
        for event in engine.step():
            if event.token is None:
                raise ValueError(f"{setting} cannot be measured: {event.error}")
            num_tokens, num_loops = num_tokens + 1, num_loops + event.num_loops
            new[place[event.id]].append(event.token)
            if event.logprobs is not None:
                bits[place[event.id]] -= event.logprobs.chosen / math.log(2)
    seconds = clock() - start
    outcomes = [
        (float(tuple(own[-len(text.answer) :]) == text.answer), 1.0)
        if text.answer
        else (each, float(text.num_bytes))
        for text, own, each in zip(texts, new, bits, strict=True)
    ]
    return Point(setting, outcomes, num_tokens, num_loops, (num_tokens / seconds,))


# --- choosing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frontier:
    """All points, and which is to be used.

    Attributes:
        metric: What their quality is.
        within: How much of the quality may be lost.
        best: The fixed depth of the best quality.
        fixed: The shallowest fixed depth that loses little enough.
        chosen: The rule that is faster than that one by enough and loses little enough; else that
            one.
    """

    metric: Metric
    within: float
    points: list[Point]
    best: Point
    fixed: Point
    chosen: Point

    def tokens_per_s(self, point: Point) -> float:
        """Tokens per second, as its gain says."""
        return self.gain(point) * median(self.fixed.speeds)

    def gain(self, point: Point) -> float:
        """How many times as fast as ``fixed`` a point is."""
        return faster(point, self.fixed)

    def loss(self, point: Point) -> Score:
        """How much quality a point loses against the best, text by text."""
        return lost(point, self.best, self.metric)

    @property
    def undominated(self) -> list[Point]:
        """The points than which none is faster and better, the fastest first."""
        found: list[Point] = []
        for point in sorted(self.points, key=self.gain, reverse=True):
            if all(self.loss(point).value < self.loss(other).value for other in found):
                found.append(point)
        return found


def faster(point: Point, other: Point) -> float:
    """How many times as fast a point is: the median over the parts of the texts.

    If a machine gets slower or faster while it measures, that changes the ratio of one part only.
    """
    return median(mine / its for mine, its in zip(point.speeds, other.speeds, strict=True))


def lost(point: Point, best: Point, metric: Metric) -> Score:
    """How much quality a point loses against another; negative: it gains."""
    better, worse = best.outcomes, point.outcomes
    pair = (worse, better) if metric == "bits_per_byte" else (better, worse)
    return summarise(differences(*pair))


def choose(points: Sequence[Point], metric: Metric, within: float) -> Frontier:
    """Choose the fastest point that loses at most ``within``; a rule only if it pays.

    What a point loses counts with one standard error of the paired difference, so that a lucky
    sample does not decide. A rule is believed to gain no more than by the loops that it saves.
    """
    require(within >= 0, "--within", within, "a number of at least 0")
    sign = 1 if metric == "bits_per_byte" else -1
    depths = [point for point in points if point.setting.exit_rule is None]
    best = min(depths, key=lambda point: (sign * point.score.value, point.setting.num_loops))

    def suffices(point: Point) -> bool:
        found = lost(point, best, metric)
        return found.value + (found.stderr or 0.0) <= within

    fixed = min(filter(suffices, depths), key=lambda point: point.setting.num_loops)
    rules = [point for point in points if point.setting.exit_rule is not None and suffices(point)]

    def gain(point: Point) -> float:
        return min(faster(point, fixed), fixed.mean_loops / point.mean_loops)

    fast = [point for point in rules if gain(point) >= WORTH]
    chosen = max(fast, key=gain, default=fixed)
    return Frontier(metric, within, list(points), best, fixed, chosen)


def shallowest(
    model: RecurrentDepthLM, texts: Sequence[Text], depths: Sequence[int], metric: Metric,
    within: float,
) -> int:  # fmt: skip
    """The shallowest depth that loses at most ``within``, measured on whole texts at once.

    At a fixed depth that is the quality through the cache.
    """
    found: dict[int, Outcomes] = {depth: [] for depth in depths}
    with inference(model):
        for text in texts:
            tokens = torch.tensor([text.read], device=model.embed.weight.device)
            ctx = model.context(tokens)
            begun = start_loops(model, model.encode(tokens, ctx), ctx, [max(depths)])
            for loop, state in enumerate(unroll(model, begun, ctx), start=1):
                if loop in found:
                    found[loop].append(_outcome(text, model.decode(readout(model, state), ctx)[0]))
    points = [Point(Setting(depth), found[depth], 1, depth, (1.0,)) for depth in depths]
    return choose(points, metric, within).fixed.setting.num_loops


def _outcome(text: Text, logits: Float[Tensor, "T V"]) -> tuple[float, float]:
    if text.answer:
        return float(tuple(logits[-len(text.answer) :].argmax(-1).tolist()) == text.answer), 1.0
    targets = torch.tensor(text.tokens[1:])
    logprobs = logits[:-1].cpu().double().log_softmax(dim=-1).gather(1, targets[:, None])
    return -float(logprobs.sum()) / math.log(2), float(text.num_bytes)
