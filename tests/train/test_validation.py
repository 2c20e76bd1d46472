import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.engine.reference import generate
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.validation import (
    held_out_bits,
    held_out_bits_per_byte,
    puzzle_accuracy,
    puzzle_right,
)
from tests.strategies import random_model
from tests.train.examples import loader, oracle, small_walks, tiny_model

# --- held-out text -------------------------------------------------------------------------------


def test_bits_per_byte_by_hand(prepared: Path) -> None:
    model = random_model(tiny_model(max_seq_len=32)).train()
    bits = held_out_bits_per_byte(model, loader(prepared), 2)
    assert model.training
    nats, num_bytes = 0.0, 0
    for batch in loader(prepared, batch_size=1).validation_batches():
        documents, targets = batch.documents[0], batch.targets[0]
        for number in documents[documents >= 0].unique():
            chosen = documents == number
            logits = model.eval()(batch.tokens[:, chosen], num_loops=2).logits[0]
            nats += float(
                functional.cross_entropy(logits, targets[chosen], reduction="sum").detach()
            )
        num_bytes += int((targets >= 3).sum())  # ids of the byte tokenizer: 3 + byte
    split = loader(prepared)
    assert num_bytes == split.num_bytes
    assert bits == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_bits_are_counted_by_document(prepared: Path) -> None:
    """Documents go on over rows and batches; a batch's bytes are shared among them."""
    model, split = random_model(tiny_model(max_seq_len=32)), loader(prepared, "train")
    numbers = split.document_of(np.arange(split.num_tokens))
    second = int(np.argmax(numbers == 1))  # where the second document begins
    num_batches = second // (4 * 32) + 1
    documents = held_out_bits(model, split, 1, num_batches)
    sizes = [size for _, size in documents]
    assert len(sizes) == 2 and sizes[0] == second - 2  # without bos and eos; ids are bytes
    assert sum(sizes) == sum(batch.num_bytes for batch in split.validation_batches(num_batches))
    total = sum(bits for bits, _ in documents) / sum(sizes)
    assert total == held_out_bits_per_byte(model, split, 1, num_batches)
    first = held_out_bits(model, loader(prepared, "train", 1), 1, second // 32 + 1)[0]
    assert first == pytest.approx(documents[0], rel=1e-5)


def test_bits_per_byte_does_not_depend_on_the_batch(prepared: Path) -> None:
    model = random_model(tiny_model())
    values = [held_out_bits_per_byte(model, loader(prepared, batch_size=b), 3) for b in (1, 5, 16)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    first = held_out_bits_per_byte(model, loader(prepared), 3, max_batches=1)
    assert first != pytest.approx(values[0], rel=1e-4)


def test_an_untrained_model_knows_nothing(prepared: Path) -> None:
    model = RecurrentDepthLM(tiny_model())
    split = loader(prepared)
    targets = sum(int((b.targets >= 0).sum()) for b in split.validation_batches())
    guess = math.log2(300) * targets / split.num_bytes
    # A little above: its logits are small and random, not equal.
    assert guess <= held_out_bits_per_byte(model, split, 1) < 1.1 * guess


# --- held-out walks ------------------------------------------------------------------------------


def test_hops_accuracy_counts_right_answers() -> None:
    walks = small_walks()
    assert puzzle_accuracy(model := oracle(walks, right=True), walks, 6, 1, 128, 0) == 1.0
    assert model.training
    wrong = puzzle_accuracy(oracle(walks, right=False), walks, 6, 1, 512, 0)
    expected = (walks.held_out_batch(6, 512, 0).targets[:, -1] == 0).float().mean()
    assert 0 < wrong < 0.3 and wrong == pytest.approx(float(expected))


def test_a_chain_is_right_if_the_model_writes_it_by_itself() -> None:
    """With two entities, even random weights write some chains of three right."""
    walks = Walks(HopsConfig(num_entities=2, num_relations=2, written_out=True))
    model = random_model(tiny_model(rope=None))  # with positions, decoding counts on
    batch = walks.held_out_batch(3, 64, seed=5)
    # Weights that know two ids only: no chain would be right with the others among them.
    with torch.no_grad():
        model.embed.weight[2:] *= 0.01
    written = generate(model, batch.tokens[:, :4], max_new_tokens=3, num_loops=2).tokens
    expected = [
        new == entities[3:] for new, entities in zip(written, batch.targets.tolist(), strict=True)
    ]
    assert puzzle_right(model, walks, 3, 2, 64, 5).tolist() == expected
    assert 0 < sum(expected) < 64
