from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openmythos.config import ModelConfig
from tests.interop.hf.conftest import Open
from tests.interop.hf.examples import CONFIGS, DENSE, LATENT, PARCAE, SPARSE
from tests.strategies import random_tokens

TOLERANCE = 2e-5  # logits are of size 2 to 5; fp32 in another order of sums differs by 1.2e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@torch.no_grad()
def test_logits_are_ours_at_every_depth(opened: Open, config: ModelConfig) -> None:
    """Depths below, at and beyond the config's 4; cached in two chunks up to it."""
    model, export = opened(config)
    tokens = random_tokens(config, 2, 9)
    for num_loops in (2, 4, 6):
        ours = model(tokens, num_loops=num_loops).logits
        theirs = export(tokens, num_loops=num_loops, use_cache=False).logits
        assert (ours - theirs).abs().max() < TOLERANCE
        if num_loops <= config.num_loops:
            first = export(tokens[:, :5], num_loops=num_loops)
            cache = first.past_key_values
            second = export(tokens[:, 5:], num_loops=num_loops, past_key_values=cache)
            cached = torch.cat((first.logits, second.logits), dim=1)
            assert (ours - cached).abs().max() < TOLERANCE


@torch.no_grad()
def test_every_attention_and_expert_implementation_agrees(opened: Open) -> None:
    model, export = opened(SPARSE)
    tokens = random_tokens(SPARSE, 2, 9)
    ours = model(tokens).logits
    for implementation in ("eager", "sdpa"):
        export.set_attn_implementation(implementation)
        assert (export(tokens).logits - ours).abs().max() < TOLERANCE
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        export.set_experts_implementation(implementation)
        assert (export(tokens).logits - ours).abs().max() < TOLERANCE


# What ``make test-onnx`` has run: ONNX has no erfinv, say, and onnxruntime little for doubles.
ONNX = """
    __rshift__ _local_scalar_dense _scaled_dot_product_flash_attention_for_cpu _softmax
    _to_copy _unsafe_view add addcmul addmm alias all arange bitwise_and bitwise_not
    bitwise_xor bmm cat clamp clone constant_pad_nd cos cumsum detach div embedding eq exp
    expand flip full_like gather ge index lerp log lt mean mm mul ne neg ones_like pow relu
    roll rsqrt rsub select sigmoid silu sin slice softplus split split_with_sizes squeeze
    stack sub sum t topk transpose unsqueeze view where zeros_like
"""
ONNX_DOUBLE = "_to_copy arange clamp div lerp mul neg pow sub"


class Operators(TorchDispatchMode):
    """Records the operators that run, and those of them that see doubles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.double: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.found.add(name)
        tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
        if any(x.dtype == torch.float64 for x in tensors):
            self.double.add(name)
        return out


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@torch.no_grad()
def test_every_operator_is_one_that_onnx_has(opened: Open, config: ModelConfig) -> None:
    _, export = opened(config)
    if config.core_ff.kind == "moe":
        export.set_experts_implementation("batched_mm")
    tokens = random_tokens(config, 2, 7)
    with Operators() as operators:
        export(tokens, use_cache=False)
    assert operators.found <= set(ONNX.split())
    assert operators.double <= set(ONNX_DOUBLE.split())


@torch.no_grad()
def test_experts_of_another_rank_add_nothing(opened: Open) -> None:
    """Expert parallelism gives a rank's experts the number of all of them for one elsewhere."""
    _, export = opened(SPARSE)
    experts = export.model.core[0].mlp.experts
    experts._is_expert_parallel = True
    states, index = torch.randn(5, SPARSE.d_model), torch.randint(0, 5, (5, 2))
    index[0] = elsewhere = experts.num_experts
    weights = torch.rand(5, 2).masked_fill(index == elsewhere, 0.0)
    found = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        export.set_experts_implementation(implementation)
        found.append(experts(states, index, weights))
        assert found[-1][0].count_nonzero() == 0
        assert (found[-1] - found[0]).abs().max() < TOLERANCE
    assert found[0].count_nonzero() > 0


@torch.no_grad()
def test_bf16_keeps_the_routers_bias_in_fp32(opened: Open) -> None:
    model, export = opened(SPARSE, dtype=torch.bfloat16)
    assert export.model.core[0].mlp.gate.selection_bias.dtype == torch.float32
    tokens = random_tokens(SPARSE, 2, 9)
    found = export(tokens, use_cache=False).logits
    assert found.dtype == torch.bfloat16
    assert (found - model.to(torch.bfloat16)(tokens).logits).abs().max() < 0.3


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@torch.no_grad()
def test_offloaded_is_not_offloaded(opened: Open, config: ModelConfig) -> None:
    """accelerate brings a module's weights when its ``forward`` is called, and only then."""
    import accelerate

    _, export = opened(config)
    tokens = random_tokens(config, 2, 9)
    expected = export(tokens).logits
    accelerate.cpu_offload(export, execution_device=torch.device("cpu"))
    owners = [module for module in export.modules() if hasattr(module, "_hf_hook")]
    assert len(owners) > 20 and all(p.is_meta for p in export.parameters())
    assert torch.equal(export(tokens).logits, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("config", [SPARSE, LATENT, PARCAE], ids=["sparse", "latent", "parcae"])
def test_gradients_are_ours(opened: Open, config: ModelConfig) -> None:
    """Into the looped core too; the same with every block checkpointed."""
    model, export = opened(config)
    tokens = random_tokens(config, 2, 9)
    model(tokens).logits.square().mean().backward()
    wanted = model.core[0].attention.out.weight.grad
    assert wanted is not None and wanted.abs().max() > 1e-3
    for checkpointed in (False, True):
        if checkpointed:
            export.gradient_checkpointing_enable()
        export.train().zero_grad()
        export(tokens, use_cache=False).logits.square().mean().backward()
        found = export.model.core[0].self_attn.o_proj.weight.grad
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_a_model_made_from_the_config_is_initialised(opened: Open, config: ModelConfig) -> None:
    """transformers makes models on the meta device: what no one fills would be garbage."""
    _, export = opened(config)
    torch.manual_seed(0)
    buffers = []
    for _ in range(2):
        for tensor in (*export.parameters(), *export.buffers()):
            tensor.data.fill_(float("nan"))
            tensor._is_hf_initialized = False
        for module in export.modules():
            module._is_hf_initialized = False
        export.init_weights()
        assert all(tensor.isfinite().all() for tensor in export.state_dict().values())
        buffers.append([buffer.clone() for buffer in export.buffers()])
    assert all(map(torch.equal, *buffers))  # a buffer is no weight: nothing about it is random
    assert export(random_tokens(DENSE, 1, 4)).logits.isfinite().all()
