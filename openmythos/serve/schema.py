"""The bodies of requests. A field that OpenAI's API lacks is our own, or vLLM's of that name.

Unknown fields are kept apart, to be named in a warning; what is known and not offered is refused.
"""

from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from openmythos.serve.error import APIError

T = TypeVar("T")
# Told is what is wrong first: a list of a million mistakes would take seconds and a gigabyte.
ListOf = Annotated[list[T], Field(fail_fast=True)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Biases = dict[str, Annotated[Number, Field(ge=-100, le=100)]]
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
ROLES = get_args(Role)
MAX_CHOICES, MAX_TOP, MAX_BIASES, MAX_STOPS, MAX_STOP_CHARACTERS = 128, 20, 1024, 16, 1000
MAX_PRIORITY, MAX_SALT = 1000, 1000  # characters of a salt
LEAST_EXAMPLES, MOST_EXAMPLES = 8, 64  # of a reading map


def _few(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"it has {len(biases)} entries; give up to {MAX_BIASES}")
    return biases


class Body(BaseModel):
    """What every body has."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def unknown(self) -> list[str]:
        """The fields that are ignored, in alphabetical order."""
        return sorted(self.model_extra or {})


class Generation(Body):
    """Fields of everything that generates.

    Attributes:
        num_loops: Loops per token.
        reasoning_effort: The same as a word; the table stands in ``/v1/models``.
        exit_rule: Stops single tokens earlier: a ``kind`` and its fields.
        include_loops: Report the loops of each token and of the request.
        priority: Requests with a lower one go first; waiting makes up for a higher one.
        cache_salt: Requests with different ones share nothing that was read.
    """

    model: str
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] = 1.0
    logit_bias: Annotated[Biases, BeforeValidator(_few)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    user: str | None = None
    num_loops: int | None = None
    reasoning_effort: str | None = None
    exit_rule: dict[str, Any] | None = None
    include_loops: bool = False
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool = False


class Choices(Generation):
    """Fields of completions and chat completions."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: str | ListOf[str] | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0

    def stops(self) -> list[str]:
        """The stop texts.

        Raises:
            APIError: There are too many, or one is empty or too long.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise APIError(
                400, f"stop has {len(stops)} texts; give up to {MAX_STOPS}", param="stop"
            )
        for stop in stops:
            if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
                said = f"a stop text has {len(stop)} characters; give 1 to {MAX_STOP_CHARACTERS}"
                raise APIError(400, said, param="stop")
        return stops

    def usage_in_stream(self) -> bool:
        """Whether a stream ends with the usage.

        Raises:
            APIError: There are options for a stream and no stream.
        """
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options needs stream: true", param="stream_options")
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Choices):
    """``POST /v1/completions``."""

    prompt: str | ListOf[str] | ListOf[int] | ListOf[ListOf[int]]
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    def check(self) -> None:
        """Refuse what is not offered.

        Raises:
            APIError: A field asks for it.
        """
        refuse(suffix=self.suffix)
        if self.best_of not in (None, self.n):
            raise APIError(400, "best_of is not offered beyond n", param="best_of")
        if self.echo and self.stream:
            raise APIError(400, "echo is not offered with stream", param="echo")


class ContentPart(Body):
    """A part of a message; only text is offered."""

    type: str
    text: str | None = None


class Message(Body):
    """A message of a conversation."""

    role: Role
    content: str | ListOf[ContentPart] | None = None

    def plain(self) -> dict[str, str]:
        """Role and text.

        Raises:
            APIError: There is something else than text.
        """
        role = "system" if self.role == "developer" else self.role
        if role in ("tool", "function"):
            raise APIError(400, f"messages of the role {role} are not offered", param="messages")
        return {"role": role, "content": text_of(self.content)}


class ChatBody(Choices):
    """``POST /v1/chat/completions``."""

    messages: Annotated[ListOf[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    modalities: ListOf[str] | None = None
    audio: Any = None

    def check(self) -> None:
        """Refuse what is not offered.

        Raises:
            APIError: A field asks for it.
        """
        choice = None if self.tool_choice in ("none", "auto") else self.tool_choice
        refuse(tools=self.tools, functions=self.functions, audio=self.audio, tool_choice=choice)
        if (self.response_format or {}).get("type", "text") != "text":
            kind = self.response_format["type"] if self.response_format else ""
            said = f"response_format {kind!r} is not offered; only text is"
            raise APIError(400, said, param="response_format")
        if self.modalities not in (None, ["text"]):
            raise APIError(400, "only the modality text is offered", param="modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs: true", param="top_logprobs")

    def max_new_tokens(self) -> int | None:
        """The most tokens of an answer; None: as many as there is room for.

        Raises:
            APIError: Both fields are given, and differ.
        """
        both = {self.max_completion_tokens, self.max_tokens} - {None}
        if len(both) > 1:
            said = "max_tokens and max_completion_tokens differ; give one"
            raise APIError(400, said, param="max_tokens")
        return both.pop() if both else None


class TokenizeBody(Body):
    """``POST /tokenize``: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: ListOf[Message] | None = None


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: ListOf[int]


class ReadingBody(Body):
    """``POST /v1/reading``: the reading map of a puzzle.

    Attributes:
        size: Its difficulty: hops of a walk, factors of a product ...
        num_loops: Loops to run; null: the model's default.
        num_examples: Held-out examples; null: as many as may be computed, up to the most.
        seed: Chooses the examples.
    """

    model: str | None = None
    size: Count
    num_loops: Count | None = None
    num_examples: Annotated[int, Field(ge=LEAST_EXAMPLES, le=MOST_EXAMPLES)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Difference(BaseModel):
    """How much consecutive loops differ in what they read.

    Attributes:
        working: The loops, from 0, that read anything.
        bits: Between each loop and the next: 0 if they read the same in the same shares, 1 if they
            read nothing in common; null unless both work.
        mean_bits: Their mean.
        mean_interval: 95 % of it when the examples are drawn again.
        null: 95 % of it when the loops are shuffled.
    """

    working: list[int]
    bits: list[float | None]
    mean_bits: float | None
    mean_interval: tuple[float, float] | None
    null: tuple[float, float] | None


class ReadingAnswer(BaseModel):
    """A reading map; rows are loops, and what cannot be known is null.

    Attributes:
        puzzle: Its kind.
        columns: The tokens of the question, without the last one, which is read.
        num_examples: Per column, the examples in which corrupting it changes the answer.
        accuracy: Share of the examples that are answered right at this number of loops.
        necessity: The share of the answer that is lost if a column is corrupted at one loop only.
        sufficiency: The share that is kept if a column is clean at one loop only.
    """

    object: Literal["reading_map"] = "reading_map"
    model: str
    puzzle: str
    size: int
    num_loops: int
    columns: list[str]
    num_examples: list[int]
    accuracy: float
    necessity: list[list[float | None]]
    necessity_interval: list[list[tuple[float, float] | None]]
    sufficiency: list[list[float | None]]
    sufficiency_interval: list[list[tuple[float, float] | None]]
    difference: Difference


def text_of(content: str | list[ContentPart] | None) -> str:
    """The text of a message's content.

    Raises:
        APIError: A part is not text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            said = f"content of the type {part.type!r} is not offered; only text is"
            raise APIError(400, said, param="messages")
    return "".join(part.text or "" for part in content)


def refuse(**fields: Any) -> None:
    """Refuse fields of OpenAI's API that are not offered, unless they ask for nothing.

    Raises:
        APIError: One is given.
    """
    for name, value in fields.items():
        if value:
            raise APIError(400, f"{name} is not offered by this server", param=name)
