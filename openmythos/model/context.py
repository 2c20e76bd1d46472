"""What a forward needs besides the state: positions, the attention mask, the KV cache.

Attention layers pass queries and new keys and values; masks and cache columns are handled here:

    kv = ctx.store(new, place)            store a chunk's keys and values
    y = kv.attend(q, scale)               attend to them and to all cached before them
    y = ctx.attend(q, k, v, scale)        the same, for k and v computed from ``kv.read()``
    own = ctx.earlier(place, num_recent)  the tokens' own keys and values from their last loops
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map_only

from openmythos.config import ModelConfig
from openmythos.config.schema import require
from openmythos.model.cache import CacheView, KVCache, Place
from openmythos.model.rope import Rope, rope_angles
from openmythos.ops.attention import attention, depth_attention, packed_attention
from openmythos.ops.cpu import build as native

Own = tuple[
    Float[Tensor, "R B G T K"], Float[Tensor, "R B G T W"], Bool[Tensor, "B R"]
]  # keys, values, and whether each row has run that loop
Recent = tuple[tuple[Float[Tensor, "R B heads T dim"], ...], ...]  # per core layer: keys, values
Ids = Int[Tensor, "B T"] | Sequence[Sequence[int]]
Seeds = int | Sequence[int] | Int[Tensor, "B _"]


class Made:
    """Keys and values, by core layer; of a plain dictionary FSDP2 would hand modules copies."""

    def __init__(self) -> None:
        self.by_layer: dict[int, tuple[Tensor, ...]] = {}


@dataclass(frozen=True)
class ForwardContext:
    """The only extra argument of the model's calls; made once per forward by ``make_context``.

    Attention is causal. It is restricted further by ``documents`` or ``valid``; with a cache, its
    columns determine what each token attends to.

    Attributes:
        seeds: The seeds of random initial states, per row or per token.
        documents: The documents of packed rows, numbered in order in each row: tokens attend only
            within their own document. Padding has -1.
        valid: True at real tokens, False at padding.
        lengths: Each row's document lengths in order, for packed rows without padding on a GPU,
            whose kernel takes lengths instead of a mask.
        recent: Keys and values of the last loops, for depth attention without a cache.
        experts: Computes the routed experts in place of ``ops.moe``'s functions.
        counts: 1 if experts count their tokens, 0 where a loop is run again for its gradient. A
            tensor, because a compiled graph must serve both; None: they count.
        made: Keys and values of the running loop; ``advance`` adds them to ``recent``.
        shared: The values computed by ``once``.
        masks: The attention mask and the document offsets, once they have been computed.
    """

    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    rope: Rope | None
    dtype: torch.dtype
    seeds: Int[Tensor, "B _"]
    documents: Int[Tensor, "B T"] | None = None
    valid: Bool[Tensor, "B T"] | None = None
    lengths: tuple[tuple[int, ...], ...] | None = None
    cache: CacheView | None = None
    recent: Recent | None = None
    experts: Callable[..., Tensor] | None = None
    counts: Int[Tensor, ""] | None = None
    made: Made | None = field(default=None, compare=False, repr=False)
    shared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    masks: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, make: Callable[..., Any], *weights: Tensor) -> Any:
        """The result of ``make(*weights)``, called once for these weights; all loops share it.

        Other tensors, other memory in them or other gradients wanted are other weights.
        """
        wanted = torch.is_grad_enabled(), *((w.data_ptr(), w.requires_grad) for w in weights)
        key = make, *weights, wanted
        if key not in self.shared:
            self.shared[key] = make(*weights)
        return self.shared[key]

    @property
    def real(self) -> Bool[Tensor, "B T"] | None:
        """True at real tokens, False at padding; None if there is no padding."""
        if self.cache is not None:
            return self.cache.valid
        return self.valid if self.documents is None else self.documents >= 0

    def select(self, rows: Sequence[int] | Int[Tensor, "N"]) -> "ForwardContext":
        """The context of some of the rows."""
        index = rows if isinstance(rows, Tensor) else torch.tensor(rows, device=self.tokens.device)
        lengths = self.lengths
        if lengths is not None:
            chosen = rows.tolist() if isinstance(rows, Tensor) else rows
            lengths = tuple(lengths[row] for row in chosen)
        per_row = ("tokens", "positions", "rope", "seeds", "documents", "valid")
        parts = {name: select_rows(getattr(self, name), index) for name in per_row}
        parts["recent"] = select_rows(self.recent, index, dim=1)
        cache = None if self.cache is None else self.cache.select(index)
        masks = {name: select_rows(m, index) for name, m in self.masks.items() if name != "spans"}
        return replace(self, **parts, lengths=lengths, cache=cache, masks=masks)

    def at_loop(self, loop: int | None, recent: Recent | None) -> "ForwardContext":
        """The context of one loop.

        Args:
            loop: The loop of all rows, if it is the same, else None.
            recent: Keys and values of the last loops, for depth attention.
        """
        cache = None if self.cache is None else replace(self.cache, loop=loop)
        return replace(self, cache=cache, recent=recent, made=None if recent is None else Made())

    def newest_loops(self) -> Recent | None:
        """``recent`` after the running loop: that loop is put first and the oldest is dropped."""
        if self.recent is None or self.made is None:
            return None
        made = self.made.by_layer
        layers = [zip(made[n], old, strict=True) for n, old in enumerate(self.recent)]
        return tuple(tuple(torch.cat((a[None].to(b.dtype), b[:-1])) for a, b in p) for p in layers)

    # --- attention -------------------------------------------------------------------------------

    def store(self, new: tuple[Tensor, ...], place: Place) -> "KeysValues":
        """Store a chunk's ``[B heads T dim]`` tensors; return all that the chunk may attend to.

        That is what the cache holds, including the chunk; without a cache, ``new`` itself, through
        which gradients flow.
        """
        if self.cache is not None:
            return KeysValues(self, self.cache.store(new, place))
        if place.stage == "core" and self.made is not None:
            self.made.by_layer[place.layer] = new
        return KeysValues(self, new)

    def earlier(self, place: Place, num_recent: int) -> Own:
        """The tokens' own keys and values from their last ``num_recent`` loops, newest first."""
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
        """Attention within the context's mask; ``own``: also to a token's own earlier loops."""
        if own is not None:
            own_k, own_v = (tensor.to(k.dtype) for tensor in own[:2])
            return depth_attention(q, k, v, self.mask, scale, own_k, own_v, own[2])
        if self.lengths is not None and q.dtype in (torch.bfloat16, torch.float16):
            return packed_attention(q, k, v, *self._spans(), scale)
        return attention(q, k, v, self.mask, scale)

    @property
    def mask(self) -> Float[Tensor, "B 1 T S"] | None:
        """The attention mask, 0 or -inf, made on first use; None if it would be only causal."""
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
        # Padding attends to itself: a softmax over no keys would be NaN.
        itself = torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device)
        visible = visible.tril() | itself
        zeros = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
        return zeros.masked_fill(~visible, float("-inf"))[:, None]

    def _spans(self) -> tuple[Int[Tensor, "N"], int]:
        """Offsets of the documents in the concatenated rows, with the end; the greatest length."""
        if "spans" not in self.masks:
            assert self.lengths is not None
            lengths = [length for row in self.lengths for length in row]
            ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            self.masks["spans"] = ends.to(self.tokens.device), max(lengths)
        spans: tuple[Tensor, int] = self.masks["spans"]
        return spans


@no_type_check  # torch.compile, which meets this class, cannot trace runtime type checks
class KeysValues(NamedTuple):
    """The keys and values that a chunk may attend to: those of the cache, then its own.

    ``tensors`` are keys and values or, for MLA, one tensor of latents.
    """

    ctx: ForwardContext
    tensors: tuple[Float[Tensor, "B _ S _"], ...]

    def read(self) -> tuple[Float[Tensor, "B _ S _"], ...]:
        """The stored tensors, for a layer that expands them to keys and values."""
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
            scale: Factor of the scores.
            v_dim: For absorbed MLA: the first ``v_dim`` channels of the latents are the values.
            own: The result of ``ForwardContext.earlier``, for depth attention.
        """
        if v_dim is None:
            k, v = self.tensors
            return self.ctx.attend(q, k, v, scale, own)
        (latents,) = self.tensors
        # All channels serve as values and are cut afterwards: a slice of them would be copied.
        return self.ctx.attend(q, latents, latents, scale, own)[..., :v_dim]


def select_rows(part: Any, index: Int[Tensor, "N"], dim: int = 0) -> Any:
    """Some of the rows of all tensors of ``part``, along ``dim``."""
    return tree_map_only(Tensor, lambda tensor: tensor.index_select(dim, index), part)


def make_context(
    config: ModelConfig,
    tokens: Ids,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    padding_mask: Bool[Tensor, "B T"] | None = None,
    documents: Int[Tensor, "B T"] | None = None,
    positions: Int[Tensor, "B T"] | None = None,
    cache: KVCache | None = None,
    rows: Sequence[int] | None = None,
    seeds: Seeds = 0,
) -> ForwardContext:
    """The context of a batch of tokens.

    Args:
        config: The model's.
        tokens: Token ids. These and the next three may be lists or arrays, too.
        dtype: Of the model's activations.
        device: Where a list of tokens is put; a tensor stays where it is.
        padding_mask: True at real tokens, False at padding, which may be anywhere.
        documents: Document numbers of packed rows; negative numbers mark padding, which may be
            inside of a document. Where the number changes, another document begins: a number that
            comes again later in the row is a new document.
        positions: Positions of the tokens; default: real tokens counted from 0 in each document.
        cache: The cache of the earlier tokens; ``forward`` adds this chunk to it.
        rows: The cache's row of each row of ``tokens``; None: all rows in order.
        seeds: Of random initial states: one for all rows, one per row, or a tensor with one column
            or one per token. A document has equal states wherever it stands, if its seed is equal.

    Raises:
        ValueError: A wrong type or shape, token ids outside the vocabulary, more tokens than
            ``max_seq_len`` or than the cache has room for, documents together with a cache or a
            padding mask, or a cache made for another batch size.
    """
    tokens = as_tensor("tokens", tokens, torch.int64, device)
    assert isinstance(tokens, Tensor)
    like = tokens.device, tokens.shape
    padding_mask = as_tensor("padding_mask", padding_mask, torch.bool, *like)
    documents = as_tensor("documents", documents, torch.int64, *like)
    positions = as_tensor("positions", positions, torch.int64, *like)
    require(cache is None or isinstance(cache, KVCache), "cache", cache, "a KVCache or None")
    if documents is not None and padding_mask is not None:
        raise ValueError("padding_mask given with documents; mark padding by negative documents")
    if rows is not None and cache is None:
        raise ValueError(f"rows are {rows} without a cache; they are rows of a cache")
    if cache is not None and documents is not None:
        raise ValueError("packed documents cannot be cached; give one document per row")
    _check_tokens(config, tokens)
    view, valid, inside = None, None, None
    if documents is not None:
        documents, inside = _number_documents(documents)
    if cache is not None:
        view = cache.view(tokens.shape[1], padding_mask, rows)
        if len(view.lengths) != len(tokens):
            raise ValueError(f"{len(tokens)} rows given to a cache made for {len(view.lengths)}")
    else:
        valid = padding_mask
    length, most = tokens.shape[1] if view is None else view.stop, config.max_seq_len
    if length > most:
        raise ValueError(f"{length} tokens exceed max_seq_len={most}; shorten or raise it")
    if positions is None:
        positions = _positions(tokens, view, valid) if inside is None else inside
    rope = None
    if config.rope is not None:
        rope = rope_angles(positions, config.attention.rope_dim, config.rope, dtype)
    recent = None
    if config.num_recent_loops and cache is None:
        recent = _no_loops(config, tokens, dtype)
    lengths = None
    if documents is not None and tokens.device.type == "cuda" and recent is None:
        lengths = document_lengths(documents)
    seeds = _seeds(seeds, tokens)
    ctx = ForwardContext(
        tokens, positions, rope, dtype, seeds, documents, valid, lengths, view, recent=recent
    )
    if lengths is None:
        _ = ctx.mask  # make it now, outside of compiled graphs
    return ctx


def _seeds(seeds: Seeds, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B _"]:
    if not isinstance(seeds, Tensor):
        each = [seeds] * len(tokens) if isinstance(seeds, int) else seeds
        # Seeds of up to 64 bits, with or without a sign, as torch.Generator takes them.
        seeds = torch.tensor([[(seed + 2**63) % 2**64 - 2**63] for seed in each])
    allowed = (len(tokens), 1), tuple(tokens.shape)
    require(seeds.shape in allowed, "the shape of seeds", tuple(seeds.shape), f"one of {allowed}")
    return seeds.to(tokens.device)


def document_lengths(documents: Int[Tensor, "B T"]) -> tuple[tuple[int, ...], ...] | None:
    """The lengths of each row's documents in order, in tokens; None if there is padding."""
    rows = documents.tolist()
    if any(number < 0 for row in rows for number in row):
        return None
    lengths = []
    for row in rows:
        changes = [i for i in range(1, len(row)) if row[i] != row[i - 1]]
        ends = [*changes, len(row)]
        lengths.append(tuple(b - a for a, b in zip([0, *changes], ends, strict=True)))
    return tuple(lengths)


def as_tensor(
    name: str,
    value: Any,
    dtype: torch.dtype,
    device: torch.device | None,
    shape: torch.Size | None = None,
) -> Any:
    """Integers or truth values as a tensor of this dtype and shape; only ``tokens`` must be."""
    if value is None and shape is not None:
        return None
    if not isinstance(value, Tensor):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            value = torch.as_tensor(value, device=device)
    given, fits = type(value).__name__, False
    if isinstance(value, Tensor):
        given, kinds = f"{value.dtype} {list(value.shape)}", {value.dtype, dtype}
        fits = torch.can_cast(value.dtype, dtype) and (torch.bool not in kinds or len(kinds) == 1)
        fits = fits and value.ndim == 2 and shape in (None, value.shape)
    require(fits, name, given, f"{dtype} {'[B, T]' if shape is None else list(shape)}")
    return value.to(dtype)


def _check_tokens(config: ModelConfig, tokens: Int[Tensor, "B T"]) -> None:
    require(tokens.numel() > 0, "tokens", list(tokens.shape), "[B, T] with at least one token")
    if torch.compiler.is_compiling() or tokens.is_meta or native.vmapped():
        return
    low, high = torch.stack(tokens.aminmax()).tolist()  # one wait for the device, not two
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"token id {bad} is outside the vocabulary 0..{config.vocab_size - 1}")


def _positions(
    tokens: Int[Tensor, "B T"],
    view: CacheView | None,
    valid: Bool[Tensor, "B T"] | None,
) -> Int[Tensor, "B T"]:
    if view is not None:
        return view.columns
    if valid is not None:
        return (valid.cumsum(1) - 1).clamp(min=0)
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)


def _number_documents(
    documents: Int[Tensor, "B T"],
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Documents by their order in the row, -1 at padding; each token's position in its own."""
    real, index = documents >= 0, torch.arange(documents.shape[1], device=documents.device)
    # Padding continues the document before it.
    filled = documents.gather(1, torch.where(real, index, 0).cummax(dim=1).values)
    starts = torch.ones_like(real)
    starts[:, 1:] = filled[:, 1:] != filled[:, :-1]
    order = real.cumsum(1)
    first = torch.where(starts, order, 0).cummax(dim=1).values
    return torch.where(real, starts.cumsum(1), -1), (order - first) * real


def _no_loops(config: ModelConfig, tokens: Int[Tensor, "B T"], dtype: torch.dtype) -> Recent:
    """``recent`` before the first loop: zeros, which are masked."""
    (num_rows, num_tokens), num_recent = tokens.shape, config.num_recent_loops
    empty = tuple(
        torch.zeros(num_recent, num_rows, heads, num_tokens, dim, dtype=dtype, device=tokens.device)
        for heads, dim in config.attention.cache_shapes
    )
    return (empty,) * config.num_core_layers
