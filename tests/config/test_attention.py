import pytest

from openmythos.config import GQAConfig, MLAConfig
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
