import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openmythos.data.index import read_index
from openmythos.data.loader import TokenLoader, read_ahead
from openmythos.data.prepare import prepare
from openmythos.tokenizer import EOS_TOKEN, Tokenizer, byte_tokenizer

TENSORS = ("tokens", "targets", "documents", "positions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    (root / "corpus").mkdir()
    for i in range(80):
        (root / "corpus" / f"{i}.txt").write_text(f"{i}: " + "word é " * (i % 7 * 3))
    out = root / "out"
    # Shards of 64 tokens, so that windows cross one border or several.
    prepare(str(root / "corpus"), out, tokenizer=byte_tokenizer(), max_shard_tokens=64)
    return out


def stream(folder, split="train"):
    """All tokens of a split, in order, read as one row."""
    one = TokenLoader(folder, split, seq_len=1, batch_size=1)
    row = TokenLoader(folder, split, seq_len=one.num_tokens - 1, batch_size=1)
    batch = next(iter(row.validation_batches()))
    return [*batch.tokens[0].tolist(), row.tokenizer.eos_id]


def same(a, b):
    assert a.num_bytes == b.num_bytes
    for name in TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name))


@settings(max_examples=30)
@given(st.integers(1, 90), st.integers(1, 9))
def test_validation_shows_every_token_but_bos_once_in_order(folder, seq_len, batch_size):
    loader = TokenLoader(folder, "val", seq_len=seq_len, batch_size=batch_size)
    batches = list(loader.validation_batches())
    targets = torch.cat([batch.targets[batch.targets != -100] for batch in batches]).tolist()
    tokens = stream(folder, "val")
    assert targets == [token for token in tokens if token != loader.tokenizer.bos_id]
    assert sum(batch.num_bytes for batch in batches) == loader.num_bytes
    assert {tuple(batch.tokens.shape) for batch in batches} == {(batch_size, seq_len)}
    assert len(batches) == loader.num_steps_per_epoch


@settings(max_examples=12)
@given(st.integers(12, 200), st.integers(1, 7), st.integers(0, 9))
def test_an_epoch_of_training_shows_every_window_once(folder, seq_len, batch_size, seed):
    loader = TokenLoader(folder, seq_len=seq_len, batch_size=batch_size, seed=seed)
    rows = []
    for step in range(loader.num_steps_per_epoch):
        batch = loader.batch(step)
        rows += zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    epoch = rows[: loader.num_windows]
    targets = sorted(t for _, row in epoch for t in row if t != -100)
    assert targets == sorted(t for t in stream(folder) if t != loader.tokenizer.bos_id)


def test_epochs_differ_and_a_batch_straddles_them(folder):
    loader = TokenLoader(folder, seq_len=16, batch_size=4, seed=3)
    size = loader.num_windows
    rows = [row for step in range(size) for row in loader.batch(step).tokens.tolist()]  # 4 epochs
    epochs = [rows[i * size : (i + 1) * size] for i in range(4)]
    assert size % 4
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))


def test_a_split_smaller_than_a_batch_is_repeated(folder):
    loader = TokenLoader(folder, "val", seq_len=64, batch_size=32)
    assert loader.num_windows < 16
    rows = loader.batch(0).tokens.tolist()
    assert {tuple(row) for row in rows[: loader.num_windows]} == {tuple(row) for row in rows}


@settings(max_examples=20)
@given(st.integers(0, 500), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_ranks_partition_the_global_batch(folder, step, world_size):
    options = {"seq_len": 20, "batch_size": 12, "seed": 5}
    whole = TokenLoader(folder, **options).batch(step)
    parts = [
        TokenLoader(folder, **options, rank=rank, world_size=world_size).batch(step)
        for rank in range(world_size)
    ]
    for name in TENSORS:
        stacked = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
        assert torch.equal(stacked, getattr(whole, name))
    assert sum(part.num_bytes for part in parts) == whole.num_bytes


def test_ranks_share_validation_evenly(folder):
    parts = [
        list(
            TokenLoader(
                folder, "val", seq_len=16, batch_size=8, rank=r, world_size=4
            ).validation_batches()
        )
        for r in range(4)
    ]
    assert len({len(part) for part in parts}) == 1
    whole = TokenLoader(folder, "val", seq_len=16, batch_size=8)
    assert sum(b.num_bytes for part in parts for b in part) == whole.num_bytes
    assert len(list(whole.validation_batches(max_batches=2))) == 2


def test_a_batch_is_a_pure_function_of_seed_and_step(folder):
    one = TokenLoader(folder, seq_len=16, batch_size=4, seed=1)
    two = TokenLoader(folder, seq_len=16, batch_size=4, seed=1)
    for step in (0, 91, 3, 0):
        same(one.batch(step), two.batch(step))
    other = TokenLoader(folder, seq_len=16, batch_size=4, seed=2)
    assert not torch.equal(one.batch(0).tokens, other.batch(0).tokens)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    ranked = TokenLoader(folder, seq_len=16, batch_size=4, seed=1, rank=1, world_size=2)
    assert ranked.fingerprint == one.fingerprint


def test_reading_ahead_gives_the_same_batches(folder):
    loader = TokenLoader(folder, seq_len=16, batch_size=4)
    ahead = read_ahead(loader, 7)
    for step in range(7, 27):
        same(next(ahead), loader.batch(step))
    ahead.close()


def test_one_id_for_begin_and_end_changes_the_ids_and_nothing_else(tmp_path):
    """As Ouro, GPT-2, Qwen and SmolLM2 have it: every end of a document is a target."""
    ours = byte_tokenizer()
    ours.save(tmp_path / "ours")
    shared = Tokenizer.load(tmp_path / "ours", bos_token=EOS_TOKEN, pad_token=EOS_TOKEN)
    (tmp_path / "corpus").mkdir()
    for i in range(60):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"{i}: " + "word é " * (i % 7 * 3))
    loaders = {}
    for tokenizer in (ours, shared):
        out = tmp_path / f"data{tokenizer.bos_id}"
        prepare(str(tmp_path / "corpus"), out, tokenizer=tokenizer, max_shard_tokens=64)
        loaders[tokenizer.bos_id] = [
            TokenLoader(out, split, seq_len=20, batch_size=4) for split in ("train", "val")
        ]
    for apart, together in zip(*loaders.values(), strict=True):
        num_ends = 0
        pairs = zip(apart.validation_batches(), together.validation_batches(), strict=True)
        for expected, found in pairs:
            for name in ("documents", "positions"):
                assert torch.equal(getattr(found, name), getattr(expected, name))
            assert torch.equal(found.targets, expected.targets)  # eos has the same id in both
            assert found.num_bytes == expected.num_bytes
            num_ends += int((found.targets == shared.eos_id).sum())
        assert num_ends == read_index(tmp_path / "data1").splits[apart.split].num_documents


def test_rows_continue_documents(folder):
    loader = TokenLoader(folder, seq_len=8, batch_size=8)
    bos = loader.tokenizer.bos_id
    tokens = torch.cat([batch.tokens for batch in loader.validation_batches()])
    documents = torch.cat([batch.documents for batch in loader.validation_batches()])
    assert (tokens[:, 0] != bos).any()
    assert set(documents[:, 0].tolist()) == {0, -1} or set(documents[:, 0].tolist()) == {0}


def test_arguments_out_of_range(folder):
    good = {"seq_len": 8, "batch_size": 4}
    for options, message in [
        ({"split": "test"}, "unknown split 'test': choose one of train, val"),
        ({"seq_len": 0}, "seq_len is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 cannot be shared"),
        ({"world_size": 3}, "batch_size=4 cannot be shared by 3 ranks.*multiple of 3"),
        ({"rank": 1}, "rank=1 of world_size=1 is out of range"),
        ({"seq_len": 100_000}, "fewer than the 100001 of one row: lower seq_len"),
        ({"tokenizer_fingerprint": "f" * 64}, "tokenizer mismatch: .* the model uses ffffffffffff"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenLoader(folder, **{**good, **options})
    with pytest.raises(ValueError, match="step=-1 is negative"):
        TokenLoader(folder, **good).batch(-1)
    fingerprint = byte_tokenizer().fingerprint
    assert TokenLoader(folder, **good, tokenizer_fingerprint=fingerprint)


def test_damage_is_found(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n\n" * 900)
    data = prepare(str(tmp_path / "a.txt"), tmp_path / "out", vocab_size=300)
    shard = data.folder / data.splits["train"].shards[0].file
    shard.write_bytes(b"\1\1" + shard.read_bytes()[2:])
    assert TokenLoader(tmp_path / "out", seq_len=8, batch_size=1, verify=False)
    with pytest.raises(ValueError, match="does not match its SHA-256"):
        TokenLoader(tmp_path / "out", seq_len=8, batch_size=1)


def test_an_empty_split_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n\n" * 90)
    prepare(str(tmp_path / "a.txt"), tmp_path / "out", vocab_size=300, val_fraction=0.0)
    with pytest.raises(ValueError, match=r"the val split of .* has 0 tokens.*val-fraction"):
        TokenLoader(tmp_path / "out", "val", seq_len=8, batch_size=1)


def test_a_validation_split_shorter_than_a_row_is_one_row(tmp_path):
    rows = [f'{{"text": "row number {i}"}}\n' for i in range(120)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    data = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", vocab_size=300)
    loader = TokenLoader(tmp_path / "out", "val", seq_len=512, batch_size=2)
    assert loader.num_tokens < 512
    (batch,) = loader.validation_batches()
    assert batch.tokens.shape == (2, 512)
    assert batch.num_bytes == data.splits["val"].num_bytes
    num_documents = data.splits["val"].num_documents
    assert int((batch.targets != -100).sum()) == loader.num_tokens - num_documents
    assert int((batch.targets == loader.tokenizer.eos_id).sum()) == num_documents


def test_a_batch_of_16_rows_of_256_is_fast(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n\n" for i in range(20_000)))
    prepare(str(tmp_path / "a.txt"), tmp_path / "out", tokenizer=byte_tokenizer())
    loader = TokenLoader(tmp_path / "out", seq_len=256, batch_size=16)
    loader.batch(0)
    times = []
    for step in range(50):
        start = time.perf_counter()
        loader.batch(step)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.002  # 0.15 ms without checked shapes
