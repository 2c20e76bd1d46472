"""Conversations to fine-tune on: rows with messages, with a prompt and its completion, or a text.

A row becomes the text of a JSON object, `{"messages": [...]}` or `{"text": ...}`, and is one
document from there on; the chat template is applied when it is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from openmythos.config.schema import in_words
from openmythos.tokenizer import Tokenizer

COLUMNS = ("messages", "prompt", "completion", "text")
Counted = Literal["answers", "all"]

_ROLES = ("system", "user", "assistant")
_MORE = ("tool_calls", "function_call", "reasoning_content", "thinking")  # of a message


def conversation(row: Any, place: str) -> str:
    """What is trained on of a row, as JSON.

    Raises:
        ValueError: The row has nothing of this kind, or messages out of order; the message begins
            with `place`.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {in_words(row)}, not an object with messages")
    given = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    if "messages" in given:
        _refuse_more(row, ("tools",), place)
        messages = _messages(given["messages"], place)
    elif "prompt" in given and "completion" in given:
        messages = [
            {"role": role, "content": _content(given[name], f"{place} {name}")}
            for role, name in (("user", "prompt"), ("assistant", "completion"))
        ]
    elif "text" in given:
        return json.dumps({"text": _content(given["text"], f"{place} text")}, ensure_ascii=False)
    else:
        names = ", ".join(map(str, row)) or "none"
        raise ValueError(
            f"{place} has no messages, no prompt and completion, and no text; its columns are: "
            f"{names}"
        )
    return json.dumps({"messages": messages}, ensure_ascii=False)


def _messages(value: Any, place: str) -> list[dict[str, str]]:
    """Messages of which each user's is answered, perhaps after a system's.

    Raises:
        ValueError: They are not.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} messages is {in_words(value)}; give a list of messages")
    messages: list[dict[str, str]] = []
    for number, message in enumerate(value, start=1):
        where = f"{place} message {number}"
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f"{where} is no object with a role and a content")
        role = message["role"]
        if role not in _ROLES:
            raise ValueError(f"{where} has the role {role!r}; known are {', '.join(_ROLES)}")
        before = messages[-1]["role"] if messages else None
        expected = "user" if before in ("system", "assistant") else "assistant"
        if before is None:
            expected = "system or user"
        if role not in expected.split(" or "):
            raise ValueError(f"{where} is of the role {role!r}, where {expected} is due")
        _refuse_more(message, _MORE, where)
        if message.get("weight") == 0:
            raise ValueError(f"{where} has weight 0, and all answers count: take the row out")
        messages.append({"role": role, "content": _content(message.get("content"), where)})
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{place} ends with a message of the {messages[-1]['role']}: no answer")
    return messages


def _refuse_more(given: dict[str, Any], names: Sequence[str], place: str) -> None:
    """An answer without the calls and the thoughts that it was given with is another answer.

    Raises:
        ValueError: One of these names holds something.
    """
    for name in names:
        if given.get(name):  # a table has an empty one in every row
            raise ValueError(
                f"{place} has {name}, and only contents are trained: take it out, or the row"
            )


def _content(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place} holds {in_words(value)}, not text")
    if not value.strip():
        raise ValueError(f"{place} is empty")
    return value


def contents(text: str) -> str:
    """All that is said in a document that `conversation` wrote."""
    row = json.loads(text)
    return "\n".join([row.get("text", ""), *(m["content"] for m in row.get("messages", ()))])


def encode_conversation(
    text: str, tokenizer: Tokenizer, counted: Counted
) -> tuple[Int[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
    """Token ids of a document that `conversation` wrote, and which of them count in the loss.

    Args:
        text: The document.
        tokenizer: The tokenizer, with its chat template.
        counted: Of messages, the tokens of the answers or all. Of a text all count, in any case;
            the first token of a document is never predicted.

    Raises:
        ValueError: The template does not mark answers, or refuses the messages.
    """
    row = json.loads(text)
    if "text" in row:
        ids = [tokenizer.bos_id, *tokenizer.encode(row["text"]), tokenizer.eos_id]
        answers = [True] * len(ids)
    elif counted == "answers":
        ids, answers = tokenizer.encode_answers(row["messages"])
    else:
        ids = tokenizer.encode_chat(row["messages"], answer_follows=False)
        answers = [True] * len(ids)
    return np.array(ids, dtype=np.int64), np.array(answers, dtype=np.bool_)
