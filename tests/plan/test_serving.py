import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmythos.config import GQAConfig, ModelConfig, SwiGLUConfig, counts
from openmythos.config.injection import AddInjectionConfig
from openmythos.config.matched_baseline import plain_model
from openmythos.config.presets import PRESETS, preset
from openmythos.config.schema import from_dict
from openmythos.plan.serving import (
    MEASURES,
    Comparison,
    Load,
    Machine,
    load_of,
    most_users,
    plain_models,
    serve,
    turns,
)
from tests.strategies import model_fields

CONTEXT, H100 = 8192, Machine()
LAYER = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096  # 218.1M
TABLE = 128_256 * 4096


def looped(core: int = 6, loops: int = 4) -> ModelConfig:
    """4 + T x core + 4 layers of 218.1M parameters each."""
    return ModelConfig(
        vocab_size=128_256,
        d_model=4096,
        num_prelude_layers=4,
        num_core_layers=core,
        num_coda_layers=4,
        num_loops=loops,
        attention=GQAConfig(num_heads=32, num_kv_heads=8, head_dim=128),
        feed_forward=SwiGLUConfig(d_ff=14_336),
        injection=AddInjectionConfig(),
        prelude_norm=False,
        tie_embeddings=False,
        max_seq_len=CONTEXT,
    )


def load(config: ModelConfig, kept: int | None = None, mean: float | None = None) -> Load:
    return load_of(config, context_length=CONTEXT, kept_loops=kept, mean_loops=mean)


# The table by hand: 80 GB, 3.35 TB/s, 989 TFLOP/s, a tenth in reserve, 8,192 tokens, bfloat16.
TABLE_BY_HAND = {
    "equal depth": ("16.06", 52, "47.3", "2,459", 52),
    "per_loop": ("8.21", 59, "42.8", "2,522", 59),
    "last_loop": ("8.21", 135, "20.9", "2,827", 90),
    "equal parameters": ("8.21", 135, "47.5", "6,408", 135),
    "equal loss": ("10.39", 96, "47.5", "4,559", 96),
}


def loads_of_the_table() -> dict[str, Load]:
    ours = {"per_loop": load(looped()), "last_loop": load(looped(), kept=1)}
    return {**ours, **{name: load(model) for name, model in plain_models(looped()).items()}}


def test_the_table_to_its_last_digit() -> None:
    found, intensities = {}, []
    for name, each in loads_of_the_table().items():
        full = serve(each, H100)
        found[name] = (
            f"{each.weight_bytes / 1e9:.2f}",
            full.users,
            f"{full.tokens_per_second_each:.1f}",
            f"{full.tokens_per_second:,.0f}",
            serve(each, H100, rate=30.0).users,
        )
        assert full.limit == "bandwidth"
        intensities.append(round(full.flops_per_byte))
    assert found == TABLE_BY_HAND
    assert (min(intensities), max(intensities)) == (14, 17)
    assert round(H100.flops_per_second / H100.bytes_per_second) == 295
    depths = {name: model.effective_depth() for name, model in plain_models(looped()).items()}
    assert depths == {"equal depth": 32, "equal parameters": 14, "equal loss": 19}


def test_a_load_is_the_formulas() -> None:
    each, key = load(looped(), kept=1), 2 * 8 * 128 * 2
    assert each.weight_bytes == 2 * (14 * LAYER + 2 * TABLE + 4096)
    assert each.read_bytes == each.weight_bytes - 2 * TABLE + 3 * 2 * 6 * LAYER
    assert each.kept_bytes == CONTEXT * 14 * key
    assert each.cache_read_bytes == CONTEXT * (4 + 4 * 6 + 4) * key
    assert each.flops == counts.forward_flops(looped(), context_length=CONTEXT, cached=True)
    users = (72e9 - each.weight_bytes) / each.kept_bytes
    at_rate = (3.35e12 / 30 - each.read_bytes) / each.cache_read_bytes
    assert most_users(each, H100) == math.floor(users) == 135
    assert most_users(each, H100, 30.0) == math.floor(at_rate) == 90
    served = serve(each, replace(H100, price_per_hour=3.0), rate=30.0)
    seconds = (each.read_bytes + 90 * each.cache_read_bytes) / 3.35e12
    assert served.seconds_per_step == pytest.approx(seconds, rel=1e-12)
    assert served.cost_per_million_tokens == pytest.approx(3e6 / (3600 * 90 / seconds), rel=1e-12)
    slow = replace(H100, flops_per_second=1e12)  # the other side of the ridge
    assert serve(each, slow).limit == "compute"
    assert serve(each, slow).seconds_per_step == pytest.approx(135 * each.flops / 1e12)
    causal = counts.forward_flops(looped(), context_length=CONTEXT // 2)
    assert each.prompt_flops == CONTEXT * causal


def test_a_tied_table_is_read_as_the_head() -> None:
    tied = replace(looped(), tie_embeddings=True)
    assert load(tied).read_bytes == load(looped()).read_bytes
    assert load(tied).weight_bytes == load(looped()).weight_bytes - 2 * TABLE


def test_exits_read_the_mean_depth_of_the_cache_and_all_of_the_core() -> None:
    full, early = load(looped()), load(looped(), mean=2.5)
    assert early.cache_read_bytes == full.cache_read_bytes * (8 + 2.5 * 6) / 32
    flops = [counts.forward_flops(looped(), num_loops=n, context_length=CONTEXT) for n in (0, 1)]
    assert early.flops == flops[0] + 2.5 * (flops[1] - flops[0])
    assert (early.read_bytes, early.kept_bytes) == (full.read_bytes, full.kept_bytes)
    with pytest.raises(ValueError, match=r"^mean_loops is 5.0; it must be in 1..4$"):
        load(looped(), mean=5.0)


def test_experts_are_read_as_far_as_rows_choose_them() -> None:
    config = preset("mythos-1t")
    experts = config.core_ff
    each = load_of(config, context_length=CONTEXT)
    per_expert = 3 * config.d_model * experts.width * 2
    passes = config.num_core_layers * config.num_loops
    routed, num = experts.num_experts_per_token, experts.num_experts
    base = each.read_bytes
    for users in (1, 7, 500):
        read = num * (1 - (1 - routed / num) ** users) * passes * per_expert
        assert each.step_bytes(users) == pytest.approx(base + read + users * each.cache_read_bytes)
    assert each.step_bytes(1) - base - each.cache_read_bytes == pytest.approx(
        routed * passes * per_expert
    )
    halved = load_of(config, context_length=CONTEXT, mean_loops=config.num_loops / 2)
    assert halved.running == 0.5
    assert halved.step_bytes(14) - 14 * halved.cache_read_bytes == pytest.approx(
        each.step_bytes(7) - 7 * each.cache_read_bytes
    )


@settings(max_examples=20, deadline=None)
@given(fields=model_fields(), loops=st.integers(1, 9), share=st.floats(0, 1))
def test_what_is_read_of_the_cache_is_the_same_for_every_layout(
    fields: dict[str, Any], loops: int, share: float
) -> None:
    config = from_dict(ModelConfig, {**fields, "num_loops": loops})
    mean = 1.0 + share * (loops - 1)
    loads = [
        load_of(config, context_length=3, kept_loops=kept, mean_loops=mean)
        for kept in counts.loops_kept_by_layout(loops).values()
    ]
    assert len({each.cache_read_bytes for each in loads}) == 1
    assert len({each.step_bytes(5) for each in loads}) == 1
    assert loads[0].kept_bytes == max(each.kept_bytes for each in loads)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(PRESETS)),
    memory=st.floats(1e8, 1e14),
    more=st.floats(1, 100),
    rate=st.floats(0, 300),
)
def test_more_memory_never_serves_fewer(name: str, memory: float, more: float, rate: float) -> None:
    each = load_of(preset(name), context_length=1024)
    small, large = (Machine(memory_bytes=size) for size in (memory, memory * more))
    users = most_users(each, small, rate)
    assert most_users(each, large, rate) >= users >= 0
    if users:  # exactly as many as fit: one more would be too much, or too slow
        seconds = each.step_seconds(users, small)
        assert each.weight_bytes + users * each.kept_bytes <= small.usable_bytes
        assert seconds * rate <= 1
        next_fits = each.weight_bytes + (users + 1) * each.kept_bytes <= small.usable_bytes
        assert not (next_fits and each.step_seconds(users + 1, small) * rate <= 1)


def test_what_would_turn_the_verdict_turns_it() -> None:
    """Each number that the sheet gives is put back in, and just missed."""
    config = looped()
    plain_load = cache(lambda layers: load(plain_model(config, layers)))
    for kept in (4, 1):
        ours = load(config, kept)
        for measure in MEASURES:
            plain = load(plain_models(config)["equal loss"])
            comparison = Comparison(ours, plain, H100, measure)
            assert not comparison.wins(rate=30.0)
            found = turns(config, comparison, plain_load, 30.0)
            assert found.phi is not None
            for phi, won in ((found.phi, True), (found.phi - 0.002, False)):
                other = load(plain_models(config, phi)["equal loss"])
                assert Comparison(ours, other, H100, measure).wins(rate=30.0) == won
            for _, high in found.rates:
                assert comparison.wins(rate=0.999 * high)
                assert not comparison.wins(rate=1.001 * high)
            for low, _ in found.batches:
                assert comparison.wins(most=low) and not comparison.wins(most=low - 1)
            shared = kept == 1 and measure == "users"  # memory is all that looping saves here
            assert bool(found.rates) == bool(found.batches) == shared
    assert turns(replace(config, num_loops=1), comparison, plain_load, 30.0).phi is None


def test_only_what_fits_can_win() -> None:
    config = looped()
    ours, deep = load(config), load(plain_models(config)["equal depth"])
    small = replace(H100, memory_bytes=12e9)
    comparison = Comparison(ours, deep, small, "tokens_per_second")
    assert comparison.ratio() is None and comparison.wins()
    assert comparison.winning_batches() == ((1, None),)
    tiny = Comparison(ours, deep, replace(H100, memory_bytes=1e9), "users")
    assert tiny.ratio() is None and not tiny.wins()
    assert tiny.winning_batches() == tiny.winning_rates() == ()
    nobody = serve(ours, tiny.machine)
    assert (nobody.users, nobody.limit, nobody.cost_per_million_tokens) == (0, "no user", None)


def test_several_winning_batches_are_found_exactly() -> None:
    """A flatter but later line crosses a steeper one, and memory ends it."""
    cheap = Load(
        weight_bytes=0,
        read_bytes=1000,
        expert_bytes=0,
        expert_share=0.0,
        running=1.0,
        kept_bytes=1,
        cache_read_bytes=1.0,
        flops=0.0,
        prompt_flops=0.0,
    )
    steep = replace(cheap, read_bytes=0, cache_read_bytes=4.0)
    machine = Machine(memory_bytes=1000.0, bytes_per_second=1.0, reserve=0.0)
    comparison = Comparison(cheap, steep, machine, "tokens_per_second")
    assert comparison.winning_batches() == ((334, None),)
    assert Comparison(steep, cheap, machine, "tokens_per_second").winning_batches() == ((1, 333),)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reserve": 1.0}, "reserve is 1.0; it must be in [0, 1)"),
        ({"memory_bytes": -1.0}, "memory_bytes is -1.0; it must be above 0"),
        ({"flops_per_second": math.nan}, "flops_per_second is nan; it must be a number"),
    ],
)
def test_impossible_machines_are_refused(change: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match="it must be") as caught:
        Machine(**change)
    assert str(caught.value) == said


def test_an_impossible_phi_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^phi is -1.0; it must be in 0..2$"):
        plain_models(looped(), -1.0)
