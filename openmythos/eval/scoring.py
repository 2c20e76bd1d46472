"""What every evaluation asks of a model: log-likelihoods of text, and continuations.

Requests are batched by length. A row's result does not depend on the rows beside it: short rows are
padded under a mask, and each sampled request has a generator of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
from openmythos.text_stream import ByteDecoder, TextStream

Pair = tuple[list[int], list[int]]  # token ids of a context and its continuation


@runtime_checkable  # the tests check arguments
class Codec(ByteDecoder, Protocol):
    """Text to token ids and back; ``Tokenizer`` is one. An id is None where there is no such."""

    @property
    def bos_id(self) -> int | None:
        """Begins a document."""

    @property
    def eos_id(self) -> int | None:
        """Ends a document."""

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A context to continue until one of ``stops`` is in the text; 0 is greedy."""

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
        model: Runs in evaluation mode.
        codec: Its tokenizer.
        num_loops: Loops of every token.
        batch_size: Rows a batch; does not change results.
        add_bos: Contexts begin with the codec's bos, as documents in training do.
        seed: Of initial states and samples.
        exit_rule: Stops single tokens earlier; only generation asks it.
        cache_layout: Of generation; default: the exact one.
        num_truncated: Contexts that were cut on the left to fit the model, since the start.
    """

    model: RecurrentDepthLM
    codec: Codec
    num_loops: int
    batch_size: int = 16
    add_bos: bool = True
    seed: int = 0
    exit_rule: Rule | None = None
    cache_layout: CacheLayout | None = None
    num_truncated: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "num_loops", "batch_size")

    @property
    def max_len(self) -> int:
        """The most tokens that the model reads."""
        return self.model.config.max_seq_len

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
        """Ids of a context, with bos if the model is used to one."""
        bos = self.codec.bos_id if self.add_bos else None
        return [*([] if bos is None else [bos]), *self.codec.encode(text)]

    def encode_pair(self, context: str, continuation: str) -> Pair:
        """Ids of both, as they are when the two texts are encoded in one piece.

        White space at the end of the context belongs to the continuation, whose first token has it.
        Where one token would straddle the seam and leave nothing, the two are encoded apart.
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
        """Nats of each continuation after its context, and whether greedy decoding gives it."""
        return self.score_tokens([self.encode_pair(*pair) for pair in pairs])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Nats of each whole text, every token once, windows as long as the model reads."""
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
        """As ``loglikelihood``, on token ids; equal inputs (choices of one token) run once.

        Raises:
            ValueError: A pair without a context or a continuation, or with a continuation that is
                longer than the model.
        """
        askers: dict[tuple[int, ...], list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            self._check_pair(context, continuation)
            read = (*context, *continuation)[-(self.max_len + 1) : -1]
            askers.setdefault(read, []).append(index)
        scores = [(0.0, False)] * len(pairs)
        rows = sorted(askers, key=lambda row: (-len(row), row))
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            for row, logits in zip(batch, self._logits(batch), strict=True):
                for index in askers[row]:
                    scores[index] = _score(logits[: len(row)], pairs[index][1])
        return scores

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
        """Logits of rows that begin at the left; what stands past a row's end is padding."""
        device, width = self.model.embed.weight.device, max(map(len, rows))
        lengths = torch.tensor([len(row) for row in rows], device=device)
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        valid = torch.arange(width, device=device) < lengths[:, None]
        ctx = self.model.context(tokens, padding_mask=None if bool(valid.all()) else valid)
        generator = torch.Generator().manual_seed(self.seed)
        with inference(self.model):
            output = self.model(tokens, num_loops=self.num_loops, ctx=ctx, generator=generator)
        return output.logits

    # --- generation ------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """The continuation of each context, without the stop text.

        Raises:
            ValueError: A request that asks for as many new tokens as the model reads, or more.
        """
        rows = [self._row(index, request) for index, request in enumerate(requests)]
        order = sorted(range(len(rows)), key=lambda index: (-len(rows[index].tokens), index))
        texts = [""] * len(requests)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            found = self._generate_batch(
                [rows[index] for index in chosen], [requests[index].stops for index in chosen]
            )
            for index, text in zip(chosen, found, strict=True):
                texts[index] = text
        return texts

    def _row(self, index: int, request: GenerationRequest) -> Request:
        """What the engine is asked for; ``index`` among the requests decides what is drawn."""
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
                temperature=request.temperature, top_k=request.top_k, top_p=request.top_p
            ),
            stop_tokens=[] if self.codec.eos_id is None else [self.codec.eos_id],
            seed=self.seed,
            sample_idx=index,
        )

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
    """Context and continuation of each window over a text: every token is predicted once.

    A window's input has ``length`` tokens; the last one looks back as far as it can.
    """
    whole = [prefix, *tokens]
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        yield whole[max(0, stop - length) : start + 1], tokens[start:stop]


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Nats of the last tokens of a row, and whether each of them is the most likely one."""
    wide = logits[-len(continuation) :]
    wide = wide if wide.dtype == torch.float64 else wide.float()
    targets = torch.tensor(continuation, device=logits.device)
    picked = wide.log_softmax(dim=-1).gather(1, targets[:, None])
    return float(picked.sum()), bool((wide.argmax(dim=-1) == targets).all())
