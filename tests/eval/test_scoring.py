import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from openmythos import generate
from openmythos.config import NormalInitConfig, PonderNetConfig
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.engine.reference import Session
from openmythos.eval.puzzle import PuzzleCodec
from openmythos.eval.scoring import GenerationRequest, Scorer, rolling_windows
from openmythos.model.cache import LastLoop
from openmythos.model.exit import ArgmaxStableExit
from openmythos.plan import memory
from openmythos.tokenizer import Tokenizer, byte_tokenizer
from tests.eval.examples import bpe, scorer, text_model
from tests.foreign import END, backend, write_chat_folder, write_folder
from tests.strategies import MLA, MOE, random_model, scripted_model, small_config

PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " x"),
    ("The sky is", " y"),
    ("a", "b"),
    ("", "begins with nothing"),
    ("a longer context, of which the model reads as much as it can: " * 2, "end"),
    ("trailing space ", "word"),
]
TEXTS = ["", "x", "a text of some length", "and one that is longer than the model reads. " * 12]
REQUESTS = [
    GenerationRequest(context="The sky", max_new_tokens=6),
    GenerationRequest(context="a", max_new_tokens=9, temperature=1.0, top_k=50),
    GenerationRequest(context="", max_new_tokens=4, temperature=1.0),
    GenerationRequest(context="def f(x):\n    ", max_new_tokens=9, temperature=0.7, top_p=0.9),
]
MODELS = {
    "gqa": {},
    "mla, experts, halting": {
        "attention": MLA,
        "core_feed_forward": MOE,
        "halting": PonderNetConfig(),
    },
    "random initial state": {"state_init": NormalInitConfig()},
}


def alone(asked: Scorer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The definition: one row, no padding."""
    tokens = torch.tensor([[*context, *continuation]])
    ctx = asked.model.context(tokens[:, :-1], seeds=asked.seed)
    with torch.no_grad():
        out = asked.model(tokens[:, :-1], num_loops=asked.num_loops, ctx=ctx)
    log_probs = out.logits[0, len(context) - 1 :].log_softmax(-1)
    picked = log_probs.gather(1, tokens[0, len(context) :, None])
    return float(picked.sum()), log_probs.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_scores_are_those_of_every_row_alone(changes) -> None:
    model = text_model(**changes)
    one = scorer(model, batch_size=1)
    expected = [alone(one, *one.encode_pair(*pair)) for pair in PAIRS]
    for batch_size in (1, 3, 8):
        found = scorer(model, batch_size=batch_size).loglikelihood(PAIRS)
        for (nats, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
            assert nats == pytest.approx(wanted, abs=1e-5)
            assert greedy == wanted_greedy


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_batch_size_changes_nothing(changes) -> None:
    model = text_model(**changes)
    one, eight = (scorer(model, batch_size=size) for size in (1, 8))
    assert one.rolling(TEXTS) == pytest.approx(eight.rolling(TEXTS), abs=1e-4)  # of 2,000 nats
    assert one.generate(REQUESTS) == eight.generate(REQUESTS)


def test_greedy_continuations_are_called_greedy() -> None:
    asked = scorer()
    prompt = [asked.prefix_id, *asked.codec.encode("The sky")]
    (row,) = generate(asked.model, [prompt], max_new_tokens=3, num_loops=3).tokens
    pairs = [(prompt, row), (prompt, [*row[:-1], (row[-1] + 1) % 259]), (prompt, row[:1])]
    assert [greedy for _, greedy in asked.score_tokens(pairs)] == [True, False, True]


def test_depth_is_a_property_that_may_change() -> None:
    asked = scorer()
    shallow, asked.num_loops = asked.loglikelihood(PAIRS), 1
    assert asked.loglikelihood(PAIRS) != shallow
    asked.num_loops = 3
    assert asked.loglikelihood(PAIRS) == shallow


def test_choices_of_one_token_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, rows = scorer(batch_size=8), []
    logits = Scorer._logits
    monkeypatch.setattr(
        Scorer, "_logits", lambda self, batch: rows.extend(batch) or logits(self, batch)
    )
    found = asked.score_tokens([([5, 6, 7], [choice]) for choice in range(100)])
    assert rows == [(5, 6, 7)]
    assert torch.tensor([nats for nats, _ in found]).exp().sum() < 1
    assert [alone(asked, [5, 6, 7], [9])[0]] == pytest.approx([found[9][0]], abs=1e-5)


def test_a_model_in_training_mode_stays_in_it() -> None:
    asked = scorer()
    asked.model.train()
    expected = scorer().loglikelihood(PAIRS)
    assert asked.loglikelihood(PAIRS) == expected
    assert asked.model.training


def test_pairs_are_encoded_as_in_one_piece() -> None:
    asked = scorer(codec=bpe())
    encode, bos = asked.codec.encode, asked.codec.bos_id
    assert asked.encode_pair("the value", " that") == (
        [bos, *encode("the value")],
        encode("the value that")[len(encode("the value")) :],
    )
    moved = asked.encode_pair("the value ", "that")
    assert moved == asked.encode_pair("the value", " that")
    assert asked.encode_pair("", "that") == ([bos], encode("that"))
    assert asked.encode_pair("  ", "that") == ([bos], encode("  that"))
    plain = scorer(codec=bpe(), add_bos=False)
    assert plain.encode_pair("the value", " that")[0] == encode("the value")
    assert plain.encode_pair("", "that")[0] == [bos]
    whole = next(i for i in range(3, 320) if len(asked.codec.decode([i])) > 3)
    word = asked.codec.decode([whole])
    bare = word.rstrip()
    straddled = asked.encode_pair(bare[:-1], bare[-1:])
    assert straddled[1]  # never nothing, even where the seam is inside a token


@given(st.integers(0, 60), st.integers(1, 16))
def test_windows_predict_every_token_once(size: int, length: int) -> None:
    tokens, whole = list(range(1, size + 1)), [0, *range(1, size + 1)]
    windows = list(rolling_windows(tokens, 0, length))
    assert [token for _, continuation in windows for token in continuation] == tokens
    for context, continuation in windows:
        read = [*context, *continuation[:-1]]
        assert context and len(read) <= length
        assert whole[read[0] : read[-1] + 1] == read  # contiguous, ending before what it predicts
    assert all(len(c) + len(t) - 1 == length for c, t in windows[1:])


def test_rolling_sums_its_windows() -> None:
    asked = scorer(text_model(max_seq_len=16))
    text = "a text that is longer than the model reads"
    tokens = asked.codec.encode(text)
    windows = rolling_windows(tokens, asked.prefix_id, 16)
    expected = sum(alone(asked, context, rest)[0] for context, rest in windows)
    assert asked.rolling([text, ""]) == [pytest.approx(expected, rel=1e-6), 0.0]


def test_long_contexts_are_cut_on_the_left_and_counted() -> None:
    asked = scorer(text_model(max_seq_len=16))
    context, continuation = list(range(3, 33)), [40, 41]
    found = asked.score_tokens([(context, continuation), ([3], [4])])
    assert asked.num_truncated == 1
    expected = alone(asked, context[-15:], continuation)
    assert found[0] == (pytest.approx(expected[0], abs=1e-5), expected[1])
    request = GenerationRequest(context="x" * 40, max_new_tokens=4)
    prompt = asked.codec.encode("x" * 12)
    (row,) = generate(asked.model, [prompt], max_new_tokens=4, num_loops=3).tokens
    assert asked.generate([request]) == [asked.codec.decode(row)]
    assert asked.num_truncated == 2


def test_generation_is_that_of_the_engine() -> None:
    asked = scorer(batch_size=2)
    contexts = ["The sky", "a", "def f(x):\n    return"]
    prompts = [asked.encode_context(context) for context in contexts]
    eos = byte_tokenizer().eos_id
    rows = generate(asked.model, prompts, max_new_tokens=8, num_loops=3, stop_tokens=[eos]).tokens
    requests = [GenerationRequest(context=context, max_new_tokens=8) for context in contexts]
    assert asked.generate(requests) == [asked.codec.decode(row) for row in rows]
    (text,) = asked.generate(requests[:1])
    stop = text[3:5]
    stopped = [GenerationRequest(context=contexts[0], max_new_tokens=8, stops=("@@", stop))]
    assert asked.generate(stopped) == [text[: text.index(stop)]]


def test_text_stops_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, steps = scorer(), itertools.count()
    (text,) = asked.generate([GenerationRequest(context="a", max_new_tokens=30)])
    decode = type(asked.model).decode
    monkeypatch.setattr(type(asked.model), "decode", lambda *args: (next(steps), decode(*args))[1])
    request = GenerationRequest(context="a", max_new_tokens=30, stops=(text[0],))
    assert asked.generate([request]) == [""]
    assert next(steps) <= 4


def test_exit_rule_and_cache_layout_reach_the_engine() -> None:
    rule, layout = ArgmaxStableExit(patience=1), LastLoop()
    asked = scorer(exit_rule=rule, cache_layout=layout, num_loops=6)
    prompt = asked.encode_context("The sky is")
    (row,) = generate(
        asked.model,
        [prompt],
        max_new_tokens=12,
        num_loops=6,
        exit_rule=rule,
        cache_layout=layout,
        stop_tokens=[byte_tokenizer().eos_id],
    ).tokens
    request = GenerationRequest(context="The sky is", max_new_tokens=12)
    assert asked.generate([request]) == [asked.codec.decode(row)]


def test_walks_are_continued_in_their_words() -> None:
    codec = PuzzleCodec(Walks(HopsConfig(num_entities=12, num_relations=4, seed=2)))
    asked = scorer(random_model(small_config(vocab_size=16)), codec=codec)
    prompt = codec.encode("e3 r1")
    (row,) = generate(asked.model, [prompt], max_new_tokens=5, num_loops=3).tokens
    whole, cut = asked.generate(
        [
            GenerationRequest(context="e3 r1", max_new_tokens=5, stops=stops)
            for stops in ((), (codec.words[row[2]],))
        ]
    )
    assert whole == codec.decode_bytes(row).decode()
    assert cut == whole[: whole.index(codec.words[row[2]])]


def test_refusals() -> None:
    asked = scorer(text_model(max_seq_len=16))
    with pytest.raises(ValueError, match="20 tokens and the model reads 16"):
        asked.score_tokens([([3], list(range(20)))])
    with pytest.raises(ValueError, match="at least one token of each"):
        asked.score_tokens([([], [3])])
    with pytest.raises(ValueError, match="not empty"):
        asked.loglikelihood([("a", "")])
    with pytest.raises(ValueError, match="16 new tokens leave no room"):
        asked.generate([GenerationRequest(context="a", max_new_tokens=16)])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        GenerationRequest(context="a", max_new_tokens=0)
    with pytest.raises(ValueError, match="stops"):
        GenerationRequest(context="a", max_new_tokens=1, stops=("",))
    with pytest.raises(ValueError, match="num_loops is 0"):
        scorer(num_loops=0)


def test_generation_knows_every_end_id_and_no_id_without_a_token(tmp_path: Path) -> None:
    """An instruct model's folder: two end ids, a padded vocabulary, no token before a text."""
    codec = Tokenizer.load(write_chat_folder(tmp_path))
    a, b = codec.encode("ab")
    model = scripted_model(300, {a: b, b: 258, 258: a})
    asked = scorer(model, codec=codec)
    request = GenerationRequest(context="a", max_new_tokens=4)
    assert asked.generate([request]) == ["b"]
    assert asked.encode_context("a") == [a]
    model = scripted_model(300, {a: 299, b: 258})
    with torch.no_grad():
        model.head.weight[b] += model.embed.weight[a] / 2  # the most likely id that has a token
    assert scorer(model, codec=codec).generate([request]) == ["b"]


def test_bits_per_byte_need_a_tokenizer_that_keeps_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, backend(END, normalizer=normalizers.Lowercase()))
    asked = scorer(text_model(259), codec=Tokenizer.load(folder))
    assert len(asked.loglikelihood([("a", " b")])) == 1
    with pytest.raises(ValueError, match=r"changes text .* so bits per byte would be wrong"):
        asked.rolling(["A text"])


def test_batches_that_do_not_fit_into_memory_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model()
    pairs = [("a" * n, "bc") for n in range(1, 9)]
    asked = [GenerationRequest(context=context, max_new_tokens=2) for context, _ in pairs]
    expected = scorer(model).loglikelihood(pairs), scorer(model).generate(asked)
    logits, fitting, sizes = Scorer._logits, Session.fitting, []

    def of_few(self: Scorer, rows: list[tuple[int, ...]]) -> torch.Tensor:
        sizes.append(len(rows))
        if len(rows) > 4:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ...")
        return logits(self, rows)

    def for_few(model: Any, rows: Sequence[Any], **options: Any) -> Session:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return fitting(model, rows, **options)

    monkeypatch.setattr(Scorer, "_logits", of_few)
    monkeypatch.setattr(Session, "fitting", for_few)
    small = scorer(model, batch_size=64)
    with pytest.warns(UserWarning, match="8 rows at once do not fit into memory; going on with 4"):
        found = small.loglikelihood(pairs)
    assert found == [pytest.approx(pair) for pair in expected[0]] and sizes == [8, 4, 4]
    with pytest.warns(UserWarning, match="4 rows at once do not fit into memory; going on with 2"):
        assert small.generate(asked) == expected[1]
    monkeypatch.setattr(Scorer, "_logits", logits)
    monkeypatch.setattr(memory, "free_bytes", lambda: 40_000)  # two rows of up to ten tokens
    with pytest.warns(UserWarning, match="rows at once do not fit into memory"):
        found = scorer(model, batch_size=4).loglikelihood(pairs)
    assert found == [pytest.approx(pair) for pair in expected[0]]
    monkeypatch.setattr(memory, "free_bytes", lambda: 4_000)
    with pytest.raises(ValueError, match=r"the logits of 1 rows needs .* lower batch_size"):
        scorer(model, batch_size=1).loglikelihood(pairs)
    monkeypatch.setattr(Session, "fitting", lambda *a, **b: {}["another fault"])
    with pytest.raises(KeyError):
        small.generate(asked)
