import pytest

from openmythos.data.addition import Addition, AdditionConfig
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.eval.puzzle import PuzzleCodec, puzzle_documents

WALKS = Walks(HopsConfig(num_entities=5, num_relations=3, seed=4))


def test_words_are_token_ids() -> None:
    codec = PuzzleCodec(WALKS)
    assert codec.encode("e0 r2  e4\nr0") == [0, 7, 4, 5]
    assert codec.decode([0, 7, 4, 5]) == "e0 r2 e4 r0"
    assert codec.decode_bytes([4, 5]) == b" e4 r0" == codec.decode_bytes([4]) + b" r0"
    assert codec.bos_id is None and codec.eos_id is None
    with pytest.raises(ValueError, match=r"'hello' is no word of a walk; .*, e0 to e4, .* r2,"):
        codec.encode("e0 hello")
    with pytest.raises(ValueError, match="there is no walk; a walk is a start"):
        codec.encode_prompt("  ")


def test_documents_are_walks_that_end_where_they_say() -> None:
    codec = PuzzleCodec(WALKS)
    documents = puzzle_documents(WALKS, 6, count=40)
    assert len(documents) == 40
    for document in documents:
        entity, *relations = codec.encode(document["context"])
        assert len(relations) == 6
        for relation in relations:
            entity = WALKS.relations[relation - 5, entity]
        assert document["target"] == f" e{entity}"
    assert puzzle_documents(WALKS, 6, count=40) == documents
    assert puzzle_documents(WALKS, 6, count=40, seed=2) != documents


def test_documents_of_walks_that_are_written_out_ask_for_the_whole_chain() -> None:
    written = Walks(HopsConfig(num_entities=5, num_relations=3, seed=4, written_out=True))
    codec = PuzzleCodec(WALKS)
    for plain, document in zip(
        puzzle_documents(WALKS, 3, count=20), puzzle_documents(written, 3, count=20), strict=True
    ):
        assert document["context"] == plain["context"]
        passed = codec.encode(document["target"])
        assert len(passed) == 3 and document["target"].endswith(plain["target"])
        start, *relations = codec.encode(document["context"])
        assert passed[0] == WALKS.relations[relations[0] - 5, start]


def test_a_sum_is_asked_up_to_its_equals_sign() -> None:
    sums = Addition(AdditionConfig(), seed=1)
    for document in puzzle_documents(sums, 3, count=10):
        terms = [int(term.replace(" ", "")[::-1]) for term in document["context"][:-1].split("+")]
        assert document["context"].endswith("=") and len(terms) == 3
        assert int(document["target"].replace(" ", "")[::-1]) == sum(terms)
