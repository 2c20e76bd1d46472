"""The reference generator: prompts of unequal length in one batch, loops chosen per token.

Faster engines must give the same tokens.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openmythos.config.counts import kv_bytes_per_token
from openmythos.config.schema import as_flag, as_integer, plain, require
from openmythos.engine.batch import CachedBatch, UncachedBatch
from openmythos.engine.request import TEXT, Request, room_for, token_ids
from openmythos.engine.sampling import (
    Logprobs,
    SamplingConfig,
    adjusted,
    row_generator,
    sample,
    token_logprobs,
)
from openmythos.model.cache import CacheLayout, KVCache, PerLoop
from openmythos.model.exit import Fixed, Rule
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cpu import build as native
from openmythos.plan.memory import require_memory

FinishReason = Literal["stop", "length"]
Prompts = Sequence[Any] | Tensor  # of token ids; text is refused with an error that explains it
# One value for all prompts, or one per prompt:
Counts = int | Sequence[int] | Int[Tensor, "B"]
Numbers = float | Sequence[float]
OptionalCounts = int | None | Sequence[int | None]
OptionalNumbers = float | None | Sequence[float | None]

T = TypeVar("T")


@dataclass(frozen=True)
class NewToken:
    """One sampled token, with the ``logits`` it was sampled from and the loops that they took.

    ``logprobs`` are given if the request asks for them.
    """

    row: int
    token: int
    num_loops: int
    finish_reason: FinishReason | None
    logits: Float[Tensor, "V"]
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class GenerationResult:
    """What ``generate`` returns: every list has one entry per prompt.

    If a row was ended by a stop token, it is the last of the row's ``tokens``. One core application
    is one loop of the core for one token; padding is not counted. ``core_applications`` are all of
    them; ``prefill_core_applications`` are those from which no token was sampled (a prompt before
    its last token and, without a cache, all recomputation). The difference is the sum of ``loops``.
    """

    tokens: list[list[int]]
    loops: list[list[int]]
    finish_reasons: list[FinishReason | None]
    core_applications: int = 0
    prefill_core_applications: int = 0
    logits: list[Float[Tensor, "_ V"]] | None = None


def generate(
    model: RecurrentDepthLM,
    prompts: Prompts,
    *,
    max_new_tokens: Counts,
    num_loops: Counts | None = None,
    exit_rule: Rule | None = None,
    temperature: Numbers = 0.0,
    top_k: OptionalCounts = None,
    top_p: OptionalNumbers = None,
    num_ids: int | None = None,
    stop_tokens: Collection[int] = (),
    seed: int = 0,
    cache_layout: CacheLayout | None = None,
    prefill_chunk: int | None = None,
    use_cache: bool = True,
    max_loops: int | None = None,
    compiled: bool = False,
    return_logits: bool = False,
) -> GenerationResult:
    """Continue each prompt; arguments not listed are fields of ``Request`` and ``SamplingConfig``.

    Args:
        model: Its mode, training or evaluation, is the same afterwards.
        prompts: Token ids, at least one per prompt; lengths may differ.
        num_ids: The tokenizer's ``vocab_size``, which a model does not know: ids from there on have
            no text and are then not generated. None: all ids that the model has.
        seed: Seed of the initial states and, together with the prompt's index, of the sampling.
        cache_layout: Default ``PerLoop``, the same results as without a cache; others approximate.
        prefill_chunk: Number of prompt tokens read at once; None: all. See ``Session.stream``.
        use_cache: False computes all tokens again for each new one; not possible with an exit rule.
        max_loops: The most loops that the cache has room for; default: the largest ``num_loops``.
        compiled: Whether to compile decoding; see ``Session``.
        return_logits: Whether to return the logits of every new token.

    Raises:
        ValueError: A bad prompt, number or combination; raised before anything is computed.
    """
    rows = _token_rows(prompts)
    given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_loops": num_loops}
    given |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    columns = [_per_row(name, value, len(rows)) for name, value in given.items()]
    return_logits = as_flag("return_logits", return_logits)
    stops = Request(tokens=(), stop_tokens=stop_tokens).stop_tokens  # an iterator is read once
    requests = [
        Request(
            tokens=tokens,
            max_new_tokens=count,
            num_loops=depth,
            exit_rule=exit_rule,
            sampling=SamplingConfig(temperature=t, top_k=k, top_p=p, num_ids=num_ids),
            stop_tokens=stops,
            seed=seed,
            sample_idx=row,
        )
        for row, (tokens, count, depth, t, k, p) in enumerate(zip(rows, *columns, strict=True))
    ]
    session = Session.fitting(
        model,
        requests,
        max_loops=max_loops,
        cache_layout=cache_layout,
        use_cache=use_cache,
        compiled=compiled,
    )
    result = GenerationResult([[] for _ in rows], [[] for _ in rows], [None for _ in rows])
    logits: list[list[Tensor]] = [[] for _ in rows]
    for new in session.stream(requests, prefill_chunk=prefill_chunk):
        result.tokens[new.row].append(new.token)
        result.loops[new.row].append(new.num_loops)
        result.finish_reasons[new.row] = new.finish_reason
        if return_logits:
            logits[new.row].append(new.logits)
    return replace(
        result,
        core_applications=session.core_applications,
        prefill_core_applications=session.core_applications - sum(map(sum, result.loops)),
        logits=[torch.stack(row) for row in logits] if return_logits else None,
    )


class Session:
    """Rows of tokens that are continued from call to call; the KV cache keeps what was read.

    Between calls, the last token of each row has been sampled but not read by the model; the tokens
    of the row's next request come after it. Loops, exit rule and sampling may change with every
    call; a row's seed may not. Each row has room for ``max_len`` tokens that are read (default:
    ``max_seq_len``).

    ``compiled`` decodes with ``torch.compile``, several times as fast as eager, except that the
    first tokens of a model or of a new batch size wait for the compiler. Prompts are read eagerly.
    It needs the cache, a model whose settings do not change and, on a CPU, a C++ compiler.

    A call that fails, wherever it fails, leaves the session as it was after the last token that it
    yielded (the tokens of its requests included) or, if there is none, as before the call.
    """

    def __init__(
        self,
        model: RecurrentDepthLM,
        *,
        batch_size: int = 1,
        max_loops: int | None = None,
        max_len: int | None = None,
        cache_layout: CacheLayout | None = None,
        use_cache: bool = True,
        compiled: bool = False,
    ) -> None:
        _checked(model, [Request(tokens=())])
        use_cache, compiled = as_flag("use_cache", use_cache), as_flag("compiled", compiled)
        require(use_cache or not compiled, "compiled", compiled, "False without a cache")
        native.require_compiler("compiled", compiled)
        self.model, self.use_cache = model, use_cache
        longest = model.config.max_seq_len if max_len is None else max_len
        deepest = model.config.num_loops if max_loops is None else max_loops
        batch_size = as_integer("batch_size", batch_size, 1, 2**20)
        self.max_len = as_integer("max_len", longest, 1)
        self.max_loops = as_integer("max_loops", deepest, 1)
        made = "None or a layout of openmythos.model.cache, for example LastLoop()"
        known = cache_layout is None or isinstance(cache_layout, CacheLayout)
        require(known, "cache_layout", cache_layout, made)
        self._done = _Done(((),) * batch_size)
        self.batch: CachedBatch | UncachedBatch = UncachedBatch(model, batch_size)
        if use_cache:
            _require_room(model, batch_size, self.max_len, self.max_loops, cache_layout)
            cache = KVCache(
                model.config,
                batch_size=batch_size,
                max_len=self.max_len,
                max_loops=self.max_loops,
                layout=cache_layout,
                dtype=model.embed.weight.dtype,
                device=model.embed.weight.device,
            )
            self.batch = CachedBatch(model, cache, compiled=compiled)

    @classmethod
    def fitting(
        cls,
        model: RecurrentDepthLM,
        requests: Sequence[Request],
        *,
        max_loops: int | None = None,
        cache_layout: CacheLayout | None = None,
        use_cache: bool = True,
        compiled: bool = False,
    ) -> "Session":
        """A session with just enough room for one call of ``stream`` with these requests.

        Raises:
            ValueError: A request that the model cannot serve, or a bad argument.
        """
        _checked(model, requests)
        room = room_for(model.config, requests)
        return cls(
            model,
            batch_size=len(requests),
            max_loops=room.max_loops if max_loops is None else max_loops,
            max_len=room.max_len,
            cache_layout=cache_layout,
            use_cache=use_cache,
            compiled=compiled,
        )

    @property
    def core_applications(self) -> int:
        """Number of core applications (one loop of one token) since the session began."""
        return self._done.core_applications

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens of each row: given, sampled, and including the last, which is not read yet."""
        return [list(row) for row in self._done.tokens]

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row, including one that has not been read."""
        return [len(row) for row in self._done.tokens]

    def room(self, row: int = 0) -> int:
        """Number of tokens, given and new together, that a row still has room for."""
        positions = self.model.config.max_seq_len - self.lengths[row]
        if not self.use_cache:
            return positions
        # The last new token needs no column of the cache, because it is not read.
        return min(positions, self.max_len - self.lengths[row] + 1)

    def stream(
        self, requests: Sequence[Request], *, prefill_chunk: int | None = None
    ) -> Iterator[NewToken]:
        """Read the tokens of one request per row, then yield each new token when it is sampled.

        At each step the rows come in order. The given tokens are read with all loops, except the
        last, which gives the first new token. A request may be without tokens if its row has some.

        Args:
            requests: One per row. All must have the same ``exit_rule``, and each row the same
                ``seed`` in all calls. A row's random numbers continue those of its last request
                with the same ``sample_idx``.
            prefill_chunk: Number of given tokens read at once; None: all. Chunks end at multiples
                of it, counted from the row's first token, so a row does not depend on the others.
                With a layout that approximates, a token reads its own chunk at its own loop and
                earlier chunks at the kept loops, so the results depend on the chunk's size.

        Raises:
            ValueError: A bad number or combination; raised before anything is computed. Later, from
                the stream: another stream of this session has gone on since.
        """
        _checked(self.model, requests)
        num_rows, config = len(self.lengths), self.model.config
        given = len(requests)
        require(given == num_rows, "the number of requests", given, f"{num_rows} here")
        for row, (request, length) in enumerate(zip(requests, self.lengths, strict=True)):
            request.check(config, max_loops=self.max_loops, num_before=length, row=row)
        rules = (Fixed() if r.exit_rule is None else r.exit_rule for r in requests)
        rule = _shared("exit_rule", rules, "give all rows of a call the same")
        if not self.use_cache and not isinstance(rule, Fixed):
            raise ValueError(f"exit rule {rule.kind!r} needs use_cache=True")
        seeds = tuple(request.seed for request in requests)
        for row, (seed, begun) in enumerate(zip(seeds, self._done.seeds or seeds, strict=True)):
            begins = f"{begun}, as when the row began; sample_idx makes requests draw differently"
            require(seed == begun, f"seed of row {row}", seed, begins)
        if prefill_chunk is not None:
            prefill_chunk = as_integer("prefill_chunk", prefill_chunk, 1)
        done = replace(self._done, seeds=seeds)
        return self._stream(
            list(requests), self._budgets(requests), rule, self._done, done, prefill_chunk
        )

    def _budgets(self, requests: Sequence[Request]) -> list[int]:
        """The maximum number of new tokens of each row."""
        limit, budgets = self.model.config.max_seq_len, []
        for row, (request, length) in enumerate(zip(requests, self.lengths, strict=True)):
            given = length + len(request.tokens)
            left = self.max_len + 1 - given if self.use_cache else limit
            budget = request.budget(max(1, min(left, limit - given)))
            if budget > left:
                raise ValueError(
                    f"row {row} needs {given - 1 + budget} columns and has "
                    f"max_len={self.max_len}; raise max_len, or ask for fewer new tokens"
                )
            budgets.append(budget)
        return budgets

    def _stream(
        self,
        requests: Sequence[Request],
        budgets: list[int],
        rule: Rule,
        expected: "_Done",
        done: "_Done",
        chunk: int | None,
    ) -> Iterator[NewToken]:
        """Yield tokens; ``expected`` is what this stream left the session as, ``done`` it goes on.

        The session moves by the one assignment to ``_done``, after a step's work: whatever stops
        the work, even between two lines, what the batch did since is undone before the next step.
        """
        depths = [request.depth(self.model.config) for request in requests]
        modules = list(self.model.modules())
        given = [request.tokens for request in requests]
        running, left = list(range(len(requests))), list(budgets)
        while running:
            if self._done is not expected:
                raise ValueError(
                    "another stream of this session has gone on since this one was last read; "
                    "read one to its end, or give each a session of its own"
                )
            texts = [(*old, *new) for old, new in zip(done.tokens, given, strict=True)]
            with inference(self.model, modules):
                unread = self._rewind(texts)
                self.batch.seeds = done.seeds  # of initial states; not known before
                before = self.batch.core_applications
                self.batch.prefill([row[:-1] for row in unread], depths, chunk)
                tokens = {row: texts[row][-1] for row in running}
                logits, loops = self.batch.decode(tokens, depths, rule)
                keys = {row: (row, requests[row].sample_idx) for row in running}
                drawn = {key: done.generator(key) for key in keys.values()}
                num_new = [budgets[row] - left[row] for row in running]
                settings = [
                    requests[row].sampling_after(new)
                    for row, new in zip(running, num_new, strict=True)
                ]
                weighed = adjusted(logits, settings, [texts[row] for row in running], num_new)
                sampled = sample(weighed, settings, list(drawn.values())).tolist()
            new = []
            for i, (row, likely) in enumerate(zip(running, sampled, strict=True)):
                request = requests[row]
                token = request.new_token(num_new[i], likely)
                texts[row] = (*texts[row], token)
                left[row] -= 1
                reason: FinishReason | None = "length" if left[row] == 0 else None
                reason = "stop" if token in request.stop_tokens else reason
                report = None
                if request.logprobs is not None:
                    report = token_logprobs(logits[i], token, request.logprobs)
                new.append(NewToken(row, token, loops[i], reason, logits[i], report))
            work = self.batch.core_applications - before
            done = _Done(
                tuple(texts),
                done.seeds,
                done.generators | drawn,
                done.core_applications + work,
            )
            expected = self._done = done
            yield from new
            given = [()] * len(requests)
            running = [item.row for item in new if item.finish_reason is None]

    def _rewind(self, texts: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """Undo what the batch did since the last whole step; return each row's unread tokens."""
        read = [max(0, length - 1) for length in self.lengths]
        self.batch.rewind(read)
        return [list(text[start:]) for text, start in zip(texts, read, strict=True)]


@dataclass(frozen=True)
class _Done:
    """What a session has done: replaced as a whole, never changed.

    All tokens of a row but the last have been read. The generators, by row and ``sample_idx``, are
    copied before they draw.
    """

    tokens: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...] = ()  # of the rows, from their first requests
    generators: dict[tuple[int, int], torch.Generator] = field(default_factory=dict)
    core_applications: int = 0

    def generator(self, key: tuple[int, int]) -> torch.Generator:
        """A copy of the generator of a row and ``sample_idx``."""
        if key in self.generators:
            return self.generators[key].clone_state()
        row, sample_idx = key
        return row_generator(self.seeds[row], sample_idx)


def _require_room(
    model: RecurrentDepthLM, batch_size: int, max_len: int, loops: int, layout: CacheLayout | None
) -> None:
    """Refuse a cache that this machine's memory cannot hold, before any of it is allocated."""
    weight = model.embed.weight
    if weight.device.type != "cpu":
        return  # an accelerator's allocator refuses by itself, with the sizes
    kept = (PerLoop() if layout is None else layout).num_slots(loops)
    per_token = kv_bytes_per_token(
        model.config, num_loops=loops, kept_loops=kept, dtype_bytes=weight.dtype.itemsize
    )
    what = f"a cache of {batch_size} rows, {max_len} tokens and {loops} loops"
    advice = "lower num_loops, take fewer tokens or rows, or another cache layout"
    require_memory(batch_size * (max_len + 1) * per_token, what, advice)


def _token_rows(prompts: Prompts) -> list[tuple[int, ...]]:
    given = prompts if isinstance(prompts, TEXT) else plain(prompts)
    many = isinstance(given, Iterable) and not isinstance(given, Set | Mapping)
    rows = list(given) if many and not isinstance(given, TEXT) else []
    if isinstance(given, TEXT) or any(isinstance(row, TEXT) for row in rows):
        raise ValueError("prompts hold text; give token ids: encode it with a tokenizer first")
    require(len(rows) > 0, "prompts", given, "at least one list of token ids, in a list or tensor")
    allowed = "a list of token ids, and prompts a list of such lists or a 2-D tensor"
    return [token_ids(f"prompt {row}", prompt, allowed) for row, prompt in enumerate(rows)]


def _checked(model: RecurrentDepthLM, requests: Sequence[Request]) -> None:
    """Refuse what is no model, or no list of requests."""
    made = "a RecurrentDepthLM, for example from load_pretrained"
    require(isinstance(model, nn.Module) and hasattr(model, "embed"), "model", model, made)
    made = "at least one Request, in a list"
    known = isinstance(requests, Sequence) and all(isinstance(r, Request) for r in requests)
    require(known and len(requests) > 0, "requests", requests, made)


def _per_row(name: str, value: Any, num_rows: int) -> list[Any]:
    values = value if isinstance(value, TEXT) else plain(value)
    if isinstance(values, TEXT) or not isinstance(values, Sequence):
        return [values] * num_rows
    require(len(values) == num_rows, name, value, f"one value, or one for each of {num_rows} rows")
    return list(values)


def _shared(name: str, values: Iterable[T], advice: str) -> T:
    """The one value that all requests have; an error if there are several."""
    found = set(values)
    if len(found) > 1:
        different = ", ".join(sorted(map(str, found)))
        raise ValueError(f"{name} differs between requests: {different}; {advice}")
    return found.pop()
