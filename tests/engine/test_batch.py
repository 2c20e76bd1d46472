"""The batch against a slow oracle: one token at a time, keys and values in dictionaries."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from openmythos.config import (
    ACTConfig,
    CopyInitConfig,
    DepthAttentionConfig,
    GQAConfig,
    ModelConfig,
    MoEConfig,
    NormalInitConfig,
    PonderNetConfig,
    SinusoidalLoopConfig,
    SwiGLUConfig,
    UniversalACTConfig,
    ValueEmbeddingConfig,
    WeightLoRAConfig,
)
from openmythos.engine.batch import CachedBatch, UncachedBatch
from openmythos.model.cache import CacheView, EveryK, FirstLoop, KVCache, LastLoop, PerLoop, Place
from openmythos.model.exit import (
    AccelerationExit,
    ArgmaxStableExit,
    CumulativeThreshold,
    EntropyKLExit,
    Fixed,
    KLExit,
    LatentDifferenceExit,
    Rule,
)
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import MLA

GQA = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm="weightless")
MOE = MoEConfig(num_experts=4, num_experts_per_token=2, d_expert=6, bias_loops=2)


def make_model(seed: int = 2, **changes: Any) -> RecurrentDepthLM:
    """A small fp64 model whose weights are all random, so that every part matters."""
    settings: dict[str, Any] = {
        "vocab_size": 19,
        "d_model": 12,
        "num_prelude_layers": 1,
        "num_core_layers": 2,
        "num_coda_layers": 1,
        "num_loops": 4,
        "attention": GQA,
        "feed_forward": SwiGLUConfig(d_ff=16),
        "max_seq_len": 64,
        "state_init": NormalInitConfig(),
    }
    model = RecurrentDepthLM(ModelConfig(**(settings | changes))).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "injection" not in name:
                parameter.normal_(0, 0.45, generator=generator)
            if name == "halting.proj.bias":
                parameter.fill_(-1.0)
    return model


# --- the oracle ----------------------------------------------------------------------------------


class Dictionaries:
    """One row; ``kept[stage, layer, loop, column]``. A token shows loop ``shown(loop, taken)``."""

    def __init__(self, shown: Callable[[int, int | None], int]) -> None:
        self.shown = shown
        self.kept: dict[tuple[str, int, int | None, int], tuple[Tensor, ...]] = {}
        self.taken: dict[int, int] = {}

    def view(self, model: RecurrentDepthLM, column: int) -> "DictionaryView":
        """Of one token."""
        cache = KVCache(model.config, batch_size=1, max_len=64, max_loops=1)
        cache.lengths = [column]
        view = DictionaryView(**vars(cache.view(1)))
        object.__setattr__(view, "dictionaries", self)
        return view


class DictionaryView(CacheView):
    """Keeps a token's keys and values in dictionaries instead."""

    def store(self, new: tuple[Tensor, ...], place: Place) -> tuple[Tensor, ...]:
        assert new[0].shape[2] == 1 and self.start is not None
        loop = None if place.loop_idx is None else int(place.loop_idx[0])
        where = self.dictionaries
        where.kept[place.stage, place.layer, loop, self.start] = new
        read = []
        for past in range(self.start + 1):
            shown = None if loop is None else where.shown(loop, where.taken.get(past))
            read.append(where.kept[place.stage, place.layer, shown, past])
        return tuple(torch.cat(parts, dim=2) for parts in zip(*read, strict=True))

    def earlier(self, place: Place, num_recent: int) -> tuple[Tensor, ...]:
        """The token's own loops before this one; loop 0 again where there are none."""
        loop = int(place.loop_idx[0])
        loops = [max(0, loop - back) for back in range(1, num_recent + 1)]
        kept = self.dictionaries.kept
        read = [kept["core", place.layer, past, self.start] for past in loops]
        return tuple(torch.stack(parts) for parts in zip(*read, strict=True))


def forward_fill(loop: int, taken: int | None) -> int:
    return loop if taken is None else min(loop, taken - 1)


SHOWN = {
    PerLoop(): forward_fill,
    EveryK(2): lambda loop, taken: 2 * (forward_fill(loop, taken) // 2),
    EveryK(3): lambda loop, taken: 3 * (forward_fill(loop, taken) // 3),
    FirstLoop(): lambda loop, taken: 0,
    LastLoop(): lambda loop, taken: loop if taken is None else taken - 1,
}


@dataclass
class Seen:
    """Everything that one token has shown, loop by loop, as plain numbers and vectors."""

    states: list[Tensor]
    probs: list[list[float]]
    lambdas: list[float]


def oracle(
    model: RecurrentDepthLM,
    tokens: list[int],
    depths: list[int],
    decide: Callable[[Seen], bool] | None = None,
    exit_from: int = 0,
    layout: PerLoop = PerLoop(),  # noqa: B008
    seed: int = 0,
) -> tuple[list[Tensor], list[int]]:
    """Logits and loops at every position; exits are allowed from position ``exit_from``."""
    cache, logits, taken = Dictionaries(SHOWN[layout]), [], []
    for position, token in enumerate(tokens):
        ids = torch.tensor([[token]])
        view = cache.view(model, position)
        ctx = replace(model.context(ids, positions=view.columns, seeds=seed), cache=view, masks={})
        e = model.encode(ids, ctx)
        h = model.init_state(e, ctx)
        seen, asked = Seen([h[0, 0]], [], []), decide is not None and position >= exit_from
        for loop in range(depths[position]):
            before, h = h, model.step(h, e, torch.tensor([loop]), ctx)
            seen.states.append(h[0, 0])
            if isinstance(model.config.halting, UniversalACTConfig):
                started = model.loop_embedding(before, torch.tensor([loop]), ctx.positions)
                seen.lambdas.append(float(model.halting(started)))
            elif model.halting is not None:
                seen.lambdas.append(float(model.halting(h)))
            if not asked and loop < depths[position] - 1:
                continue
            shown = model.decode(mixture(model, seen) if mixes(model) else h, ctx)[0, 0]
            seen.probs.append(shown.softmax(-1).tolist())
            if asked and decide(seen):
                break
        taken.append(loop + 1)
        cache.taken[position] = loop + 1
        logits.append(shown)
    return logits, taken


def mixes(model: RecurrentDepthLM) -> bool:
    return model.halting is not None and model.halting.mixes_states


def act_weights(lambdas: list[float], threshold: float = 0.99) -> list[float]:
    """Graves' weights by his definition, when the loops end with the last lambda."""
    weights: list[float] = []
    for value in lambdas[:-1]:
        if sum(weights) + value >= threshold:
            break
        weights.append(value)
    weights.append(1 - sum(weights))
    return weights + [0.0] * (len(lambdas) - len(weights))


def mixture(model: RecurrentDepthLM, seen: Seen) -> Tensor:
    weights = act_weights(seen.lambdas)
    if isinstance(model.config.halting, UniversalACTConfig):
        kept = [1 - w for w in weights]
        weights = [w * math.prod(kept[i + 1 :]) for i, w in enumerate(weights)]
    terms = [w * state for w, state in zip(weights, seen.states[1:], strict=True)]
    return torch.stack(terms).sum(dim=0)[None, None]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def last_two(seen: Seen, apart: int = 1) -> tuple[list[float], list[float]]:
    uniform = [1 / len(seen.probs[0])] * len(seen.probs[0])
    return ([uniform, *seen.probs])[-1 - apart], seen.probs[-1]


def accelerates(seen: Seen, threshold: float) -> bool:
    s = seen.states
    values = [
        float((s[t] - 2 * s[t - 1] + s[t - 2]).norm() / s[t].norm()) for t in range(2, len(s))
    ]
    return len(values) >= 2 and max(values[-2:]) < threshold


def act_mass(lambdas: list[float]) -> float:
    total = 0.0
    for value in lambdas:
        total = 1.0 if total + value >= 0.99 else total + value
    return total


ARGMAX = lambda seen: [max(range(len(p)), key=p.__getitem__) for p in seen.probs]  # noqa: E731

UNIVERSAL: dict[str, Any] = {
    "seed": 4,
    "halting": UniversalACTConfig(),
    "loop_embedding": SinusoidalLoopConfig(num_channels=12, positions=True),
    "state_init": CopyInitConfig(),
}
LOOKS_BACK: dict[str, Any] = {"depth_attention": DepthAttentionConfig(num_recent_loops=2)}
RULES: list[tuple[Rule, dict[str, Any], Callable[[Seen], bool]]] = [
    (KLExit(threshold=0.2), {}, lambda seen: kl(*last_two(seen)) < 0.2),
    (
        EntropyKLExit(kl=0.2, entropy=2.0),
        {"attention": MLA},
        lambda seen: (
            kl(*last_two(seen)[::-1]) < 0.2 and -sum(p * math.log(p) for p in seen.probs[-1]) < 2
        ),
    ),
    (
        LatentDifferenceExit(threshold=0.6, min_loops=4),
        {},
        lambda seen: (
            len(seen.probs) >= 4
            and float((seen.states[-1] - seen.states[-2]).norm() / seen.states[-1].norm()) < 0.6
        ),
    ),
    (AccelerationExit(threshold=0.9), {}, lambda seen: accelerates(seen, 0.9)),
    (
        ArgmaxStableExit(patience=2),
        {},
        lambda seen: len(seen.probs) >= 3 and len(set(ARGMAX(seen)[-3:])) == 1,
    ),
    (
        CumulativeThreshold(threshold=0.7),
        {"halting": PonderNetConfig()},
        lambda seen: 1 - math.prod(1 - x for x in seen.lambdas) >= 0.7,
    ),
    (
        CumulativeThreshold(threshold=0.8),
        {"halting": ACTConfig()},
        lambda seen: act_mass(seen.lambdas) >= 0.8,
    ),
    (KLExit(threshold=0.05), {"attention": MLA}, lambda seen: kl(*last_two(seen)) < 0.05),
    (KLExit(threshold=0.02), {"halting": ACTConfig()}, lambda seen: kl(*last_two(seen)) < 0.02),
    (KLExit(threshold=0.02), UNIVERSAL, lambda seen: kl(*last_two(seen)) < 0.02),
    (CumulativeThreshold(threshold=0.8), UNIVERSAL, lambda seen: act_mass(seen.lambdas) >= 0.8),
    (KLExit(threshold=0.2), LOOKS_BACK, lambda seen: kl(*last_two(seen)) < 0.2),
    (
        KLExit(threshold=0.4, check_every=2),
        {},
        lambda seen: len(seen.probs) % 2 == 0 and kl(*last_two(seen, apart=2)) < 0.4,
    ),
    (
        CumulativeThreshold(threshold=0.8, check_every=3),
        {"halting": ACTConfig()},
        lambda seen: len(seen.probs) % 3 == 0 and act_mass(seen.lambdas) >= 0.8,
    ),
]


# --- the batch through the same tokens -----------------------------------------------------------


def new_batch(
    model: RecurrentDepthLM, rows: int = 1, max_loops: int = 8, layout: PerLoop | None = None
) -> CachedBatch:
    cache = KVCache(
        model.config,
        batch_size=rows,
        max_len=32,
        max_loops=max_loops,
        layout=layout,
        dtype=torch.float64,
    )
    return CachedBatch(model, cache)


def counted(model: RecurrentDepthLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows times tokens of every later call of ``step``, counted from outside."""
    calls, step = [], model.step

    def counting(h: Tensor, *rest: Any) -> Tensor:
        calls.append(h.shape[0] * h.shape[1])
        return step(h, *rest)

    monkeypatch.setattr(model, "step", counting)
    return calls


PROMPTS = [[3, 14, 15, 9, 2, 6], [5], [3, 5, 8, 9]]
FORCED = [[7, 9, 3, 2, 4], [6, 2, 6, 3, 8], [3, 2, 7, 9, 5]]
DEPTHS = [8, 5, 7]


def forced_decode(
    model: RecurrentDepthLM, rule: Rule, depths: list[int], layout: PerLoop, chunk: int | None
) -> tuple[list[list[Tensor]], list[list[int]]]:
    """Three unequal prompts, then forced tokens: logits and loops of each row's decode steps."""
    batch = new_batch(model, 3, layout=layout)
    batch.prefill([prompt[:-1] for prompt in PROMPTS], depths, chunk)
    logits: list[list[Tensor]] = [[], [], []]
    loops: list[list[int]] = [[], [], []]
    for step in range(len(FORCED[0])):
        fed = [[p[-1], *f][step] for p, f in zip(PROMPTS, FORCED, strict=True)]
        shown, taken = batch.decode(dict(enumerate(fed)), depths, rule)
        for row in range(3):
            logits[row].append(shown[row])
            loops[row].append(taken[row])
    return logits, loops


@torch.no_grad()
@pytest.mark.parametrize(
    ("rule", "changes", "decide"), RULES, ids=lambda v: v.kind if isinstance(v, Rule) else ""
)
def test_early_exit_equals_the_oracle(
    rule: Rule, changes: dict[str, Any], decide: Callable[[Seen], bool]
) -> None:
    model, depths = make_model(**changes), DEPTHS
    logits, loops = forced_decode(model, rule, depths, PerLoop(), None)
    for row, (prompt, forced) in enumerate(zip(PROMPTS, FORCED, strict=True)):
        tokens = (prompt + forced)[: len(prompt) - 1 + len(forced)]
        first = len(prompt) - 1
        expected, taken = oracle(model, tokens, [depths[row]] * len(tokens), decide, first)
        assert loops[row] == taken[first:]
        torch.testing.assert_close(logits[row], expected[first:], rtol=0, atol=1e-9)
    early = {t for row, depth in zip(loops, depths, strict=True) for t in row if t < depth}
    assert len(early) > 1, f"the rule stops tokens early only after {early} loops"


@torch.no_grad()
@pytest.mark.parametrize("layout", SHOWN, ids=str)
@pytest.mark.parametrize("exits", [False, True], ids=["full", "exits"])
def test_layouts_equal_the_oracle(layout: PerLoop, exits: bool) -> None:
    model = make_model(num_core_layers=1)
    rule, _, decide = RULES[0]
    chunk = 1 if isinstance(layout, LastLoop) and type(layout) is LastLoop else None
    depths = [8, 3, 6]
    logits, loops = forced_decode(model, rule if exits else Fixed(), depths, layout, chunk)
    for row, (prompt, forced) in enumerate(zip(PROMPTS, FORCED, strict=True)):
        tokens = (prompt + forced)[: len(prompt) - 1 + len(forced)]
        first = len(prompt) - 1
        chosen = decide if exits else None
        expected, taken = oracle(
            model, tokens, [depths[row]] * len(tokens), chosen, first, layout=layout
        )
        assert loops[row] == taken[first:]
        torch.testing.assert_close(logits[row], expected[first:], rtol=0, atol=1e-9)


@torch.no_grad()
def test_depth_may_change_from_call_to_call() -> None:
    """The original's defect: prefill at 4 loops, then decode at 8, met a cache with holes."""
    model = make_model()
    prompt, forced, steps = PROMPTS[0], FORCED[0], [8, 2, 8, 4, 1, 8]
    batch = new_batch(model)
    batch.prefill([prompt[:-1]], [4], None)
    fed = [prompt[-1], *forced][: len(steps)]
    shown = [batch.decode({0: t}, [d], Fixed())[0][0] for t, d in zip(fed, steps, strict=True)]
    depths = [4] * (len(prompt) - 1) + steps
    expected, _ = oracle(model, prompt[:-1] + fed, depths)
    torch.testing.assert_close(shown, expected[len(prompt) - 1 :], rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": MLA},
        {"core_feed_forward": MOE},
        {"halting": ACTConfig()},
        {"halting": PonderNetConfig()},
        UNIVERSAL,
        LOOKS_BACK,
        {"num_coda_layers": 0, "num_prelude_layers": 0, "readout": "linear"},
        {"loop_adapter": WeightLoRAConfig(rank=2, num_loops=3)},
        {"loop_embedding": SinusoidalLoopConfig(num_channels=4)},
        {"value_embedding": ValueEmbeddingConfig(layers=(0, 1, 3), gate_channels=4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [None, 2])
def test_cached_equals_uncached(changes: dict[str, Any], chunk: int | None) -> None:
    """Unequal rows, unequal depths, rows that leave early, prompts whole and in chunks."""
    model, depths = make_model(**changes), [5, 2, 3]
    cached, uncached = new_batch(model, 3), UncachedBatch(model, 3)
    for batch in (cached, uncached):
        batch.prefill([prompt[:-1] for prompt in PROMPTS], depths, chunk)
    for step, rows in enumerate([[0, 1, 2], [0, 2], [0, 1, 2], [1], [0, 2]]):
        fed = {row: FORCED[row][step] for row in rows}
        expected, taken = uncached.decode(fed, depths, Fixed())
        shown, loops = cached.decode(fed, depths, Fixed())
        assert loops == taken == [depths[row] for row in rows]
        torch.testing.assert_close(shown, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_only_running_rows_are_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, depths = make_model(), [8, 3, 5]
    calls = counted(model, monkeypatch)
    batch = new_batch(model, 3)
    batch.prefill([[1, 2, 3], [4, 5, 6], [7, 8, 9]], depths, None)
    assert calls == [9, 9, 9, 6, 6, 3, 3, 3]
    assert batch.core_applications == sum(calls) == 3 * sum(depths)
    calls.clear()
    _, loops = batch.decode({0: 1, 1: 2, 2: 3}, depths, KLExit(threshold=0.2))
    assert sum(calls) == sum(loops) < sum(depths)
    calls.clear()
    batch.decode({1: 5}, depths, Fixed())
    assert calls == [1, 1, 1]


@torch.no_grad()
def test_padding_is_neither_counted_nor_looped_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    calls = counted(model, monkeypatch)
    batch = new_batch(model, 2)
    batch.prefill([[1, 2, 3, 4, 5, 6], [7]], [2, 2], 3)
    assert calls == [6, 6, 3, 3]  # the second chunk holds no token of row 1
    assert batch.core_applications == 7 * 2
    calls.clear()
    batch.prefill([[], []], [2, 2], None)
    assert calls == []


@torch.no_grad()
def test_uncached_counts_all_it_repeats() -> None:
    batch = UncachedBatch(make_model(), 2)
    batch.prefill([[1, 2], []], [3, 2], None)
    assert batch.core_applications == 0
    assert batch.length == 2
    batch.decode({0: 4, 1: 5}, [3, 2], Fixed())
    assert batch.core_applications == 3 * 3 + 1 * 2
    batch.decode({1: 5}, [3, 2], Fixed())
    assert batch.core_applications == 11 + 2 * 2
