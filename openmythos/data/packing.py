"""Rows of tokens for the model: windows over a stream of documents, with their targets.

A split is one long stream: bos, tokens, eos, bos, tokens, eos. Windows of `seq_len` tokens are cut
from it without gaps, and the target of a window's last token is the first token of the next window,
so every token but bos is a target exactly once. A bos is never a target: nothing in a document
tells which document follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from openmythos.model.context import ForwardContext
from openmythos.model.recurrent import RecurrentDepthLM

IGNORED_TARGET = -100
PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class Batch:
    """What one step of training or evaluation reads; all tensors are int64.

    Attributes:
        tokens: Input ids.
        targets: Id to predict after each token, -100 where there is no loss.
        documents: Number of the document inside the row, from 0; a token attends only to tokens of
            the same number. -1 is padding.
        positions: Position inside the document, from 0 at its start, or at the start of the row for
            a document that began in an earlier window.
        num_bytes: Bytes of text of all targets that count: summed loss in bits over it is bits per
            byte (eos costs loss and has no bytes). 0 where tokens are not text.
    """

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    documents: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    num_bytes: int

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the rows; ``num_bytes`` stays that of the whole batch."""
        return Batch(
            tokens=self.tokens[start:stop],
            targets=self.targets[start:stop],
            documents=self.documents[start:stop],
            positions=self.positions[start:stop],
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
    """Windows that cover a stream: each has `seq_len` targets, the last one possibly fewer."""
    return max(0, -(-(num_tokens - 1) // seq_len))


def pack_windows(
    spans: Int[np.ndarray, "B T1"],
    num_valid: Int[np.ndarray, " B"],
    *,
    bos_id: int,
    pad_id: int,
    token_num_bytes: Int[np.ndarray, " V"],
) -> Batch:
    """Turn spans of seq_len + 1 tokens of a stream into a batch.

    Args:
        spans: Tokens of each window and the one after it; anything past `num_valid` is ignored.
        num_valid: Tokens of each span that are there; fewer than seq_len + 1 only at the stream's
            end.
        bos_id: Id that begins a document.
        pad_id: Id that fills the input where the stream has ended.
        token_num_bytes: Bytes of text of each id.
    """
    seq_len = spans.shape[1] - 1
    columns = np.arange(seq_len, dtype=np.int64)
    # A token without a successor has nothing to predict, so it counts as padding too.
    is_padding = columns >= (num_valid[:, None] - 1)
    tokens = np.where(is_padding, pad_id, spans[:, :-1])
    is_start = (tokens == bos_id) & ~is_padding
    targets = np.where(is_padding | (spans[:, 1:] == bos_id), IGNORED_TARGET, spans[:, 1:])

    documents = np.cumsum(is_start, axis=1, dtype=np.int64)
    # A row that starts inside a document already has number 0 there; one that starts with bos has
    # 1.
    documents -= documents[:, :1]
    starts = np.maximum.accumulate(np.where(is_start, columns, 0), axis=1)
    positions = np.where(is_padding, 0, columns - starts)
    documents[is_padding] = PADDING_DOCUMENT

    counted = targets != IGNORED_TARGET
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        documents=torch.from_numpy(documents),
        positions=torch.from_numpy(positions),
        num_bytes=int(token_num_bytes[targets[counted]].sum()),
    )


def on_device(model: RecurrentDepthLM, batch: Batch) -> tuple[Batch, ForwardContext]:
    """A batch where the model is, and its context; rows of one whole document need no mask."""
    documents = batch.documents
    # Asked before the batch moves: the answer must not wait for the device.
    single = bool((documents == documents[:, :1]).all()) and bool((documents >= 0).all())
    batch = batch.to(model.embed.weight.device)
    masked = None if single else batch.documents
    return batch, model.context(batch.tokens, documents=masked, positions=batch.positions)
