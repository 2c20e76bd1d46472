"""How many rows fit into a budget of memory: one row is run and what it allocates is counted.

Nothing is estimated, so nothing has to know what a family or an instrument keeps. The weights are
there already and do not count.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SAFE = 0.95  # of the bytes: some small tensors of one batch live on into the next


class OverBudget(ValueError):
    """The tensors that are alive take more bytes than were allowed."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, as long as they are alive.

    Args:
        model: Its weights are not counted.
        most: More bytes than these raise ``OverBudget``; None: there is no limit.

    Attributes:
        now: Bytes that are alive.
        peak: The most so far.
    """

    def __init__(self, model: nn.Module, most: int | None = None) -> None:
        super().__init__()
        self.most, self.now, self.peak = most, 0, 0
        self._sizes: dict[int, int] = {}
        self._known = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        self._weights = {storage._cdata for storage in self._known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self._count(part)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._weights:
            return
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        if self.most is not None and self.now > self.most:
            raise OverBudget(f"{self.now:,} bytes are alive; {self.most:,} are allowed")

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def rows_within(max_bytes: int, run_one: Callable[[], object], model: nn.Module) -> int:
    """The most rows that a batch may have: what one row takes is the most that each adds.

    Args:
        max_bytes: Bytes that a batch may take, besides the weights.
        run_one: Runs one row.
        model: The model that it runs.

    Raises:
        OverBudget: Not even one row fits.
    """
    meter = LiveBytes(model, max_bytes)
    try:
        with meter:
            run_one()
    except OverBudget:
        raise OverBudget(
            f"max_bytes is {max_bytes:,}, and one row needs more; give more bytes, shorter rows or "
            "fewer loops"
        ) from None
    return max(1, int(SAFE * max_bytes / max(meter.peak, 1)))
