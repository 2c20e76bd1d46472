import math
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from openmythos.config import (
    ACTConfig,
    AddInjectionConfig,
    CopyInitConfig,
    DepthAttentionConfig,
    GateInjectionConfig,
    LearnedLoopConfig,
    LinearInjectionConfig,
    ModelConfig,
    NoInjectionConfig,
    OriginalLTIInjectionConfig,
    OutputLoRAConfig,
    PonderNetConfig,
    ReLUSquaredConfig,
    UniversalACTConfig,
    ValueEmbeddingConfig,
    WeightLoRAConfig,
    counts,
)
from openmythos.config.presets import PRESETS, preset
from openmythos.config.schema import from_dict
from openmythos.model.cache import EveryK, FirstLoop, KVCache, LastLoop, PerLoop
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.attention import attention_reference
from tests.strategies import GQA, MLA, MOE, Json, model_fields, random_tokens, small_config

BATCH, TOKENS = 2, 5


def meta_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the model itself."""
    with torch.device("meta"):
        model = RecurrentDepthLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def meta_params(config: ModelConfig) -> dict[str, int]:
    """Parameters of the model itself, by the name of its first module."""
    sizes: dict[str, int] = {}
    for name, shape in meta_shapes(config).items():
        part = name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + math.prod(shape)
    return sizes


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_a_preset_are_the_models(name: str) -> None:
    shapes = meta_shapes(preset(name))
    assert counts.parameter_shapes(preset(name)) == shapes
    assert counts.total_params(preset(name)) == sum(map(math.prod, shapes.values()))


@settings(max_examples=150)
@given(model_fields())
def test_total_and_breakdown_are_the_models(fields: Json) -> None:
    config = from_dict(ModelConfig, fields)
    sizes: dict[str, int] = {}
    for part in counts.parts(config):
        name = part.name.split(".")[0]
        sizes[name] = sizes.get(name, 0) + part.weights.params
    adapter = config.loop_adapter  # a module of the model under its kind
    module = {"embedding": "embed", "loop_adapter": "" if adapter is None else adapter.kind}
    found = {module.get(name, name): size for name, size in sizes.items() if size}
    assert found == meta_params(config)
    assert counts.parameter_shapes(config) == meta_shapes(config)
    assert counts.active_params(config) <= counts.total_params(config)


def test_active_parameters_of_routed_experts() -> None:
    dense, sparse = (
        small_config(core_feed_forward=replace(MOE, num_experts=2)),
        small_config(core_feed_forward=MOE),
    )
    routers = 2 * 2 * 16  # layers x further experts x d_model: the router reads all its rows
    assert counts.active_params(sparse) == counts.active_params(dense) + routers
    assert counts.total_params(dense) == counts.active_params(dense)


def test_a_table_that_is_looked_up_is_active_by_one_row() -> None:
    vocab, dim = 32, 16
    tied, untied = small_config(), small_config(tie_embeddings=False)
    assert counts.total_params(untied) - counts.total_params(tied) == vocab * dim
    assert counts.active_params(untied) - counts.active_params(tied) == dim
    learned = small_config(loop_embedding=LearnedLoopConfig(num_loops=5))
    assert counts.active_params(learned) - counts.active_params(tied) == dim
    lora = small_config(loop_adapter=WeightLoRAConfig(rank=2, num_loops=5))
    added = counts.total_params(lora) - counts.total_params(tied)
    assert added == 5 * (counts.active_params(lora) - counts.active_params(tied))


def test_no_part_is_empty_and_names_are_unique() -> None:
    for config in (
        small_config(),
        small_config(core_feed_forward=MOE, attention=MLA, num_coda_layers=0),
    ):
        names = [part.name for part in counts.parts(config)]
        assert len(names) == len(set(names))
        assert all(part.weights != counts.Weights() for part in counts.parts(config))


# --- FLOPs ---------------------------------------------------------------------------------------


def measured(run: Callable[[], object]) -> int:
    """FLOPs that torch counts; the reference shows attention's products to the counter."""
    plain = patch("openmythos.model.context.attention", attention_reference)
    with plain, FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def real_model(config: ModelConfig) -> tuple[RecurrentDepthLM, Tensor]:
    """In fp64, where experts are plain products that the counter sees."""
    tokens = random_tokens(config, BATCH, TOKENS)
    return RecurrentDepthLM(config).double(), tokens


@settings(max_examples=60)
@given(model_fields(), st.integers(1, 4))
def test_forward_flops_are_those_of_torch(fields: Json, num_loops: int) -> None:
    config = from_dict(ModelConfig, fields)
    model, tokens = real_model(config)
    with torch.no_grad():
        flops = measured(lambda: model.eval()(tokens, num_loops=num_loops))
    per_token = counts.forward_flops(config, num_loops=num_loops, context_length=TOKENS)
    assert flops == BATCH * TOKENS * per_token


@settings(max_examples=40)
@given(model_fields())
def test_decoding_flops_are_those_of_torch(fields: Json) -> None:
    config = from_dict(ModelConfig, fields)
    model, tokens = real_model(config)
    cache = KVCache(
        config, batch_size=BATCH, max_len=9, max_loops=config.num_loops, dtype=torch.float64
    )
    with torch.no_grad():
        model.eval()(tokens, ctx=model.context(tokens, cache=cache))
        last = tokens[:, -1:]
        flops = measured(lambda: model(last, ctx=model.context(last, cache=cache)))
    per_token = counts.forward_flops(config, context_length=TOKENS + 1, cached=True)
    assert flops == BATCH * per_token


def training_flops(config: ModelConfig, grad_loops: int | None) -> int:
    model, tokens = real_model(config)

    def run() -> None:
        out = model(tokens, grad_loops=grad_loops)
        loss = out.logits.square().mean()
        if out.exit_weights is not None:
            loss = loss + out.exit_weights.square().mean()
        loss.backward()

    return measured(run)


@pytest.mark.parametrize("grad_loops", [None, 4, 2, 1])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": MLA, "core_feed_forward": MOE},
        {"injection": AddInjectionConfig(), "loop_adapter": WeightLoRAConfig(rank=2, num_loops=2)},
        {"injection": GateInjectionConfig(), "halting": ACTConfig()},
        {
            "injection": OriginalLTIInjectionConfig(),
            "loop_adapter": OutputLoRAConfig(rank=2, num_loops=2),
        },
        {"injection": NoInjectionConfig(), "state_init": CopyInitConfig(), "readout": "linear"},
        {"value_embedding": ValueEmbeddingConfig(layers=(0, 2), gate_channels=3)},
        {"injection": GateInjectionConfig(add_e=False), "state_init": CopyInitConfig()},
        {"feed_forward": ReLUSquaredConfig(d_ff=9), "tie_embeddings": False},
        {"halting": PonderNetConfig()},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_training_flops_are_those_of_torch(
    changes: dict[str, object], grad_loops: int | None
) -> None:
    config = small_config(**changes)
    per_token = counts.training_flops(config, grad_loops=grad_loops, context_length=TOKENS)
    assert training_flops(config, grad_loops) == BATCH * TOKENS * per_token


@pytest.mark.parametrize("grad_loops", [4, 1])
@pytest.mark.parametrize(
    ("changes", "unneeded"),
    [
        ({"injection": LinearInjectionConfig()}, 2 * 16**2),
        ({"halting": UniversalACTConfig()}, 2 * 16),
        # Both layers' scores and values, by the keys and values of loops that nothing trains.
        ({"depth_attention": DepthAttentionConfig(num_recent_loops=3)}, 2 * 2 * 2 * (4 * 4) * 3),
    ],
    ids=[
        "state-before-the-first-gradient",
        "gate-before-the-first-gradient",
        "keys-before-the-first-gradient",
    ],
)
def test_training_flops_count_products_that_need_no_gradient(
    changes: dict[str, object], unneeded: int, grad_loops: int
) -> None:
    config = small_config(**changes)
    per_token = counts.training_flops(config, grad_loops=grad_loops, context_length=TOKENS)
    assert training_flops(config, grad_loops) == BATCH * TOKENS * (per_token - unneeded)


def test_flops_grow_by_a_loop_and_by_a_key() -> None:
    config = small_config(attention=MLA)
    flops = [counts.forward_flops(config, num_loops=loops) for loops in (1, 2, 3)]
    assert flops[2] - flops[1] == flops[1] - flops[0] > 0
    one_key = counts.forward_flops(config, context_length=1) - counts.forward_flops(config)
    assert one_key == 2 * 2 * (4 + 2 + 3) * config.effective_depth()
    one_key = counts.forward_flops(config, context_length=1, cached=True)
    one_key -= counts.forward_flops(config, cached=True)
    assert one_key == 2 * 2 * (5 + 2) * 2 * config.effective_depth()


def test_depth_attention_costs_a_key_a_recent_loop() -> None:
    plain, deep = (
        small_config(depth_attention=depth)
        for depth in (None, DepthAttentionConfig(num_recent_loops=3))
    )
    assert counts.total_params(deep) == counts.total_params(plain)
    for context in (0, 9):
        more = counts.forward_flops(deep, num_loops=5, context_length=context)
        more -= counts.forward_flops(plain, num_loops=5, context_length=context)
        assert more == 2 * (4 * 2 * 4) * 3 * (2 * 5)
    assert counts.kv_bytes_per_token(deep) == counts.kv_bytes_per_token(plain)


def test_training_is_three_forwards_less_the_loops_without_gradient() -> None:
    config = small_config()
    full = counts.training_flops(config, context_length=7)
    assert full == 3 * counts.forward_flops(config, context_length=7)
    assert full == counts.training_flops(config, context_length=7, grad_loops=9)
    loop = counts.forward_flops(config, num_loops=2) - counts.forward_flops(config, num_loops=1)
    assert (
        counts.training_flops(config, grad_loops=1) == counts.training_flops(config) - 2 * 3 * loop
    )


# --- memory --------------------------------------------------------------------------------------


LAYOUTS = {
    "per_loop": PerLoop(),
    "every_2": EveryK(2),
    "every_4": EveryK(4),
    "last_loop": LastLoop(),
    "first_loop": FirstLoop(),
}


@pytest.mark.parametrize("attention", [GQA, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_loops", [1, 3, 4, 7])
def test_kv_bytes_are_the_caches(layout: str, num_loops: int, attention: object) -> None:
    config, batch, length = small_config(attention=attention), 2, 5
    cache = KVCache(
        config,
        batch_size=batch,
        max_len=length,
        max_loops=num_loops,
        layout=LAYOUTS[layout],
        dtype=torch.bfloat16,
    )
    kept = counts.loops_kept_by_layout(num_loops)[layout]
    per_token = counts.kv_bytes_per_token(config, num_loops=num_loops, kept_loops=kept)
    assert per_token * batch * length == cache.num_bytes


def test_kv_bytes_default_to_every_loop() -> None:
    config = small_config()
    assert counts.kv_bytes_per_token(config) == (1 + 4 * 2 + 1) * 2 * (2 * 2 * 4)
    assert counts.kv_bytes_per_token(config, dtype_bytes=4) == 2 * counts.kv_bytes_per_token(config)
    assert set(counts.loops_kept_by_layout(3)) == set(LAYOUTS)


def test_memory_of_weights_and_training() -> None:
    config = small_config()
    params = counts.total_params(config)
    assert counts.weight_bytes(config, 4) == 2 * counts.weight_bytes(config) == 4 * params
    assert counts.training_bytes(config) == 16 * params
    halves = counts.training_bytes(config, param_bytes=2, grad_bytes=2, moment_bytes=1)
    assert halves == 6 * params


def test_count_collects_the_figures() -> None:
    config = small_config(attention=MLA)
    figures = counts.count(config, num_loops=5, context_length=9)
    assert figures.num_loops == 5
    assert figures.effective_depth == 1 + 5 * 2 + 1
    assert figures.inference_flops_per_token == counts.forward_flops(
        config, num_loops=5, context_length=9, cached=True
    )
    assert figures.training_flops_per_token == counts.training_flops(
        config, num_loops=5, context_length=5
    )
    assert figures.kv_bytes_per_token == counts.kv_bytes_per_token(config, num_loops=5)
    assert counts.count(config).num_loops == config.num_loops
