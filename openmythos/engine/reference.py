"""The plain generator: unequal prompts in one batch, depth chosen per row and per token.

Faster engines must give the same tokens.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmythos.config.schema import require
from openmythos.engine.batch import CachedBatch, UncachedBatch
from openmythos.engine.sampling import SamplingConfig, row_generator, sample
from openmythos.model.cache import CacheLayout, KVCache
from openmythos.model.exit import Fixed, Rule
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cpu import build as native

FinishReason = Literal["stop", "length"]
Prompts = Sequence[Any] | Tensor  # of token ids; text is refused with an explanation
# One value for all rows, or one a row:
Counts = int | Sequence[int] | Int[Tensor, "B"]
Numbers = float | Sequence[float]
OptionalCounts = int | None | Sequence[int | None]
OptionalNumbers = float | None | Sequence[float | None]


@dataclass(frozen=True)
class NewToken:
    """One sampled token. The position that predicted it took ``num_loops`` and gave ``logits``."""

    row: int
    token: int
    num_loops: int
    finish_reason: FinishReason | None
    logits: Float[Tensor, "V"]


@dataclass(frozen=True)
class GenerationResult:
    """What ``generate`` returns: one entry a prompt in every list.

    A stop token that was produced is the last of its row's ``tokens``. ``core_applications`` counts
    the passes of one token through the core in one loop, without padding;
    ``prefill_core_applications`` are those that predicted no new token (a prompt before its last
    token and, without a cache, all that was computed again). The rest is the sum of ``loops``.
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
    """Continue each prompt; arguments that are not listed are those of ``Session.stream``.

    Args:
        model: Left in the mode, training or evaluation, in which it came.
        prompts: Token ids, at least one a prompt; lengths may differ.
        seed: Of the initial states and, with the prompt's index, of what is sampled.
        cache_layout: Default ``PerLoop``, which equals no cache; the others approximate.
        use_cache: False computes everything again for each token; without an exit rule only.
        max_loops: Depth of the cache; default: the largest of ``num_loops``.
        compiled: As ``Session`` takes it.
        return_logits: Keep the logits of every new token.

    Raises:
        ValueError: A bad prompt, number or combination, before any work is done.
    """
    rows = _token_rows(prompts, model.config.vocab_size)
    depths = _depths(model, num_loops, len(rows))
    budget = _counts("max_new_tokens", max_new_tokens, len(rows))
    _check_lengths([0] * len(rows), rows, budget, model.config.max_seq_len)
    session = Session(
        model,
        batch_size=len(rows),
        max_loops=max(depths) if max_loops is None else max_loops,
        max_len=max(map(len, rows)) - 1 + max(budget),
        cache_layout=cache_layout,
        use_cache=use_cache,
        compiled=compiled,
        seed=seed,
    )
    result = GenerationResult([[] for _ in rows], [[] for _ in rows], [None for _ in rows])
    logits: list[list[Tensor]] = [[] for _ in rows]
    for new in session.stream(
        rows,
        max_new_tokens=budget,
        num_loops=depths,
        exit_rule=exit_rule,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=stop_tokens,
        prefill_chunk=prefill_chunk,
    ):
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
    """Rows that go on from call to call: what was read stays in the cache.

    Between calls each row holds one token that is sampled but not yet read; the next prompt follows
    it. Depth, exit rule and sampling may change with every call. Tokens stand in columns that all
    rows share; there are ``max_len`` of them (default: ``max_seq_len``).

    ``compiled`` sends new tokens through ``torch.compile``: a model's first ones, and the first of
    a new batch size, wait for the compiler; the others come several times as fast. Prompts are
    read eagerly. It needs the cache, a model whose settings stay as they are, and, on a CPU, a C++
    compiler.
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
        seed: int = 0,
    ) -> None:
        require(use_cache or not compiled, "compiled", compiled, "False without a cache")
        native.require_compiler("compiled", compiled)
        self.model, self.use_cache = model, use_cache
        self.max_len = model.config.max_seq_len if max_len is None else max_len
        self.max_loops = model.config.num_loops if max_loops is None else max_loops
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        require(self.max_loops >= 1, "max_loops", max_loops, "at least 1")
        require(self.max_len >= 1, "max_len", max_len, "at least 1")
        self.generators = [row_generator(seed, row) for row in range(batch_size)]
        self.pending: list[list[int]] = [[] for _ in range(batch_size)]
        self.lengths = [0] * batch_size
        self.batch: CachedBatch | UncachedBatch = UncachedBatch(model, batch_size, seed)
        if use_cache:
            cache = KVCache(
                model.config,
                batch_size=batch_size,
                max_len=self.max_len,
                max_loops=self.max_loops,
                layout=cache_layout,
                dtype=model.embed.weight.dtype,
                device=model.embed.weight.device,
            )
            self.batch = CachedBatch(model, cache, seed, compiled=compiled)

    @property
    def core_applications(self) -> int:
        """Passes of one token through the core in one loop, since the session began."""
        return self.batch.core_applications

    def stream(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: Counts,
        num_loops: Counts | None = None,
        exit_rule: Rule | None = None,
        temperature: Numbers = 0.0,
        top_k: OptionalCounts = None,
        top_p: OptionalNumbers = None,
        stop_tokens: Iterable[int] = (),
        prefill_chunk: int | None = None,
    ) -> Iterator[NewToken]:
        """Read one prompt a row, then yield new tokens as they come, rows in order at each step.

        Args:
            prompts: May be empty where a row has something to go on from.
            max_new_tokens: At most so many tokens a row.
            num_loops: The most loops a position takes; default: the config's.
            exit_rule: Stops single positions earlier; prompts are read at full depth.
            temperature: 0 is greedy. This, ``top_k`` and ``top_p`` may be one value a row.
            top_k: Keep the most likely tokens; None: all.
            top_p: Keep the fewest tokens that reach this probability; None: all.
            stop_tokens: A row is finished when it produces one of them.
            prefill_chunk: Read prompts in pieces of so many tokens; None: in one.

        Raises:
            ValueError: A bad prompt, number or combination, before any work is done.
        """
        config, num_rows = self.model.config, len(self.lengths)
        rows = _token_rows(prompts, config.vocab_size, self.pending)
        require(len(rows) == num_rows, "the number of prompts", len(rows), f"{num_rows} here")
        depths = _depths(self.model, num_loops, num_rows)
        deep = f"at most {self.max_loops}, the session's max_loops; raise that"
        require(max(depths) <= self.max_loops, "num_loops", max(depths), deep)
        budget = _counts("max_new_tokens", max_new_tokens, num_rows)
        _check_lengths(self.lengths, rows, budget, config.max_seq_len)
        self._check_columns(rows, budget)
        rule = Fixed() if exit_rule is None else exit_rule
        made = "None or a rule of openmythos.model.exit, for example KLExit()"
        require(isinstance(rule, Rule), "exit_rule", exit_rule, made)
        if rule.needs_halting and self.model.halting is None:
            raise ValueError(
                f"exit rule {rule.kind!r} needs a halting head and the model has none; use a rule "
                "that reads states or logits, or a model with config.halting"
            )
        if not self.use_cache and not isinstance(rule, Fixed):
            raise ValueError(f"exit rule {rule.kind!r} needs use_cache=True")
        stops = frozenset(stop_tokens)
        for stop in stops:
            inside = f"in 0..{config.vocab_size - 1}"
            require(0 <= stop < config.vocab_size, "a stop token", stop, inside)
        if prefill_chunk is not None:
            require(prefill_chunk >= 1, "prefill_chunk", prefill_chunk, "at least 1, or None")
        settings = zip(
            _per_row("temperature", temperature, num_rows),
            _per_row("top_k", top_k, num_rows),
            _per_row("top_p", top_p, num_rows),
            strict=True,
        )
        configs = [SamplingConfig(temperature=t, top_k=k, top_p=p) for t, k, p in settings]
        return self._stream(rows, budget, depths, rule, configs, stops, prefill_chunk)

    def _check_columns(self, rows: list[list[int]], budget: list[int]) -> None:
        new = max(len(old) + len(row) for old, row in zip(self.pending, rows, strict=True)) - 1
        columns = self.batch.length + new + max(budget)
        if self.use_cache and columns > self.max_len:
            raise ValueError(
                f"the batch needs {columns} columns and has max_len={self.max_len}; rows share "
                "them, so one row's prompt and another's new tokens add up: raise max_len"
            )

    def _stream(
        self,
        rows: list[list[int]],
        budget: list[int],
        depths: list[int],
        rule: Rule,
        configs: list[SamplingConfig],
        stops: frozenset[int],
        chunk: int | None,
    ) -> Iterator[NewToken]:
        unread = [pending + row for pending, row in zip(self.pending, rows, strict=True)]
        self.pending = [row[-1:] for row in unread]
        self.lengths = [old + len(row) for old, row in zip(self.lengths, rows, strict=True)]
        with inference(self.model):
            self.batch.prefill([row[:-1] for row in unread], depths, chunk)
        running, left = list(range(len(rows))), list(budget)
        while running:
            with inference(self.model):
                tokens = {row: self.pending[row][0] for row in running}
                logits, loops = self.batch.decode(tokens, depths, rule)
                settings = [configs[row] for row in running]
                sampled = sample(logits, settings, [self.generators[row] for row in running])
            new = []
            for i, (row, token) in enumerate(zip(running, sampled.tolist(), strict=True)):
                self.pending[row] = [token]
                self.lengths[row] += 1
                left[row] -= 1
                reason: FinishReason | None = "length" if left[row] == 0 else None
                reason = "stop" if token in stops else reason
                new.append(NewToken(row, token, loops[i], reason, logits[i]))
            yield from new
            running = [item.row for item in new if item.finish_reason is None]


def _token_rows(
    prompts: Prompts, vocab_size: int, pending: Sequence[list[int]] | None = None
) -> list[list[int]]:
    """The prompts as lists of integers; only a row with a pending token may be empty."""
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts hold text; give token ids: encode it with a tokenizer first")
    require(len(prompts) > 0, "prompts", prompts, "at least one list of token ids")
    rows = []
    for index, prompt in enumerate(prompts):
        try:
            row = [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(
                f"prompt {index} is {prompt!r}; it must be a list of token ids, and prompts a list "
                "of such lists or a 2-D tensor"
            ) from None
        inside = all(0 <= token < vocab_size for token in row)
        require(inside, f"prompt {index}", row, f"of token ids in 0..{vocab_size - 1}")
        goes_on = pending is not None and index < len(pending) and pending[index]
        require(bool(row or goes_on), f"prompt {index}", row, "at least one token long")
        rows.append(row)
    return rows


def _check_lengths(
    lengths: Sequence[int], rows: list[list[int]], budget: list[int], limit: int
) -> None:
    for index, (old, row, count) in enumerate(zip(lengths, rows, budget, strict=True)):
        if old + len(row) + count > limit:
            raise ValueError(
                f"row {index} has {old + len(row)} tokens and max_new_tokens={count}, which "
                f"together exceed max_seq_len={limit}; shorten one of them"
            )


def _per_row(name: str, value: Any, num_rows: int) -> list[Any]:
    values = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(values, Sequence):
        return [values] * num_rows
    require(len(values) == num_rows, name, value, f"one value, or one for each of {num_rows} rows")
    return list(values)


def _counts(name: str, value: Any, num_rows: int) -> list[int]:
    counts = _per_row(name, value, num_rows)
    for count in counts:
        require(isinstance(count, int) and count >= 1, name, count, "an integer of at least 1")
    return counts


def _depths(model: RecurrentDepthLM, num_loops: Any, num_rows: int) -> list[int]:
    given = model.config.num_loops if num_loops is None else num_loops
    return _counts("num_loops", given, num_rows)
