"""Chat templates: a conversation as the one text that a model was trained on.

A template is a program in Jinja2 that comes with a checkpoint. It runs in Jinja2's sandbox, which
gives it the messages and nothing else.

Source: Hugging Face transformers, utils/chat_template_utils.py (names, filters and white space).
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, str]  # role ("system", "user" or "assistant") and content


def render_chat(template: str, messages: Sequence[Message], **names: Any) -> str:
    """The text of a conversation, up to where the model's next answer begins.

    Args:
        template: The chat template.
        messages: The messages so far.
        names: What else the template may use, such as ``bos_token``.

    Raises:
        ValueError: The template is damaged, or refuses the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    try:
        compiled = environment.from_string(template)
        given = {"tools": None, "documents": None, "add_generation_prompt": True, **names}
        return compiled.render(messages=[dict(message) for message in messages], **given)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the checkpoint's chat template fails: {reason}") from None


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks answers for training, as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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
