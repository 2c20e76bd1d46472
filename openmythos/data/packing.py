"""Packed rows of tokens: windows cut from a stream of documents, with their targets.

A split is one long stream: bos, tokens, eos, bos, tokens, eos ... It is cut into windows of
`seq_len` tokens without gaps. The target of a window's last token is the first token of the next
window, so every token but the bos of a document is a target exactly once. That bos is never a
target, because it does not depend on the document before it. Where documents start is known from
their offsets and never from the ids: many models begin and end a text with the same id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from openmythos.model.context import ForwardContext
from openmythos.model.recurrent import RecurrentDepthLM

IGNORED_TARGET = -100
PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class Batch:
    """The input of one training or evaluation step; all tensors are int64.

    Attributes:
        tokens: Input ids.
        targets: Id to predict after each token; -100 where there is no loss.
        documents: Number of each token's document within its row, from 0; -1 is padding. They are
            the document mask: a token attends only to tokens with the same number.
        positions: Position within the document. It counts from 0 at the document's start, or at the
            start of the row if the document began in an earlier window.
        num_bytes: Bytes of text of all targets with a loss. Bits per byte are the summed loss in
            bits divided by it (an eos adds to the loss but has no bytes). 0 if tokens are not text.
    """

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    documents: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    num_bytes: int

    def rows(self, start: int, stop: int, step: int = 1) -> Batch:
        """Every ``step``-th row from ``start`` on; ``num_bytes`` stays that of the whole batch."""
        return Batch(
            tokens=self.tokens[start:stop:step],
            targets=self.targets[start:stop:step],
            documents=self.documents[start:stop:step],
            positions=self.positions[start:stop:step],
            num_bytes=self.num_bytes,
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            documents=self.documents.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            num_bytes=self.num_bytes,
        )


def num_windows(num_tokens: int, seq_len: int) -> int:
    """Number of windows that cover a stream: `seq_len` targets each, the last one maybe fewer."""
    return max(0, -(-(num_tokens - 1) // seq_len))


def whole_documents(
    offsets: Int[np.ndarray, " N1"], seq_len: int
) -> tuple[Int[np.ndarray, " W"], Int[np.ndarray, " W"]]:
    """Windows that hold whole documents: where in the stream each begins and ends.

    A window takes the documents that follow each other until the next one does not fit into
    `seq_len` + 1 tokens. A document that does not fit into any window has one of its own, which
    ends where that is full: the rest of it is left out.

    Args:
        offsets: Where each document begins; then the number of tokens.
        seq_len: Tokens of a row.
    """
    starts, stops = [], []
    document, most = 0, len(offsets) - 1
    while document < most:
        start = int(offsets[document])
        after = int(np.searchsorted(offsets, start + seq_len + 1, side="right")) - 1
        after = max(after, document + 1)
        starts.append(start)
        stops.append(min(int(offsets[after]), start + seq_len + 1))
        document = after
    return np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)


def pack_windows(
    spans: Int[np.ndarray, "B T1"],
    starts: Bool[np.ndarray, "B T1"],
    num_valid: Int[np.ndarray, " B"],
    counted: Bool[np.ndarray, "B T1"] | None = None,
    *,
    pad_id: int,
    token_num_bytes: Int[np.ndarray, " V"],
) -> Batch:
    """Make a batch of spans of seq_len + 1 tokens of a stream.

    Args:
        spans: Tokens of each window and the token after it; entries from `num_valid` on are
            ignored.
        starts: Which of these tokens begin a document.
        num_valid: Number of tokens in each span.
        counted: Which of these tokens are targets, of those that can be; None: all.
        pad_id: Id that fills the input where the stream has ended.
        token_num_bytes: Bytes of text of each id.
    """
    seq_len = spans.shape[1] - 1
    columns = np.arange(seq_len, dtype=np.int64)
    # A token without a successor has nothing to predict, so it counts as padding too.
    is_padding = columns >= (num_valid[:, None] - 1)
    tokens = np.where(is_padding, pad_id, spans[:, :-1])
    is_start = starts[:, :-1] & ~is_padding
    is_ignored = is_padding | starts[:, 1:]
    if counted is not None:
        is_ignored |= ~counted[:, 1:]
    targets = np.where(is_ignored, IGNORED_TARGET, spans[:, 1:])

    documents = np.cumsum(is_start, axis=1, dtype=np.int64)
    # The first document of a row has number 0 if it began in an earlier window, but 1 if the row
    # starts with its bos: subtract that.
    documents -= documents[:, :1]
    first_columns = np.maximum.accumulate(np.where(is_start, columns, 0), axis=1)
    positions = np.where(is_padding, 0, columns - first_columns)
    documents[is_padding] = PADDING_DOCUMENT

    has_loss = targets != IGNORED_TARGET
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        documents=torch.from_numpy(documents),
        positions=torch.from_numpy(positions),
        num_bytes=int(token_num_bytes[targets[has_loss]].sum()),
    )


def on_device(
    model: RecurrentDepthLM, batch: Batch, seeds: int | Int[Tensor, "B T"] = 0
) -> tuple[Batch, ForwardContext]:
    """The batch on the model's device, and its context with these seeds of initial states.

    If every row is a single document without padding, the context has no document mask.
    """
    documents = batch.documents
    # Computed before the batch moves to the device, so that it does not wait for the device.
    single = bool((documents == documents[:, :1]).all()) and bool((documents >= 0).all())
    batch = batch.to(model.embed.weight.device)
    masked = None if single else batch.documents
    options = {"documents": masked, "positions": batch.positions, "seeds": seeds}
    return batch, model.context(batch.tokens, **options)
