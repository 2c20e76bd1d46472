import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from openmythos.config import GQAConfig, ModelConfig
from openmythos.interop.export import export_hf
from tests.interop.hf.conftest import Open
from tests.interop.hf.examples import CONFIGS, DENSE, LATENT, SPARSE
from tests.strategies import random_model


def test_slots_follow_the_depth_however_it_is_set(transformers: ModuleType, tmp_path: Path) -> None:
    """1 prelude, 2 core and 1 coda layer: 2 + 2 N slots."""
    folder = export_hf(random_model(DENSE), tmp_path / "export")
    auto, remote = transformers.AutoConfig, {"trust_remote_code": True}
    config = auto.from_pretrained(folder, **remote)
    assert (config.num_loops, config.num_hidden_layers) == (4, 10)
    config.num_loops = 2  # as vLLM's hf_overrides does
    assert config.num_hidden_layers == 6
    assert auto.from_pretrained(folder, num_loops=6, **remote).num_hidden_layers == 14
    config.save_pretrained(tmp_path / "again")
    assert config.to_dict()["num_hidden_layers"] == 6
    assert type(config)().num_hidden_layers == 6  # its defaults make a small model


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SPARSE, (4, 2, 4, 24, 4, 2, 8)),
        (LATENT, (2, 2, 6, 24, 0, 0, 0)),  # nope 4 + rope 2, wider than the values' 3
    ],
)
def test_what_engines_read_is_derived(
    transformers: ModuleType, tmp_path: Path, config: object, expected: tuple[int, ...]
) -> None:
    folder = export_hf(random_model(config), tmp_path / "export")  # type: ignore[arg-type]
    found = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    names += ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    assert tuple(getattr(found, name) for name in names) == expected
    assert not hasattr(found, "kv_lora_rank")  # vLLM would cache latents, which slots cannot


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_parallel_plans_name_what_this_kind_has(opened: Open, config: ModelConfig) -> None:
    """A pattern for nothing is a fault to transformers; experts without one are whole."""
    _, export = opened(config)
    base, found = export.model, export.config
    names = {name for name, _ in base.named_modules()} | set(dict(base.named_parameters()))
    places = {re.sub(r"\.\d+\.", ".*.", name) for name in names}
    assert set(found.base_model_tp_plan) <= places
    experts = {name for name in places if name.endswith((".gate_up_proj", ".experts.down_proj"))}
    assert experts <= set(found.base_model_tp_plan)
    plan = found.base_model_ep_plan
    assert (plan is None) == (not experts)
    assert plan is None or experts < set(plan) <= places
    found.base_model_tp_plan = {**found.base_model_tp_plan}  # as transformers up to 5.19 does
    assert "base_model_tp_plan" not in found.to_dict()
    assert set(base._keep_in_fp32_modules_strict) == ({"selection_bias"} if experts else set())
    if not experts:
        with pytest.raises(ValueError, match="this model has no experts"):
            export.set_experts_implementation("eager")


def test_norms_of_heads_sum_their_gradient_over_ranks(opened: Open) -> None:
    heads = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm="weighted")
    _, export = opened(replace(DENSE, attention=heads))
    plan = export.config.base_model_tp_plan
    assert plan["core.*.self_attn.q_norm"] == "replicated_with_grad_allreduce"
    assert plan["core.*.self_attn.k_norm"] == "replicated_with_grad_allreduce"
