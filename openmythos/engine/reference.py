"""The reference generator: prompts of unequal length in one batch, loops chosen per token.

Faster engines must give the same tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.config.counts import kv_bytes_per_token
from openmythos.config.schema import plain, require
from openmythos.engine.batch import CachedBatch, UncachedBatch
from openmythos.engine.request import Request, token_ids
from openmythos.engine.sampling import (
    Logprobs,
    SamplingConfig,
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
    stop_tokens: Iterable[int] = (),
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
        seed: Seed of the initial states and, together with the prompt's index, of the sampling.
        cache_layout: Default ``PerLoop``, the same results as without a cache; others approximate.
        prefill_chunk: Number of prompt tokens read at once; None: all.
        use_cache: False computes all tokens again for each new one; not possible with an exit rule.
        max_loops: The most loops that the cache has room for; default: the largest ``num_loops``.
        compiled: Whether to compile decoding; see ``Session``.
        return_logits: Whether to return the logits of every new token.

    Raises:
        ValueError: A bad prompt, number or combination; raised before anything is computed.
    """
    rows = _token_rows(prompts)
    columns = (
        _per_row("max_new_tokens", max_new_tokens, len(rows)),
        _per_row("num_loops", num_loops, len(rows)),
        _per_row("temperature", temperature, len(rows)),
        _per_row("top_k", top_k, len(rows)),
        _per_row("top_p", top_p, len(rows)),
    )
    stops = frozenset(token_ids("stop_tokens", stop_tokens))
    requests = [
        Request(
            tokens=tokens,
            max_new_tokens=count,
            num_loops=depth,
            exit_rule=exit_rule,
            sampling=SamplingConfig(temperature=t, top_k=k, top_p=p),
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
    call; the seed may not. Each row has room for ``max_len`` tokens that are read (default:
    ``max_seq_len``).

    ``compiled`` decodes with ``torch.compile``, several times as fast as eager, except that the
    first tokens of a model or of a new batch size wait for the compiler. Prompts are read eagerly.
    It needs the cache, a model whose settings do not change and, on a CPU, a C++ compiler.

    Attributes:
        lengths: Number of tokens of each row, including one that has not been read.
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
        require(use_cache or not compiled, "compiled", compiled, "False without a cache")
        native.require_compiler("compiled", compiled)
        self.model, self.use_cache = model, use_cache
        self.max_len = model.config.max_seq_len if max_len is None else max_len
        self.max_loops = model.config.num_loops if max_loops is None else max_loops
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        require(self.max_loops >= 1, "max_loops", max_loops, "at least 1")
        require(self.max_len >= 1, "max_len", max_len, "at least 1")
        self.lengths = [0] * batch_size
        self._pending: list[list[int]] = [[] for _ in range(batch_size)]
        self._generators: dict[tuple[int, int], torch.Generator] = {}  # by row and sample_idx
        self._seed: int | None = None  # the seed of the first requests, then of the session
        self.batch: CachedBatch | UncachedBatch = UncachedBatch(model, batch_size, seed=0)
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
            self.batch = CachedBatch(model, cache, seed=0, compiled=compiled)

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
        config = model.config
        require(len(requests) > 0, "requests", requests, "at least one")
        for row, request in enumerate(requests):
            request.check(config, row=row)
        budgets = [request.budget(config.max_seq_len - len(request.tokens)) for request in requests]
        deepest = max(request.depth(config) for request in requests)
        return cls(
            model,
            batch_size=len(requests),
            max_loops=deepest if max_loops is None else max_loops,
            max_len=max(
                len(request.tokens) - 1 + budget
                for request, budget in zip(requests, budgets, strict=True)
            ),
            cache_layout=cache_layout,
            use_cache=use_cache,
            compiled=compiled,
        )

    @property
    def core_applications(self) -> int:
        """Number of core applications (one loop of one token) since the session began."""
        return self.batch.core_applications

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
            requests: One per row. All must have the same ``exit_rule``, and the same ``seed`` in
                all calls. A row's random numbers continue those of its last request with the same
                ``sample_idx``.
            prefill_chunk: Number of given tokens read at once; None: all.

        Raises:
            ValueError: A bad number or combination; raised before anything is computed.
        """
        num_rows, config = len(self.lengths), self.model.config
        given = len(requests)
        require(given == num_rows, "the number of requests", given, f"{num_rows} here")
        for row, (request, length) in enumerate(zip(requests, self.lengths, strict=True)):
            request.check(config, max_loops=self.max_loops, num_before=length, row=row)
        rules = (Fixed() if r.exit_rule is None else r.exit_rule for r in requests)
        rule = _shared("exit_rule", rules, "give all rows of a call the same")
        if not self.use_cache and not isinstance(rule, Fixed):
            raise ValueError(f"exit rule {rule.kind!r} needs use_cache=True")
        begun = [] if self._seed is None else [self._seed]
        draws = "give all rows of a session the same, and sample_idx to make them draw differently"
        seed = _shared("seed", [*begun, *(request.seed for request in requests)], draws)
        if prefill_chunk is not None:
            require(prefill_chunk >= 1, "prefill_chunk", prefill_chunk, "at least 1, or None")
        return self._stream(requests, self._budgets(requests), rule, seed, prefill_chunk)

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

    def _unread(self, requests: Sequence[Request]) -> list[list[int]]:
        """Each row's tokens that the model has not read yet."""
        return [
            [*pending, *request.tokens]
            for pending, request in zip(self._pending, requests, strict=True)
        ]

    def _stream(
        self,
        requests: Sequence[Request],
        budgets: list[int],
        rule: Rule,
        seed: int,
        chunk: int | None,
    ) -> Iterator[NewToken]:
        unread = self._unread(requests)
        depths = [request.depth(self.model.config) for request in requests]
        self._pending = [row[-1:] for row in unread]
        self.lengths = [old + len(r.tokens) for old, r in zip(self.lengths, requests, strict=True)]
        self._seed = self.batch.seed = seed  # of initial states; not known before
        generators = [
            self._generators.setdefault((row, r.sample_idx), row_generator(seed, r.sample_idx))
            for row, r in enumerate(requests)
        ]
        with inference(self.model):
            self.batch.prefill([row[:-1] for row in unread], depths, chunk)
        running, left = list(range(len(requests))), list(budgets)
        while running:
            with inference(self.model):
                tokens = {row: self._pending[row][0] for row in running}
                logits, loops = self.batch.decode(tokens, depths, rule)
                settings = [requests[row].sampling for row in running]
                sampled = sample(logits, settings, [generators[row] for row in running])
            new = []
            for i, (row, token) in enumerate(zip(running, sampled.tolist(), strict=True)):
                request = requests[row]
                self._pending[row] = [token]
                self.lengths[row] += 1
                left[row] -= 1
                reason: FinishReason | None = "length" if left[row] == 0 else None
                reason = "stop" if token in request.stop_tokens else reason
                report = None
                if request.logprobs is not None:
                    report = token_logprobs(logits[i], token, request.logprobs)
                new.append(NewToken(row, token, loops[i], reason, logits[i], report))
            yield from new
            running = [item.row for item in new if item.finish_reason is None]


def _require_room(
    model: RecurrentDepthLM, batch_size: int, max_len: int, loops: int, layout: CacheLayout | None
) -> None:
    """Refuse a cache that this machine's memory cannot hold, before any of it is allocated."""
    weight = model.embed.weight
    if weight.device.type != "cpu":
        return  # an accelerator's allocator refuses by itself, with the sizes
    kept = (PerLoop() if layout is None else layout).num_slots(loops)
    per_token = kv_bytes_per_token(
        model.config, num_loops=loops, kept_loops=kept, dtype_bytes=weight.element_size()
    )
    what = f"a cache of {batch_size} rows, {max_len} tokens and {loops} loops"
    advice = "lower num_loops, take fewer tokens or rows, or another cache layout"
    require_memory(batch_size * (max_len + 1) * per_token, what, advice)


def _token_rows(prompts: Prompts) -> list[tuple[int, ...]]:
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts hold text; give token ids: encode it with a tokenizer first")
    require(len(prompts) > 0, "prompts", prompts, "at least one list of token ids")
    allowed = "a list of token ids, and prompts a list of such lists or a 2-D tensor"
    return [token_ids(f"prompt {row}", prompt, allowed) for row, prompt in enumerate(prompts)]


def _per_row(name: str, value: Any, num_rows: int) -> list[Any]:
    values = plain(value)
    if not isinstance(values, Sequence):
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
