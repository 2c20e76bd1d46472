"""Log-likelihoods of text and generated continuations: what evaluations ask of a model.

Requests are batched by length. A row's result does not depend on the other rows of its batch:
padding is masked, and each sampled request has its own generator.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from openmythos.config.schema import require, require_positive
from openmythos.engine.reference import Session
from openmythos.engine.request import Request
from openmythos.engine.sampling import SamplingConfig
from openmythos.model.cache import CacheLayout
from openmythos.model.exit import Rule
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.plan.memory import is_out_of_memory, require_memory
from openmythos.text_stream import ByteDecoder, TextStream

T = TypeVar("T")
Pair = tuple[list[int], list[int]]  # token ids of a context and its continuation


@runtime_checkable  # the tests check argument types
class Codec(ByteDecoder, Protocol):
    """Text to token ids and back, as a ``Tokenizer``; an id is None if the token does not exist."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; the model may have more, which are not generated."""

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The ids before a text that is to be continued."""

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end a generated text."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a document."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends a document."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; those of special tokens only with ``special``."""

    def require_lossless(self, purpose: str, *texts: str) -> None:
        """Raise a ValueError if a text, or one of these, does not come back from its ids."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A context to continue until one of ``stops`` occurs in the text; temperature 0 is greedy."""

    context: str
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        require_positive(self, "max_new_tokens")
        require(all(self.stops), "stops", self.stops, "texts that are not empty")


@dataclass(kw_only=True)
class Scorer:
    """A model at one depth; ``num_loops`` may be changed between calls.

    Attributes:
        model: The model; it is run in evaluation mode.
        codec: The model's tokenizer.
        num_loops: Loops per token.
        batch_size: Rows per batch; does not change results. Halved where memory does not suffice.
        add_bos: Whether contexts begin with the ids that the codec begins a text with.
        special: Whether marks such as ``<|im_start|>`` in contexts and stops are the tokens.
        limit: The most tokens that are read at once; default: the model's maximum.
        seed: Seed of random initial states and of samples.
        exit_rule: Stops single tokens earlier; used in generation only.
        cache_layout: The cache layout of generation; default: the exact one.
        num_truncated: Number of contexts so far that were cut on the left to fit the model.
    """

    model: RecurrentDepthLM
    codec: Codec
    num_loops: int
    batch_size: int = 16
    add_bos: bool = True
    special: bool = False
    limit: int | None = None
    seed: int = 0
    exit_rule: Rule | None = None
    cache_layout: CacheLayout | None = None
    num_truncated: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "num_loops", "batch_size")
        longest = self.model.config.max_seq_len
        allowed = f"at least 1 and at most the model's {longest} tokens"
        require(self.limit is None or 1 <= self.limit <= longest, "max_length", self.limit, allowed)

    @property
    def max_len(self) -> int:
        """The most tokens that are read at once."""
        return self.model.config.max_seq_len if self.limit is None else self.limit

    @property
    def prefix_id(self) -> int:
        """The token that stands for an empty context.

        Raises:
            ValueError: The codec has none.
        """
        prefix = self.codec.eos_id if self.codec.bos_id is None else self.codec.bos_id
        if prefix is None:
            raise ValueError("the context is empty, and this model has no token that begins a text")
        return prefix

    # --- text to tokens --------------------------------------------------------------------------

    def encode_context(self, text: str) -> list[int]:
        """Token ids of a context, after the codec's ``begin_ids`` if ``add_bos`` is set.

        They are not put before a text that begins with them.
        """
        ids = self.codec.encode(text, special=self.special)
        begin = [*self.codec.begin_ids] if self.add_bos else []
        return ids if ids[: len(begin)] == begin else begin + ids

    def encode_pair(self, context: str, continuation: str) -> Pair:
        """Token ids of both, split from the ids of the two texts encoded as one.

        White space at the end of the context is moved to the continuation, because tokens begin
        with it. If the continuation would get no token this way, because one token spans the
        boundary, the two texts are encoded separately.
        """
        require(continuation != "", "a continuation", continuation, "a text that is not empty")
        if context == "":
            return [self.prefix_id], self.codec.encode(continuation)
        bare = context.rstrip()
        if bare == "":
            return [self.prefix_id], self.codec.encode(context + continuation)
        continuation = context[len(bare) :] + continuation
        before, whole = self.encode_context(bare), self.encode_context(bare + continuation)
        return before, whole[len(before) :] or self.codec.encode(continuation)

    # --- log-likelihood --------------------------------------------------------------------------

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Each continuation's log-likelihood in nats, and whether greedy decoding gives it."""
        return self.score_tokens([self.encode_pair(*pair) for pair in pairs])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of each whole text in nats, in windows of the model's maximum length.

        Raises:
            ValueError: The tokenizer changes text, so that the nats are those of another text.
        """
        self.codec.require_lossless("bits per byte", *texts)
        windows: list[Pair] = []
        owners: list[int] = []
        for index, text in enumerate(texts):
            tokens = self.codec.encode(text)
            for window in rolling_windows(tokens, self.prefix_id, self.max_len):
                windows.append(window)
                owners.append(index)
        totals = [0.0] * len(texts)
        for owner, (nats, _) in zip(owners, self.score_tokens(windows), strict=True):
            totals[owner] += nats
        return totals

    def score_tokens(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """``loglikelihood`` on token ids; equal model inputs (one-token choices) run once.

        Raises:
            ValueError: A pair lacks a context or a continuation, or its continuation is longer than
                the model's maximum length.
        """
        askers: dict[tuple[int, ...], list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            self._check_pair(context, continuation)
            read = (*context, *continuation)[-(self.max_len + 1) : -1]
            askers.setdefault(read, []).append(index)
        scores = [(0.0, False)] * len(pairs)

        def answer(batch: Sequence[tuple[int, ...]]) -> None:
            for row, logits in zip(batch, self._logits(batch), strict=True):
                for index in askers[row]:
                    scores[index] = _score(logits[: len(row)], pairs[index][1])

        self._in_batches(sorted(askers, key=lambda row: (-len(row), row)), answer)
        return scores

    def _in_batches(self, rows: Sequence[T], run: Callable[[Sequence[T]], None]) -> None:
        """Run all rows, the longest first; a batch that does not fit into memory is halved."""
        start = 0
        while start < len(rows):
            batch = rows[start : start + self.batch_size]
            try:
                run(batch)
            except (MemoryError, RuntimeError, ValueError) as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                self.batch_size = len(batch) // 2
                said = f"{len(batch)} rows at once do not fit into memory; going on with"
                warnings.warn(f"{said} {self.batch_size}", stacklevel=2)
                continue
            start += len(batch)

    def _check_pair(self, context: list[int], continuation: list[int]) -> None:
        if not context or not continuation:
            raise ValueError(
                f"a context of {len(context)} and a continuation of {len(continuation)} tokens; "
                "give at least one token of each"
            )
        if len(continuation) > self.max_len:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens and the model reads "
                f"{self.max_len}; shorten it, or score it as a rolling text"
            )
        self.num_truncated += len(context) + len(continuation) > self.max_len + 1

    def _logits(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Logits of rows that are padded on the right to equal length."""
        device, width = self.model.embed.weight.device, max(map(len, rows))
        if device.type == "cpu":  # where the system would end the process instead of saying so
            numbers = len(rows) * width * self.model.config.vocab_size
            size = numbers * self.model.embed.weight.dtype.itemsize
            require_memory(size, f"the logits of {len(rows)} rows", "lower batch_size")
        lengths = torch.tensor([len(row) for row in rows], device=device)
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        valid = torch.arange(width, device=device) < lengths[:, None]
        ctx = self.model.context(
            tokens, padding_mask=None if bool(valid.all()) else valid, seeds=self.seed
        )
        with inference(self.model):
            output = self.model(tokens, num_loops=self.num_loops, ctx=ctx)
        return output.logits

    # --- generation ------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """The continuation of each context, without the stop text.

        Raises:
            ValueError: A request's ``max_new_tokens`` is not below the model's maximum length.
        """
        rows = [self._row(index, request) for index, request in enumerate(requests)]
        order = sorted(range(len(rows)), key=lambda index: (-len(rows[index].tokens), index))
        texts = [""] * len(requests)

        def answer(chosen: Sequence[int]) -> None:
            found = self._generate_batch(
                [rows[index] for index in chosen], [requests[index].stops for index in chosen]
            )
            for index, text in zip(chosen, found, strict=True):
                texts[index] = text

        self._in_batches(order, answer)
        return texts

    def _row(self, index: int, request: GenerationRequest) -> Request:
        """The request for the engine; its seed depends on ``index`` among the requests."""
        room = self.max_len - request.max_new_tokens
        if room < 1:
            raise ValueError(
                f"{request.max_new_tokens} new tokens leave no room for a context in the "
                f"{self.max_len} that the model reads; ask for fewer (max_gen_toks in a task file)"
            )
        prompt = self.encode_context(request.context) or [self.prefix_id]
        self.num_truncated += len(prompt) > room
        return Request(
            tokens=prompt[-room:],
            max_new_tokens=request.max_new_tokens,
            num_loops=self.num_loops,
            exit_rule=self.exit_rule,
            sampling=SamplingConfig(
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                num_ids=self.codec.vocab_size,
            ),
            stop_tokens=self.codec.end_ids | self._marks_in(request.stops),
            seed=self.seed,
            sample_idx=index,
        )

    def _marks_in(self, stops: Sequence[str]) -> set[int]:
        """Ids of the stops that are special tokens, which have no text to be found in."""
        if not self.special:
            return set()
        found = [self.codec.encode(stop, special=True) for stop in stops]
        return {ids[0] for ids in found if len(ids) == 1 and not self.codec.decode_bytes(ids)}

    def _generate_batch(
        self, rows: Sequence[Request], stops: Sequence[tuple[str, ...]]
    ) -> list[str]:
        session = Session.fitting(self.model, rows, cache_layout=self.cache_layout)
        streams = [TextStream(self.codec, texts) for texts in stops]
        waiting = set(range(len(rows)))
        for new in session.stream(rows):
            stream = streams[new.row]
            stream.push(new.token)
            if stream.stopped or new.finish_reason is not None:
                stream.finish()
                waiting.discard(new.row)
            if not waiting:
                break
        return [stream.text for stream in streams]


def rolling_windows(tokens: list[int], prefix: int, length: int) -> Iterator[Pair]:
    """Context and continuation of each window over a text; every token is predicted once.

    A window's input has ``length`` tokens; the last window overlaps the one before it to fill up.
    """
    whole = [prefix, *tokens]
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        yield whole[max(0, stop - length) : start + 1], tokens[start:stop]


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood in nats of a row's last tokens, and whether each is the most likely one."""
    wide = logits[-len(continuation) :]
    wide = wide if wide.dtype == torch.float64 else wide.float()
    targets = torch.tensor(continuation, device=logits.device)
    picked = wide.log_softmax(dim=-1).gather(1, targets[:, None])
    return float(picked.sum()), bool((wide.argmax(dim=-1) == targets).all())
