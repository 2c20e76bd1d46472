"""The matrix products of a computation, and the time that this machine takes for them alone."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

POOL_BYTES = 1 << 25  # operands are cycled through, so that they do not stay in the CPU's cache


@dataclass(frozen=True)
class Product:
    """``batch`` products of [rows, inner] by [inner, columns]."""

    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.rows * self.inner * self.columns


class ProductCounter(TorchDispatchMode):
    """Counts the products in its context; an attention kernel counts as its two products.

    A causal kernel computes half of the scores, so both of its products count half.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if function.namespace in ("openmythos_experts", "openmythos_attention"):
            self._own(function.namespace, name, args)
        elif name in ("mm", "addmm"):
            a, b = args[-2:]
            self.counts[Product(1, a.shape[0], a.shape[1], b.shape[1])] += 1
        elif name in ("bmm", "baddbmm"):
            a, b = args[-2:]
            self.counts[Product(*a.shape, b.shape[2])] += 1
        elif name == "_grouped_mm":
            self._grouped(args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None))
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            self._attention(*args[:3], causal=(args[4:5] or (kwargs.get("is_causal"),))[0])
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            for _ in range(2):
                self._attention(*args[1:4], causal=args[7])
        return function(*args, **kwargs)

    def _own(self, namespace: str, name: str, args: tuple) -> None:
        """Count our kernels: experts by their numbers of rows, attention as a causal kernel."""
        if namespace == "openmythos_attention":
            q, k, v = args[:3] if name == "forward" else args[1:4]
            for _ in range(1 if name == "forward" else 2):
                self._attention(q, k, v, causal=True)
            return
        weights = args[0] if name == "gradient" else args[2]
        uses = args[5] if name == "gradient" else [args[3]]
        outer, inner = weights.shape[1:]
        ends = torch.stack(list(uses)).sum(dim=0).tolist()  # a gradient sums over all loops' rows
        for start, stop in zip([0, *ends], ends, strict=False):
            if stop == start:
                continue
            rows = stop - start
            if name == "gradient":
                self.counts[Product(1, outer, rows, inner)] += 1
            elif args[4]:
                self.counts[Product(1, rows, inner, outer)] += 1
            else:
                self.counts[Product(1, rows, outer, inner)] += 1

    def _grouped(self, a: Tensor, b: Tensor, ends: Tensor) -> None:
        stops = ends.tolist()
        for start, stop in zip([0, *stops], stops, strict=False):
            if stop > start and b.dim() == 3:
                self.counts[Product(1, stop - start, a.shape[1], b.shape[2])] += 1
            elif stop > start:
                self.counts[Product(1, a.shape[0], stop - start, b.shape[1])] += 1

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, causal: bool | None) -> None:
        batch, num_q, num_k = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
        half = 2 if causal and num_q > 1 else 1
        self.counts[Product(batch, num_q, q.shape[3], num_k // half)] += 1
        self.counts[Product(batch, num_q, num_k // half, v.shape[3])] += 1


def count_products(run: Callable[[], object]) -> Counter[Product]:
    """How often ``run`` makes each product."""
    with ProductCounter() as counter:
        run()
    return counter.counts


def seconds(product: Product) -> float:
    """Median time of one such product alone, in fp32."""
    size = 4 * product.batch * (product.inner * (product.rows + product.columns))
    copies = max(1, min(64, POOL_BYTES // size))
    batch = () if product.batch == 1 else (product.batch,)
    left = [torch.randn(*batch, product.rows, product.inner) for _ in range(copies)]
    # Stored as weights are, [columns, inner], and read transposed.
    right = [torch.randn(*batch, product.columns, product.inner).mT for _ in range(copies)]
    times, index, start = [], 0, time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < 0.05 and len(times) < 300):
        a, b = left[index % copies], right[index % copies]
        begin = time.perf_counter()
        torch.matmul(a, b)
        times.append(time.perf_counter() - begin)
        index += 1
    return median(times[1:])


def matmul_bound(run: Callable[[], object]) -> dict[str, float]:
    """FLOPs of all products of ``run``, and the seconds that they take alone on this machine."""
    counts = count_products(run)
    flops = sum(product.flops * count for product, count in counts.items())
    total = sum(seconds(product) * count for product, count in counts.items())
    return {"gflop": flops / 1e9, "bound_s": total, "gflop_per_s": flops / 1e9 / total}
