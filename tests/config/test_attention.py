import pytest

from openmythos.config import GQAConfig, MLAConfig, ValueEmbeddingConfig, WeightLoRAConfig
from openmythos.config.weights import matrix, table, vector
from tests.strategies import unchecked

GQA = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
MLA = {
    "num_heads": 2,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (GQAConfig, {**GQA, "num_heads": 0}, "num_heads is 0; it must be at least 1"),
        (
            GQAConfig,
            {**GQA, "num_kv_heads": 3},
            "num_kv_heads is 3; it must be a divisor of num_heads=4",
        ),
        (
            GQAConfig,
            {**GQA, "qk_norm": "wieghted"},
            "qk_norm is 'wieghted'; it must be one of 'none', ",
        ),
        (GQAConfig, {**GQA, "qk_norm_eps": 0.0}, "qk_norm_eps is 0.0; it must be above 0, or null"),
        (MLAConfig, {**MLA, "v_head_dim": -1}, "v_head_dim is -1; it must be at least 1"),
    ],
)
def test_bad_fields_are_named_in_one_line(kind, fields, message):
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)


def test_what_is_cached():
    assert GQAConfig(**GQA).cache_shapes == ((2, 4), (2, 4))
    assert MLAConfig(**MLA).cache_shapes == ((1, 7),)
    assert (GQAConfig(**GQA).rope_dim, MLAConfig(**MLA).rope_dim) == (4, 2)


def test_weights_and_products_per_key():
    gqa = GQAConfig(**GQA, qk_bias=True, qk_norm="weighted")
    lora = WeightLoRAConfig(rank=3, num_loops=5)
    assert gqa.weights(16, None) == matrix(16, 8 * 4) + matrix(16, 16) + vector(6 * 4 + 2 * 4)
    more = gqa.weights(16, lora).params - gqa.weights(16, None).params
    assert more == 5 * 3 * (16 + 32 + 16 + 16)
    assert {gqa.macs_per_key(cached=cached) for cached in (False, True)} == {4 * 2 * 4}
    mla = MLAConfig(**MLA)
    assert (mla.macs_per_key(cached=False), mla.macs_per_key(cached=True)) == (2 * 9, 2 * 2 * 7)


def test_value_embeddings_have_a_table_and_a_gate_per_layer():
    part = ValueEmbeddingConfig(layers=(0, 1), gate_channels=8)
    assert part.weights(32, 2, 4) == table(32, 2 * 4) + matrix(8, 2)
