"""Parts of every answer."""

from openmythos.serve.reply import warnings
from openmythos.serve.schema import TokenizeBody


def test_what_was_ignored_is_said_in_one_line_of_ascii() -> None:
    assert warnings(TokenizeBody(prompt="a")) == {}
    body = TokenizeBody.model_validate({"prompt": "a", "zeal": 1, "a\nb": 2, "ü": 3})
    said = warnings(body, "first")["x-warning"]
    assert said == "first; ignored: ab, zeal, ?"
    long = TokenizeBody.model_validate({"x" * 5000: 1})
    assert len(warnings(long)["x-warning"]) == 1000
    nameless = TokenizeBody.model_validate({"": 1})
    assert warnings(nameless)["x-warning"] == "ignored:"
