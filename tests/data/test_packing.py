import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from openmythos.data.packing import num_windows, on_device, pack_windows
from tests.strategies import random_model, small_config

BOS, EOS, PAD = 0, 1, 2
SIZES = np.array([0, 0, 0, 1, 2, 3, 4], dtype=np.int64)


def stream_of(documents, eos=EOS):
    """The tokens of the documents, and which of them begin one."""
    pieces = [[BOS, *document, eos] for document in documents]
    starts = [[True, *(False for _ in piece[1:])] for piece in pieces]
    return np.concatenate(pieces).astype(np.int64), np.concatenate(starts)


def pack(stream_and_starts, seq_len):
    stream, starts = stream_and_starts
    count = num_windows(len(stream), seq_len)
    # rubbish past the end must not be seen
    spans = np.full((count, seq_len + 1), 6, dtype=np.int64)
    begins = np.ones(spans.shape, dtype=np.bool_)
    valid = np.zeros(count, dtype=np.int64)
    for i in range(count):
        window = slice(i * seq_len, (i + 1) * seq_len + 1)
        valid[i] = len(stream[window])
        spans[i, : valid[i]], begins[i, : valid[i]] = stream[window], starts[window]
    return pack_windows(spans, begins, valid, pad_id=PAD, token_num_bytes=SIZES)


# Many models begin, end and pad with one id.
streams = st.builds(
    stream_of,
    st.lists(st.lists(st.integers(3, 6), max_size=7), min_size=1, max_size=6),
    st.sampled_from([EOS, BOS]),
)


@given(streams, st.integers(1, 9))
def test_every_token_but_the_first_of_a_document_is_a_target_once(stream, seq_len):
    tokens, starts = stream
    batch = pack(stream, seq_len)
    targets = batch.targets[batch.targets != -100].tolist()
    assert targets == tokens[~starts].tolist()
    assert batch.num_bytes == SIZES[tokens].sum()
    inputs = batch.tokens[batch.documents >= 0].tolist()
    assert inputs == tokens[:-1].tolist()


@given(streams, st.integers(1, 9))
def test_documents_and_positions_agree_with_a_walk_along_the_stream(stream, seq_len):
    tokens, starts = stream
    batch = pack(stream, seq_len)
    rows = zip(
        batch.tokens.tolist(), batch.documents.tolist(), batch.positions.tolist(), strict=True
    )
    for row, (inputs, documents, positions) in enumerate(rows):
        document, position = 0, 0
        for column, token in enumerate(inputs):
            place = row * seq_len + column
            if place >= len(tokens) - 1:
                assert (token, documents[column], positions[column]) == (PAD, -1, 0)
                continue
            if starts[place] and column > 0:
                document, position = document + 1, 0
            assert (documents[column], positions[column]) == (document, position)
            position += 1


@given(streams, st.integers(1, 9))
def test_a_target_belongs_to_the_document_of_its_token(stream, seq_len):
    batch = pack(stream, seq_len)
    has_loss = batch.targets[:, :-1] != -100
    same = batch.documents[:, :-1] == batch.documents[:, 1:]
    # At a row's last columns the next token may be padding; otherwise loss means the same document.
    padded_next = batch.documents[:, 1:] == -1
    assert bool((same | padded_next)[has_loss].all())


def test_example():
    batch = pack(stream_of([[3, 4], [5]]), 4)  # 0 3 4 1 | 0 5 1
    assert batch.tokens.tolist() == [[0, 3, 4, 1], [0, 5, PAD, PAD]]
    assert batch.targets.tolist() == [[3, 4, 1, -100], [5, 1, -100, -100]]
    assert batch.documents.tolist() == [[0, 0, 0, 0], [0, 0, -1, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.num_bytes == 1 + 2 + 3
    assert all(t.dtype == torch.int64 for t in (batch.tokens, batch.targets, batch.documents))


def test_one_id_for_begin_and_end_is_learnt_as_an_end():
    batch = pack(stream_of([[3, 4], []], eos=BOS), 6)  # 0 3 4 0 | 0 0
    assert batch.tokens.tolist() == [[0, 3, 4, 0, 0, PAD]]
    assert batch.targets.tolist() == [[3, 4, 0, -100, 0, -100]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 1, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 0]]


def test_to_moves_every_tensor():
    moved = pack(stream_of([[3, 4]]), 4).to("meta")
    tensors = (moved.tokens, moved.targets, moved.documents, moved.positions)
    assert {t.device.type for t in tensors} == {"meta"}
    assert moved.num_bytes == 3


def test_num_windows():
    assert [num_windows(n, 4) for n in (0, 1, 2, 5, 6, 9)] == [0, 0, 1, 1, 2, 2]


def test_rows_of_one_whole_document_need_no_mask():
    model = random_model(small_config())
    batch = pack(stream_of([[3, 4], [5]]), 4)  # 0 3 4 1 | 0 5 and padding
    two = pack(stream_of([[3], [4]]), 5)  # 0 3 1 0 4
    masks = [on_device(model, rows)[1].mask for rows in (batch.rows(0, 1), batch, two)]
    assert [mask is None for mask in masks] == [True, False, False]
