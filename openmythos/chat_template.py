"""Chat templates: a conversation as the one text that a model was trained on.

A template is a program in Jinja2 that comes with a checkpoint. It runs in Jinja2's sandbox, which
gives it the messages and nothing else.

Source: Hugging Face transformers, utils/chat_template_utils.py (names, filters and white space).
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, str]  # role ("system", "user" or "assistant") and content

_BEGIN, _END = "\U0010f0f0", "\U0010f0f1"  # of an answer; private use
_CUT = (
    "the checkpoint's chat template cuts an answer between {% generation %} and "
    "{% endgeneration %}, as {% break %}, {% continue %} or a filter does: take that out of there"
)


def render_chat(template: str, messages: Sequence[Message], **names: Any) -> str:
    """The text of a conversation, up to where the model's next answer begins.

    Args:
        template: The chat template.
        messages: The messages so far.
        names: What else the template may use, such as ``bos_token``.

    Raises:
        ValueError: The template is damaged, or refuses the messages.
    """
    return _render(template, messages, False, {"add_generation_prompt": True, **names})


def render_answers(
    template: str, messages: Sequence[Message], **names: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a whole conversation, and where in it the template marks answers.

    Args:
        template: The chat template; it marks answers with ``{% generation %}``.
        messages: The messages.
        names: What else the template may use, such as ``bos_token``.

    Returns:
        The text, and of each answer the number of its first character and of the one after it.

    Raises:
        ValueError: The template marks no answers, cuts one, is damaged, or refuses the messages.
    """
    if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is None:
        raise ValueError(
            "the checkpoint's chat template does not mark answers with {% generation %}: write a "
            "template that does as its chat_template.jinja, or let all tokens count"
        )
    everything = template + "".join(message["content"] for message in messages)
    if _BEGIN in everything or _END in everything:
        raise ValueError(
            f"a message holds U+{ord(_BEGIN):X} or U+{ord(_END):X}, characters of private use that "
            "mark answers here: take them out"
        )
    text = _render(template, messages, True, {"add_generation_prompt": False, **names})
    plain, spans = "", []
    open_at: list[int] = []  # answers may hold others
    for piece in re.split(f"({_BEGIN}|{_END})", text):
        if piece == _BEGIN:
            open_at.append(len(plain))
        elif piece == _END and open_at:
            spans.append((open_at.pop(), len(plain)))
        elif piece == _END:
            raise ValueError(_CUT)
        else:
            plain += piece
    if open_at:
        raise ValueError(_CUT)
    return plain, spans


def _render(
    template: str,
    messages: Sequence[Message],
    marked: bool,
    names: Mapping[str, Any],
) -> str:
    try:
        compiled = _compiled(template, marked)
        given = {"tools": None, "documents": None, **names}
        return compiled.render(messages=[dict(message) for message in messages], **given)
    except Exception as error:  # somebody's program: a macro without an end, a number's items
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the checkpoint's chat template fails: {reason}") from None


@lru_cache(maxsize=8)
def _compiled(template: str, marked: bool) -> jinja2.Template:
    generation = _Marked if marked else _Generation
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks answers for training, as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Marked(_Generation):
    """The same with a character of private use before and after what it holds."""

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = parser.stream.current.lineno
        begin, end = (
            jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]).set_lineno(line)
            for mark in (_BEGIN, _END)
        )
        return [begin, *super().parse(parser), end]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja2's escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
