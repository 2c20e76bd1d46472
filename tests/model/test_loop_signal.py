import math
import typing

import pytest
import torch

from openmythos.config import (
    LearnedLoopConfig,
    LinearInjectionConfig,
    LoopAdapterConfig,
    LoopEmbeddingConfig,
    LoopScaleConfig,
    OutputLoRAConfig,
    SinusoidalLoopConfig,
    WeightLoRAConfig,
)
from openmythos.model.loop_signal import (
    LOOP_ADAPTERS,
    LOOP_EMBEDDINGS,
    LearnedLoop,
    LoopLinear,
    LoopScale,
    OutputLoRA,
    SinusoidalLoop,
    make_loop_embedding,
)
from openmythos.model.recurrent import RecurrentDepthLM
from tests.strategies import random_model, random_tokens, seeded, small_config

NOWHERE = torch.zeros(3, 2, dtype=torch.int64)  # positions, where only the loop counts


@pytest.mark.parametrize("channels", [4, 5])
def test_sinusoid_is_the_originals(channels):
    """[sin(t w_j) for all j, cos(t w_j) for all j], cut; w_j = theta^(-2j/channels)."""
    embedding = SinusoidalLoop(
        small_config(d_model=8), SinusoidalLoopConfig(num_channels=channels, theta=100.0)
    )
    h = torch.zeros(3, 2, 8, dtype=torch.float64)
    got = embedding(h, torch.tensor([0, 1, 70]), NOWHERE)
    rates = [100.0 ** (-2 * j / channels) for j in range(math.ceil(channels / 2))]
    for row, t in enumerate([0, 1, 70]):
        signal = [math.sin(t * w) for w in rates] + [math.cos(t * w) for w in rates]
        wanted = torch.tensor(signal[:channels] + [0.0] * (8 - channels), dtype=torch.float64)
        torch.testing.assert_close(got[row], wanted.expand(2, 8))


def test_positions_make_the_universal_transformers_signal():
    """P[p, t, 2j] = sin(p w_j) + sin(t w_j), P[p, t, 2j + 1] = the cosines (equations 6 and 7)."""
    config = SinusoidalLoopConfig(num_channels=6, positions=True)
    positions = torch.tensor([[0, 1, 2], [0, 0, 7]])
    embedding = SinusoidalLoop(small_config(d_model=6), config)
    got = embedding(torch.zeros(2, 3, 6).double(), torch.tensor([3, 5]), positions)
    for row, t in enumerate([3, 5]):
        for column, p in enumerate(positions[row].tolist()):
            for j in range(3):
                w = 10_000 ** (-2 * j / 6)
                sine, cosine = got[row, column, j], got[row, column, 3 + j]
                assert float(sine) == pytest.approx(math.sin(p * w) + math.sin(t * w))
                assert float(cosine) == pytest.approx(math.cos(p * w) + math.cos(t * w))


def test_sinusoid_is_computed_wide():
    embedding = SinusoidalLoop(small_config(d_model=4), SinusoidalLoopConfig(num_channels=4))
    h = torch.zeros(2, 1, 4, dtype=torch.bfloat16)
    got = embedding(h, torch.tensor([257, 258]), torch.zeros(2, 1, dtype=torch.int64))
    assert got.dtype == torch.bfloat16
    assert not torch.equal(got[0], got[1])


def test_learned_starts_at_zero_and_ends_in_its_last_row():
    embedding = LearnedLoop(small_config(d_model=4), LearnedLoopConfig(num_loops=2))
    h = torch.randn(3, 2, 4)
    loops = torch.tensor([0, 1, 9])
    assert torch.equal(embedding(h, loops, NOWHERE), h)
    with torch.no_grad():
        embedding.table.copy_(torch.tensor([[1.0], [2.0]]))
    torch.testing.assert_close(
        embedding(h, loops, NOWHERE) - h, torch.tensor([1.0, 2, 2]).view(3, 1, 1).expand(3, 2, 4)
    )


def test_output_lora_is_the_originals():
    adapter = OutputLoRA(small_config(d_model=4), OutputLoRAConfig(rank=2, num_loops=3)).double()
    with torch.no_grad():
        adapter.scale.copy_(torch.randn(3, 2))
    y = torch.randn(3, 2, 4, dtype=torch.float64)
    got = adapter(y, torch.tensor([2, 0, 5]))
    for row, loop in enumerate([2, 0, 2]):
        wanted = (
            y[row] + (y[row] @ adapter.down.weight.T * adapter.scale[loop]) @ adapter.up.weight.T
        )
        torch.testing.assert_close(got[row], wanted)


def test_the_config_chooses():
    assert set(LOOP_EMBEDDINGS) == set(typing.get_args(LoopEmbeddingConfig))
    assert set(LOOP_ADAPTERS) == set(typing.get_args(LoopAdapterConfig))
    assert make_loop_embedding(small_config()) is None
    for part in (LearnedLoopConfig(num_loops=1), SinusoidalLoopConfig(num_channels=2)):
        made_embedding = make_loop_embedding(small_config(loop_embedding=part))
        assert type(made_embedding) is LOOP_EMBEDDINGS[type(part)]


@pytest.mark.parametrize("adapter", [None, WeightLoRAConfig(rank=2, num_loops=2)])
def test_without_an_adapter_of_the_output_it_is_left_alone(adapter):
    model, y = RecurrentDepthLM(small_config(loop_adapter=adapter)), torch.randn(2, 3, 16)
    assert model.loop_adapter(y, torch.tensor([0, 1])) is y


def test_the_adapters_weights_stand_under_its_kind():
    model = RecurrentDepthLM(small_config(loop_adapter=OutputLoRAConfig(rank=2, num_loops=3)))
    names = {name for name in model.state_dict() if "lora" in name}
    assert names == {"output_lora.down.weight", "output_lora.up.weight", "output_lora.scale"}
    assert type(model.loop_adapter) is OutputLoRA


def made(rank: int = 2, num_loops: int = 3) -> LoopLinear:
    linear = LoopLinear(5, 7, WeightLoRAConfig(rank=rank, num_loops=num_loops)).double()
    generator = seeded()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def test_each_row_uses_the_weights_of_its_own_loop():
    linear, x = made(), torch.randn(4, 3, 5, dtype=torch.float64)
    loops = torch.tensor([2, 0, 1, 0])
    y = linear(x, loops)
    for row, loop in enumerate(loops.tolist()):
        weight = linear.weight + linear.lora_up[loop] @ linear.lora_down[loop]
        torch.testing.assert_close(y[row], x[row] @ weight.T)
        torch.testing.assert_close(linear(x[row : row + 1], loops[row : row + 1])[0], y[row])


def test_loops_past_the_table_use_its_last_row():
    linear, x = made(), torch.randn(2, 3, 5, dtype=torch.float64)
    last = linear(x, torch.tensor([2, 2]))
    torch.testing.assert_close(linear(x, torch.tensor([3, 99])), last)


def test_full_rank_reproduces_an_untied_weight_for_every_loop():
    """Relaxed Recursive Transformers: the residual's SVD is exact at full rank."""
    linear = made(rank=5)
    untied = torch.randn(3, 7, 5, dtype=torch.float64)
    u, s, v = torch.linalg.svd(untied - linear.weight, full_matrices=False)
    with torch.no_grad():
        linear.lora_up.copy_(u * s[:, None])
        linear.lora_down.copy_(v)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    y = linear(x, torch.arange(3))
    torch.testing.assert_close(y, torch.einsum("bti,boi->bto", x, untied))


def test_the_table_starts_as_no_change():
    config = small_config(loop_adapter=WeightLoRAConfig(rank=2, num_loops=2))
    model = RecurrentDepthLM(config)
    linear = model.core[0].attention.qkv
    x = torch.randn(2, 3, 16)
    assert linear.lora_down.abs().max() > 0
    assert torch.equal(linear(x, torch.tensor([0, 1])), linear(x))


def test_a_full_rank_adapter_makes_a_looped_model_an_untied_one():
    """k layers x L loops with per-loop weights equal L x k layers without a loop."""
    plain = {"num_prelude_layers": 0, "num_coda_layers": 0, "injection": LinearInjectionConfig()}
    adapter = WeightLoRAConfig(rank=24, num_loops=2)
    looped = random_model(
        small_config(num_core_layers=1, loop_adapter=adapter, **plain), dtype=torch.float64
    )
    untied = random_model(small_config(num_core_layers=1, **plain), dtype=torch.float64)
    untied.load_state_dict(looped.state_dict(), strict=False)
    tokens = random_tokens(looped.config, 2, 5)
    ctx = looped.context(tokens)
    with torch.no_grad():
        e = looped.encode(tokens, ctx)
        h = torch.zeros_like(e)
        for loop in range(2):
            for name, linear in looped.core[0].named_modules():
                if isinstance(linear, LoopLinear):
                    change = linear.lora_up[loop] @ linear.lora_down[loop]
                    untied.core[0].get_submodule(name).weight.copy_(linear.weight + change)
            h = untied.step(h, e, torch.zeros(2, dtype=torch.int64), ctx)
        torch.testing.assert_close(looped(tokens, num_loops=2).h, h)


def test_only_the_core_carries_adapters():
    config = small_config(loop_adapter=WeightLoRAConfig(rank=2, num_loops=2))
    names = {n.split(".")[0] for n, _ in RecurrentDepthLM(config).named_parameters() if "lora" in n}
    assert names == {"core"}


def test_loop_scale_by_hand():
    scale = LoopScale(small_config(d_model=4), LoopScaleConfig(num_loops=2)).double()
    y = torch.randn(3, 5, 4, dtype=torch.float64, generator=seeded())
    loop_idx = torch.tensor([0, 1, 7])
    assert torch.equal(scale(y, loop_idx), y)  # at the start
    with torch.no_grad():
        scale.scale.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    wanted = torch.stack((y[0] * scale.scale[0], y[1] * scale.scale[1], y[2] * scale.scale[1]))
    got = scale(y, loop_idx)
    assert torch.equal(got, wanted)
    got.sum().backward()
    torch.testing.assert_close(scale.scale.grad[0], y[0].sum(dim=0))
    torch.testing.assert_close(scale.scale.grad[1], y[1:].sum(dim=(0, 1)))


def test_a_model_with_loop_scale_starts_as_the_one_without():
    config = small_config(loop_adapter=LoopScaleConfig(num_loops=2))
    model = RecurrentDepthLM(config)
    plain = RecurrentDepthLM(small_config())
    tokens = torch.arange(6).view(2, 3)
    assert torch.equal(model(tokens, num_loops=4).logits, plain(tokens, num_loops=4).logits)
    assert {name for name, _ in model.named_parameters()} - {
        name for name, _ in plain.named_parameters()
    } == {"loop_scale.scale"}
