import pytest
import torch

from openmythos.analysis.example import CONTROL, puzzle_examples, text_examples
from openmythos.data.packing import IGNORED_TARGET
from openmythos.data.puzzle_table import CONFIGS, make_puzzle
from openmythos.data.synthetic import HopsConfig, Walks
from tests.strategies import random_model, small_config


def test_walks_ask_for_their_end_and_know_the_way() -> None:
    walks = Walks(HopsConfig())
    found = puzzle_examples(walks, 4, 20, seed=3)
    along = torch.from_numpy(walks.entities_along(found.tokens.numpy()))
    assert found.asked.sum(dim=1).tolist() == [1] * 20 and bool(found.asked[:, -1].all())
    assert torch.equal(found.answers[:, -1], along[:, -1])
    for hop in (1, 2, 3):
        assert torch.equal(found.concepts[f"entity after hop {hop}"][:, -1], along[:, hop])
    control = found.concepts[CONTROL][:, -1]
    assert bool((control < 16).all()) and not bool((along == control[:, None]).any())
    assert found.what == "walks of 4 hops" and not found.is_text


def test_a_walk_over_all_entities_has_no_control() -> None:
    walks = Walks(HopsConfig(num_entities=2, num_relations=2))
    found = puzzle_examples(walks, 6, 50)
    along = walks.entities_along(found.tokens.numpy())
    whole = torch.tensor([len({*row[1:]}) == 2 for row in along.tolist()])
    absent = found.concepts[CONTROL][:, -1] == IGNORED_TARGET
    assert torch.equal(absent, whole) and bool(whole.any())


WAYS = {
    "products": [f"product of {n} factors" for n in range(2, 6)],
    "recall": [],
    "facts": [],
    "induction": ["letter after hop 1", "letter after hop 2"],
    "addition": ["1s of the first 2 numbers", "1s of the first 3 numbers"],
}
SIZES = {"products": 6, "recall": 4, "facts": 1, "induction": 3, "addition": 4}


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_puzzle_asks_for_its_answer_and_has_a_control_that_could_be_one(kind: str) -> None:
    puzzle, size = make_puzzle(CONFIGS[kind](), seed=5), SIZES[kind]
    found, whole = puzzle_examples(puzzle, size, 40, seed=2), puzzle.held_out_batch(size, 40, 2)
    asked = puzzle.question_len(size)
    assert torch.equal(found.tokens, whole.tokens[:, :asked])
    assert torch.equal(found.answers[:, -1], whole.targets[:, asked - 1])
    assert found.asked.sum(dim=1).tolist() == [1] * 40
    assert [*found.concepts] == [*WAYS[kind], CONTROL]
    control = found.concepts[CONTROL][:, -1]
    known = control != IGNORED_TARGET
    edges = torch.tensor(puzzle.kinds).cumsum(0)
    kinds = [(edges <= words[known, None]).sum(dim=1) for words in (control, found.answers[:, -1])]
    assert torch.equal(*kinds) and int(known.sum()) >= 10
    for name in WAYS[kind]:
        assert not bool((found.concepts[name][known, -1] == control[known]).any())
    assert not bool((found.answers[known, -1] == control[known]).any())


def test_results_on_the_way_are_the_answers_of_shorter_questions() -> None:
    products = make_puzzle(CONFIGS["products"](), seed=0)
    found = puzzle_examples(products, 5, 20)
    for size in (2, 3, 4):
        shorter = products.targets(found.tokens[:, :size].numpy())[:, -1]
        assert found.concepts[f"product of {size} factors"][:, -1].tolist() == shorter.tolist()
    sums = make_puzzle(CONFIGS["addition"](), seed=0)
    found = puzzle_examples(sums, 4, 20)
    ones = found.tokens[:, ::3]
    for terms in (2, 3):
        partial = ones[:, :terms].sum(dim=1) % 10
        assert torch.equal(found.concepts[f"1s of the first {terms} numbers"][:, -1], partial)
    induction = make_puzzle(CONFIGS["induction"](), seed=0)
    found = puzzle_examples(induction, 3, 20)
    for hops in (1, 2):
        fewer = found.tokens.clone()
        fewer[:, 0] -= 3 - hops
        reached = induction.targets(fewer.numpy())[:, -1]
        assert found.concepts[f"letter after hop {hops}"][:, -1].tolist() == reached.tolist()


def test_text_is_padded_and_asks_for_every_next_token() -> None:
    found = text_examples([[5, 6, 7, 6], [9], [6, 7]], "text")
    assert found.tokens.tolist() == [[5, 6, 7], [6, 0, 0]]
    assert found.valid.tolist() == [[True] * 3, [True, False, False]]
    none = IGNORED_TARGET
    assert found.answers.tolist() == [[6, 7, 6], [7, none, none]]
    commonest = int(found.answers[found.asked].mode().values)
    control = found.concepts[CONTROL]
    assert commonest in (6, 7)
    assert bool((control[found.answers == commonest] == none).all())
    assert control[found.asked & (found.answers != commonest)].unique().tolist() == [commonest]
    with pytest.raises(ValueError, match="no row has two tokens"):
        text_examples([[1], []], "text")


def test_batches_are_all_rows_in_order_and_padding_is_masked() -> None:
    found = text_examples([[1, 2, 3], [4, 5], [6, 7, 8]], "text")
    parts = list(found.batches(2))
    assert [len(part) for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part.tokens for part in parts]), found.tokens)
    assert parts[1].concepts[CONTROL].shape == (1, 2)
    assert found.to(torch.device("cpu")).answers.tolist() == found.answers.tolist()
    model = random_model(small_config())
    assert parts[0].context(model).valid is not None
    assert parts[1].context(model).valid is None
    seeds = torch.cat([part.context(model).seeds for part in parts])
    assert torch.equal(seeds, found.context(model).seeds) and len(seeds.unique()) == 3
