"""One measurement per process: ``python -m benchmarks.measure CONFIG WHAT SIDE`` prints JSON."""

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import llama
from benchmarks.matmul import matmul_bound
from benchmarks.original import ALL_LOOPS, make_pair
from openmythos.engine.engine import Engine, EngineConfig
from openmythos.engine.reference import Session
from openmythos.engine.request import Request
from openmythos.model.cache import KVCache
from openmythos.model.recurrent import RecurrentDepthLM

SHARED = {
    "vocab_size": 4096,
    "dim": 512,
    "n_heads": 8,
    "n_kv_heads": 2,
    "max_seq_len": 512,
    "prelude_layers": 1,
    "coda_layers": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_experts": 64,
    "n_shared_experts": 1,
    "n_experts_per_tok": 4,
    "expert_dim": 128,
    "lora_rank": 16,
}
CONFIGS = {
    "B": ({**SHARED, "attn_type": "mla", "max_loop_iters": 8}, 256),
    "C": ({**SHARED, "attn_type": "gqa", "max_loop_iters": 16}, 512),
}
LLAMA, LLAMA_LENGTH = "llama", 256  # the second anchor: one loop of a plain stack
SIDES = ("original", "ours")
PROMPT, STEPS = 64, 32
RUNS = {"forward": 5, "train": 3}

Logits = Callable[[Tensor], Tensor]


def agreement(name: str) -> dict[str, float]:
    """Largest difference of the logits, with all loops forced and with ordinary halting."""
    if name == LLAMA:
        theirs, ours = llama.make_pair()
        tokens = some_tokens(1, LLAMA_LENGTH)
        with torch.no_grad():
            logits = theirs(tokens).logits
            difference = float((logits - ours(tokens, num_loops=1).logits).abs().max())
        scale = float(logits.abs().max())
        forced = {"forced_difference": difference, "forced_scale": scale}
        return forced | {"halting_difference": difference, "halting_scale": scale}
    fields, length = CONFIGS[name]
    result = {}
    for label, bias in (("forced", ALL_LOOPS), ("halting", None)):
        original, ours = make_pair(fields, bias)
        tokens = some_tokens(1, length)
        with torch.no_grad():
            theirs = original(tokens, n_loops=fields["max_loop_iters"])
            logits = ours(tokens, num_loops=fields["max_loop_iters"]).logits
        result[f"{label}_difference"] = float((theirs - logits).abs().max())
        result[f"{label}_scale"] = float(theirs.abs().max())
    return result


def some_tokens(rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SHARED["vocab_size"], (rows, length), generator=generator)


def one_pass(what: str, logits: Logits, model: torch.nn.Module, tokens: Tensor) -> None:
    if what == "forward":
        with torch.no_grad():
            logits(tokens)
        return
    model.zero_grad(set_to_none=True)
    found = logits(tokens)[:, :-1]
    functional.cross_entropy(found.flatten(0, 1), tokens[:, 1:].flatten()).backward()


def passes(what: str, logits: Logits, model: torch.nn.Module, tokens: Tensor) -> dict[str, Any]:
    one_pass(what, logits, model, tokens)
    times = []
    for _ in range(RUNS[what]):
        start = time.perf_counter()
        one_pass(what, logits, model, tokens)
        times.append(time.perf_counter() - start)
    return {"seconds": median(times), "tokens": tokens.numel()}


@torch.no_grad()
def decode_original(model: torch.nn.Module, tokens: Tensor, num_loops: int) -> dict[str, Any]:
    """Greedy decoding with the original's own cache."""
    cache: dict[str, dict[str, Tensor]] = {}
    logits = model(tokens, n_loops=num_loops, kv_cache=cache)
    start = time.perf_counter()
    for step in range(STEPS):
        tokens = logits[:, -1:].argmax(dim=-1)
        logits = model(tokens, n_loops=num_loops, kv_cache=cache, start_pos=PROMPT + step)
    spent = time.perf_counter() - start
    held = [tensor for slot in cache.values() for tensor in slot.values()]
    num_bytes = sum(tensor.nbytes for tensor in held) / len(tokens) / (PROMPT + STEPS)
    return {"seconds": spent, "tokens": len(tokens) * STEPS, "kv_bytes_per_token": num_bytes}


@torch.no_grad()
def decode_llama(model: Any, tokens: Tensor) -> dict[str, Any]:
    """Greedy ``generate`` of transformers with its default cache, less the prompt's time."""
    words = {"do_sample": False, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
    words["eos_token_id"] = None
    spent = {}
    for count in (1, STEPS + 1, 1, STEPS + 1):  # the first round warms up
        start = time.perf_counter()
        model.generate(tokens, max_new_tokens=count, **words)
        spent[count] = time.perf_counter() - start
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    found = {"seconds": spent[STEPS + 1] - spent[1], "tokens": len(tokens) * STEPS}
    return {**found, "kv_bytes_per_token": 4 * numbers}


@torch.no_grad()
def decode_step_by_step(
    model: RecurrentDepthLM, tokens: Tensor, num_loops: int
) -> tuple[float, int]:
    """Greedy decoding with our model and cache but no engine: seconds, cache bytes per token."""
    rows = len(tokens)
    cache = KVCache(model.config, batch_size=rows, max_len=PROMPT + STEPS, max_loops=num_loops)
    logits = model(tokens, num_loops=num_loops, ctx=model.context(tokens, cache=cache)).logits
    start = time.perf_counter()
    for _ in range(STEPS):
        tokens = logits[:, -1:].argmax(dim=-1)
        ctx = model.context(tokens, cache=cache)
        logits = model(tokens, num_loops=num_loops, ctx=ctx).logits
    return time.perf_counter() - start, cache.num_bytes // rows // (PROMPT + STEPS)


def decode_session(
    model: RecurrentDepthLM, tokens: Tensor, num_loops: int, *, compiled: bool
) -> float:
    """Seconds that a session takes after the first new token of each row."""
    rows, length = len(tokens), PROMPT + STEPS
    session = Session(
        model, batch_size=rows, max_loops=num_loops, max_len=length, compiled=compiled
    )
    new = session.stream(
        [
            Request(tokens=row, max_new_tokens=STEPS + 1, num_loops=num_loops)
            for row in tokens.tolist()
        ]
    )
    for _ in range(rows):
        next(new)
    start = time.perf_counter()
    assert sum(1 for _ in new) == rows * STEPS
    return time.perf_counter() - start


def decode_engine(engine: Engine, tokens: Tensor, num_loops: int) -> float:
    """Seconds that the engine takes after the first new token of each row, all in one step."""
    for row in tokens.tolist():
        engine.add(Request(tokens=row, max_new_tokens=STEPS + 1, num_loops=num_loops))
    while not (new := len(engine.step())):
        pass
    assert new == len(tokens)  # or the time below would have prompts in it
    start = time.perf_counter()
    while not engine.is_idle:
        new += len(engine.step())
    assert new == len(tokens) * (STEPS + 1)
    return time.perf_counter() - start


def decode_ours(model: RecurrentDepthLM, tokens: Tensor, num_loops: int) -> dict[str, Any]:
    """Greedy decoding after the first new token: by the compiled engine, and by sessions."""
    rows, length = len(tokens), PROMPT + STEPS
    sizes = {"max_rows": rows, "max_len": length, "max_loops": num_loops, "hold_rows": rows}
    sizes["prefill_chunk"] = rows * PROMPT  # all prompts at once, as the other side reads them
    engine = Engine(model, EngineConfig(**sizes, compiled=True, reuse_prefixes=False))
    decode_engine(engine, tokens, num_loops)  # warm-up: compiles
    spent = decode_engine(engine, tokens, num_loops)
    decode_session(model, tokens, num_loops, compiled=True)  # the same
    session = decode_session(model, tokens, num_loops, compiled=True)
    eager = decode_session(model, tokens, num_loops, compiled=False)
    model_only, num_bytes = decode_step_by_step(model, tokens, num_loops)
    return {
        "seconds": spent,
        "session_seconds": session,
        "eager_seconds": eager,
        "tokens": len(tokens) * STEPS,
        "model_seconds": model_only,
        "kv_bytes_per_token": num_bytes,
    }


def measure(name: str, what: str, side: str) -> dict[str, Any]:
    """Measure one side; side "bound" is the time of our matrix products alone."""
    if name == LLAMA:
        length, num_loops = LLAMA_LENGTH, 1
        original, ours = llama.make_pair()
    else:
        fields, length = CONFIGS[name]
        num_loops = fields["max_loop_iters"]
        original, ours = make_pair(fields, ALL_LOOPS)

    def their_logits(tokens: Tensor) -> Tensor:
        if name == LLAMA:
            return original(tokens).logits
        return original(tokens, n_loops=num_loops)

    def our_logits(tokens: Tensor) -> Tensor:
        return ours(tokens, num_loops=num_loops).logits

    if what.startswith("decode"):
        tokens = some_tokens(int(what.removeprefix("decode")), PROMPT)
        if side == "original" and name == LLAMA:
            return decode_llama(original, tokens)
        if side == "original":
            return decode_original(original, tokens, num_loops)
        if side == "ours":
            return decode_ours(ours, tokens, num_loops)
        cache = KVCache(
            ours.config, batch_size=len(tokens), max_len=PROMPT + 1, max_loops=num_loops
        )
        with torch.no_grad():
            ours(tokens, num_loops=num_loops, ctx=ours.context(tokens, cache=cache))

            def decode_one() -> None:
                cache.lengths = [PROMPT] * len(tokens)  # the same column every time
                ctx = ours.context(tokens[:, :1], cache=cache)
                ours(tokens[:, :1], num_loops=num_loops, ctx=ctx)

            found = matmul_bound(decode_one)
        return {**found, "bound_s": found["bound_s"] * STEPS, "gflop": found["gflop"] * STEPS}
    tokens = some_tokens(1, length)
    if side == "original":
        return passes(what, their_logits, original, tokens)
    if side == "ours":
        return passes(what, our_logits, ours, tokens)
    return matmul_bound(lambda: one_pass(what, our_logits, ours, tokens))


if __name__ == "__main__":
    torch.set_num_threads(1)
    config, what, side = sys.argv[1:]
    print(json.dumps(agreement(config) if what == "agreement" else measure(config, what, side)))
