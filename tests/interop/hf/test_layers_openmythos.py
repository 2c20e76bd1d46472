import pytest
import torch

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
    for parameter in export.parameters():
        parameter.data.fill_(float("nan"))
        parameter._is_hf_initialized = False
    for module in export.modules():
        module._is_hf_initialized = False
    export.init_weights()
    assert all(tensor.isfinite().all() for tensor in export.state_dict().values())
    assert export(random_tokens(DENSE, 1, 4)).logits.isfinite().all()
