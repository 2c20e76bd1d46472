"""What a forward needs besides the state: positions, who may see whom, the cache.

Attention layers hand over queries and new keys and values, and see no column, row or mask:

    kv = ctx.store(new, place)            keep a chunk's keys and values
    y = kv.attend(q, scale)               attend to them and to all before them
    y = ctx.attend(q, k, v, scale)        the same visibility for tensors made of ``kv.read()``
    own = ctx.earlier(place, num_recent)  the tokens' own keys and values at their last loops
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from openmythos.config import ModelConfig
from openmythos.model.cache import CacheView, KVCache, Place
from openmythos.model.rope import Rope, rope_angles
from openmythos.ops.attention import attention, depth_attention, packed_attention

Own = tuple[
    Float[Tensor, "R B G T K"], Float[Tensor, "R B G T W"], Bool[Tensor, "B R"]
]  # keys, values, and whether a row has run that loop
Recent = tuple[tuple[Float[Tensor, "R B heads T dim"], ...], ...]  # of every core layer


@dataclass(frozen=True)
class ForwardContext:
    """The only extra argument of the model's calls; made once a forward by ``make_context``.

    Who sees whom is kept as ``documents`` (attention within equal numbers; negative is padding) or
    ``valid`` (True at real tokens), and with a cache as its columns. None of them: causal.

    Attributes:
        lengths: The documents of each row in order, in tokens, where packed rows without padding
            are on a GPU: its kernels take lengths instead of a mask.
        recent: What depth attention reads without a cache, and ``made``, by layer, the keys and
            values of the loop that runs: ``advance`` turns the one into the other.
        shared: What ``once`` has made.
    """

    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    rope: Rope | None
    dtype: torch.dtype
    documents: Int[Tensor, "B T"] | None = None
    valid: Bool[Tensor, "B T"] | None = None
    lengths: tuple[tuple[int, ...], ...] | None = None
    cache: CacheView | None = None
    recent: Recent | None = None
    made: dict[int, tuple[Tensor, ...]] = field(default_factory=dict, compare=False, repr=False)
    shared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    masks: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returned at its first call in this forward; for what all loops share."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def select(self, rows: Sequence[int] | Int[Tensor, "N"]) -> "ForwardContext":
        """The context of some of the rows."""
        index = rows if isinstance(rows, Tensor) else torch.tensor(rows, device=self.tokens.device)
        lengths = self.lengths
        if lengths is not None:
            chosen = rows.tolist() if isinstance(rows, Tensor) else rows
            lengths = tuple(lengths[row] for row in chosen)
        recent = self.recent
        if recent is not None:
            recent = tuple(tuple(part[:, index] for part in layer) for layer in recent)
        masks = {name: None if m is None else m[index] for name, m in self.masks.items()}
        return replace(
            self,
            tokens=self.tokens[index],
            positions=self.positions[index],
            rope=None if self.rope is None else (self.rope[0][index], self.rope[1][index]),
            documents=None if self.documents is None else self.documents[index],
            valid=None if self.valid is None else self.valid[index],
            lengths=lengths,
            cache=None if self.cache is None else self.cache.select(index),
            recent=recent,
            masks={name: m for name, m in masks.items() if name != "spans"},
        )

    def at_loop(self, loop: int | None, recent: Recent | None) -> "ForwardContext":
        """The context of one loop.

        Args:
            loop: That of all rows, if it is the same.
            recent: What depth attention reads of the loops before.
        """
        cache = None if self.cache is None else replace(self.cache, loop=loop)
        return replace(self, cache=cache, recent=recent, made={})

    def newest_loops(self) -> Recent | None:
        """``recent`` with the loop that has run in front; the oldest falls out."""
        if self.recent is None:
            return None
        return tuple(
            tuple(
                torch.cat((fresh[None].to(old.dtype), old[:-1]))
                for fresh, old in zip(self.made[layer], earlier, strict=True)
            )
            for layer, earlier in enumerate(self.recent)
        )

    # --- attention -------------------------------------------------------------------------------

    def store(self, new: tuple[Tensor, ...], place: Place) -> "KeysValues":
        """Keep a chunk's ``[B heads T dim]`` keys and values; they and all before, to attend to.

        Without a cache they are the tensors that were given, gradients and all.
        """
        if self.cache is not None:
            return KeysValues(self, self.cache.store(new, place))
        if place.stage == "core" and self.recent is not None:
            self.made[place.layer] = new
        return KeysValues(self, new)

    def earlier(self, place: Place, num_recent: int) -> Own:
        """The tokens' own keys and values at their last ``num_recent`` loops, newest first."""
        assert place.loop_idx is not None
        back = torch.arange(1, num_recent + 1, device=place.loop_idx.device)
        exists = place.loop_idx[:, None] >= back
        if self.cache is not None:
            keys, values = self.cache.earlier(place, num_recent)
        else:
            assert self.recent is not None
            keys, values = self.recent[place.layer]
        return keys, values, exists

    def attend(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B G S K"],
        v: Float[Tensor, "B G S W"],
        scale: float,
        own: Own | None = None,
    ) -> Float[Tensor, "B H T W"]:
        """Attention to the keys that each token may see; ``own`` are further keys of its own."""
        if own is not None:
            own_k, own_v = (tensor.to(k.dtype) for tensor in own[:2])
            return depth_attention(q, k, v, self.mask, scale, own_k, own_v, own[2])
        if self.lengths is not None and q.dtype in (torch.bfloat16, torch.float16):
            return packed_attention(q, k, v, *self._spans(), scale)
        return attention(q, k, v, self.mask, scale)

    @property
    def mask(self) -> Float[Tensor, "B 1 T S"] | None:
        """Who sees whom as 0 and -inf, for kernels that need it so; None: causal order is all."""
        if "mask" not in self.masks:
            self.masks["mask"] = self._make_mask()
        mask: Tensor | None = self.masks["mask"]
        return mask

    def _make_mask(self) -> Float[Tensor, "B 1 T S"] | None:
        if self.cache is not None:
            return self.cache.mask(self.dtype)
        if self.documents is not None:
            same = self.documents[:, :, None] == self.documents[:, None, :]
            visible = same & (self.documents >= 0)[:, None, :]
        elif self.valid is not None:
            visible = self.valid[:, None, :].expand(-1, self.tokens.shape[1], -1)
        else:
            return None
        # Every query sees at least itself: a padding row must not become NaN.
        itself = torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device)
        visible = visible.tril() | itself
        zeros = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
        return zeros.masked_fill(~visible, float("-inf"))[:, None]

    def _spans(self) -> tuple[Int[Tensor, "N"], int]:
        """Where each document begins and the last ends, in tokens of all rows; the longest."""
        if "spans" not in self.masks:
            assert self.lengths is not None
            lengths = [length for row in self.lengths for length in row]
            ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            self.masks["spans"] = ends.to(self.tokens.device), max(lengths)
        spans: tuple[Tensor, int] = self.masks["spans"]
        return spans


@no_type_check  # made inside compiled graphs, where checked methods cannot be followed
class KeysValues(NamedTuple):
    """The keys and values that a chunk sees: of its own tokens, after a cache's.

    ``tensors`` are keys and values, or one tensor of latents that are both.
    """

    ctx: ForwardContext
    tensors: tuple[Float[Tensor, "B _ S _"], ...]

    def read(self) -> tuple[Float[Tensor, "B _ S _"], ...]:
        """The stored tensors, for layers that expand them."""
        return self.tensors

    def attend(
        self,
        q: Float[Tensor, "B H T K"],
        scale: float,
        *,
        v_dim: int | None = None,
        own: Own | None = None,
    ) -> Float[Tensor, "B H T W"]:
        """Attention of the chunk's queries.

        Args:
            q: Queries.
            scale: Of the scores.
            v_dim: The values are the first channels of the one stored tensor (absorbed MLA).
            own: Of ``ForwardContext.earlier``.
        """
        if v_dim is None:
            k, v = self.tensors
            return self.ctx.attend(q, k, v, scale, own)
        (latents,) = self.tensors
        # A slice of the channels would have to be copied, so all of them serve as values.
        return self.ctx.attend(q, latents, latents, scale, own)[..., :v_dim]


def make_context(
    config: ModelConfig,
    tokens: Int[Tensor, "B T"],
    *,
    dtype: torch.dtype,
    padding_mask: Bool[Tensor, "B T"] | None = None,
    documents: Int[Tensor, "B T"] | None = None,
    positions: Int[Tensor, "B T"] | None = None,
    cache: KVCache | None = None,
    rows: Sequence[int] | None = None,
) -> ForwardContext:
    """The context of a batch of tokens.

    Args:
        config: The model's.
        tokens: Token ids.
        dtype: Of the model's activations.
        padding_mask: True at real tokens; padding may stand anywhere.
        documents: Packed rows: attention only within equal numbers; negative marks padding.
        positions: Of the tokens; by default counted over real tokens, from 0 at each document.
        cache: Holds the tokens before. It counts this chunk's when a forward has run them.
        rows: The cache's rows that ``tokens`` go on; None: all of them.

    Raises:
        ValueError: Token ids out of the vocabulary, more tokens than ``max_seq_len``, documents
            together with a cache or a padding mask, or a cache made for another batch size.
    """
    if documents is not None and padding_mask is not None:
        raise ValueError("padding_mask given with documents; mark padding by negative documents")
    if cache is not None and documents is not None:
        raise ValueError("packed documents cannot be cached; give one document a row")
    _check_tokens(config, tokens)
    view, valid = None, None
    if cache is not None:
        view = _view(config, cache, tokens, padding_mask, rows)
    elif tokens.shape[1] > config.max_seq_len:
        raise _too_long(config, tokens.shape[1])
    else:
        valid = padding_mask
    if positions is None:
        positions = _positions(tokens, view, documents, valid)
    rope = None
    if config.rope is not None:
        rope = rope_angles(positions, config.attention.rope_dim, config.rope, dtype)
    recent = None
    if config.num_recent_loops and cache is None:
        recent = _no_loops(config, tokens, dtype)
    lengths = None
    if documents is not None and tokens.device.type == "cuda" and recent is None:
        lengths = document_lengths(documents)
    ctx = ForwardContext(
        tokens, positions, rope, dtype, documents, valid, lengths, view, recent=recent
    )
    if lengths is None:
        _ = ctx.mask  # made here, not in whichever compiled graph needs it first
    return ctx


def document_lengths(documents: Int[Tensor, "B T"]) -> tuple[tuple[int, ...], ...] | None:
    """Tokens of each row's documents, in order; None if there is padding."""
    rows = documents.tolist()
    if any(number < 0 for row in rows for number in row):
        return None
    lengths = []
    for row in rows:
        changes = [i for i in range(1, len(row)) if row[i] != row[i - 1]]
        ends = [*changes, len(row)]
        lengths.append(tuple(b - a for a, b in zip([0, *changes], ends, strict=True)))
    return tuple(lengths)


def _view(
    config: ModelConfig,
    cache: KVCache,
    tokens: Int[Tensor, "B T"],
    padding_mask: Bool[Tensor, "B T"] | None,
    rows: Sequence[int] | None,
) -> CacheView:
    num_rows = len(cache.lengths) if rows is None else len(rows)
    if num_rows != len(tokens):
        raise ValueError(f"{len(tokens)} rows given to a cache made for {num_rows}")
    view = cache.view(tokens.shape[1], padding_mask, rows)
    if view.stop > config.max_seq_len:
        raise _too_long(config, view.stop)
    return view


def _check_tokens(config: ModelConfig, tokens: Int[Tensor, "B T"]) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give rows of token ids, [B, T]")
    if tokens.numel() == 0:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; there must be at least one token"
        )
    if torch.compiler.is_compiling() or tokens.is_meta:
        return
    low, high = torch.stack(tokens.aminmax()).tolist()  # one wait for the device, not two
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"token id {bad} is outside the vocabulary 0..{config.vocab_size - 1}")


def _too_long(config: ModelConfig, length: int) -> ValueError:
    return ValueError(
        f"{length} tokens exceed max_seq_len={config.max_seq_len}; shorten the input or raise it"
    )


def _positions(
    tokens: Int[Tensor, "B T"],
    view: CacheView | None,
    documents: Int[Tensor, "B T"] | None,
    valid: Bool[Tensor, "B T"] | None,
) -> Int[Tensor, "B T"]:
    if view is not None:
        return view.columns
    if documents is not None:
        return _positions_in_documents(documents)
    if valid is not None:
        return (valid.cumsum(1) - 1).clamp(min=0)
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)


def _positions_in_documents(documents: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    index = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def _no_loops(config: ModelConfig, tokens: Int[Tensor, "B T"], dtype: torch.dtype) -> Recent:
    """Zeros in place of the loops before the first."""
    (num_rows, num_tokens), num_recent = tokens.shape, config.num_recent_loops
    empty = tuple(
        torch.zeros(num_recent, num_rows, heads, num_tokens, dim, dtype=dtype, device=tokens.device)
        for heads, dim in config.attention.cache_shapes
    )
    return (empty,) * config.num_core_layers
