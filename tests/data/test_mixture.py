import itertools
import json
import math
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openmythos.data.loader import TokenLoader, read_ahead
from openmythos.data.mixture import (
    CYCLE,
    MixtureLoader,
    cycle_order,
    rows_per_cycle,
    tokenizer_texts,
)
from openmythos.data.prepare import prepare
from openmythos.tokenizer import byte_tokenizer, train_bpe

SEQ_LEN, BATCH = 16, 8
LETTERS = [chr(code) for code in range(33, 127) if chr(code) not in '"\\']
SOURCES = {  # source and document: its text, of which no other document has a character
    name: [letter * (5 + 7 * number % 31) for number, letter in enumerate(letters)]
    for name, letters in (("a", LETTERS[:24]), ("b", LETTERS[24:36]))
}
WEIGHTS = (0.65, 0.35)
(FIRST_ID,) = byte_tokenizer().encode(chr(0))  # of the bytes


def id_of(letter):
    return FIRST_ID + ord(letter)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    for name, documents in SOURCES.items():
        rows = (json.dumps({"text": text}) + "\n" for text in documents)
        (root / f"{name}.jsonl").write_text("".join(rows))
        options = {"tokenizer": byte_tokenizer(), "val_fraction": 0.0, "max_shard_tokens": 100}
        prepare(str(root / f"{name}.jsonl"), root / name, **options)
    return [root / name for name in SOURCES]


def loader_of(folders, world_size=1, rank=0, *, seed=3, batch_size=BATCH, weights=WEIGHTS):
    """A mixture; of one folder its loader alone."""
    options = {"seq_len": SEQ_LEN, "batch_size": batch_size, "seed": seed}
    each = [TokenLoader(folder, **options, rank=rank, world_size=world_size) for folder in folders]
    return each[0] if len(each) == 1 else MixtureLoader(each, weights)


def rows_of(folders, start, stop, world_size=1, num_workers=0):
    """Tokens and targets of the global rows of some steps, read by so many ranks and workers."""
    parts = []
    for rank in range(world_size):
        loader = loader_of(folders, world_size, rank)
        with closing(read_ahead(loader, start, num_workers=num_workers)) as batches:
            parts.append(list(itertools.islice(batches, stop - start)))
    rows = []
    for batches in zip(*parts, strict=True):
        both = [torch.stack([batch.tokens, batch.targets], dim=1) for batch in batches]
        rows += torch.stack(both, dim=1).flatten(0, 1).tolist()
    return rows


# --- shares ---------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_every_beginning_has_its_shares_to_less_than_one_row(rows):
    total = sum(rows)
    order = cycle_order(rows)
    given = np.stack([np.cumsum(order == source) for source in range(len(rows))], axis=1)
    wanted = np.arange(1, total + 1)[:, None] * np.array(rows)  # in units of 1 / total
    assert (np.abs(given * total - wanted) < total).all()
    assert given[-1].tolist() == rows


def test_small_shares_are_spread_and_not_served_together():
    """Nearest rounding of each share would leave the large source behind by many rows."""
    rows = rows_per_cycle([0.9, *[0.01] * 10])
    order = cycle_order(rows)
    behind = np.cumsum(order == 0) - 0.9 * np.arange(1, len(order) + 1)
    assert np.abs(behind).max() < 1
    assert len(order) == 100


def test_shares_of_the_rows_that_are_read(folders):
    """A row's source is known from its characters: no document of a has one of b's."""
    ids = {id_of(text[0]) for text in SOURCES["a"]}
    of_a = []
    for tokens, targets in rows_of(folders, 0, 12):
        found = {token in ids for token in (*tokens, *targets) if token > FIRST_ID}
        assert len(found) == 1
        of_a += found
    for n, count in enumerate(itertools.accumulate(of_a), start=1):
        assert abs(count - WEIGHTS[0] * n) < 1


def test_weights_are_rows_of_a_cycle():
    assert rows_per_cycle([0.7, 0.3]) == [7, 3]
    assert rows_per_cycle([0.3333, 0.3333, 0.3334]) == [3333, 3333, 3334]
    assert rows_per_cycle([0.0001, 0.9999]) == [1, CYCLE - 1]
    assert rows_per_cycle([1.0]) == [1]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.7, 0.2], r"the weights are 0\.7 \+ 0\.2 = 0\.9; they must sum to 1"),
        ([7.0, 3.0], "7 \\+ 3 = 10; they must sum to 1"),
        ([1.2, -0.2], r"a weight is -0\.2; it must be above 0"),
        ([1.0, 0.0], r"a weight is 0\.0; it must be above 0"),
        ([0.5, math.nan], "a weight is nan; it must be above 0"),
        ([0.5, math.inf], "a weight is inf; it must be above 0"),
        ([0.33333, 0.66667], r"a weight is 0\.33333; give at most four decimals .* as 0\.3333"),
        ([0.00001, 0.99999], "a weight is 1e-05; give at most four decimals"),
        ([], "they must sum to 1"),
    ],
)
def test_weights_that_are_refused(weights, said):
    with pytest.raises(ValueError, match=said) as caught:
        rows_per_cycle(weights)
    assert "\n" not in str(caught.value)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_every_document_once_over_any_ranks_and_workers_resumed_with_others(folders, number):
    """One source, and a mixture of two."""
    folders = folders[:number]
    steps, stop = 24, 11
    expected = rows_of(folders, 0, steps)
    kinds = list(itertools.product((1, 2, 4), (0, 1, 2)))
    first = {kind: rows_of(folders, 0, stop, *kind) for kind in kinds}
    rest = {kind: rows_of(folders, stop, steps, *kind) for kind in kinds}
    for before, after in itertools.product(kinds, kinds):
        assert first[before] + rest[after] == expected
    for folder, documents in zip(folders, SOURCES.values(), strict=False):
        own = {id_of(text[0]): len(text) for text in documents}
        size = loader_of([folder]).num_windows
        rows = [row for row in expected if own.keys() & {*row[0], *row[1]}]
        assert len(rows) > 2 * size
        for start in (0, size):  # two epochs
            epoch = rows[start : start + size]
            counts = Counter(target for _, targets in epoch for target in targets)
            assert {token: counts[token] for token in own} == own
            assert counts[byte_tokenizer().eos_id] == len(own)
        assert sorted(rows[:size]) == sorted(rows[size : 2 * size])
        assert rows[:size] != rows[size : 2 * size]


def test_any_step_is_read_at_once(folders):
    """Not through the steps before it."""
    step = 10**12 // BATCH
    sources, places = loader_of(folders).locate(np.arange(step * BATCH, step * BATCH + 40))
    for source, weight in enumerate(WEIGHTS):
        assert abs(places[sources == source][0] - weight * step * BATCH) <= 1
        assert (np.diff(places[sources == source]) == 1).all()
    assert loader_of(folders).batch(step).tokens.shape == (BATCH, SEQ_LEN)


def test_the_fingerprint_is_of_data_weights_and_seed(folders):
    same = loader_of(folders).fingerprint
    assert same == loader_of(folders, 4, 3).fingerprint
    others = [
        loader_of(folders[::-1]),
        loader_of(folders, weights=(0.6, 0.4)),
        loader_of(folders, seed=4),
        loader_of(folders, batch_size=4),
    ]
    assert len({same, *(other.fingerprint for other in others)}) == 5


def test_bytes_are_those_of_the_targets(folders):
    batch = loader_of(folders).batch(0)
    assert batch.num_bytes == int((batch.targets > FIRST_ID).sum())
    parts = [loader_of(folders, 4, rank).batch(0).num_bytes for rank in range(4)]
    assert sum(parts) == batch.num_bytes


def test_loaders_that_do_not_fit(folders, tmp_path):
    options = {"seq_len": SEQ_LEN, "batch_size": BATCH}
    one = TokenLoader(folders[0], **options)
    other = train_bpe(["some text some text"], 262)
    text = folders[1].with_suffix(".jsonl")
    prepare(str(text), tmp_path / "other", tokenizer=other, val_fraction=0.0)
    with pytest.raises(ValueError, match=r"different tokenizers .*: prepare one with --tokenizer"):
        MixtureLoader([one, TokenLoader(tmp_path / "other", **options)], WEIGHTS)
    with pytest.raises(ValueError, match="differ in seed"):
        MixtureLoader([one, TokenLoader(folders[1], **options, seed=1)], WEIGHTS)
    with pytest.raises(ValueError, match="step=-1 is negative"):
        loader_of(folders).batch(-1)


def test_a_line_per_source(folders):
    first, second = loader_of(folders).in_words()
    steps = loader_of(folders[:1]).num_windows / (0.65 * BATCH)
    assert first.startswith(f"65.00% of the rows: {folders[0]}.jsonl: 24 documents, 0 duplicates")
    assert first.endswith(f"; read once in {steps:,.1f} steps, then in a new order")
    assert second.startswith("35.00% of the rows: ")


def test_a_tokenizer_sees_the_beginnings_by_weight_and_nothing_held_out(tmp_path):
    kinds = {}
    for name in ("a", "b"):
        rows = (json.dumps({"body": f"{name} {i:04} " * 8}) + "\n" for i in range(400))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        kinds[name] = (str(tmp_path / f"{name}.jsonl"), "body")
    options = {"val_fraction": 0.25, "seed": 0}
    texts = list(tokenizer_texts([*kinds.values()], [0.75, 0.25], **options, max_bytes=8000))
    sizes = Counter(text[0] for text in texts for _ in text)
    assert 6000 <= sizes["a"] < 6100 and 2000 <= sizes["b"] < 2100
    everything = list(tokenizer_texts([kinds["a"]], [1.0], **options, max_bytes=10**6))
    data = prepare(kinds["a"][0], tmp_path / "out", column="body", tokenizer=byte_tokenizer(),
                   val_fraction=0.25)  # fmt: skip
    assert len(everything) == data.splits["train"].num_documents < 400
    train = TokenLoader(tmp_path / "out", seq_len=8, batch_size=1).text().decode()
    assert all(text in train for text in everything)
