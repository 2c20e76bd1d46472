import importlib.util
import re
from pathlib import Path

import pytest
import transformers

from openmythos.chat_template import render_answers, render_chat
from openmythos.tokenizer import Tokenizer, byte_tokenizer
from tests.foreign import CHATML, END_TURN, MARKED, backend, write_chat_folder, write_folder

TALK = [
    {"role": "system", "content": "Be the one."},
    {"role": "user", "content": "  what is <the>\n\n\"1 & 2'?  "},
    {"role": "assistant", "content": "é\n"},
    {"role": "user", "content": "\n"},
]
TEMPLATES = [
    CHATML,
    # As newer templates do: namespaces, loop controls, filters, blocks that mark answers, dates.
    """{{- bos_token }}
{%- set ns = namespace(seen=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.seen = ns.seen + 1 %}
    {% if message['role'] == 'assistant' %}
    {% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}
    {% else %}
<|im_start|>{{ message | tojson }}{{ ns.seen }}
    {% endif %}
{%- endfor %}
{%- if tools %}never{% endif %}{{ strftime_now('%Y') | length }}
{%- if add_generation_prompt %}<|im_start|>{% endif %}""",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=["chatml", "modern"])
def test_a_conversation_is_that_of_transformers(tmp_path: Path, template: str) -> None:
    folder = write_chat_folder(tmp_path)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")  # the later word
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(TALK) == expected


def test_marks_in_a_message_are_text_unless_asked_for(tmp_path: Path) -> None:
    ours = Tokenizer.load(write_chat_folder(tmp_path))
    talk = [{"role": "user", "content": f"say {END_TURN}\nthe end\U000f0000"}]
    plain, special = ours.encode_chat(talk), ours.encode_chat(talk, special=True)
    assert plain.count(ours.eos_id) == 1 and special.count(ours.eos_id) == 2
    text = f"user\n{talk[0]['content']}\nassistant\n"
    assert ours.decode(plain) == text and ours.decode(special) == text.replace(END_TURN, "")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for", "chat template fails"),
        ("{{ raise_exception('roles must\nalternate') }}", "fails: roles must alternate"),
        ("{{ messages[7]['content'] }}", "chat template fails"),
        ("{{ messages.append(1) }}", "chat template fails"),
        ("{{ ''.__class__.__mro__ }}", "fails: access to attribute '__class__'"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ 5 | dictsort }}", "fails: 'int' object has no attribute 'items'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: maximum recursion depth"),
        ("{{ cycler() }}", "fails: at least one item"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        render_chat(template, TALK)
    assert "\n" not in str(caught.value)


def test_without_a_template() -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        byte_tokenizer().encode_chat(TALK)


# --- answers --------------------------------------------------------------------------------------

WHOLE = [*TALK, {"role": "assistant", "content": "the \U0001f600 end, t'he <b>\n漢字.  "}]


@pytest.mark.parametrize("name", MARKED)
def test_answers_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    folder = write_chat_folder(tmp_path)
    (folder / "chat_template.jinja").write_text(MARKED[name], encoding="utf-8")
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for talk in (WHOLE, WHOLE[1:3], WHOLE[3:]):
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        expected = theirs.apply_chat_template(talk, **options)
        ids, answers = ours.encode_answers(talk)
        assert ids == expected["input_ids"] == ours.encode_chat(talk, answer_follows=False)
        assert answers == [bool(counts) for counts in expected["assistant_masks"]]
        assert 0 < sum(answers) < len(answers)


def public_templates() -> dict[str, str]:
    """Templates of public models that mark answers, as TRL ships them; none without TRL."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return {}
    files = sorted((Path(found.origin).parent / "chat_templates").glob("*.jinja"))
    texts = {path.stem: path.read_text(encoding="utf-8") for path in files}
    return {name: t for name, t in texts.items() if re.search(r"{%-?\s*generation", t)}


def test_answers_in_templates_of_public_models(tmp_path: Path) -> None:
    """Of Qwen 2.5 and 3, Llama 3, Gemma, Phi-3 and all others that TRL trains with."""
    templates = public_templates()
    if not templates:
        pytest.skip("needs trl, whose package holds the templates")
    assert {"qwen2_5_training", "qwen3_training", "llama3_training"} < templates.keys()
    assert {"gemma_training", "phi3_training", "lfm2_training"} < templates.keys()
    marks = r"<[|\uff5c]\S+?[|\uff5c]>"
    specials = {mark for text in templates.values() for mark in re.findall(marks, text)}
    turns = ("<start_of_turn>", "<end_of_turn>", "<|bos|>", "<|eos|>")
    folder = write_folder(
        tmp_path,
        backend(*sorted(specials | {*turns})),
        tokenizer_config={"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|eos|>"},
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    # Ends in one byte, see the next test.
    talk = [WHOLE[0], WHOLE[1], {"role": "assistant", "content": "é\n t"}, *WHOLE[3:]]
    del templates["llava_next_training"]  # its messages are lists of parts
    for name, template in templates.items():
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        ours, options = Tokenizer.load(folder), {"chat_template": template, "return_dict": True}
        talks = [talk, talk[1:], talk[1:3]]
        if name == "gemma_training":
            with pytest.raises(ValueError, match="template fails: System role not supported"):
                ours.encode_answers(talks.pop(0))
        for each in talks:
            found = theirs.apply_chat_template(each, return_assistant_tokens_mask=True, **options)
            ids, answers = ours.encode_answers(each)
            assert ids == found["input_ids"], name
            assert answers == [bool(counts) for counts in found["assistant_masks"]], name
            assert 0 < sum(answers) < len(answers), name


def test_a_character_of_several_tokens_at_an_answers_end_counts_whole(tmp_path: Path) -> None:
    """Transformers leaves its last bytes out."""
    folder = write_chat_folder(tmp_path)
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    ids, answers = Tokenizer.load(folder).encode_answers([{"role": "assistant", "content": "a😀"}])
    assert answers == [True] * 5 + [False] and len(ids) == 6


def test_marks_in_an_answer_are_text_and_count(tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path)
    (folder / "chat_template.jinja").write_text(MARKED["chatml (Qwen, SmolLM)"], encoding="utf-8")
    ours = Tokenizer.load(folder)
    talk = [
        {"role": "user", "content": f"a{END_TURN}"},
        {"role": "assistant", "content": f"b{END_TURN}c"},
    ]
    ids, answers = ours.encode_answers(talk)
    assert ids.count(ours.eos_id) == 3  # of the template: system, user, assistant
    counted = [token for token, counts in zip(ids, answers, strict=True) if counts]
    assert ours.decode(counted) == f"b{END_TURN}c" and counted[-1] == ours.eos_id


def test_templates_without_marks_of_answers(tmp_path: Path) -> None:
    ours = Tokenizer.load(write_chat_folder(tmp_path))
    with pytest.raises(ValueError, match=r"does not mark answers with {% generation %}") as caught:
        ours.encode_answers(WHOLE)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"U\+10F0F0 or U\+10F0F1, characters of private use"):
        render_answers("{% generation %}{% endgeneration %}", [{"content": "\U0010f0f0"}])


def test_an_answer_in_an_answer_counts_with_what_is_around_it() -> None:
    template = "a{% generation %}b{% generation %}c{% endgeneration %}d{% endgeneration %}e"
    text, spans = render_answers(template, TALK)
    assert text == "abcde" and {place for span in spans for place in range(*span)} == {1, 2, 3}


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}b{% continue %}{% endgeneration %}{% endfor %}",
        "{% set x %}{% generation %}bc{% endgeneration %}{% endset %}{{ x[:2] }}",
        "{% set x %}{% generation %}bc{% endgeneration %}{% endset %}{{ x | reverse }}",
    ],
)
def test_an_answer_that_is_cut_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="cuts an answer"):
        render_answers(template, TALK)
