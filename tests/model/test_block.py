import pytest
import torch

from openmythos.config import BlockConfig
from openmythos.model.feedforward import MoE, SwiGLU
from tests.strategies import MOE, random_model, random_tokens, seeded, small_config


@pytest.mark.parametrize("norm", ["pre", "peri", "sandwich"])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_the_norms_stand_where_the_config_says(norm, layer_scale):
    config = small_config(block=BlockConfig(norm=norm, layer_scale=layer_scale))
    model = random_model(config, dtype=torch.float64)
    block, ctx = model.prelude[0], model.context(random_tokens(config, 2, 5))
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=seeded())
    got = block(x, ctx)
    for name in ("attention", "feed_forward"):
        part, before = getattr(block, name), getattr(block, f"{name}_norm")
        y = part(before(x), ctx) if name == "attention" else part(before(x))
        y = y if layer_scale is None else y * getattr(block, f"{name}_scale")
        after = getattr(block, f"{name}_out_norm", None)
        if norm == "sandwich":
            x = after(x + y)
        else:
            x = x + (after(y) if norm == "peri" else y)
    torch.testing.assert_close(got, x)
    assert hasattr(block, "attention_out_norm") == (norm != "pre")


def test_layer_scale_starts_at_its_value():
    model = random_model(small_config())
    assert model.core[0].attention_scale is None
    config = small_config(block=BlockConfig(layer_scale=1e-4))
    scale = type(model)(config).core[0].feed_forward_scale
    torch.testing.assert_close(scale, torch.full((16,), 1e-4))


def test_only_the_core_is_sparse():
    model = random_model(small_config(core_feed_forward=MOE))
    kinds = [type(b.feed_forward) for b in (*model.prelude, *model.core, *model.coda)]
    assert kinds == [SwiGLU, MoE, MoE, SwiGLU]
