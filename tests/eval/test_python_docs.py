from pathlib import Path

from openmythos.data.file import Document
from openmythos.data.prepare import prepare
from openmythos.data.source import load_documents
from openmythos.eval import python_docs
from openmythos.tokenizer import byte_tokenizer
from tests.eval.examples import TOPICS, documents, sentence


def test_held_out_is_the_validation_split_of_prepare(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"text {number} " * (number + 1), encoding="utf-8")
    chosen = python_docs.held_out(load_documents(str(folder)))
    data = prepare(str(folder), tmp_path / "data", tokenizer=byte_tokenizer())
    assert 0 < len(chosen) == data.splits["val"].num_documents < 20
    assert sum(len(d.text) for d in chosen) == data.splits["val"].num_bytes


def test_choices_are_of_one_document_and_nearly_one_length() -> None:
    questions = python_docs.choice_questions(documents())
    assert len(questions) == 5 * len(TOPICS)
    sentences = {sentence(topic, n) for topic in range(len(TOPICS)) for n in range(5)}
    for question in questions:
        assert len(set(question["choices"])) == 4
        assert question["context"] + question["choices"][question["answer"]] in sentences
        assert all(len(choice.split()) == 6 for choice in question["choices"])
        lengths = [len(choice) for choice in question["choices"]]
        assert max(lengths) - min(lengths) <= 4
    assert {question["answer"] for question in questions} == {0, 1, 2, 3}
    assert python_docs.choice_questions(documents()) == questions
    assert python_docs.choice_questions(documents()[:1]) != questions


def test_words_come_next() -> None:
    sentences = {sentence(topic, n) for topic in range(len(TOPICS)) for n in range(5)}
    questions = python_docs.word_questions(documents())
    assert len(questions) == 5 * len(TOPICS)
    for question in questions:
        said = f"{question['context']} {question['target']}"
        assert any(whole.startswith(said) for whole in sentences)
        assert question["target"].isalpha() and len(question["target"]) >= 2


def test_only_prose_is_asked_about() -> None:
    words = "The word that is here " * 6
    kept = f"{words}stands."
    left_out = [f"{words}stands", f">>> f()\n{kept}", f"- {kept}", "Too short.", f"NAME\n{kept}"]
    text = "\n\n".join([*left_out, kept])
    assert [" ".join(found) for found in python_docs.prose(text)] == [kept]


def test_texts_end_at_a_paragraph() -> None:
    long = "\n\n".join(f"Paragraph {n} " + "x" * 300 for n in range(20))
    rows = python_docs.texts(
        [Document("a", "short\n"), Document("b", long), Document("c", "y" * 9999)]
    )
    assert rows[0]["text"] == "short\n"
    assert long.startswith(rows[1]["text"] + "\n\n") and 1600 < len(rows[1]["text"]) <= 2000
    assert rows[2]["text"] == "y" * 2000


def test_at_most_so_many_from_all_documents() -> None:
    many = [
        Document(str(n), text.text.replace("method", f"way {n}"))
        for n in range(20)
        for text in documents()
    ]
    questions = python_docs.word_questions(many)
    assert len(questions) == python_docs.MAX_QUESTIONS
    assert len({q["context"].split()[3] for q in questions}) == 20
