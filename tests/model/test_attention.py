import itertools
import typing

import pytest
import torch

from openmythos.config import (
    AttentionConfig,
    DepthAttentionConfig,
    MLAConfig,
    RopeConfig,
    ValueEmbeddingConfig,
    WeightLoRAConfig,
)
from openmythos.config.schema import apply_overrides
from openmythos.model.attention import ATTENTIONS, LatentExpansion
from openmythos.model.attention import GQA as GQALayer
from openmythos.model.attention import MLA as MLALayer
from openmythos.model.cache import KVCache
from openmythos.model.context import make_context
from openmythos.ops.attention import attention_reference
from tests.strategies import GQA, MLA, random_model, random_tokens, seeded, small_config


def layer_of(config, dtype=torch.float64):
    model = random_model(config, dtype=dtype)
    return model, model.core[0].attention


def test_every_member_has_a_class():
    assert set(ATTENTIONS) == set(typing.get_args(AttentionConfig))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("adapter", [None, WeightLoRAConfig(rank=2, num_loops=2)])
def test_absorbed_mla_equals_expanded(dtype, tolerance, adapter, monkeypatch):
    config = small_config(attention=MLA, loop_adapter=adapter)
    model = random_model(config, dtype=dtype)
    tokens = random_tokens(config, 2, 6)

    def decode() -> torch.Tensor:
        cache = KVCache(config, batch_size=2, max_len=6, max_loops=3, dtype=dtype)
        with torch.no_grad():
            for part in (tokens[:, :5], tokens[:, 5:]):
                out = model(part, num_loops=3, ctx=model.context(part, cache=cache))
        return out.logits

    expand = LatentExpansion.forward
    calls = []

    def counted(self, latents=None, **others):
        calls.extend([1] if latents is not None else [])
        return expand(self, latents, **others)

    monkeypatch.setattr(LatentExpansion, "forward", counted)
    fast = decode()
    per_chunk = 1 + 2 * 3 + 1  # prelude, two core layers at three loops, coda
    assert len(calls) == per_chunk  # of the five tokens; the one after them is absorbed
    monkeypatch.setattr(MLALayer, "absorbs", lambda *args: False)
    slow = decode()
    assert len(calls) == 3 * per_chunk
    assert (fast - slow).abs().max() / slow.abs().max() < tolerance


def test_mla_caches_one_latent_and_one_rotary_key():
    """The original stored the rotary key once per head: from 10B up more than GQA."""
    config = small_config(attention=MLA)
    cache = KVCache(config, batch_size=3, max_len=7, max_loops=4)
    slots = 1 + 4 * 2 + 1
    (tensor,) = cache.tensors
    numbers = MLA.kv_lora_rank + MLA.qk_rope_head_dim
    assert tensor.numel() == numbers * 3 * 7 * slots
    assert cache.num_bytes == 4 * tensor.numel()
    grouped = KVCache(small_config(), batch_size=3, max_len=7, max_loops=4)
    assert sum(t.numel() for t in grouped.tensors) == 2 * 2 * 4 * 3 * 7 * slots


def test_mla_by_hand():
    """The original's formulas (openmythos-original.md, 2.2), written with plain products."""
    config = small_config(attention=MLA, rope=RopeConfig(interleaved=True))
    model, layer = layer_of(config)
    part: MLAConfig = config.attention
    tokens = random_tokens(config, 1, 5)
    ctx = model.context(tokens)
    x = torch.randn(1, 5, 16, dtype=torch.float64, generator=seeded())
    down = x @ layer.down.weight.T
    q_latent, latent, k_rope = down.split((6, 5, 2), dim=-1)
    q = (layer.q_norm(q_latent) @ layer.q_up.weight.T).view(1, 5, part.num_heads, -1)
    kv = (layer.kv_norm(latent) @ layer.kv_up.weight.T).view(1, 5, part.num_heads, -1)
    k_nope, v = kv.split((4, 3), dim=-1)
    k_rope = layer.rotate(k_rope[:, :, None].expand(-1, -1, part.num_heads, -1), ctx)
    q = torch.cat((q[..., :4], layer.rotate(q[..., 4:], ctx)), dim=-1)
    k = torch.cat((k_nope, k_rope), dim=-1)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    y = attention_reference(q, k, v, None, 6**-0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x, ctx, torch.tensor([0])), y @ layer.out.weight.T)


@pytest.mark.parametrize("qk_norm", ["none", "weightless", "weighted"])
@pytest.mark.parametrize("qk_bias", [False, True])
@pytest.mark.parametrize("eps", [None, 0.3])
def test_gqa_by_hand(qk_norm, qk_bias, eps):
    words = (f"qk_norm={qk_norm}", f"qk_bias={qk_bias}".lower(), f"qk_norm_eps={eps or 'null'}")
    part = apply_overrides(small_config(), [f"attention.{word}" for word in words])
    model, layer = layer_of(part)
    ctx = model.context(random_tokens(part, 1, 5))
    x = torch.randn(1, 5, 16, dtype=torch.float64, generator=seeded())
    q, k, v = (x @ layer.qkv.weight.T).view(1, 5, 8, 4).split((4, 2, 2), dim=2)
    if qk_bias:
        q, k = q + layer.qk_bias[:4], k + layer.qk_bias[4:]
    if qk_norm != "none":
        q, k = (t / (t.square().mean(-1, keepdim=True) + (eps or 1e-6)).sqrt() for t in (q, k))
    if qk_norm == "weighted":
        q, k = q * layer.q_norm_weight, k * layer.k_norm_weight
    q, k = layer.rotate(q, ctx), layer.rotate(k, ctx)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    y = attention_reference(q, k, v, None, 0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x, ctx, torch.tensor([0])), y @ layer.out.weight.T)


def test_value_embeddings_by_hand_and_only_where_asked():
    """v += 2 sigmoid(W_g n[..., :channels]) * table[token] (Parcae, 2.2), in every loop."""
    table = ValueEmbeddingConfig(layers=(0, 2), gate_channels=8)
    config = small_config(value_embedding=table)
    model, _ = layer_of(config)
    has = [
        block.attention.value_table is not None
        for block in (*model.prelude, *model.core, *model.coda)
    ]
    assert has == [True, False, True, False]
    layer = model.core[1].attention
    tokens = random_tokens(config, 1, 5)
    ctx = model.context(tokens)
    x = torch.randn(1, 5, 16, dtype=torch.float64, generator=seeded())
    gate = 2 * torch.sigmoid(x[..., :8] @ layer.value_gate.weight.T)
    extra = gate[..., None] * layer.value_table.weight[tokens].view(1, 5, 2, 4)
    q, k, v = (x @ layer.qkv.weight.T).view(1, 5, 8, 4).split((4, 2, 2), dim=2)
    q, k = layer.rotate(q, ctx), layer.rotate(k, ctx)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v + extra))
    y = attention_reference(q, k, v, None, 0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x, ctx, torch.tensor([0])), y @ layer.out.weight.T)


@pytest.mark.parametrize("cached", [False, True])
def test_depth_attention_by_hand(cached):
    """Loop t sees the keys and values that its token had at loops t - 1 and t - 2, no others."""
    config = small_config(depth_attention=DepthAttentionConfig(num_recent_loops=2))
    model, layer = layer_of(config)
    tokens = random_tokens(config, 2, 5)
    cache = None
    if cached:
        cache = KVCache(config, batch_size=2, max_len=5, max_loops=4, dtype=torch.float64)
    ctx = model.context(tokens, cache=cache)
    inputs = torch.randn(4, 2, 5, 16, dtype=torch.float64, generator=seeded())
    keys, values, groups, recent = [], [], (0, 0, 1, 1), ctx.recent
    with torch.no_grad():
        for loop, x in enumerate(inputs):
            here = ctx.at_loop(loop, recent)
            got = layer(x, here, torch.full((2,), loop))
            if not cached:
                made = here.made.by_layer
                made[1] = made[0]  # of the second layer, which does not run here
                recent = here.newest_loops()
            q, k, v = (x @ layer.qkv.weight.T).view(2, 5, 8, 4).split((4, 2, 2), dim=2)
            q, k = layer.rotate(q, ctx), layer.rotate(k, ctx)
            keys.append(k)
            values.append(v)
            y = torch.zeros(2, 5, 4, 4, dtype=torch.float64)
            for row, t, head in itertools.product(range(2), range(5), range(4)):
                at = groups[head]
                own = range(max(0, loop - 2), loop)
                k_all = [*k[row, : t + 1, at], *(keys[past][row, t, at] for past in own)]
                v_all = [*v[row, : t + 1, at], *(values[past][row, t, at] for past in own)]
                scores = torch.stack(k_all) @ q[row, t, head] / 2
                y[row, t, head] = scores.softmax(0) @ torch.stack(v_all)
            torch.testing.assert_close(got, y.flatten(2) @ layer.out.weight.T)


def test_depth_attention_is_the_cores_alone():
    config = small_config(depth_attention=DepthAttentionConfig(num_recent_loops=2))
    model = random_model(config)
    parts = [block.attention for block in (*model.prelude, *model.core, *model.coda)]
    assert [part.num_recent_loops for part in parts] == [0, 2, 2, 0]
    plain = random_model(small_config())
    assert model.state_dict().keys() == plain.state_dict().keys()
    tokens = random_tokens(config, 2, 5)
    torch.testing.assert_close(model(tokens, num_loops=1).logits, plain(tokens, num_loops=1).logits)
    deep = (model(tokens, num_loops=2).logits - plain(tokens, num_loops=2).logits).abs()
    assert deep.max() > 0.01


@pytest.mark.parametrize("attention", [GQA, MLA])
def test_no_token_sees_a_later_one(attention):
    config = small_config(attention=attention)
    model = random_model(config, dtype=torch.float64)
    tokens = random_tokens(config, 1, 8)
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % config.vocab_size
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax(dim=-1).min() > 1e-6


def test_positions_matter_with_rope_and_the_order_does_not_without():
    config = small_config(num_prelude_layers=0, num_coda_layers=0, num_core_layers=1, num_loops=1)
    for rope, differs in ((RopeConfig(), True), (None, False)):
        model = random_model(apply_overrides(config, ["rope=null"]) if rope is None else config)
        tokens = torch.tensor([[1, 2, 3]])
        swapped = torch.tensor([[2, 1, 3]])
        change = (model(tokens).logits - model(swapped).logits)[0, -1].abs().max()
        assert (change > 1e-3) == differs


def test_the_layers_carry_the_configs_kind():
    ctx = make_context(small_config(), torch.zeros(1, 2, dtype=torch.int64), dtype=torch.float32)
    assert ctx.mask is None
    assert isinstance(layer_of(small_config())[1], GQALayer)
    assert isinstance(layer_of(small_config(attention=MLA))[1], MLALayer)
