"""A model that is served: what a body asks for, as requests to its engine."""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch

from openmythos.config.schema import to_dict
from openmythos.data.puzzle import Puzzle
from openmythos.engine.request import Request
from openmythos.engine.sampling import Logprobs, SamplingConfig, token_logprobs
from openmythos.eval.puzzle import PuzzleCodec
from openmythos.model.exit import Rule
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.serve.answer import Answer
from openmythos.serve.depth import effort_table, loops_of, rule_of
from openmythos.serve.error import APIError
from openmythos.serve.schema import Choices, Generation, Message
from openmythos.serve.worker import EngineThread
from openmythos.text_stream import ByteDecoder

TURN = "\nUser:"  # where a plain transcript's answer ends


class Codec(ByteDecoder, Protocol):
    """Text to token ids and back; ``Tokenizer`` is one."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end a text."""

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to continue."""


@dataclass
class Asked:
    """What a body asks for, for one prompt: the requests, one per choice, and how to end them."""

    requests: list[Request]
    stops: list[str]
    warnings: list[str] = field(default_factory=list)


class ServedModel:
    """A model, its codec and its engine.

    Args:
        name: The name by which clients choose it.
        model: The model in its engine.
        codec: Its tokenizer.
        worker: Runs the engine.
        default_rule: The exit rule of requests that name none.
        default_loops: Loops per token of requests that name no depth; None: the model's own.
        created: When the server began, in seconds since 1970.
        timeout: Seconds after which a request ends with what it has; None: never.
    """

    def __init__(
        self,
        name: str,
        model: RecurrentDepthLM,
        codec: Codec,
        worker: EngineThread,
        *,
        default_rule: Rule | None = None,
        default_loops: int | None = None,
        created: int = 0,
        timeout: float | None = None,
    ) -> None:
        self.name, self.model, self.codec, self.worker = name, model, codec, worker
        self.default_rule, self.created, self.timeout = default_rule, created, timeout
        loops = model.config.num_loops if default_loops is None else default_loops
        self.default_loops = min(loops, self.max_loops)

    @property
    def max_loops(self) -> int:
        """The most loops that a request may ask for."""
        return self.worker.engine.capacity.max_loops

    @property
    def max_len(self) -> int:
        """The most tokens of a prompt and its answer."""
        return min(self.worker.engine.capacity.max_len + 1, self.model.config.max_seq_len)

    @property
    def puzzle(self) -> Puzzle | None:
        """The puzzle that the model knows; None if it reads text."""
        return self.codec.puzzle if isinstance(self.codec, PuzzleCodec) else None

    @cached_property
    def efforts(self) -> dict[str, int]:
        """Loops by ``reasoning_effort``."""
        return effort_table(self.model.config.num_loops, self.max_loops)

    @property
    def has_template(self) -> bool:
        """Whether the model was trained on conversations in a template."""
        return getattr(self.codec, "chat_template", None) is not None

    def card(self) -> dict[str, Any]:
        """The model in ``/v1/models``."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "openmythos",
            "max_model_len": self.max_len,
            "num_loops": self.model.config.num_loops,
            "max_loops": self.max_loops,
            "default_loops": self.default_loops,
            "default_exit_rule": self.default_rule and to_dict(self.default_rule),
            "reasoning_effort": self.efforts,
            "chat_template": self.has_template,
        }

    # --- text to tokens ---------------------------------------------------------------------------

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt; ids are checked and taken as they are.

        Raises:
            APIError: The text cannot be encoded, or ids are out of range.
        """
        if not isinstance(prompt, str):
            self._check_ids(prompt, "prompt")
            return list(prompt)
        try:
            return self.codec.encode_prompt(prompt)
        except ValueError as error:
            raise APIError(400, str(error), param="prompt") from None

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[str]]:
        """The token ids of a conversation, and the stop texts that it brings.

        Without a chat template the conversation is written as a plain transcript: ``User: ...`` and
        ``Assistant: ...`` on lines of their own; an answer then ends before the next ``User:``.

        Raises:
            APIError: The template refuses the messages, or there is something else than text.
        """
        plain = [message.plain() for message in messages]
        if all(not message["content"] for message in plain):
            raise APIError(400, "the messages are empty", param="messages")
        try:
            if isinstance(self.codec, PuzzleCodec):  # every message is a question
                return self.codec.encode(plain[-1]["content"]), []
            if self.has_template:
                ids: list[int] = self.codec.encode_chat(plain)  # type: ignore[attr-defined]
                return ids, []
            lines = [f"{message['role'].capitalize()}: {message['content']}" for message in plain]
            return self.codec.encode_prompt("\n".join([*lines, "Assistant:"])), [TURN]
        except ValueError as error:
            raise APIError(400, str(error), param="messages") from None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids.

        Raises:
            APIError: Ids are out of range.
        """
        self._check_ids(tokens, "tokens")
        return self.codec.decode_bytes(tokens).decode("utf-8", "replace")

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        size = self.model.config.vocab_size
        if not all(0 <= token < size for token in ids):
            raise APIError(400, f"{param} has token ids outside 0..{size - 1}", param=param)

    # --- bodies to requests -----------------------------------------------------------------------

    def depth_of(self, body: Generation) -> tuple[int, Rule | None]:
        """Loops per token and exit rule of a body.

        Raises:
            APIError: They are not possible.
        """
        loops = loops_of(
            body.num_loops,
            body.reasoning_effort,
            self.efforts,
            self.max_loops,
            self.default_loops,
        )
        rule = rule_of(body.exit_rule, self.default_rule)
        if rule is not None and rule.needs_halting and self.model.config.halting is None:
            said = f"exit rule {rule.kind!r} needs a halting head, and {self.name} has none"
            raise APIError(400, said, param="exit_rule")
        return loops, rule

    def requests(
        self,
        body: Choices,
        tokens: Sequence[int],
        max_new_tokens: int | None,
        logprobs: int | None,
        first_idx: int = 0,
    ) -> list[Request]:
        """The requests of a body for one prompt, one per choice.

        Raises:
            APIError: A value that this model cannot serve.
        """
        if not tokens:
            raise APIError(400, "the prompt is empty; give at least one token", param="prompt")
        room = self.max_len - len(tokens)
        if room < 1 or (max_new_tokens or 1) > room:
            said = (
                f"the prompt has {len(tokens)} tokens and the answer may have "
                f"{max_new_tokens or 1}; together they may have {self.max_len}"
            )
            raise APIError(400, said, param="max_tokens", code="context_length_exceeded")
        loops, rule = self.depth_of(body)
        usual = room
        if self.puzzle is not None:
            usual = max(1, self.puzzle.answer_len(len(tokens)))
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
        try:
            return [
                Request(
                    tokens=tokens,
                    max_new_tokens=max_new_tokens or min(usual, room),
                    min_new_tokens=body.min_tokens,
                    num_loops=loops,
                    exit_rule=rule,
                    sampling=self.sampling(body),
                    stop_tokens=[] if body.ignore_eos else self.codec.end_ids,
                    seed=seed,
                    sample_idx=first_idx + choice,
                    logprobs=logprobs,
                )
                for choice in range(body.n)
            ]
        except ValueError as error:
            raise APIError(400, str(error)) from None

    def sampling(self, body: Generation) -> SamplingConfig:
        """How a body asks to be sampled; else as the checkpoint asks, else at temperature 1.

        Raises:
            APIError: ``logit_bias`` names no token.
        """
        own = getattr(self.codec, "sampling", None) or {"temperature": 1.0}
        fields = dict(own) if body.temperature is None else {"temperature": body.temperature}
        if body.top_p is not None:
            fields["top_p"] = body.top_p
        if body.top_k is not None:
            fields["top_k"] = body.top_k if body.top_k > 0 else None
        bias = []
        for word, value in (body.logit_bias or {}).items():
            if not word.isdecimal() or int(word) >= self.model.config.vocab_size:
                said = f"logit_bias names {word!r}, which is no token id of this model"
                raise APIError(400, said, param="logit_bias")
            bias.append((int(word), value))
        return SamplingConfig(
            **fields,
            num_ids=min(self.codec.vocab_size, self.model.config.vocab_size),
            logit_bias=bias,
            repetition_penalty=body.repetition_penalty,
            frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty,
        )

    # --- to the engine ----------------------------------------------------------------------------

    @asynccontextmanager
    async def answers(
        self, requests: Sequence[Request], stops: Sequence[str], body: Generation
    ) -> AsyncIterator[list[Answer]]:
        """The answers to a body's requests; whatever leaves the context aborts what has not ended.

        Raises:
            APIError: The engine refuses a request.
        """
        tickets = await self.worker.open(
            requests,
            priority=body.priority,
            timeout=self.timeout,
            salt=body.cache_salt or "",
        )
        try:
            yield [Answer(self.worker, ticket, self.codec, stops) for ticket in tickets]
        finally:
            for ticket in tickets:
                self.worker.close(ticket, "abort")

    async def prompt_logprobs(self, request: Request, count: int) -> list[Logprobs | None]:
        """Log-probabilities of a prompt's own tokens, at its full depth; the first has none."""
        tokens = request.tokens

        def score() -> list[Logprobs | None]:
            ids = torch.tensor([list(tokens)], device=self.model.embed.weight.device)
            with inference(self.model):
                ctx = self.model.context(ids, seeds=[request.seed])
                logits = self.model(ids, num_loops=request.num_loops, ctx=ctx).logits[0]
            rows = zip(logits[:-1], tokens[1:], strict=True)
            return [None, *(token_logprobs(row, token, count) for row, token in rows)]

        return await self.worker.call(score)
