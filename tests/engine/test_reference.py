"""Generation as a user calls it: equal to the plain forward, whatever the batch; its refusals."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import openmythos as om
from openmythos.config import (
    ACTConfig,
    GQAConfig,
    ModelConfig,
    MoEConfig,
    NormalInitConfig,
    PonderNetConfig,
    SwiGLUConfig,
)
from openmythos.engine import compile as compiling
from openmythos.engine import reference
from openmythos.engine.batch import CachedBatch
from openmythos.engine.reference import GenerationResult, NewToken, Session, generate
from openmythos.engine.request import Request
from openmythos.engine.sampling import SamplingConfig
from openmythos.model.cache import EveryK, FirstLoop, KVCache, LastLoop
from openmythos.model.exit import (
    AccelerationExit,
    ArgmaxStableExit,
    CumulativeThreshold,
    EntropyKLExit,
    Fixed,
    KLExit,
    LatentDifferenceExit,
)
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import MLA, unchecked

MOE = MoEConfig(num_experts=4, num_experts_per_token=2, d_expert=6)
KINDS = {
    "gqa": {},
    "mla": {"attention": MLA},
    "moe": {"core_feed_forward": MOE},
    "act": {"halting": ACTConfig()},
    "pondernet": {"halting": PonderNetConfig()},
}
PROMPTS = [[3, 14, 15, 9, 2, 6], [5], [3, 5, 8, 9]]
LOOPS = [4, 2, 6]


def make_model(dtype: torch.dtype = torch.float64, **changes: Any) -> RecurrentDepthLM:
    """A small model whose weights are all random, so that every part matters."""
    settings: dict[str, Any] = {
        "vocab_size": 19,
        "d_model": 12,
        "num_prelude_layers": 1,
        "num_core_layers": 2,
        "num_coda_layers": 1,
        "num_loops": 3,
        "attention": GQAConfig(num_heads=4, num_kv_heads=2, head_dim=4),
        "feed_forward": SwiGLUConfig(d_ff=16),
        "max_seq_len": 40,
        "state_init": NormalInitConfig(),
    }
    model = RecurrentDepthLM(ModelConfig(**(settings | changes))).to(torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "injection" not in name:
                parameter.normal_(0, 0.45, generator=generator)
            if name == "halting.proj.bias":
                parameter.fill_(-1.0)
    return model.to(dtype)


def rows_of(result: GenerationResult, row: int) -> tuple[list[int], list[int], str | None]:
    return result.tokens[row], result.loops[row], result.finish_reasons[row]


def assert_same_logits(result: GenerationResult, expected: GenerationResult) -> None:
    assert result.tokens == expected.tokens
    assert result.loops == expected.loops
    assert result.logits is not None
    assert expected.logits is not None
    for mine, theirs in zip(result.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


# --- equal to the plain forward ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_the_plain_forward(kind: str) -> None:
    """Unequal prompts and depths in one batch, against one full forward a token and prompt."""
    model = make_model(**KINDS[kind])
    result = generate(model, PROMPTS, max_new_tokens=6, num_loops=LOOPS, seed=7, return_logits=True)
    assert result.logits is not None
    model.eval()
    for row, (prompt, loops) in enumerate(zip(PROMPTS, LOOPS, strict=True)):
        assert result.loops[row] == [loops] * 6
        assert result.finish_reasons[row] == "length"
        text = list(prompt)
        for token, logits in zip(result.tokens[row], result.logits[row], strict=True):
            with torch.no_grad():
                ids = torch.tensor([text])
                out = model(ids, num_loops=loops, ctx=model.context(ids, seeds=7))
            torch.testing.assert_close(logits, out.logits[0, -1], rtol=0, atol=1e-9)
            assert token == int(out.logits[0, -1].argmax())
            text.append(token)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cache_the_same(kind: str) -> None:
    model = make_model(**KINDS[kind])
    settings: dict[str, Any] = {"max_new_tokens": [5, 3, 4], "num_loops": LOOPS}
    cached = generate(model, PROMPTS, **settings, return_logits=True)
    uncached = generate(model, PROMPTS, **settings, use_cache=False, return_logits=True)
    assert_same_logits(cached, uncached)
    assert uncached.core_applications > cached.core_applications


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_each_prompt_alone(kind: str) -> None:
    """The original's defect: left padding changed the logits by 3.4."""
    model = make_model(**KINDS[kind])
    rule = KLExit(threshold=0.2)
    settings: dict[str, Any] = {"exit_rule": rule, "return_logits": True, "max_new_tokens": 5}
    together = generate(model, PROMPTS, num_loops=LOOPS, **settings)
    for row, (prompt, loops) in enumerate(zip(PROMPTS, LOOPS, strict=True)):
        alone = generate(model, [prompt], num_loops=loops, **settings)
        assert rows_of(together, row) == rows_of(alone, 0)
        assert together.logits is not None
        assert alone.logits is not None
        torch.testing.assert_close(together.logits[row], alone.logits[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_chunked_prefill_equals_whole(kind: str, chunk: int) -> None:
    """The original's defect: a chunk after the first failed."""
    model = make_model(**KINDS[kind])
    settings: dict[str, Any] = {"max_new_tokens": 4, "num_loops": LOOPS, "return_logits": True}
    whole = generate(model, PROMPTS, **settings)
    pieces = generate(model, PROMPTS, **settings, prefill_chunk=chunk)
    assert_same_logits(pieces, whole)
    assert pieces.core_applications == whole.core_applications


def test_layouts_save_memory_and_differ() -> None:
    model = make_model()
    settings: dict[str, Any] = {"max_new_tokens": 6, "num_loops": 6, "return_logits": True}
    exact = generate(model, PROMPTS, **settings)
    one = generate(model, PROMPTS, **settings, cache_layout=EveryK(1))
    assert_same_logits(one, exact)
    for layout in (EveryK(2), LastLoop()):
        other = generate(model, PROMPTS, **settings, cache_layout=layout)
        assert other.logits is not None
        assert exact.logits is not None
        assert not torch.allclose(other.logits[0][0], exact.logits[0][0])


# --- compute -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("gqa", None),
        ("gqa", KLExit(threshold=0.2)),
        ("mla", LatentDifferenceExit(threshold=0.6)),
        ("act", CumulativeThreshold(threshold=0.8)),
        ("pondernet", CumulativeThreshold(threshold=0.6)),
    ],
)
@pytest.mark.parametrize("chunk", [None, 2])
def test_core_applications_are_what_was_stepped(
    kind: str, rule: Any, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from outside: rows per call of ``step``, and never a padded token more."""
    model, stepped = make_model(**KINDS[kind]), []
    step = model.step

    def counting(h: Tensor, *rest: Any) -> Tensor:
        stepped.append(h.shape[:2])
        return step(h, *rest)

    monkeypatch.setattr(model, "step", counting)
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]  # equal, so that step sees no padding
    budget = [5, 3]
    result = generate(
        model,
        prompts,
        max_new_tokens=budget,
        num_loops=[6, 4],
        exit_rule=rule,
        prefill_chunk=chunk,
    )
    assert [len(row) for row in result.loops] == budget
    taken = sum(map(sum, result.loops))
    assert result.prefill_core_applications == 4 * 6 + 4 * 4
    assert result.core_applications == result.prefill_core_applications + taken
    decoded = stepped[6 * (1 if chunk is None else 2) :]
    assert all(tokens == 1 for _, tokens in decoded)
    assert sum(rows for rows, _ in decoded) == taken
    assert sum(rows * tokens for rows, tokens in stepped) == result.core_applications
    full = 5 * 6 + 3 * 4
    assert taken == full if rule is None else taken < full


def test_unequal_prompts_count_no_padding() -> None:
    result = generate(make_model(), PROMPTS, max_new_tokens=2, num_loops=LOOPS)
    lengths = [len(prompt) - 1 for prompt in PROMPTS]
    prefill = sum(n * loops for n, loops in zip(lengths, LOOPS, strict=True))
    assert result.prefill_core_applications == prefill
    assert result.core_applications == prefill + 2 * sum(LOOPS)


def test_uncached_counts_every_repetition() -> None:
    model = make_model()
    result = generate(model, [[1, 2, 3]], max_new_tokens=3, num_loops=2, use_cache=False)
    assert result.core_applications == 2 * (3 + 4 + 5)
    assert result.prefill_core_applications == result.core_applications - 3 * 2


# --- ends, samples, seeds ------------------------------------------------------------------------


def test_stop_tokens_end_a_row_and_spare_it() -> None:
    model = make_model()
    free = generate(model, PROMPTS, max_new_tokens=8)
    stop = free.tokens[0][2]
    cut = generate(model, PROMPTS, max_new_tokens=8, stop_tokens=[stop])
    for row, tokens in enumerate(free.tokens):
        count = tokens.index(stop) + 1 if stop in tokens else 8
        assert cut.tokens[row] == tokens[:count]
        assert cut.finish_reasons[row] == ("stop" if stop in tokens else "length")
    assert cut.finish_reasons[0] == "stop"
    spared = sum(map(len, free.tokens)) - sum(map(len, cut.tokens))
    assert free.core_applications - cut.core_applications == 3 * spared > 0


def test_stop_token_as_the_last_one_is_a_stop() -> None:
    model = make_model()
    (token,) = generate(model, [[1, 2]], max_new_tokens=1).tokens[0]
    result = generate(model, [[1, 2]], max_new_tokens=1, stop_tokens=(token,))
    assert result.finish_reasons == ["stop"]


def test_temperature_zero_is_the_argmax() -> None:
    model = make_model()
    result = generate(model, PROMPTS, max_new_tokens=5, temperature=0.0, return_logits=True)
    assert result.logits is not None
    for tokens, logits in zip(result.tokens, result.logits, strict=True):
        assert tokens == logits.argmax(dim=-1).tolist()
    assert (
        result.tokens == generate(model, PROMPTS, max_new_tokens=5, temperature=1.0, top_k=1).tokens
    )


def test_top_k_may_exceed_the_vocabulary() -> None:
    model = make_model()
    wide = generate(model, PROMPTS, max_new_tokens=5, temperature=1.0, top_k=50)
    assert wide.tokens == generate(model, PROMPTS, max_new_tokens=5, temperature=1.0).tokens


def test_ids_past_the_tokenizers_can_be_left_out() -> None:
    """A model knows no tokenizer, and its vocabulary is often padded: the caller says the size."""
    model = make_model()
    with torch.no_grad():
        model.embed.weight[-4:] = 3 * model.embed.weight[:4]
    size = model.config.vocab_size
    words: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5}
    every = generate(model, PROMPTS, **words)
    assert any(token >= size - 4 for row in every.tokens for token in row)
    fewer = generate(model, PROMPTS, num_ids=size - 4, **words)
    assert all(token < size - 4 for row in fewer.tokens for token in row)


def test_samples_depend_on_the_seed_not_on_the_batch() -> None:
    model = make_model()
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.5}
    all_rows = generate(model, PROMPTS, seed=3, **settings)
    assert generate(model, PROMPTS, seed=3, **settings).tokens == all_rows.tokens
    assert generate(model, PROMPTS[:1], seed=3, **settings).tokens == all_rows.tokens[:1]
    assert generate(model, PROMPTS[:2], seed=3, **settings).tokens == all_rows.tokens[:2]
    assert generate(model, PROMPTS, seed=4, **settings).tokens != all_rows.tokens
    twins = generate(model, [PROMPTS[0]] * 2, seed=3, **settings)
    assert twins.tokens[0] != twins.tokens[1]
    torch.manual_seed(99)
    torch.rand(5)
    assert generate(model, PROMPTS, seed=3, **settings).tokens == all_rows.tokens


def test_settings_may_differ_by_row() -> None:
    model = make_model()
    mixed = generate(
        model,
        PROMPTS,
        max_new_tokens=[3, 5, 4],
        temperature=[0.0, 1.2, 0.8],
        top_k=[None, 4, None],
        top_p=[None, None, 0.7],
        num_loops=torch.tensor(LOOPS),
    )
    assert [len(row) for row in mixed.tokens] == [3, 5, 4]
    greedy = generate(model, PROMPTS, max_new_tokens=5, num_loops=LOOPS)
    assert mixed.tokens[0] == greedy.tokens[0][:3]


# --- the model is left as it was -----------------------------------------------------------------


def test_mode_and_gradients_come_back() -> None:
    model = make_model()
    model.train()
    model.coda.eval()  # frozen by its owner
    before = {name: module.training for name, module in model.named_modules()}
    with torch.enable_grad():
        generate(model, PROMPTS, max_new_tokens=2)
        assert torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mode_comes_back_after_an_error_and_between_tokens() -> None:
    model = make_model().train()
    stream = Session(model).stream([Request(tokens=[1, 2], max_new_tokens=3)])
    next(stream)
    assert model.training
    assert torch.is_grad_enabled()
    with torch.no_grad():
        model.embed.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        next(stream)
    assert model.training
    assert torch.is_grad_enabled()


def test_training_statistics_of_experts_stay_untouched() -> None:
    model = make_model(core_feed_forward=MOE).train()
    generate(model, PROMPTS, max_new_tokens=2)
    assert all(int(value.sum()) == 0 for name, value in model.named_buffers() if "load" in name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    """The original failed in every dtype but fp32."""
    model = make_model(dtype, **KINDS[kind])
    result = generate(model, PROMPTS, max_new_tokens=3, num_loops=LOOPS, return_logits=True)
    assert result.logits is not None
    assert all(logits.dtype == dtype for logits in result.logits)
    assert all(bool(logits.isfinite().all()) for logits in result.logits)
    if dtype == torch.float32:
        uncached = generate(model, PROMPTS, max_new_tokens=3, num_loops=LOOPS, use_cache=False)
        assert uncached.tokens == result.tokens


# --- sessions ------------------------------------------------------------------------------------


def asked(
    prompts: list[list[int]], max_new_tokens: int | list[int], **settings: Any
) -> list[Request]:
    """One request per prompt, of one seed."""
    counts = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
    return [
        Request(tokens=prompt, max_new_tokens=count, sample_idx=row, **settings)
        for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]


def turn(session: Session, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in prompts]
    for new in session.stream(asked(prompts, **settings)):
        tokens[new.row].append(new.token)
    return tokens


def test_penalties_and_bias_act_on_what_a_request_says_and_has_said() -> None:
    """Greedy tokens as chosen by hand from the logits; a second turn's counts begin anew."""
    model = make_model()
    hard = SamplingConfig(frequency_penalty=3.0, repetition_penalty=1.5, logit_bias=[(5, 1.0)])
    session, text = Session(model), [1, 2, 1]
    for given in ([1, 2, 1], [4]):
        text += given if text != [1, 2, 1] else []
        new: list[int] = []
        request = Request(tokens=given, max_new_tokens=6, sampling=hard)
        for item in session.stream([request]):
            logits = item.logits.clone()
            logits[5] += 1.0
            for token in set(text):
                logits[token] *= 1.5 if logits[token] < 0 else 1 / 1.5
            for token in new:
                logits[token] -= 3.0
            assert item.token == int(logits.argmax())
            new.append(item.token)
            text.append(item.token)
        assert len(set(new)) > 1


def test_no_stop_token_comes_too_early() -> None:
    model = make_model()
    free = generate(model, [[1, 2]], max_new_tokens=8).tokens[0]
    request = Request(tokens=[1, 2], max_new_tokens=8, stop_tokens=free, min_new_tokens=5)
    new = [item.token for item in Session(model).stream([request])]
    assert len(new) >= 5 and not set(new[:5]) & set(free)


@pytest.mark.parametrize("use_cache", [True, False])
def test_turns_equal_one_long_prompt(use_cache: bool) -> None:
    """Two rows, unequal turns, one of which ends early: as if the whole text had been given."""
    model = make_model()
    session = Session(model, batch_size=2, max_loops=3, use_cache=use_cache)
    settings: dict[str, Any] = {"num_loops": 3}
    texts: list[list[int]] = [[], []]
    turns = [([[1, 2, 3], [4]], [4, 2]), ([[5], [6, 7, 8, 9]], [1, 3]), ([[], [10]], [3, 3])]
    for prompts, budget in turns:
        new = turn(session, prompts, max_new_tokens=budget, **settings)
        for row in range(2):
            texts[row] += prompts[row]
            alone = generate(model, [texts[row]], max_new_tokens=budget[row], **settings)
            assert new[row] == alone.tokens[0]
            texts[row] += new[row]
    assert session.lengths == [len(text) for text in texts]
    if use_cache:  # every token was read once, and the last of each row not yet
        assert session.core_applications == 3 * sum(len(text) - 1 for text in texts)


def test_a_turn_at_four_loops_then_one_at_eight() -> None:
    """The original's defect; what it must be instead is in test_batch, here: no hole, no error."""
    model = make_model(num_loops=8)
    session = Session(model)
    first = turn(session, [[1, 2, 3, 4]], max_new_tokens=3, num_loops=4)
    second = turn(session, [[5, 6]], max_new_tokens=3, num_loops=8)
    text = [1, 2, 3, 4, *first[0], 5, 6]
    deep = generate(model, [text], max_new_tokens=3, num_loops=8, return_logits=True)
    assert len(second[0]) == 3
    assert session.core_applications == 4 * 6 + 8 * (3 + 2)
    assert deep.core_applications == 8 * (len(text) + 2)


def test_an_abandoned_stream_can_be_continued() -> None:
    model = make_model()
    whole = generate(model, [[1, 2, 3]], max_new_tokens=6).tokens[0]
    session = Session(model)
    stream = session.stream(asked([[1, 2, 3]], max_new_tokens=6))
    heard = [next(stream).token, next(stream).token]
    stream.close()
    assert heard + turn(session, [[]], max_new_tokens=4)[0] == whole


def test_rows_have_columns_of_their_own() -> None:
    """17 tokens of one row and 19 new ones of another fit where each row fits."""
    model = make_model(max_seq_len=20)
    long, short = [1] * 17, [2]
    result = generate(model, [long, short], max_new_tokens=[3, 19])
    assert result.tokens[1] == generate(model, [short], max_new_tokens=19).tokens[0]
    rows = collected(
        Session(model, batch_size=2).stream(asked([long, short], max_new_tokens=[3, 19])), 2
    )
    assert [[new.token for new in row] for row in rows] == result.tokens
    session = Session(model, batch_size=2, max_len=18)
    with pytest.raises(ValueError, match=r"row 1 needs 19 columns and has max_len=18; raise"):
        session.stream(asked([long, short], max_new_tokens=[2, 19]))


def collected(stream: Iterator[NewToken], num_rows: int) -> list[list[NewToken]]:
    rows: list[list[NewToken]] = [[] for _ in range(num_rows)]
    for new in stream:
        rows[new.row].append(new)
    return rows


def test_each_row_has_its_own_request() -> None:
    """Depth, sampling, stop tokens and reports side by side: each row as if it were alone."""
    model = make_model()
    hot = SamplingConfig(temperature=1.5, top_k=7)
    stop = generate(model, [PROMPTS[0]], max_new_tokens=6, num_loops=4).tokens[0][2]
    requests = [
        Request(tokens=PROMPTS[0], max_new_tokens=6, num_loops=4, stop_tokens=[stop]),
        Request(tokens=PROMPTS[1], max_new_tokens=5, num_loops=2, sampling=hot, sample_idx=9),
        Request(tokens=PROMPTS[2], max_new_tokens=4, sampling=hot, logprobs=2),
    ]
    together = collected(Session(model, batch_size=3, max_loops=4).stream(requests), 3)
    for request, row in zip(requests, together, strict=True):
        (alone,) = collected(Session(model, max_loops=4).stream([request]), 1)
        assert [new.token for new in row] == [new.token for new in alone]
        assert [new.num_loops for new in row] == [request.num_loops or 3] * len(row)
        assert [new.finish_reason for new in row] == [new.finish_reason for new in alone]
        assert all((new.logprobs is None) == (request.logprobs is None) for new in row)
    assert [row[-1].finish_reason for row in together] == ["stop", "length", "length"]


def test_logprobs_are_reported_for_what_was_sampled() -> None:
    model = make_model()
    hot = SamplingConfig(temperature=3.0)
    request = Request(tokens=[1, 2], max_new_tokens=6, sampling=hot, logprobs=3)
    for new in Session(model).stream([request]):
        expected = new.logits.log_softmax(-1)
        assert new.logprobs is not None
        assert new.logprobs.chosen == pytest.approx(float(expected[new.token]))
        values, tokens = expected.topk(3)
        assert [token for token, _ in new.logprobs.top] == tokens.tolist()
        assert [value for _, value in new.logprobs.top] == pytest.approx(values.tolist())


def test_forced_tokens_are_scored_as_if_they_had_been_generated() -> None:
    """Their logits are those of the text; a request that is forced to say what it says anyhow."""
    model, text = make_model(), [3, 14, 15, 9, 2, 6]
    rule, sampling = LatentDifferenceExit(threshold=0.9), SamplingConfig(temperature=1.0)
    common: dict[str, Any] = {"tokens": text[:2], "max_new_tokens": 6, "logprobs": 0}
    whole = model(torch.tensor([text])).logits[0].detach().log_softmax(dim=-1)
    request = Request(**common, forced_tokens=text[2:], stop_tokens=[6])
    given = list(Session.fitting(model, [request]).stream([request]))
    assert [new.token for new in given] == text[2:] and given[-1].finish_reason == "stop"
    for new, place in zip(given, range(1, 5), strict=True):
        assert new.logprobs is not None
        assert new.logprobs.chosen == pytest.approx(float(whole[place, new.token]), abs=1e-10)

    free = Request(**common, exit_rule=rule, sampling=sampling, num_loops=6)
    said = [
        (new.token, new.num_loops, new.logprobs)
        for new in Session.fitting(model, [free]).stream([free])
    ]
    assert len({loops for _, loops, _ in said}) > 1
    forced = replace(free, forced_tokens=[token for token, *_ in said[:4]])
    again = Session.fitting(model, [forced]).stream([forced])
    assert [(new.token, new.num_loops, new.logprobs) for new in again] == said


def test_samples_of_one_seed_are_told_apart_by_their_number() -> None:
    model = make_model()
    hot = SamplingConfig(temperature=1.5)

    def drawn(samples: list[int], seed: int = 3) -> list[list[int]]:
        requests = [
            Request(tokens=[5], max_new_tokens=8, sampling=hot, seed=seed, sample_idx=index)
            for index in samples
        ]
        rows = collected(Session(model, batch_size=len(samples)).stream(requests), len(samples))
        return [[new.token for new in row] for row in rows]

    three = drawn([0, 1, 2])
    assert len({tuple(row) for row in three}) == 3
    assert drawn([2, 0]) == [three[2], three[0]]  # the place in the batch does not matter
    assert three == generate(model, [[5]] * 3, max_new_tokens=8, temperature=1.5, seed=3).tokens
    assert drawn([0], seed=4) != three[:1]


def test_a_row_draws_on_and_a_new_sample_begins_again() -> None:
    model = make_model()
    hot = SamplingConfig(temperature=1.5)
    (whole,) = generate(model, [[5]], max_new_tokens=6, temperature=1.5).tokens
    session = Session(model)
    first = turn(session, [[5]], max_new_tokens=3, sampling=hot)[0]
    assert first + turn(session, [[]], max_new_tokens=3, sampling=hot)[0] == whole
    session = Session(model)
    turn(session, [[5]], max_new_tokens=3, sampling=hot)
    requests = [
        Request(tokens=tokens, max_new_tokens=5, sampling=hot, sample_idx=1)
        for tokens in ([], [5, *first])
    ]
    streams = session.stream(requests[:1]), Session(model).stream(requests[1:])
    went_on, fresh = ([new.token for new in stream] for stream in streams)
    assert went_on == fresh


@pytest.mark.parametrize("use_cache", [True, False])
def test_room_is_what_fits(use_cache: bool) -> None:
    """To the last token, by position and by column."""
    model = make_model(max_seq_len=20)
    for max_len, first in ((20, 20), (12, 13 if use_cache else 20)):
        session = Session(model, max_len=max_len, use_cache=use_cache)
        assert session.room() == first
        turn(session, [[1, 2, 3]], max_new_tokens=4)
        assert session.room() == first - 7
        over = Request(tokens=[4, 5], max_new_tokens=session.room() - 1)
        with pytest.raises(ValueError, match=r"room for 20 in all|and has max_len=12"):
            session.stream([over])
        turn(session, [[4, 5]], max_new_tokens=session.room() - 2)
        assert session.room() == 0


def test_without_a_number_a_row_takes_all_the_room() -> None:
    model = make_model(max_seq_len=12)
    (row,) = collected(Session(model).stream([Request(tokens=[1, 2])]), 1)
    assert len(row) == 10 and row[-1].finish_reason == "length"
    (row,) = collected(Session(model, max_len=6).stream([Request(tokens=[1, 2])]), 1)
    assert len(row) == 5
    both = [Request(tokens=[1] * 8), Request(tokens=[2], max_new_tokens=2)]
    rows = collected(Session(model, batch_size=2).stream(both), 2)
    assert [len(row) for row in rows] == [4, 2]  # what its own max_seq_len leaves the first row
    with pytest.raises(ValueError, match="needs 7 columns and has max_len=6"):
        Session(model, max_len=6).stream([Request(tokens=[1] * 7)])


@pytest.mark.parametrize("use_cache", [True, False])
def test_requests_of_other_seeds_share_a_batch(use_cache: bool) -> None:
    """Initial states and samples are those of each request alone, in any order."""
    model, hot = make_model(), SamplingConfig(temperature=1.5)
    requests = [
        Request(tokens=prompt, max_new_tokens=4, sampling=hot, seed=seed)
        for seed, prompt in enumerate([*PROMPTS, PROMPTS[0]])
    ]

    def run(chosen: list[Request]) -> list[list[NewToken]]:
        session = Session.fitting(model, chosen, use_cache=use_cache)
        return collected(session.stream(chosen, prefill_chunk=2), len(chosen))

    for order in (requests, requests[::-1]):
        for request, together in zip(order, run(order), strict=True):
            (alone,) = run([request])
            assert [new.token for new in together] == [new.token for new in alone]
            for new, own in zip(together, alone, strict=True):
                torch.testing.assert_close(new.logits, own.logits, rtol=0, atol=1e-9)


def test_rows_of_a_call_share_the_rule_and_keep_their_seeds() -> None:
    session = Session(make_model(), batch_size=2)
    ruled = [Request(tokens=[1], exit_rule=rule) for rule in (KLExit(), None)]
    with pytest.raises(ValueError, match=r"^exit_rule differs between requests: Fixed\(.*KLExit"):
        session.stream(ruled)
    assert len(turn(session, [[1], [2]], max_new_tokens=1, exit_rule=KLExit(), seed=2)) == 2
    with pytest.raises(
        ValueError, match=r"^seed of row 0 is 3; it must be 2, as when .* sample_idx"
    ):
        session.stream(asked([[1], [2]], max_new_tokens=1, seed=3))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["hello"], "prompts hold text; give token ids: encode it with a tokenizer"),
        ("hello", "encode it with a tokenizer"),
        ([], "at least one list of token ids"),
        ([[1], []], r"prompt 1 is \[\]; it must be at least one token long"),
        ([1, 2, 3], "prompt 0 is 1; it must be a list of token ids"),
        ([[1.5]], r"prompt 0 is \[1.5\]; it must be a list of token ids"),
        ([[1], [19]], r"prompt 1 is \[19\]; it must be of token ids in 0..18"),
        ([[-1]], r"token ids in 0..18"),
    ],
)
def test_bad_prompts_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(make_model(), prompts, max_new_tokens=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be an integer of at least 1"),
        (
            {"max_new_tokens": 39},
            "row 0 has 2 tokens and asks for 39 new ones.* room for 40",
        ),
        ({"max_new_tokens": 10**12}, r"room for 40 in all \(max_seq_len\)"),
        ({"num_loops": 0}, "num_loops is 0; it must be an integer of at least 1"),
        ({"num_loops": [2, 2, 2]}, "num_loops is .* one for each of 1 rows"),
        ({"num_loops": 5, "max_loops": 4}, "num_loops is 5; it must be at most 4"),
        ({"max_loops": 0}, "max_loops is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"stop_tokens": [19]}, "a stop token is 19; it must be in 0..18"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"exit_rule": CumulativeThreshold(threshold=0.5)}, "needs a halting head and the model"),
        ({"exit_rule": KLExit(), "use_cache": False}, "'kl' needs use_cache=True"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    monkeypatch.setattr(model, "encode", pytest.fail)  # any work
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2]], **({"max_new_tokens": 1} | settings))


def test_a_session_refuses_what_it_cannot_hold() -> None:
    session = Session(make_model(), batch_size=2, max_len=8)
    with pytest.raises(ValueError, match="the number of requests is 1; it must be 2"):
        session.stream(asked([[1]], max_new_tokens=1))
    with pytest.raises(ValueError, match="num_loops is 4; it must be at most 3"):
        session.stream(asked([[1], [2]], max_new_tokens=1, num_loops=4))
    with pytest.raises(ValueError, match="needs 9 columns and has max_len=8"):
        session.stream(asked([[1], [2]], max_new_tokens=9))
    with pytest.raises(ValueError, match=r"requests is \[\]; it must be at least one"):
        Session.fitting(make_model(), [])
    with pytest.raises(ValueError, match="batch_size is 0"):
        Session(make_model(), batch_size=0)


# --- the public surface --------------------------------------------------------------------------


def test_public_name() -> None:
    model = make_model()
    result = om.generate(model, PROMPTS, max_new_tokens=3, num_loops=2, exit_rule=None, seed=0)
    assert [len(row) for row in result.tokens] == [3, 3, 3]
    assert result.loops == [[2, 2, 2]] * 3
    square = om.generate(model, torch.tensor([[1, 2], [3, 4]]), max_new_tokens=1)
    assert square.tokens == om.generate(model, [[1, 2], [3, 4]], max_new_tokens=1).tokens


@pytest.mark.slow
def test_a_compiled_session_gives_the_eager_tokens(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs as they are recorded; ``test_compile`` compiles a session's with Inductor."""
    monkeypatch.setattr(compiling, "_backend", lambda graph, inputs: graph)
    layers = {"num_prelude_layers": 0, "num_core_layers": 1, "num_coda_layers": 0}
    model = make_model(**layers, core_feed_forward=MOE, halting=ACTConfig())
    prompts = [[3, 14, 15], [9, 2, 6]]
    settings: dict[str, Any] = {"max_new_tokens": 5, "return_logits": True}
    eager = generate(model, prompts, **settings)
    longer = settings | {"max_new_tokens": 8, "num_loops": 5}
    expected = generate(model, prompts, **longer)
    with unchecked():
        assert_same_logits(generate(model, prompts, compiled=True, **settings), eager)
        assert_same_logits(generate(model, prompts, compiled=True, **longer), expected)


def test_compile_needs_the_cache() -> None:
    with pytest.raises(ValueError, match="compiled is True; it must be False without a cache"):
        generate(make_model(), [[1]], max_new_tokens=1, use_cache=False, compiled=True)


def test_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"False without a C\+\+ compiler: install g\+\+"):
        generate(make_model(), [[1]], max_new_tokens=1, compiled=True)


# --- a call that fails ---------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """What stands for Ctrl-C."""


@pytest.mark.parametrize(
    ("error", "options"),
    [(Stopped, {"cache_layout": LastLoop()}), (RuntimeError, {"use_cache": False})],
)
def test_a_failure_anywhere_changes_nothing(
    options: dict[str, Any], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every call of the model and of the sampler in turn, before and after its work."""
    model = make_model(num_core_layers=1).eval()
    hot = SamplingConfig(temperature=1.5)
    left = {"calls": 10**9, "after": False}

    def failing(name: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            left["calls"] -= 1
            result = call(*args, **kwargs) if left["after"] or left["calls"] != 0 else None
            if left["calls"] == 0:
                raise error(name)
            return result

        return run

    for name in ("encode", "step", "decode"):
        monkeypatch.setattr(RecurrentDepthLM, name, failing(name, getattr(RecurrentDepthLM, name)))
    monkeypatch.setattr(reference, "sample", failing("sample", reference.sample))

    def two_turns(stop_at: int, after: bool) -> tuple[Any, int]:
        """What was said and is left after both turns, with a failure at one call of the second."""
        session = Session(model, batch_size=2, **options)
        rows: list[list[int]] = [[], []]
        failures = 0
        for turn_idx, prompts in enumerate(([[1, 2, 3], [4]], [[5, 6, 7], [8]])):
            said, given = [0, 0], prompts
            left.update(calls=stop_at if turn_idx else 10**9, after=after)
            while min(said) < 2:
                budgets = [2 - count for count in said]
                before = session.tokens
                try:
                    for new in session.stream(
                        asked(given, budgets, sampling=hot, num_loops=2), prefill_chunk=2
                    ):
                        rows[new.row].append(new.token)
                        said[new.row] += 1
                        given = [[], []]
                except error:
                    failures += 1
                    if given != [[], []]:
                        assert session.tokens == before
        return (rows, session.tokens, session.core_applications), failures

    expected, failures = two_turns(10**9, after=False)
    assert failures == 0
    calls = 0
    for after in (False, True):
        for stop_at in range(1, 200):
            with unchecked():
                found, failures = two_turns(stop_at, after)
            if failures == 0:
                break
            calls += 1
            assert found == expected, f"call {stop_at} of the turn, after={after}"
            assert not any(module.training for module in model.modules())
    assert calls >= 2 * (8 if options.get("use_cache", True) else 6)


def test_a_diverged_model_leaves_the_session_as_it_was() -> None:
    model = make_model()
    session = Session(model)
    first = turn(session, [[1, 2]], max_new_tokens=2)[0]
    weight, before = model.embed.weight.detach().clone(), session.core_applications
    with torch.no_grad():
        model.embed.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        turn(session, [[3]], max_new_tokens=2)
    assert session.tokens == [[1, 2, *first]] and session.core_applications == before
    with torch.no_grad():
        model.embed.weight.copy_(weight)
    expected = generate(model, [[1, 2, *first, 3]], max_new_tokens=2).tokens
    assert turn(session, [[3]], max_new_tokens=2) == expected


def test_a_stream_that_another_has_overtaken_is_refused() -> None:
    session = Session(make_model())
    one = session.stream(asked([[1, 2]], max_new_tokens=5))
    two = session.stream(asked([[3]], max_new_tokens=5))
    next(one)
    with pytest.raises(ValueError, match="another stream of this session has gone on since"):
        next(two)
    next(one)
    three = session.stream(asked([[]], max_new_tokens=2))
    next(three)
    with pytest.raises(ValueError, match="another stream of this session has gone on since"):
        next(one)
    next(three)
    assert session.lengths == [6]


@pytest.mark.parametrize("layout", [LastLoop(), EveryK(2), FirstLoop()], ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_are_positions_of_the_row(layout: Any, chunk: int) -> None:
    """A row's numbers depend neither on its neighbours nor on how it was cut into calls."""
    model = make_model()
    text = [3, 14, 15, 9, 2, 6, 5, 8, 7]
    options: dict[str, Any] = {"max_new_tokens": 3, "return_logits": True}
    options |= {"cache_layout": layout, "prefill_chunk": chunk}
    alone = generate(model, [text], **options)
    beside = generate(model, [[5], text, text[:4]], num_loops=[2, 3, 5], **options)
    assert alone.logits is not None and beside.logits is not None
    assert beside.tokens[1] == alone.tokens[0]
    torch.testing.assert_close(beside.logits[1], alone.logits[0], rtol=0, atol=1e-9)
    by_parts = []
    for parts in ([text[1:-1]], [text[1:chunk], text[chunk:-1]]):
        memory = KVCache(
            model.config, batch_size=1, max_len=12, max_loops=3, layout=layout, dtype=torch.float64
        )
        batch = CachedBatch(model, memory)
        with torch.no_grad():
            for part in ([text[:1]], *([part] for part in parts)):
                batch.prefill(part, [3], chunk)
            by_parts.append(batch.decode({0: text[-1]}, [3], Fixed())[0])
    torch.testing.assert_close(by_parts[0], by_parts[1], rtol=0, atol=1e-9)


# --- wrong values at every entry point -----------------------------------------------------------

TEXTS: list[Any] = ["2", b"2", bytearray(b"2")]
NO_INTEGER: list[Any] = [*TEXTS, 2.5, True, [], {}, object(), 10**30, -1, float("nan"), len]
NO_INTEGER += [torch.tensor(2.0), torch.tensor([[2]]), np.float64(2), "LastLoop"]
NO_NUMBER: list[Any] = [*TEXTS, True, {}, object(), 10**400, -1, float("nan"), float("inf"), 1j]
NO_FLAG: list[Any] = ["False", 1, 0.0, None, torch.tensor([True, False])]
NO_IDS: list[Any] = [None, 5, *TEXTS, "", [1.5], [True], [None], ["1"], [[[1]]], {1: 2}, object()]
NO_IDS += [torch.tensor(3), torch.tensor([1.0]), [10**30]]
NO_OBJECT: list[Any] = ["last_loop", 5, 0.5, [1], LastLoop, KLExit, {}, torch.tensor(1), object()]
WRONG: dict[str, list[Any]] = {
    "prompts": [*NO_IDS, ["ab", "c"], [], [[]], {1}, [{1}], (x for x in "ab"), [b"a"]],
    "max_new_tokens": [*NO_INTEGER, 0, [1, 1, 1]],
    "num_loops": [*NO_INTEGER, 0],
    "max_loops": [*NO_INTEGER, 0, 2**62],
    "prefill_chunk": [*NO_INTEGER, 0],
    "seed": [x for x in NO_INTEGER if not (isinstance(x, int) and x == -1)],
    "top_k": [*NO_INTEGER, 0],
    "temperature": NO_NUMBER,
    "top_p": [*NO_NUMBER, 0, 1.5],
    "exit_rule": NO_OBJECT,
    "cache_layout": NO_OBJECT,
    "stop_tokens": [x for x in NO_IDS if not isinstance(x, list) or x != [10**30]],
    "use_cache": NO_FLAG,
    "compiled": NO_FLAG,
    "return_logits": NO_FLAG,
    "model": ["tiny", None, 5, torch.nn.Linear(2, 2)],
}
SESSION: dict[str, list[Any]] = {
    name: [*NO_INTEGER, 0, 2**62] for name in ("batch_size", "max_len", "max_loops")
} | {name: WRONG[name] for name in ("cache_layout", "use_cache", "compiled", "model")}
REQUEST = {name: WRONG[name] for name in ("max_new_tokens", "num_loops", "seed", "exit_rule")} | {
    "tokens": [
        x for x in [*NO_IDS, {1}] if not isinstance(x, list) or x != [10**30]
    ],  # whose vocabulary is not known yet
    "stop_tokens": WRONG["stop_tokens"],
    "sampling": [None, *NO_OBJECT],
    "sample_idx": NO_INTEGER,
    "logprobs": NO_INTEGER,
    "min_new_tokens": NO_INTEGER,
}
RULE_FIELDS: list[tuple[Any, dict[str, Any], str, list[Any]]] = [
    (KLExit, {}, "threshold", [*NO_NUMBER, 0, None]),
    (EntropyKLExit, {}, "kl", [*NO_NUMBER, 0, None]),
    (EntropyKLExit, {}, "entropy", [*NO_NUMBER, 0, None]),
    (LatentDifferenceExit, {}, "threshold", [*NO_NUMBER, 0, None]),
    (AccelerationExit, {}, "threshold", [*NO_NUMBER, 0, None]),
    (AccelerationExit, {"threshold": 1.0}, "patience", [*NO_INTEGER, 0, None]),
    (ArgmaxStableExit, {}, "patience", [*NO_INTEGER, 0, None]),
    (CumulativeThreshold, {}, "threshold", [*NO_NUMBER, 0, 1.5, None]),
    (Fixed, {}, "min_loops", [*NO_INTEGER, 0, None]),
    (EveryK, {}, "k", [*NO_INTEGER, 0, None]),
]


def assert_one_line(what: str, call: Any) -> None:
    said = "nothing: it was accepted"
    try:
        with unchecked():
            call()
    except Exception as error:  # of which class is the question
        said = f"{type(error).__name__}: {error}"
    one_line = (
        said.startswith(("ValueError: ", "DoesNotFitError: "))
        and "\n" not in said
        and len(said) < 600
    )
    assert one_line, f"{what} gave {said}"


def each(table: dict[str, list[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, values in table.items():
        for value in values:
            shown = " ".join(f"{name}={value!r}".split())
            yield shown[:100], {name: value}


def test_generate_refuses_wrong_values_in_one_line() -> None:
    model = make_model().train()
    before = torch.random.get_rng_state()
    for what, wrong in each(WRONG):
        values = {"model": model, "prompts": [[1, 2]], "max_new_tokens": 1} | wrong
        assert_one_line(what, partial(generate, **values))
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sessions_refuse_wrong_values_in_one_line() -> None:
    model = make_model()
    for what, wrong in each(SESSION):
        assert_one_line(f"Session({what})", partial(Session, **({"model": model} | wrong)))
    session = Session(model)
    turn(session, [[1, 2]], max_new_tokens=2)
    before = (session.tokens, session.core_applications)
    fine = Request(tokens=[1], max_new_tokens=1)
    for requests in (None, 5, "ab", [], [1], [[1]], fine, {fine: 1}, (x for x in [fine]), [None]):
        assert_one_line(f"stream({requests!r})", partial(session.stream, requests))
        assert_one_line(f"fitting({requests!r})", partial(Session.fitting, model, requests))
    for chunk in WRONG["prefill_chunk"]:
        call = partial(session.stream, [fine], prefill_chunk=chunk)
        assert_one_line(f"prefill_chunk={chunk!r}", call)
    assert (session.tokens, session.core_applications) == before
    expected = generate(model, [[*session.tokens[0], 1]], max_new_tokens=1).tokens
    assert turn(session, [[1]], max_new_tokens=1) == expected


def test_requests_rules_and_layouts_refuse_wrong_values_in_one_line() -> None:
    for what, wrong in each(REQUEST):
        assert_one_line(f"Request({what})", partial(Request, **({"tokens": [1]} | wrong)))
    sampling = {name: WRONG[name] for name in ("temperature", "top_k", "top_p")} | {
        "logit_bias": [5, "ab", [1], {"a": 1}, {1: "a"}, {-1: 0.0}, [(1, 2, 3)], True, math.nan],
        "repetition_penalty": [*NO_NUMBER, 0, None],
        "frequency_penalty": [x for x in NO_NUMBER if x != -1],
        "presence_penalty": [x for x in NO_NUMBER if x != -1],
    }
    for what, wrong in each(sampling):
        assert_one_line(f"SamplingConfig({what})", partial(SamplingConfig, **wrong))
    for kind, others, name, values in RULE_FIELDS:
        for what, wrong in each({name: values}):
            assert_one_line(f"{kind.__name__}({what})", partial(kind, **others, **wrong))


def test_numbers_of_other_libraries_are_accepted() -> None:
    model = make_model()
    expected = generate(model, [[1, 2]], max_new_tokens=3, num_loops=2, stop_tokens=[5])
    for kind in (np.int64, np.int32, torch.tensor):
        call = partial(
            generate,
            model,
            iter([torch.tensor([1, 2])]),
            max_new_tokens=kind(3),
            num_loops=kind(2),
            stop_tokens=torch.tensor([5]),
            prefill_chunk=kind(1),
            max_loops=kind(2),
            seed=kind(0),
        )
        with unchecked():
            found = call()
        assert found.tokens == expected.tokens
    with unchecked():
        assert KLExit(threshold=torch.tensor(0.5)) == KLExit(threshold=np.float64(0.5))
        assert EveryK(np.int64(2)) == EveryK(2)
