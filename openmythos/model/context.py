"""What a forward needs besides the state: positions, who may see whom, the cache."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from openmythos.config import ModelConfig
from openmythos.model.cache import KVCache, RecentLoops
from openmythos.model.rope import Rope, rope_angles


@dataclass(frozen=True)
class ForwardContext:
    """The only extra argument of the model's calls; made once a forward by ``make_context``.

    ``mask`` is added to the attention scores; None means causal over the chunk itself. With a
    cache, ``rows`` are its rows of this batch (None: all), ``start`` is the chunk's first column.
    Without one, ``recent`` is what depth attention reads, and ``rows`` are rows of that.
    ``shared`` holds what ``once`` has made.
    """

    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    rope: Rope | None
    mask: Float[Tensor, "B 1 T S"] | None
    cache: KVCache | None = None
    rows: Int[Tensor, "B"] | None = None
    start: int = 0
    recent: RecentLoops | None = None
    shared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned at its first call in this forward; for what all loops share."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def select(self, index: Int[Tensor, "N"]) -> "ForwardContext":
        """The context of some of the rows."""
        batch_rows = index if self.rows is None else self.rows[index]
        return replace(
            self,
            tokens=self.tokens[index],
            positions=self.positions[index],
            rope=None if self.rope is None else (self.rope[0][index], self.rope[1][index]),
            mask=None if self.mask is None else self.mask[index],
            rows=None if self.cache is None and self.recent is None else batch_rows,
        )


def make_context(
    config: ModelConfig,
    tokens: Int[Tensor, "B T"],
    *,
    dtype: torch.dtype,
    padding_mask: Bool[Tensor, "B T"] | None = None,
    documents: Int[Tensor, "B T"] | None = None,
    positions: Int[Tensor, "B T"] | None = None,
    cache: KVCache | None = None,
) -> ForwardContext:
    """The context of a batch of tokens.

    Args:
        config: The model's.
        tokens: Token ids.
        dtype: Of the model's activations.
        padding_mask: True at real tokens; padding may stand anywhere.
        documents: Packed rows: attention only within equal numbers; negative marks padding.
        positions: Of the tokens; by default counted over real tokens, from 0 at each document.
        cache: Holds the tokens before; this call reserves its columns there.

    Raises:
        ValueError: Token ids out of the vocabulary, more tokens than ``max_seq_len``, documents
            together with a cache or a padding mask, or a cache made for another batch size.
    """
    if documents is not None and padding_mask is not None:
        raise ValueError("padding_mask given with documents; mark padding by negative documents")
    _check_tokens(config, tokens, cache, documents, padding_mask)
    if documents is not None:
        same = documents[:, :, None] == documents[:, None, :]
        visible = same & (documents >= 0)[:, None, :]
        if positions is None:
            positions = _positions_in_documents(documents)
        visible = visible.tril()
    elif cache is not None:
        return _cached_context(config, tokens, dtype, padding_mask, positions, cache)
    elif padding_mask is not None:
        visible = padding_mask[:, None, :].expand(-1, tokens.shape[1], -1).tril()
        if positions is None:
            positions = (padding_mask.cumsum(1) - 1).clamp(min=0)
    else:
        visible = None
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return _finish(config, tokens, positions, visible, dtype, None, 0)


def _cached_context(
    config: ModelConfig,
    tokens: Int[Tensor, "B T"],
    dtype: torch.dtype,
    padding_mask: Bool[Tensor, "B T"] | None,
    positions: Int[Tensor, "B T"] | None,
    cache: KVCache,
) -> ForwardContext:
    start = cache.append(tokens.shape[1], padding_mask)
    stop = cache.length
    if positions is None and not cache.padded:
        positions = torch.arange(start, stop, device=tokens.device).expand(tokens.shape)
    elif positions is None:
        counted = cache.valid[:, :stop].cumsum(1) - 1
        positions = counted[:, start:stop].clamp(min=0)
    visible = None
    if cache.padded or (start > 0 and tokens.shape[1] > 1):
        columns = torch.arange(stop, device=tokens.device)
        causal = columns <= torch.arange(start, stop, device=tokens.device)[:, None]
        visible = cache.valid[:, None, :stop] & causal
    return _finish(config, tokens, positions, visible, dtype, cache, start)


def _check_tokens(
    config: ModelConfig,
    tokens: Int[Tensor, "B T"],
    cache: KVCache | None,
    documents: Int[Tensor, "B T"] | None,
    padding: Bool[Tensor, "B T"] | None,
) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give rows of token ids, [B, T]")
    if tokens.numel() == 0:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; there must be at least one token"
        )
    if cache is not None and documents is not None:
        raise ValueError("packed documents cannot be cached; give one document a row")
    if cache is not None and cache.valid.shape[0] != tokens.shape[0]:
        rows = cache.valid.shape[0]
        raise ValueError(f"{tokens.shape[0]} rows given to a cache made for {rows}")
    length = tokens.shape[1] + (0 if cache is None else cache.length)
    if cache is not None and length > config.max_seq_len and (cache.padded or padding is not None):
        # Columns that hold padding take no position.
        fresh = tokens.shape[1] if padding is None else padding.sum(dim=1)
        length = int((cache.valid[:, : cache.length].sum(dim=1) + fresh).max())
    if length > config.max_seq_len:
        raise ValueError(
            f"{length} tokens exceed max_seq_len={config.max_seq_len}; shorten the input or "
            "raise it"
        )
    if torch.compiler.is_compiling() or tokens.is_meta:
        return
    low, high = torch.stack(tokens.aminmax()).tolist()  # one wait for the device, not two
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"token id {bad} is outside the vocabulary 0..{config.vocab_size - 1}")


def _positions_in_documents(documents: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    index = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def _finish(
    config: ModelConfig,
    tokens: Int[Tensor, "B T"],
    positions: Int[Tensor, "B T"],
    visible: Bool[Tensor, "B T S"] | None,
    dtype: torch.dtype,
    cache: KVCache | None,
    start: int,
) -> ForwardContext:
    mask = None
    if visible is not None:
        # Every query sees at least itself: a padding row must not become NaN.
        num_q, num_k = visible.shape[-2:]
        itself = torch.eye(num_q, dtype=torch.bool, device=tokens.device)
        visible = visible.clone()
        visible[:, :, num_k - num_q :] |= itself
        mask = torch.zeros(visible.shape, dtype=dtype, device=tokens.device)
        mask = mask.masked_fill(~visible, float("-inf"))[:, None]
    rope = None
    if config.rope is not None:
        rope = rope_angles(positions, config.attention.rope_dim, config.rope, dtype)
    recent = None
    if config.depth_attention is not None and cache is None:
        recent = RecentLoops(config, tokens, dtype)
    return ForwardContext(tokens, positions, rope, mask, cache, None, start, recent)
