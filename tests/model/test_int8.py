from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from openmythos.checkpoint.load import load_checkpoint
from openmythos.checkpoint.save import save_pretrained
from openmythos.config import (
    ACTConfig,
    GQAConfig,
    LinearInjectionConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    ReLUSquaredConfig,
    SwiGLUConfig,
    WeightLoRAConfig,
)
from openmythos.engine.compile import compile_call
from openmythos.engine.engine import Engine, EngineConfig
from openmythos.engine.reference import Session
from openmythos.engine.request import Request
from openmythos.interop.writing import check_writable
from openmythos.model.attention import LatentExpansion
from openmythos.model.feedforward import MoE
from openmythos.model.int8 import Int8Weight
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.ops.cpu import int8
from openmythos.ops.int8 import dequantise
from tests.strategies import randomise, seeded, small_config, unchecked

MLA = MLAConfig(
    num_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
)
MOE = MoEConfig(num_experts=8, num_experts_per_token=2, d_expert=32)
WIDE = {"d_model": 32, "vocab_size": 64}
CONFIGS = {
    "gqa": small_config(
        **WIDE,
        attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8),
        feed_forward=SwiGLUConfig(d_ff=48),
    ),
    "mla, experts, halting": small_config(
        **WIDE, attention=MLA, core_feed_forward=MOE, halting=ACTConfig(), tie_embeddings=False
    ),
    "linear injection, relu": small_config(
        **WIDE,
        attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8),
        feed_forward=ReLUSquaredConfig(d_ff=48),
        injection=LinearInjectionConfig(bias=True),
        loop_adapter=WeightLoRAConfig(rank=2, num_loops=4),
    ),
}
TOKENS = torch.randint(0, 64, (3, 20), generator=seeded(1))
# Root mean square of the difference of the logits, of their standard deviation in fp32. A weight is
# off by at most 1/254 of its channel's largest, and errors recur through loops.
NEAR = 0.1


def pair(config: ModelConfig, folder: Path) -> tuple[RecurrentDepthLM, RecurrentDepthLM]:
    """A model in fp32, and the same in 8 bits."""
    model = RecurrentDepthLM(config).eval().requires_grad_(False)
    randomise(model)
    return model, load_checkpoint(save_pretrained(model, folder), weights="int8")


def widened(quantised: RecurrentDepthLM) -> RecurrentDepthLM:
    """The model in fp32 with the weights that the integers stand for."""
    state = quantised.state_dict()
    wide = {
        name.removesuffix(".values"): tensor
        if not name.endswith(".values")
        else dequantise(tensor, state[name.removesuffix("values") + "scale"])
        for name, tensor in state.items()
        if not name.endswith("weight.scale") and not name.endswith(("up.scale", "down.scale"))
    }
    model = RecurrentDepthLM(quantised.config).eval().requires_grad_(False)
    model.load_state_dict(wide)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_widened_weights_and_near_those_of_fp32(
    kind: str, tmp_path: Path
) -> None:
    exact, quantised = pair(CONFIGS[kind], tmp_path)
    wide = widened(quantised)
    for num_loops in (1, 4, 8):
        logits, found = (m(TOKENS, num_loops=num_loops).logits for m in (exact, quantised))
        same = wide(TOKENS, num_loops=num_loops).logits
        torch.testing.assert_close(found, same, rtol=1e-4, atol=2e-5 * float(same.abs().max()))
        off = (found - logits).square().mean().sqrt() / logits.std()
        assert 0 < off < NEAR, f"{num_loops} loops: {off:.4f}"
        alone = quantised(TOKENS[1:2], num_loops=num_loops).logits
        torch.testing.assert_close(alone, found[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_matrices_are_in_8_bits_and_the_rest_in_fp32(kind: str, tmp_path: Path) -> None:
    exact, quantised = pair(CONFIGS[kind], tmp_path)
    kept = {name for name, _ in quantised.named_parameters()}
    assert not any(parameter.requires_grad for parameter in quantised.parameters())
    assert {p.dtype for p in quantised.parameters()} == {torch.float32}
    for name, parameter in exact.named_parameters():
        *_, module, leaf = ("", *name.split("."))
        small = parameter.dim() < 2 or "lora" in leaf or module in ("router", "proj")
        assert (name in kept) == small, name
    assert isinstance(quantised.core[0].attention.out.weight, Int8Weight)
    assert quantised.embed.weight.dtype == torch.float32
    assert quantised.embed.weight.shape == exact.embed.weight.shape


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_engines_tokens_are_the_sessions(kind: str, tmp_path: Path) -> None:
    _, quantised = pair(CONFIGS[kind], tmp_path)
    requests = [
        Request(tokens=TOKENS[row, : 5 + row].tolist(), max_new_tokens=6) for row in range(3)
    ]
    wanted: list[list[int]] = []
    for request in requests:
        session = Session(quantised, batch_size=1, max_len=32)
        wanted.append([new.token for new in session.stream([request])])
    with pytest.raises(ValueError, match="it must be False with weights in 8 bits"):
        Engine(quantised, EngineConfig(max_rows=3, max_len=32, batch_invariant=True))
    engine = Engine(quantised, EngineConfig(max_rows=3, max_len=32))
    numbers = [engine.add(request) for request in requests]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while not engine.is_idle:
        for event in engine.step():
            assert event.token is not None
            found[event.id].append(event.token)
    assert [found[number] for number in numbers] == wanted


class Products(nn.Module):
    """Every product with weights in 8 bits: a table, one that is tied to it, MLA's, experts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.up = LatentExpansion(MLA)
        self.moe = MoE(CONFIGS["mla, experts, halting"], replace(MOE, num_shared_experts=0))
        randomise(self)
        for module, name in ((self.table, "weight"), (self.up, "weight")):
            Int8Weight.put(module, name, getattr(module, name))
        for name in ("gate_up", "down"):
            Int8Weight.put(self.moe, name, getattr(self.moe, name))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        absorbed = self.up(queries=x.view(len(x), 1, 4, 8))
        mixed = self.up(mixed=absorbed).flatten(2)
        return functional.linear(self.moe(x) + mixed[..., :32], self.table.weight)


def test_compiled_calls_read_the_integers(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    int8._decided.cache_clear()
    model, tokens, targets = Products().eval(), TOKENS[:2, :1], list[Any]()

    def as_it_is(graph: fx.GraphModule, inputs: object, **options: object) -> Any:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", as_it_is)
    with unchecked(), torch.no_grad():
        found = compile_call(Products.forward)(model, tokens)
        torch.testing.assert_close(found, model(tokens))
    assert set(int8.KERNELS.values()) <= set(targets)
    assert not set(int8.KERNELS) & set(targets)
    int8._decided.cache_clear()


def test_what_is_in_8_bits_is_not_written(tmp_path: Path) -> None:
    _, quantised = pair(CONFIGS["gqa"], tmp_path / "model")
    with pytest.raises(ValueError, match='weights="stored" to write it'):
        save_pretrained(quantised, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="weights are in 8 bits"):
        check_writable(quantised, None)


def test_a_function_that_has_no_such_product_says_so(tmp_path: Path) -> None:
    _, quantised = pair(CONFIGS["gqa"], tmp_path)
    weight: Any = quantised.embed.weight
    with pytest.raises(TypeError, match="cumsum does not take weights in 8 bits"):
        torch.cumsum(weight, 0)
    by_head = weight.view(4, -1, 32)
    with pytest.raises(TypeError, match="cumsum does not take heads in 8 bits"):
        torch.cumsum(by_head, 0)


def test_a_token_reads_less_than_0_3_of_the_bytes(tmp_path: Path) -> None:
    config = replace(CONFIGS["mla, experts, halting"], d_model=256, num_loops=8)
    exact, quantised = pair(config, tmp_path)

    def read(model: RecurrentDepthLM) -> int:
        """All but the core once, and the core in every loop; of experts those of a token."""

        def size(tensors: dict[str, Tensor]) -> float:
            share = MOE.num_experts_per_token / MOE.num_experts
            routed = ("feed_forward.gate_up", "feed_forward.down")
            of = lambda name: share if any(part in name for part in routed) else 1.0  # noqa: E731
            return sum(tensor.nbytes * of(name) for name, tensor in tensors.items())

        core = {n: t for n, t in model.state_dict().items() if n.startswith("core.")}
        rest = {n: t for n, t in model.state_dict().items() if n not in core}
        return round(size(rest) + config.num_loops * size(core))

    assert read(quantised) < 0.3 * read(exact)
