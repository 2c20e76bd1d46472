import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openmythos.config import LearnedLoopConfig
from openmythos.config.adapter import AdapterConfig
from openmythos.data.conversation import contents, conversation, encode_conversation
from openmythos.data.file import LeftOut
from openmythos.data.loader import TokenLoader
from openmythos.data.packing import on_device, whole_documents
from openmythos.data.prepare import prepare
from openmythos.data.source import read_source
from openmythos.interop.adapter import new_adapter
from openmythos.model.adapter import changes_of
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cross_entropy import cross_entropy
from openmythos.tokenizer import Tokenizer, byte_tokenizer
from tests.foreign import MARKED, write_chat_folder
from tests.strategies import random_model, randomise, small_config

TALK = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_chat_folder(tmp_path_factory.mktemp("chat"))
    (folder / "chat_template.jinja").write_text(MARKED["turns (Gemma)"], encoding="utf-8")
    return Tokenizer.load(folder)


def turn(role: str, content: object = "x") -> dict[str, object]:
    return {"role": role, "content": content}


def test_rows_of_three_kinds() -> None:
    pair = conversation({"prompt": "one", "completion": "two", "id": 3}, "row")
    assert pair == conversation({"messages": TALK, "prompt": None}, "row")
    assert json.loads(pair) == {"messages": TALK}
    assert json.loads(conversation({"text": "é"}, "row")) == {"text": "é"}
    empty = {"tool_calls": None, "weight": None}  # as tables have it in every row
    whole = [message | empty for message in TALK]
    assert pair == conversation({"messages": whole, "tools": []}, "row")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "row 3 is a list, not an object with messages"),
        ({"body": "x"}, "row 3 has no messages, .* no text; its columns are: body"),
        ({"prompt": "x"}, "its columns are: prompt"),
        ({"messages": []}, "row 3 messages is a list; give a list of messages"),
        ({"messages": "x"}, "messages is text; give a list"),
        ({"messages": ["x"]}, "message 1 is no object with a role"),
        ({"messages": [turn("tool")]}, "message 1 has the role 'tool'; known are system, user"),
        ({"messages": [turn("assistant")]}, "'assistant', where system or user is due"),
        ({"messages": [turn("user"), turn("user")]}, "message 2 .*'user', where assistant is due"),
        ({"messages": [turn("user"), turn("system")]}, "'system', where assistant is due"),
        ({"messages": [turn("user")]}, "ends with a message of the user: no answer"),
        ({"messages": [turn("user", " "), turn("assistant")]}, "message 1 is empty"),
        ({"messages": [turn("user"), turn("assistant", None)]}, "message 2 holds null, not text"),
        ({"prompt": "x", "completion": ""}, "row 3 completion is empty"),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, "row 3 prompt holds a list, not text"),
        ({"messages": TALK, "tools": [{"name": "f"}]}, "row 3 has tools, .*: take it out"),
        ({"messages": [TALK[0], TALK[1] | {"tool_calls": [{}]}]}, "message 2 has tool_calls"),
        ({"messages": [TALK[0], TALK[1] | {"thinking": "hm"}]}, "message 2 has thinking"),
        ({"messages": [TALK[0], TALK[1] | {"weight": 0}]}, "message 2 has weight 0"),
        ({"text": 3}, "row 3 text holds a whole number, not text"),
    ],
)
def test_rows_that_are_refused(row: object, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        conversation(row, "row 3")
    assert "\n" not in str(caught.value)


def test_which_tokens_count(tokenizer: Tokenizer) -> None:
    text = conversation({"messages": TALK}, "row")
    ids, answers = encode_conversation(text, tokenizer, "answers")
    # And the mark of the end, which has no text.
    assert tokenizer.decode(ids[answers].tolist()) == "two\n"
    everything, counted = encode_conversation(text, tokenizer, "all")
    assert np.array_equal(everything, ids) and counted.all()
    plain, counted = encode_conversation(conversation({"text": "one"}, "r"), tokenizer, "answers")
    expected = [tokenizer.bos_id, *tokenizer.encode("one"), tokenizer.eos_id]
    assert plain.tolist() == expected and counted.all()


def test_tables_of_conversations(tmp_path: Path) -> None:
    rows = [{"messages": TALK}, {"messages": [*TALK, turn("user")]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"id": [1], "messages": [TALK]}), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("prompt,completion\none,two\n")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("text")
    bad, good = [], []
    for item in read_source(str(tmp_path), None):
        bad += [item.reason] if isinstance(item, LeftOut) else []
        good += [] if isinstance(item, LeftOut) else [item.text]
    assert good == [conversation({"messages": TALK}, "")] * 3
    parts = (
        "a.jsonl line 2 ends with",
        "d.parquet has no messages",
        "e.txt is a text and no table",
    )
    assert len(bad) == 3 and all(part in said for part, said in zip(parts, bad, strict=True))
    with pytest.raises(ValueError, match="python-docs holds text and no conversations"):
        read_source("python-docs", None)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 9))
def test_windows_hold_whole_documents_in_order(lengths: list[int], seq_len: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts, stops = whole_documents(offsets, seq_len)
    held = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        assert 0 < stop - start <= seq_len + 1
        inside = [o for o in offsets[:-1].tolist() if start <= o < stop]
        held += inside
        if stop not in offsets:  # cut: alone
            assert len(inside) == 1 and stop - start == seq_len + 1
        elif stop < offsets[-1]:  # the next one did not fit
            assert offsets[len(held) + 1] - start > seq_len + 1
    assert held == offsets[:-1].tolist()


def write_rows(folder: Path) -> Path:
    """20 short conversations, one whose answer is too long for a row, one whose question is."""
    long = [turn("user", "short"), turn("assistant", "w" * 300)]
    late = [turn("user", "q" * 300), turn("assistant", "late")]
    talks = [[turn("user", f"q{i}" * (i % 4 + 1)), turn("assistant", f"a{i}")] for i in range(20)]
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": t}) + "\n" for t in (*talks, long, late)))
    return path


def test_packed_conversations_are_learnt_as_each_alone(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    options = {"tokenizer": tokenizer, "val_fraction": 0.2, "conversations": "answers"}
    data = prepare(str(write_rows(tmp_path)), tmp_path / "out", **options, max_shard_tokens=50)
    assert prepare(str(tmp_path / "talks.jsonl"), tmp_path / "out", **options,
                   max_shard_tokens=50).reused  # fmt: skip
    loaders = [TokenLoader(data.folder, s, seq_len=96, batch_size=4) for s in ("train", "val")]
    assert sum(loader.num_cut for loader in loaders) == 1
    assert sum(loader.num_skipped for loader in loaders) == 1
    said = "".join(loader.cut_in_words() for loader in loaders)
    assert "1 conversations are cut after 97 tokens" in said and "1 are left out" in said
    answers: list[str] = []
    models = learners()
    for loader in loaders:
        documents = [loader.document(n) for n in range(data.splits[loader.split].num_documents)]
        batches = list(loader.validation_batches())
        for batch in batches:
            for targets in batch.targets.tolist():
                kept = [token for token in targets if token != -100]
                answers += loader.tokenizer.decode(kept).split("\n")[:-1]
        for model in models:
            packed = torch.zeros(())
            for batch in batches:
                moved, ctx = on_device(model, batch)
                logits = model(moved.tokens, ctx=ctx).logits
                packed = packed + cross_entropy(logits, batch.targets).sum()
            alone = torch.zeros(())
            for document in documents:
                ids, counted = (torch.from_numpy(a[:97]) for a in document)
                if counted.any():
                    targets = torch.where(counted[1:], ids[1:], -100)[None]
                    alone = alone + cross_entropy(model(ids[None, :-1]).logits, targets).sum()
            learnt = [p for p in model.parameters() if p.requires_grad]
            gradients = [torch.autograd.grad(loss, learnt) for loss in (packed, alone)]
            for one, other in zip(*gradients, strict=True):
                assert (one - other).abs().max() <= 1e-12 * max(1, other.abs().max())
                assert one.any()
    assert sorted(a for a in answers if a[0] == "a") == sorted(f"a{i}" for i in range(20))


def learners() -> list[RecurrentDepthLM]:
    """Models with random weights; all are trained, an adapter, or one with a change per loop."""
    config = small_config(
        vocab_size=300, max_seq_len=512, loop_embedding=LearnedLoopConfig(num_loops=3)
    )
    models = [random_model(config) for _ in range(3)]
    for model, num_loops in zip(models[1:], (None, 3), strict=True):
        adapter = AdapterConfig(rank=2, alpha=1.0, num_loops=num_loops)
        new_adapter(model, adapter, "base", seed=0)
        for changes in changes_of(model).values():
            randomise(torch.nn.ModuleList(changes))
    return [model.double() for model in models]


def test_conversations_that_cannot_be_prepared(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path))
    for without in (None, byte_tokenizer()):
        with pytest.raises(ValueError, match="need a tokenizer with a chat template"):
            prepare(path, tmp_path / "out", tokenizer=without, conversations="answers")
    with pytest.raises(ValueError, match=r"not in the column 'talk'.* leave --column out"):
        prepare(path, tmp_path / "out", tokenizer=tokenizer, column="talk", conversations="answers")
    (tmp_path / "chatml").mkdir()
    unmarked = Tokenizer.load(write_chat_folder(tmp_path / "chatml"))
    with pytest.raises(ValueError, match=r"talks.jsonl:1: the checkpoint's .* does not mark"):
        prepare(path, tmp_path / "out", tokenizer=unmarked, conversations="answers")
    data = prepare(path, tmp_path / "out", tokenizer=unmarked, conversations="all")
    assert data.num_left_out == 0 and data.num_duplicates == 0
    loader = TokenLoader(data.folder, seq_len=64, batch_size=2)
    assert loader.document(0)[1][1:].all()
    late = {"tokenizer": tokenizer, "conversations": "answers", "val_fraction": 0.0}
    row = {"messages": [turn("user", "q" * 90), turn("assistant", "late")]}
    (tmp_path / "late.jsonl").write_text(json.dumps(row))
    prepare(str(tmp_path / "late.jsonl"), tmp_path / "late", **late)
    with pytest.raises(ValueError, match=r"no conversation of .* has an answer within 64 tokens"):
        TokenLoader(tmp_path / "late", seq_len=64, batch_size=1)


def test_all_that_is_said_is_what_a_tokenizer_must_have_tokens_for() -> None:
    """As it is said, and not as JSON writes it."""
    told = conversation({"prompt": "Say \x04.", "completion": "No\x06."}, "row 1")
    assert contents(told) == "\nSay \x04.\nNo\x06." and "\x04" not in told
    assert contents(conversation({"text": "a\x04b"}, "row 1")) == "a\x04b"
