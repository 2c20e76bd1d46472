from dataclasses import replace

import pytest
import torch

from openmythos.config import DepthAttentionConfig
from openmythos.model.cache import KVCache
from openmythos.model.context import document_lengths, make_context
from tests.strategies import random_model, random_tokens, small_config, unchecked

CONFIG = small_config(max_seq_len=8)


def context(tokens, **options):
    return make_context(CONFIG, tokens, dtype=torch.float32, **options)


def visible(ctx) -> list[list[list[int]]]:
    return (ctx.mask[:, 0] == 0).int().tolist()


def test_one_unpadded_document_a_row_needs_no_mask():
    ctx = context(random_tokens(CONFIG, 2, 4))
    assert ctx.mask is None
    assert ctx.positions.tolist() == [[0, 1, 2, 3]] * 2


def test_padding_is_seen_by_itself_alone_and_takes_no_position():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
    ctx = context(random_tokens(CONFIG, 2, 3), padding_mask=mask)
    assert ctx.positions.tolist() == [[0, 0, 1], [0, 1, 1]]
    assert visible(ctx) == [[[1, 0, 0], [0, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]


def test_documents_are_closed_and_count_from_zero():
    ctx = context(random_tokens(CONFIG, 1, 5), documents=torch.tensor([[4, 4, 7, 7, -1]]))
    assert ctx.positions.tolist() == [[0, 1, 0, 1, 0]]
    assert visible(ctx)[0] == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_a_cache_goes_on_counting():
    cache = KVCache(CONFIG, batch_size=2, max_len=8, max_loops=1)
    tokens = random_tokens(CONFIG, 2, 2)
    first = context(tokens, cache=cache, padding_mask=torch.tensor([[0, 1], [1, 1]]).bool())
    assert cache.lengths == [0, 0]  # nothing has been read yet
    first.cache.commit()
    assert cache.lengths == [1, 2]
    second = context(tokens, cache=cache)
    assert second.positions.tolist() == [[1, 2], [2, 3]]
    assert visible(second) == [[[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
    one = context(tokens[:1], cache=cache, rows=[1])
    assert one.positions.tolist() == [[2, 3]]
    second.cache.commit()
    with pytest.raises(RuntimeError, match="row 1 of the cache has 4 tokens and had 2 when this"):
        one.cache.commit()
    assert cache.lengths == [3, 4]


def test_an_unpadded_cache_needs_a_mask_only_for_a_chunk_after_a_prefix():
    cache = KVCache(CONFIG, batch_size=1, max_len=8, max_loops=1)
    for num_tokens in (3, 1):
        ctx = context(random_tokens(CONFIG, 1, num_tokens), cache=cache)
        assert ctx.mask is None
        ctx.cache.commit()
    chunk = context(random_tokens(CONFIG, 1, 2), cache=cache)
    assert visible(chunk)[0] == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]


def test_positions_may_be_given():
    positions = torch.tensor([[3, 5]])
    ctx = context(random_tokens(CONFIG, 1, 2), positions=positions)
    assert ctx.positions is positions


def test_selecting_rows():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    ctx = context(random_tokens(CONFIG, 3, 3), padding_mask=mask)
    part = ctx.select(torch.tensor([2, 0]))
    assert torch.equal(part.tokens, ctx.tokens[[2, 0]])
    assert torch.equal(part.mask, ctx.mask[[2, 0]])
    assert torch.equal(part.rope[0], ctx.rope[0][[2, 0]])
    assert part.cache is None
    cache = KVCache(CONFIG, batch_size=3, max_len=3, max_loops=1)
    ctx = context(random_tokens(CONFIG, 3, 3), cache=cache)
    part = ctx.select([2, 0])
    assert part.cache.rows.tolist() == [2, 0]
    assert part.select(torch.tensor([1])).cache.rows.tolist() == [0]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.tensor([[0, 32]]), {}, r"token id 32 is outside the vocabulary 0\.\.31"),
        (torch.tensor([[-1, 3]]), {}, r"token id -1 is outside the vocabulary 0\.\.31"),
        (torch.zeros(1, 9).long(), {}, "9 tokens exceed max_seq_len=8"),
        (torch.zeros(2, 0).long(), {}, "it must be .* with at least one token"),
        (torch.zeros(0, 2).long(), {}, "it must be .* with at least one token"),
        (
            torch.zeros(1, 2).long(),
            {"documents": torch.zeros(1, 2).long(), "padding_mask": torch.ones(1, 2).bool()},
            "mark padding by negative documents",
        ),
    ],
)
def test_errors_say_what_was_given(tokens, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        context(tokens, **options)
    assert "\n" not in str(caught.value)


def test_documents_and_a_cache_exclude_each_other():
    cache = KVCache(CONFIG, batch_size=1, max_len=8, max_loops=1)
    with pytest.raises(ValueError, match="packed documents cannot be cached"):
        context(torch.zeros(1, 2).long(), cache=cache, documents=torch.zeros(1, 2).long())
    assert cache.length == 0


def test_a_cache_longer_than_the_model_is_refused_in_time():
    cache = KVCache(CONFIG, batch_size=1, max_len=20, max_loops=1)
    context(random_tokens(CONFIG, 1, 7), cache=cache).cache.commit()
    with pytest.raises(ValueError, match="9 tokens exceed max_seq_len=8"):
        context(random_tokens(CONFIG, 1, 2), cache=cache)
    assert cache.length == 7


def test_what_loops_share_is_made_once_a_forward():
    ctx, made = context(torch.zeros(2, 3, dtype=torch.int64)), []

    def make(weight: torch.Tensor) -> int:
        made.append(weight)
        return len(made)

    weight = torch.nn.Parameter(torch.zeros(3))
    assert ctx.once(make, weight) == ctx.once(make, weight) == 1
    assert ctx.select(torch.tensor([0])).once(make, weight) == 1
    assert context(ctx.tokens).once(make, weight) == 2


def test_other_weights_are_made_anew_within_one_context():
    ctx, first = context(torch.zeros(2, 3, dtype=torch.int64)), torch.nn.Parameter(torch.zeros(3))
    make = lambda weight: object()  # noqa: E731
    seen = [ctx.once(make, first), ctx.once(make, torch.nn.Parameter(torch.zeros(3)))]
    first.data = torch.ones(3)
    seen.append(ctx.once(make, first))
    first.requires_grad_(False)
    seen.append(ctx.once(make, first))
    with torch.no_grad():
        seen.append(ctx.once(make, first))
        first += 1  # the same memory: what was made reads the new values
        assert ctx.once(make, first) is seen[-1]
    assert len(set(seen)) == 5


@pytest.mark.parametrize(
    ("given", "positions", "alone"),
    [
        # The number comes again: a new document. Padding inside of a document: it goes on.
        ([0, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1], [[0, 1], [2, 3], [4, 5]]),
        ([5, 5, -1, 5, 5, 5], [0, 1, 0, 2, 3, 4], [[0, 1, 3, 4, 5]]),
        ([-1, 3, -2, 3, 2, -1], [0, 0, 0, 1, 0, 0], [[1, 3], [4]]),
        ([1, -1, 2, 1, -1, 1], [0, 0, 0, 0, 0, 1], [[0], [2], [3, 5]]),
    ],
)
def test_runs_of_numbers_are_the_documents_everywhere(given, positions, alone):
    model, documents = random_model(CONFIG, dtype=torch.float64), torch.tensor([given])
    tokens = random_tokens(CONFIG, 1, len(given))
    ctx = model.context(tokens, documents=documents)
    assert ctx.positions.tolist() == [positions]
    assert ctx.real.tolist() == [[number >= 0 for number in given]]
    if min(given) >= 0:
        assert document_lengths(ctx.documents) == (tuple(map(len, alone)),)
    logits = model(tokens, ctx=ctx).logits
    for places in alone:
        torch.testing.assert_close(logits[:, places], model(tokens[:, places]).logits)


def test_lists_and_arrays_are_taken_as_tensors():
    tokens = random_tokens(CONFIG, 2, 3)
    expected = context(tokens, padding_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]).bool())
    with unchecked():
        for given in (tokens.tolist(), tokens.numpy(), tokens.to(torch.int32)):
            ctx = context(given, padding_mask=[[False, True, True], [True, True, True]])
            assert torch.equal(ctx.tokens, tokens) and ctx.tokens.dtype == torch.int64
            assert torch.equal(ctx.positions, expected.positions)
            assert torch.equal(ctx.mask, expected.mask)
        packed = context(tokens, documents=[[0, 0, 1], [0, 1, 1]], positions=[[4, 5, 0], [3, 0, 1]])
        assert packed.positions.tolist() == [[4, 5, 0], [3, 0, 1]]


WRONG = [
    *(
        {"tokens": x}
        for x in (None, "abc", b"abc", 3, 2.5, [1, 2], [[1.5]], [[1], [1, 2]], [["a"]])
    ),
    *({"tokens": x} for x in (torch.ones(1, 2), torch.ones(1, 2).bool(), torch.ones(2).long())),
    *({"padding_mask": x} for x in (torch.ones(2, 3), torch.ones(2, 3).long(), "1", True)),
    *({"padding_mask": x} for x in (torch.ones(3, 2).bool(), torch.ones(3).bool())),
    *({"documents": x} for x in (torch.ones(2, 3), torch.ones(1, 3).long(), [0, 0, 1], 0)),
    *({"positions": x} for x in (torch.ones(2, 3), torch.ones(1, 3).long(), range(3), "0")),
    *({"cache": x} for x in (True, "cache", {})),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_values_of_other_types_and_shapes_are_refused_in_a_line(wrong):
    given = {"tokens": torch.zeros(2, 3).long(), **wrong}
    with (
        unchecked(),
        pytest.raises(ValueError, match=f"^{next(iter(wrong))} is .* must be") as error,
    ):
        context(given.pop("tokens"), **given)
    assert "\n" not in str(error.value)


def test_recent_loops_only_without_a_cache_and_rows_of_them():
    config = small_config(depth_attention=DepthAttentionConfig(num_recent_loops=2))
    tokens = random_tokens(config, 3, 2)
    ctx = make_context(config, tokens, dtype=torch.float32)
    assert [len(layer) for layer in ctx.recent] == [2, 2]
    some = ctx.select(torch.tensor([2, 0])).select(torch.tensor([1]))
    assert some.recent[0][0].shape == (2, 1, 2, 2, 4)
    cache = KVCache(config, batch_size=3, max_len=2, max_loops=1)
    assert make_context(config, tokens, dtype=torch.float32, cache=cache).recent is None
    plain = context(tokens)
    assert plain.recent is plain.select(torch.tensor([0])).recent is None


def test_a_cache_may_be_gone_on_with_after_a_failed_call():
    """Columns are counted when they are filled: what a failed call wrote is not seen."""
    model = random_model(CONFIG, dtype=torch.float64)
    tokens = random_tokens(CONFIG, 2, 6)
    cache = KVCache(CONFIG, batch_size=2, max_len=8, max_loops=2, dtype=torch.float64)
    with torch.no_grad():
        model(tokens[:, :3], num_loops=2, ctx=model.context(tokens[:, :3], cache=cache))
        with pytest.raises(ValueError, match="num_loops is 3; it must be at most the cache's"):
            model(tokens[:, 3:], num_loops=3, ctx=model.context(tokens[:, 3:], cache=cache))
        ctx = model.context(tokens[:, :2], cache=cache)
        model.encode(tokens[:, :2], ctx)  # and then the power goes
        ctx = model.context(tokens[:, 3:], cache=cache)
        got = model(tokens[:, 3:], num_loops=2, ctx=ctx).logits
        torch.testing.assert_close(got, model(tokens, num_loops=2).logits[:, 3:])


def test_packed_rows_are_told_to_gpus_as_lengths():
    documents = torch.tensor([[4, 4, 7, 7, 9], [1, 1, 1, 1, 1]])
    lengths = document_lengths(documents)
    assert lengths == ((2, 2, 1), (5,))
    assert document_lengths(torch.tensor([[4, 4, -1]])) is None
    tokens = random_tokens(CONFIG, 2, 5)
    ctx = replace(context(tokens, documents=documents), lengths=lengths, masks={})
    spans, longest = ctx._spans()
    assert (spans.tolist(), spans.dtype, longest) == ([0, 2, 4, 5, 10], torch.int32, 5)
    spans, longest = ctx.select([0])._spans()
    assert (spans.tolist(), longest) == ([0, 2, 4, 5], 2)
