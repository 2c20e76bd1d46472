"""Is training right on this GPU, and how quick? One command of at most eight minutes.

    .venv/bin/python -m benchmarks.gpu_check          # on a GPU; writes benchmarks/gpu_check.json
    .venv/bin/python -m benchmarks.gpu_check --cpu    # the same checks, small, on a CPU

A wrong number fails it (exit status 1), a slow one never does. What needs a GPU (flash and flex
attention, speeds, peak memory) is left out with ``--cpu``, and what does not fit into the time is
said to be skipped.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openmythos.config import GQAConfig, ModelConfig, MoEConfig, SwiGLUConfig, counts
from openmythos.config.matched_baseline import plain_model
from openmythos.config.parallel import ParallelConfig
from openmythos.folder import write_json
from openmythos.model.feedforward import Router
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.attention import attention, attention_reference, packed_attention
from openmythos.ops.cross_entropy import cross_entropy
from openmythos.ops.moe import grouped_mm, grouped_mm_reference, moe_experts
from openmythos.plan.serving import GPUS
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth
from openmythos.train.gradients import reshard
from openmythos.train.parallel import parallelize
from openmythos.train.ranks import join
from openmythos.train.recipe import TrainConfig

RESULT = Path(__file__).with_suffix(".json")
HOST_READS = ("_local_scalar_dense", "nonzero", "unique", "masked_select")
LOW = torch.bfloat16
ROUNDING = 0.03  # relative error that sums of bfloat16 products may have
GRACE = 30.0  # seconds for a process to begin, and for a check to see that the time is over
SAME = 1e-5  # of the same sums in float32 in another order


@dataclass(frozen=True)
class Place:
    """Where the checks run: the device, and how large the models are."""

    device: str
    small: bool
    end: float

    @property
    def loops(self) -> tuple[int, ...]:
        return (1, 2, 5) if self.small else (1, 2, 3, 4, 8, 16)

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def config(self, moe: bool = False, num_loops: int = 4) -> ModelConfig:
        width, heads = (64, 2) if self.small else (1024, 16)
        experts = MoEConfig(
            num_experts=8 if self.small else 64,
            num_experts_per_token=2 if self.small else 8,
            d_expert=width // 4,
        )
        return ModelConfig(
            vocab_size=256 if self.small else 32_768,
            d_model=width,
            num_prelude_layers=1 if self.small else 2,
            num_core_layers=2 if self.small else 4,
            num_coda_layers=1 if self.small else 2,
            num_loops=num_loops,
            attention=GQAConfig(num_heads=heads, num_kv_heads=heads, head_dim=width // heads),
            feed_forward=SwiGLUConfig(d_ff=4 * width),
            core_feed_forward=experts if moe else None,
            max_seq_len=4096,
            tie_embeddings=False,
        )

    def model(self, config: ModelConfig) -> RecurrentDepthLM:
        """With random weights everywhere: zero projections would hide what they multiply."""
        model = RecurrentDepthLM(config).train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise / math.sqrt(5 * parameter.shape[-1]))
        return model.to(self.device)

    def tokens(self, config: ModelConfig) -> Tensor:
        shape = (2, 32) if self.small else (4, 1024)
        generator = torch.Generator().manual_seed(2)
        return torch.randint(config.vocab_size, shape, generator=generator).to(self.device)

    def random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(self.device)


@dataclass
class Found:
    """What a check has measured, and what of it is wrong."""

    numbers: dict[str, Any]
    wrong: list[str]

    def most(self, name: str, value: float, limit: float) -> None:
        """Keep a number that must be at most ``limit``."""
        self.numbers[name] = value
        if not value <= limit:  # NaN is wrong, too
            self.wrong.append(f"{name} is {value:.3g}; at most {limit:.3g} is right")

    def equal(self, name: str, value: Any, expected: Any) -> None:
        """Keep a value that must be ``expected``."""
        self.numbers[name] = value
        if value != expected:
            self.wrong.append(f"{name} is {value}; {expected} is right")


Check = Callable[[Place, Found], None]


def relative(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    difference = (got.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def loss_of(model: RecurrentDepthLM, tokens: Tensor, low: bool = False, **options: Any) -> Tensor:
    """The next token's mean loss; ``low``: with products in bfloat16."""
    cast = torch.autocast(tokens.device.type, dtype=LOW, enabled=low, cache_enabled=False)
    with cast:
        ctx = replace(model.context(tokens), experts=moe_experts)
        logits = model(tokens, ctx=ctx, **options).logits
        return cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()


def gradients(model: RecurrentDepthLM, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter; the model keeps none."""
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient, over those that are not almost zero."""
    largest = max(float(each.norm()) for each in expected.values())
    kept = [name for name, each in expected.items() if float(each.norm()) > 1e-3 * largest]
    return max(relative(got[name], expected[name]) for name in kept)


# --- right numbers --------------------------------------------------------------------------------


def low_precision(place: Place, found: Found) -> None:
    """Losses and gradients in bfloat16 against float32; the router's logits and A stay exact."""
    for name, moe in (("dense", False), ("moe", True)):
        config = place.config(moe)
        model, tokens = place.model(config), place.tokens(config)
        exact = loss_of(model, tokens)
        expected = gradients(model, exact)
        low = loss_of(model, tokens, low=True)
        got = gradients(model, low)
        found.most(f"{name}_loss", relative(low.detach(), exact.detach()), 0.01)
        flat, other = (torch.cat([g.flatten() for g in x.values()]) for x in (got, expected))
        # A rounding that flips an expert changes the gradients of few tokens by much.
        found.most(f"{name}_gradient", relative(flat, other), 0.3 if moe else 0.1)
    router = next(module for module in model.modules() if isinstance(module, Router))
    x = place.random(64, config.d_model).to(LOW)
    decay = model.injection.decay()
    with torch.autocast(place.device, dtype=LOW):
        logits, low_decay = router(x), model.injection.decay()
    exact = torch.nn.functional.linear(x.float(), router.weight)
    found.equal("router_dtype", str(logits.dtype), "torch.float32")
    found.equal("router_is_exact", bool(torch.equal(logits, exact)), True)
    assert decay is not None
    assert low_decay is not None
    found.equal("decay_is_exact", bool(torch.equal(decay, low_decay)), True)


def experts_products(place: Place, found: Found) -> None:
    """grouped_mm, forward and backward, against the loop over experts in float64."""
    sizes = [3, 0, 17, 12] if place.small else [300, 0, 1700, 1200]
    ends = torch.tensor(sizes, device=place.device).cumsum(0).to(torch.int32)
    x, weights = place.random(sum(sizes), 64), place.random(4, 32, 64)
    both = {}
    for name, dtype, product in (
        ("low", LOW, grouped_mm),
        ("single", torch.float32, grouped_mm),
        ("exact", torch.float64, grouped_mm_reference),
    ):
        inputs = [each.to(LOW).to(dtype).requires_grad_() for each in (x, weights)]
        y = product(*inputs, ends)
        outer = place.random(*y.shape).to(LOW).to(dtype)
        both[name] = (y.detach(), *torch.autograd.grad(y, inputs, outer))
    for name, limit in (("low", ROUNDING), ("single", SAME)):
        pairs = zip(both[name], both["exact"], strict=True)
        found.most(name, max(relative(*pair) for pair in pairs), limit)


def fused_attention(place: Place, found: Found) -> None:
    """Attention, packed documents and flex attention, both ways, against the reference."""
    rows, heads, length, width = (2, 2, 64, 32) if place.small else (2, 8, 1024, 64)
    scale = width**-0.5
    shapes = [(rows, heads, length, width), (rows, heads // 2, length, width)]
    inputs = [place.random(*shape).to(LOW) for shape in (shapes[0], shapes[1], shapes[1])]

    def both_ways(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [each.detach().to(dtype).requires_grad_() for each in inputs]
        y = attend(*leaves)
        outer = place.random(*y.shape).to(LOW).to(dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, outer)]

    def compare(name: str, got: list[Tensor], expected: list[Tensor], limit: float) -> None:
        errors = [relative(*pair) for pair in zip(got, expected, strict=True)]
        found.most(name, max(errors), limit)

    def reference(mask: Tensor | None) -> list[Tensor]:
        wide = None if mask is None else mask.double()
        return both_ways(lambda q, k, v: attention_reference(q, k, v, wide, scale), torch.float64)

    causal = reference(None)
    plain = lambda q, k, v: attention(q, k, v, None, scale)  # noqa: E731
    compare("causal", both_ways(plain, LOW), causal, ROUNDING)
    compare("causal_single", both_ways(plain, torch.float32), causal, SAME)
    if not place.is_gpu:
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # without it, above, torch may take another
        compare("flash", both_ways(plain, LOW), causal, ROUNDING)
    half = torch.arange(length, device=place.device) >= length // 3
    apart = half[:, None] != half[None]
    later = torch.ones(length, length, device=place.device).triu(1).bool()
    mask = torch.zeros(rows, 1, length, length, device=place.device)
    mask = mask.masked_fill(apart | later, float("-inf"))
    spans = torch.tensor(
        [start + row * length for row in range(rows) for start in (0, length // 3)]
        + [rows * length],
        device=place.device,
        dtype=torch.int32,
    )
    longest = length - length // 3
    packed = lambda q, k, v: packed_attention(q, k, v, spans, longest, scale)  # noqa: E731
    compare("packed", both_ways(packed, LOW), reference(mask), ROUNDING)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention)
    block_mask = create_block_mask(
        lambda b, h, q, k: q >= k, None, None, length, length, device=place.device
    )
    flexible = lambda q, k, v: flex(  # noqa: E731
        q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True
    )
    compare("flex", both_ways(flexible, LOW), causal, ROUNDING)


def compiled_blocks(place: Place, found: Found) -> None:
    """Compiled by block: equal to eager at every depth, by one graph for each kind of block."""
    from torch._dynamo.utils import counters

    for name, moe in (("dense", False), ("moe", True)) if not place.small else (("dense", False),):
        config = place.config(moe)
        model, tokens = place.model(config), place.tokens(config)
        eager = {n: loss_of(model, tokens, num_loops=n) for n in place.loops}
        expected = gradients(model, eager[place.loops[-1]])
        torch._dynamo.reset()
        counters.clear()
        for block in (*model.prelude, *model.core, *model.coda):
            block.compile(fullgraph=True, backend="inductor" if place.is_gpu else "eager")
        graphs = []
        for num_loops in place.loops:
            loss = loss_of(model, tokens, num_loops=num_loops)
            got = gradients(model, loss)
            graphs.append(counters["stats"]["unique_graphs"])
            error = relative(loss.detach(), eager[num_loops].detach())
            found.most(f"{name}_loss_{num_loops}", error, 1e-4)
        found.most(f"{name}_gradient", worst(got, expected), 1e-3 if place.is_gpu else SAME)
        found.equal(f"{name}_graphs_by_depth", graphs, graphs[:1] * len(place.loops))


class _HostReads(TorchDispatchMode):
    """Counts operations that need a number of the device on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in HOST_READS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def no_host_reads(place: Place, found: Found) -> None:
    """Nothing in the loop, forward and backward, waits for the device."""
    for name, moe in (("dense", False), ("moe", True)):
        config = place.config(moe)
        model, tokens = place.model(config), place.tokens(config)
        if place.is_gpu:
            loss_of(model, tokens, low=True).backward()  # what is made once may wait
        ctx = replace(model.context(tokens), experts=moe_experts)
        counted = _HostReads()
        cast = torch.autocast(place.device, dtype=LOW, cache_enabled=False)
        if place.is_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            with counted, cast:
                logits = model(tokens, ctx=ctx, num_loops=4).logits
                cross_entropy(logits[:, :-1], tokens[:, 1:]).mean().backward()
        except RuntimeError as error:
            found.wrong.append(f"{name}: {error}")
        finally:
            if place.is_gpu:
                torch.cuda.set_sync_debug_mode("default")
        found.equal(f"{name}_reads", dict(counted.seen), {})


def sharded_alone(place: Place, found: Found) -> None:
    """FSDP2 on one rank gives the loss and the gradients of the model itself."""
    config = place.config()
    model, tokens = place.model(config), place.tokens(config)
    loss = loss_of(model, tokens, num_loops=3)
    expected = gradients(model, loss)
    recipe = TrainConfig(
        max_steps=1,
        depth=DepthSchedule(sampling=FixedDepth(mean_recurrence=3)),
        parallel=ParallelConfig(),
    )
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.is_gpu else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=0,
            world_size=1,
        )
        try:
            ranks = join(recipe.parallel, place.device)
            parallelize(model, recipe, ranks)
            again = loss_of(model, tokens, num_loops=3)
            again.backward()
            reshard(model)
            got = {
                name: parameter.grad.full_tensor()  # type: ignore[union-attr]
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        finally:
            dist.destroy_process_group()
    found.most("loss", relative(again.detach(), loss.detach()), 1e-6)
    found.equal("all_gradients", sorted(got), sorted(expected))
    found.most("gradient", worst(got, expected), SAME)


def kept_by_gradient_loops(place: Place, found: Found) -> None:
    """Memory grows with the loops that have a gradient, and not with those that have none."""
    config = place.config(num_loops=16)
    model, tokens = place.model(config), place.tokens(config)

    def kept(num_loops: int, grad_loops: int) -> int:
        seen: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen.setdefault(storage._cdata, storage)
            return tensor

        if place.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(model, tokens, low=True, num_loops=num_loops, grad_loops=grad_loops)
        size = sum(storage.nbytes() for storage in seen.values())
        seen.clear()
        gradients(model, loss)
        if place.is_gpu:
            peaks.append(torch.cuda.max_memory_allocated())
        return size

    peaks: list[int] = []
    sizes = [kept(8, grad_loops) for grad_loops in (1, 2, 4, 8)]
    steps = [b - a for a, b in itertools.pairwise(sizes)]
    found.numbers |= {"kept_bytes": dict(zip((1, 2, 4, 8), sizes, strict=True))}
    found.numbers |= {"peak_bytes": dict(zip((1, 2, 4, 8), peaks, strict=False))}
    # Each doubling adds twice as many loops as the one before.
    found.most("growth_2_to_4", abs(steps[1] / (2 * steps[0]) - 1), 0.05)
    found.most("growth_4_to_8", abs(steps[2] / (4 * steps[0]) - 1), 0.05)
    found.most("growth_without_gradient", abs(kept(16, 2) / sizes[1] - 1), 0.01)


# --- speeds ---------------------------------------------------------------------------------------


def speeds(place: Place, found: Found) -> None:
    """Tokens per second and share of the peak: looped, unlooped at equal FLOPs, the original."""
    loops = 8
    for name, moe in (("dense", False), ("moe", True)):
        looped = place.config(moe, loops)
        deep = plain_model(looped, loops * looped.num_core_layers)
        for kind, config in (("looped", looped), ("unlooped", deep)):
            if place.is_gpu and time.monotonic() > place.end:
                found.numbers[f"{name}_{kind}"] = "skipped: the time is over"
                continue
            model, tokens = place.model(config), place.tokens(config)
            seconds = _seconds(place, lambda m=model, t=tokens: loss_of(m, t, low=True).backward())
            keys = (tokens.shape[1] + 1) // 2
            flops = counts.training_flops(config, context_length=keys) * tokens.numel()
            found.numbers[f"{name}_{kind}"] = _speed(place, tokens, seconds, flops)
            del model
    found.numbers["original"] = _original(place)


def _speed(place: Place, tokens: Tensor, seconds: float, flops: float) -> dict[str, float]:
    row = {"tokens_per_second": tokens.numel() / seconds, "flops_per_second": flops / seconds}
    if place.is_gpu:
        row["share_of_peak"] = flops / seconds / GPUS["h200"].flops_per_second
    return row


def _original(place: Place) -> Any:
    """The original OpenMythos and ours with the same weights, in training."""
    from benchmarks.measure import CONFIGS
    from benchmarks.original import ALL_LOOPS, SOURCE, make_pair

    if not SOURCE.is_file():
        return "not installed"
    fields, length = CONFIGS["B"]
    rows: dict[str, Any] = {}
    original, ours = (each.to(place.device).train() for each in make_pair(fields, ALL_LOOPS))
    tokens = torch.randint(0, fields["vocab_size"], (4, length), device=place.device)

    def theirs() -> None:
        logits = original(tokens, n_loops=fields["max_loop_iters"])
        cross_entropy(logits[:, :-1], tokens[:, 1:]).mean().backward()

    for name, step in (
        ("original", theirs),
        ("ours", lambda: loss_of(ours, tokens, num_loops=fields["max_loop_iters"]).backward()),
    ):
        rows[name] = {"tokens_per_second": tokens.numel() / _seconds(place, step)}
    return rows


def _seconds(place: Place, step: Callable[[], None]) -> float:
    """The mean time of a step after two others."""
    times = 1 if place.small else 5
    for _ in range(0 if place.small else 2):
        step()
    if place.is_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        step()
    if place.is_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


CHECKS: dict[str, Check] = {
    "low_precision": low_precision,
    "experts_products": experts_products,
    "fused_attention": fused_attention,
    "compiled_blocks": compiled_blocks,
    "no_host_reads": no_host_reads,
    "sharded_alone": sharded_alone,
    "kept_by_gradient_loops": kept_by_gradient_loops,
    "speeds": speeds,
}


def run(place: Place, names: list[str]) -> dict[str, Any]:
    """Run checks; their numbers, what is wrong and the seconds of each."""
    found: dict[str, Any] = {}
    for name in names:
        started, each = time.monotonic(), Found({}, [])
        try:
            CHECKS[name](place, each)
        except Exception as error:  # one check that cannot run does not hide the others
            each.wrong.append(f"{type(error).__name__}: {error}")
        seconds = round(time.monotonic() - started, 1)
        found[name] = {"numbers": each.numbers, "wrong": each.wrong, "seconds": seconds}
    return found


def run_apart(name: str, flags: list[str], seconds: float, out: Path) -> dict[str, Any]:
    """Run one check in a process of its own: what hangs or breaks the GPU's state ends alone."""
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu_check", *flags, "--apart", name]
    numbers: dict[str, Any] = {}
    wrong: list[str] = []
    try:
        ended = subprocess.run(
            [*command, "--seconds", str(seconds), "--out", str(out)],
            check=False,
            timeout=seconds + GRACE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if out.is_file():
            found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return found
        wrong = [f"the process ended with {ended.returncode}: {ended.stderr.strip()[-500:]}"]
    except subprocess.TimeoutExpired:
        numbers["not finished"] = f"no end within {seconds + GRACE:.0f} s"
    return {"numbers": numbers, "wrong": wrong, "seconds": round(time.monotonic() - started, 1)}


def table_of(found: dict[str, Any]) -> str:
    """A line per number, and per check what is wrong with it."""
    lines = []
    for name, each in found.items():
        said = f"wrong: {'; '.join(each['wrong'])}" if each["wrong"] else "right"
        said = "not finished" if "not finished" in each["numbers"] else said
        lines.append(f"{name}: {said}, {each['seconds']} s")
        lines += [f"    {key:40} {json.dumps(number)}" for key, number in each["numbers"].items()]
    return "\n".join(lines)


def main() -> None:
    """Run all checks, each in a process of its own, and write what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--cpu", action="store_true", help="small, on a CPU")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--seconds", type=float, default=420.0, help="of all checks together")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file")
    parser.add_argument("--apart", choices=CHECKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.cuda.is_available():
        raise SystemExit("error: no GPU; --cpu runs the checks small")
    torch.manual_seed(0)
    end = time.monotonic() + arguments.seconds
    if arguments.apart is not None:
        place = Place("cpu" if arguments.cpu else "cuda", arguments.cpu, end)
        write_json(arguments.out, run(place, [arguments.apart])[arguments.apart])
        return
    machine = "cpu" if arguments.cpu else torch.cuda.get_device_name()
    found: dict[str, Any] = {}
    result = {"machine": machine, "torch": torch.__version__, "checks": found}
    out = arguments.out or (None if arguments.cpu else RESULT)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            left = max(0.0, end - time.monotonic())
            flags = ["--cpu"] if arguments.cpu else []
            if left:
                found[name] = run_apart(name, flags, left, Path(folder) / f"{name}.json")
            else:
                over = {"not finished": "skipped: the time is over"}
                found[name] = {"numbers": over, "wrong": [], "seconds": 0.0}
            print(table_of({name: found[name]}), flush=True)
            if out is not None:
                write_json(out, result)
    print(json.dumps(result))
    sys.exit(any(each["wrong"] for each in found.values()))


if __name__ == "__main__":
    main()
