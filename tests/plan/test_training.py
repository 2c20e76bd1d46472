import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks

from openmythos.checkpoint.load import empty_model
from openmythos.config import GQAConfig, ModelConfig, SwiGLUConfig, counts
from openmythos.config.parallel import ParallelConfig
from openmythos.config.presets import preset
from openmythos.model.feedforward import Router
from openmythos.ops.moe import moe_experts
from openmythos.plan.placement import units
from openmythos.plan.serving import Machine
from openmythos.plan.training import (
    Links,
    Work,
    activation_bytes,
    cost_of,
    exchanges,
    memory,
    step_flops,
)
from tests.strategies import unchecked

GIB = 2**30
H100_80 = Machine(memory_bytes=80.0 * GIB)
ONE_T = preset("mythos-1t")
EP = ParallelConfig(dp_shard=1024, ep=128)
EP_TP = ParallelConfig(dp_shard=128, ep=128, tp=8)
ADAMW = Work(context_length=4096, optimizer="adamw")


def gib(number: float) -> float:
    return round(number / GIB, 1)


def dense(loops: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_768,
        d_model=2048,
        num_prelude_layers=2,
        num_core_layers=8,
        num_coda_layers=2,
        num_loops=loops,
        attention=GQAConfig(num_heads=16, num_kv_heads=16, head_dim=128),
        feed_forward=SwiGLUConfig(d_ff=8192),
        max_seq_len=4096,
        tie_embeddings=False,
    )


# --- by hand: mythos-1t, EP 128, AdamW ------------------------------------------------------------

# Parameters of a core block: 3 of 384 experts, and what every rank gathers whole.
EXPERTS = 3 * 3 * 12_288 * 4352
DIVIDED = 1536 * 96 * 192 + 512 * 96 * 256 + 96 * 128 * 12_288 + 3 * 12_288 * 4352
ROUTER, WHOLE = 384 * 12_288, 12_288 * 2112 + 1536 + 512 + 2 * 12_288


def test_a_trillion_parameters_by_hand() -> None:
    core = 16 * 2 * (EXPERTS + DIVIDED + WHOLE + ROUTER)
    found = memory(ONE_T, EP, ADAMW)
    state = found["parameters"] + found["gradients"] + found["optimizer"]
    assert [gib(state), gib(core), gib(core)] == [14.7, 25.8, 25.8]
    assert gib(state + 2 * core) == 66.2
    # The routers are gathered in float32, not in bfloat16.
    assert found["core_weights"] == found["core_gradients"] == core + 16 * 2 * ROUTER


def test_a_trillion_parameters_with_tensor_parallel_by_hand() -> None:
    # 46.2 is what is left if all matrices but the experts are divided by 8.
    core = 16 * 2 * (EXPERTS + (DIVIDED + WHOLE + ROUTER) / 8)
    state = 16 * counts.total_params(ONE_T) / 1024
    assert gib(state + 2 * core) == 46.2
    # MLA's first projection, the norms and the router are whole on every rank in truth.
    found = memory(ONE_T, EP_TP, ADAMW)
    whole = 16 * 2 * (WHOLE + ROUTER) * 7 / 8
    assert found["core_weights"] == core + whole + 16 * 2 * ROUTER
    stored = found["parameters"] + found["gradients"] + found["optimizer"]
    assert gib(stored) == 15.2  # tables are not divided by tp


def test_gathering_by_loop_moves_412_gib_instead_of_26() -> None:
    def gathered(layout: ParallelConfig) -> float:
        found = exchanges(ONE_T, layout, ADAMW)
        return sum(e.num_bytes for e in found if e.what == "core weights")

    core = 16 * 2 * (EXPERTS + DIVIDED + WHOLE + ROUTER)
    assert round(16 * core / GIB) == 412
    # In truth a little more: cuts are of equal length, and the routers are in float32.
    by_step, by_loop = gathered(EP), gathered(replace(EP, core_gather="loop"))
    assert core < by_step < 1.08 * core
    assert by_loop == 16 * by_step


def test_exchanges_of_the_dense_model_by_hand() -> None:
    """By step 2.3 GiB for blocks and tables, by loop 17.3 GiB; two gathers are of the tables."""
    layout, work = ParallelConfig(dp_shard=64), Work(context_length=1024)
    for gather, number, size in (("step", 19, 2.3), ("loop", 139, 17.3)):
        found = exchanges(dense(8), replace(layout, core_gather=gather), work)
        mine = [each for each in found if each.kind == "all_gather"]
        assert sum(each.number for each in mine) == number
        assert gib(sum(each.num_bytes for each in mine)) == size
    for loops in (1, 4, 16):  # by step it is the same at every depth
        found = exchanges(dense(loops), layout, work)
        assert sum(each.number for each in found if each.kind == "all_gather") == 19
        assert sum(each.number for each in found if each.kind == "reduce_scatter") == 15


# --- what the model keeps -------------------------------------------------------------------------


def kept_bytes(config: ModelConfig, num_loops: int, recompute: bool = False) -> int:
    """What autograd keeps of a forward: blocks in bfloat16, states in float32, as on a GPU."""
    model = empty_model(config).train()
    stages = (model.prelude, model.core, model.coda)
    low = {id(m) for stage in stages for m in stage.modules() if not isinstance(m, Router)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            dtype = torch.bfloat16 if id(module) in low else torch.float32
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    made = torch.empty(parameter.shape, dtype=dtype)
                    module._parameters[name] = torch.nn.Parameter(made)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        with unset_fake_temporarily():
            tokens = torch.zeros(2, 256, dtype=torch.int64)
            ctx = replace(model.context(tokens), experts=moe_experts)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        seen: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                seen.setdefault(storage._cdata, storage)
            return tensor

        cast = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
        with saved_tensors_hooks(pack, lambda tensor: tensor), cast:
            model(tokens, ctx=ctx, num_loops=num_loops, recompute=recompute)
        return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("name", ["tiny", "mythos-1b", "ouro-1.4b"])
def test_activations_are_what_autograd_keeps(name: str) -> None:
    """By differences, so that what is kept once (the cast head, logits, masks) does not count."""
    layers = {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 0}
    config = replace(preset(name), vocab_size=64, **layers)
    with unchecked():
        _compare_kept(config)


def _compare_kept(config: ModelConfig) -> None:
    planned = partial(activation_bytes, layout=ParallelConfig(), work=Work(context_length=512))
    deeper = replace(config, num_prelude_layers=config.num_prelude_layers + 1)
    looped, once = replace(config, num_loops=2), replace(config, num_loops=1)
    for more, less in ((looped, once), (replace(deeper, num_loops=1), once)):
        counted = kept_bytes(more, more.num_loops) - kept_bytes(less, less.num_loops)
        assert planned(more) - planned(less) == pytest.approx(counted, rel=0.02)
    # With loops run again, autograd keeps nothing of one: the loop itself holds its state.
    counted = kept_bytes(looped, 2, recompute=True) - kept_bytes(once, 1, recompute=True)
    again = partial(planned, work=Work(context_length=512, recompute=True))
    assert counted == 0
    assert again(looped) - again(once) == 512 * (6 if config.loop_norm else 4) * config.d_model


# --- the choice -----------------------------------------------------------------------------------


def test_flops_are_those_of_the_counts() -> None:
    config, work = preset("mythos-1b"), Work(context_length=4096, rows=2)
    token = counts.training_flops(config, context_length=2048)
    one = ParallelConfig()
    assert step_flops(config, one, work) == 8192 * token
    assert step_flops(config, ParallelConfig(tp=2), work) == 4096 * token
    twice = step_flops(config, one, replace(work, accumulation=2))
    assert twice == 2 * 8192 * token
    again = step_flops(config, one, replace(work, recompute=True)) / 8192
    loop = counts.forward_flops(config, num_loops=1, context_length=2048)
    loop -= counts.forward_flops(config, num_loops=0, context_length=2048)
    assert again == token + 8 * loop
    # Six loops without gradients cost a third, and do not run again.
    two = step_flops(config, one, replace(work, grad_loops=2)) / 8192
    assert two == token - 6 * 2 * loop
    assert step_flops(config, one, replace(work, grad_loops=2, recompute=True)) / 8192 == two + (
        2 * loop
    )


def test_one_device_exchanges_nothing_and_keeps_cast_weights() -> None:
    config = preset("tiny")
    cost = cost_of(config, ParallelConfig(), Work(context_length=256), H100_80, Links())
    assert cost.exchanges == () and cost.limit == "compute"
    core = sum(2 * unit.gathered for unit in units(config, ParallelConfig()) if unit.in_core)
    assert cost.memory["core_weights"] == config.num_loops * core
    assert cost.memory["core_gradients"] == cost.memory["reduce_buffer"] == 0


def test_a_machine_inside_is_quicker_than_the_network() -> None:
    found = exchanges(preset("mythos-10b"), ParallelConfig(dp_shard=8, ep=8), ADAMW)
    (pairs,) = (each for each in found if each.what.startswith("tokens"))
    assert Links().seconds(pairs) == pytest.approx(pairs.num_bytes * 7 / 8 / 450e9)
    assert Links(devices=4).seconds(pairs) == pytest.approx(pairs.num_bytes * 7 / 8 / 50e9)
    # 8 core layers, 8 loops, there and back, forward and backward; 8 experts per token.
    assert pairs.number == 8 * 8 * 2 * 2
    assert pairs.num_bytes == pairs.number * 4096 * 8 * 2048 * 2


def test_optimizer_state_by_kind() -> None:
    config, one = preset("mythos-1b"), ParallelConfig()
    adamw = memory(config, one, ADAMW)["optimizer"]
    muon = memory(config, one, replace(ADAMW, optimizer="muon"))["optimizer"]
    assert adamw == 8 * counts.total_params(config)
    shapes = counts.parameter_shapes(config)
    rest = [name for name in shapes if name.startswith(("embed", "injection"))]
    rest += [name for name, shape in shapes.items() if "router" in name or len(shape) == 1]
    moments = counts.total_params(config) + sum(math.prod(shapes[name]) for name in set(rest))
    assert muon == 4 * moments
