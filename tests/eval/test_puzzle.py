import pytest

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
    documents = puzzle_documents(WALKS, 6, size=40)
    assert len(documents) == 40
    for document in documents:
        entity, *relations = codec.encode(document["context"])
        assert len(relations) == 6
        for relation in relations:
            entity = WALKS.relations[relation - 5, entity]
        assert document["target"] == f" e{entity}"
    assert puzzle_documents(WALKS, 6, size=40) == documents
    assert puzzle_documents(WALKS, 6, size=40, seed=2) != documents
