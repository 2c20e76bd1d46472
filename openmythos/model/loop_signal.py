"""How one loop differs from the next: loop embeddings, low-rank changes of weights or output."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from openmythos.config import (
    LearnedLoopConfig,
    LoopAdapterConfig,
    ModelConfig,
    OutputLoRAConfig,
    SinusoidalLoopConfig,
    WeightLoRAConfig,
)


class LoopLinear(nn.Linear):
    """``x W^T``, or ``x (W + B_t A_t)^T`` where t is each row's loop. No bias.

    B starts at zero, so that all loops start with the same weights. Loops past the table use its
    last row.

    Source: Relaxed Recursive Transformers (arXiv 2410.20672), section 3.
    """

    def __init__(self, num_in: int, num_out: int, lora: WeightLoRAConfig | None = None) -> None:
        super().__init__(num_in, num_out, bias=False)
        self.lora = lora
        if lora is not None:
            self.lora_down = nn.Parameter(torch.empty(lora.num_loops, lora.rank, num_in))
            self.lora_up = nn.Parameter(torch.zeros(lora.num_loops, num_out, lora.rank))
            self.drawn = ("lora_down",)  # see ``init_weights``

    def forward(
        self, x: Float[Tensor, "B T I"], loop_idx: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T O"]:
        """Apply the weights of each row's loop."""
        y = functional.linear(x, self.weight)
        if self.lora is None or loop_idx is None:
            return y
        row = loop_idx.clamp(max=self.lora.num_loops - 1)
        narrow = torch.bmm(x, self.lora_down[row].transpose(1, 2))
        return y + torch.bmm(narrow, self.lora_up[row].transpose(1, 2))


class SinusoidalLoop(nn.Module):
    """Adds [sin(t w), cos(t w)] to the first channels; defined for every loop.

    With ``positions``, [sin(p w), cos(p w)] of the token's position p too.

    Source: kyegomez/OpenMythos, open_mythos/main.py, loop_index_embedding; with positions,
        Universal Transformers (arXiv 1807.03819), equations 6 and 7, its channels in this order.
    """

    def __init__(self, config: ModelConfig, part: SinusoidalLoopConfig) -> None:
        super().__init__()
        self.config = part

    def forward(
        self,
        h: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"],
        positions: Int[Tensor, "B T"],
    ) -> Float[Tensor, "B T D"]:
        """h plus its loop's signal."""
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        signal = self._wave(loop_idx[:, None].to(wide))
        if self.config.positions:
            signal = signal + self._wave(positions.to(wide))
        rest = h.shape[-1] - self.config.num_channels
        return h + functional.pad(signal.to(h.dtype), (0, rest))

    def _wave(self, places: Float[Tensor, "B T"]) -> Float[Tensor, "B T C"]:
        channels = self.config.num_channels
        steps = torch.arange(0, channels, 2, dtype=places.dtype, device=places.device)
        angles = places[..., None] * self.config.theta ** -(steps / channels)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :channels]


class LearnedLoop(nn.Module):
    """Adds a learned vector a loop; zero at the start; the last row past the table."""

    def __init__(self, config: ModelConfig, part: LearnedLoopConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(part.num_loops, config.d_model))

    def forward(
        self,
        h: Float[Tensor, "B T D"],
        loop_idx: Int[Tensor, "B"],
        positions: Int[Tensor, "B T"],
    ) -> Float[Tensor, "B T D"]:
        """h plus its loop's vector."""
        return h + self.table[loop_idx.clamp(max=len(self.table) - 1)][:, None]


class LoopAdapter(nn.Module):
    """Leaves the core's output as it is; the others override this.

    It stands for no adapter and for ``weight_lora``, which is inside the core's ``LoopLinear``s.
    """

    def __init__(self, config: ModelConfig, part: LoopAdapterConfig | None) -> None:
        super().__init__()

    def forward(
        self, y: Float[Tensor, "B T D"], loop_idx: Int[Tensor, "B"]
    ) -> Float[Tensor, "B T D"]:
        """The core's output y as each row's loop changes it."""
        return y


class OutputLoRA(LoopAdapter):
    """``y + ((y down) * scale_t) up``; zero at the start; the last scale past the table.

    Source: kyegomez/OpenMythos, open_mythos/main.py, LoRAAdapter.
    """

    def __init__(self, config: ModelConfig, part: OutputLoRAConfig) -> None:
        super().__init__(config, part)
        self.down = nn.Linear(config.d_model, part.rank, bias=False)
        self.up = nn.Linear(part.rank, config.d_model, bias=False)
        self.scale = nn.Parameter(torch.ones(part.num_loops, part.rank))

    def init_weights(self) -> None:
        """Start as no change."""
        self.up.weight.zero_()

    def forward(
        self, y: Float[Tensor, "B T D"], loop_idx: Int[Tensor, "B"]
    ) -> Float[Tensor, "B T D"]:
        """y plus its loop's change."""
        scale = self.scale[loop_idx.clamp(max=len(self.scale) - 1)][:, None]
        return y + self.up(self.down(y) * scale)


LOOP_EMBEDDINGS: dict[type, type[nn.Module]] = {
    SinusoidalLoopConfig: SinusoidalLoop,
    LearnedLoopConfig: LearnedLoop,
}
LOOP_ADAPTERS: dict[type, type[LoopAdapter]] = {
    WeightLoRAConfig: LoopAdapter,
    OutputLoRAConfig: OutputLoRA,
}


def make_loop_embedding(config: ModelConfig) -> nn.Module | None:
    """The loop embedding that the config names."""
    part = config.loop_embedding
    return None if part is None else LOOP_EMBEDDINGS[type(part)](config, part)


def make_loop_adapter(config: ModelConfig) -> LoopAdapter:
    """The loop adapter that the config names."""
    part = config.loop_adapter
    return LoopAdapter(config, part) if part is None else LOOP_ADAPTERS[type(part)](config, part)
