from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from openmythos.checkpoint.weights import StoredWeights
from openmythos.config import (
    CopyInitConfig,
    GQAConfig,
    ModelConfig,
    NoInjectionConfig,
    RopeConfig,
    SwiGLUConfig,
)
from openmythos.interop.mapping import (
    AnyRule,
    Constant,
    Dead,
    Family,
    Join,
    Recomputed,
    Rename,
    Reshape,
    Rule,
    Shift,
    Split,
    TiedCopy,
    check_fields,
    export_config,
    export_tensors,
    read_tensors,
)
from openmythos.model.recurrent import RecurrentDepthLM

ReadAll = Callable[[], dict[str, Tensor]]


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


# --- rules: each as the published families need it ------------------------------------------------

RULES = {
    "rename": (Rename("a", "x"), [(3, 2)]),
    "transpose": (Rename("a", "x", transpose=True), [(3, 2)]),
    "reshape (Huginn's qk_bias)": (Reshape("a", "x", (2, 1, 4, 3), (8, 3)), [(2, 1, 4, 3)]),
    "join (q, k, v)": (Join(("q", "k", "v"), "x", sizes=(4, 2, 2)), [(4, 3), (2, 3), (2, 3)]),
    "join columns": (Join(("a", "b"), "x", dim=1), [(3, 2), (3, 2)]),
    "join per head": (Join(("n", "r"), "x", sizes=(3, 2), groups=4), [(12, 5), (8, 5)]),
    "stack experts": (Join(("g0", "u0", "g1", "u1"), "x", stack=2), [(3, 5)] * 4),
    "split (Huginn's adapter)": (Split("a", ("h", "e"), dim=1), [(4, 8)]),
    "split unequal": (Split("a", ("q", "kv"), sizes=(4, 2)), [(6, 5)]),
}


@pytest.mark.parametrize(("rule", "shapes"), RULES.values(), ids=list(RULES))
def test_rules_go_there_and_back(rule: Rule, shapes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.randn(shape, generator=generator) for shape in shapes]
    ours = rule.read(theirs)
    assert len(theirs) == len(rule.theirs)
    assert len(ours) == len(rule.ours)
    back = rule.write(ours)
    assert all(torch.equal(a, b) for a, b in zip(theirs, back, strict=True))
    assert all(tensor.is_contiguous() for tensor in [*ours, *back])
    kept = {tensor.untyped_storage().data_ptr() for tensor in theirs}
    made = {tensor.untyped_storage().data_ptr() for tensor in [*ours, *back]}
    assert len(made) == len(ours) + len(back), "tensors share memory"
    assert not kept & made, "a tensor is a view of the file"
    # The same rule gives shapes on the meta device.
    hollow = rule.write([tensor.to("meta") for tensor in ours])
    assert [tensor.shape for tensor in hollow] == [tensor.shape for tensor in theirs]


def test_a_norm_stored_around_zero_is_moved_by_one() -> None:
    rule, stored = Shift("a", "x"), torch.tensor([-0.5, 0.0, 0.25])
    (ours,) = rule.read([stored])
    assert ours.tolist() == [0.5, 1.0, 1.25]
    (back,) = rule.write([ours])
    assert torch.equal(back, stored)
    assert [tensor.shape for tensor in rule.write([ours.to("meta")])] == [(3,)]


def test_a_constant_is_made_and_may_not_have_changed() -> None:
    rule = Constant("x", (2, 3), 0.5)
    (ours,) = rule.read([])
    assert torch.equal(ours, torch.full((2, 3), 0.5))
    assert rule.write([ours]) == [] == rule.write([ours.to("meta")])
    ours[1, 1] = 0.25
    with pytest.raises(ValueError, match=r"^x is not 0\.5 everywhere any more, and the family has"):
        rule.write([ours])


def test_join_takes_one_part_at_a_time_and_keeps_the_wider_dtype() -> None:
    parts = [numbered(2, 3), numbered(2, 3).double() / 3, numbered(2, 3).half()]
    (joined,) = Join(("a", "b", "c"), "x").read(part for part in parts)
    assert joined.dtype == torch.float64
    assert torch.equal(joined, torch.cat([part.double() for part in parts]))


def test_join_orders_its_parts() -> None:
    q, k, v = numbered(2, 1), 10 + numbered(1, 1), 20 + numbered(1, 1)
    (joined,) = Join(("q", "k", "v"), "x", sizes=(2, 1, 1)).read([q, k, v])
    assert joined[:, 0].tolist() == [0, 1, 10, 20]
    nope, rope = numbered(4, 1), 10 + numbered(2, 1)
    (joined,) = Join(("n", "r"), "x", sizes=(2, 1), groups=2).read([nope, rope])
    assert joined[:, 0].tolist() == [0, 1, 10, 2, 3, 11]
    parts = [numbered(1, 1) + 10 * i for i in range(4)]
    (stacked,) = Join(("g0", "u0", "g1", "u1"), "x", stack=2).read(parts)
    assert stacked[..., 0].tolist() == [[0, 10], [20, 30]]


# --- a family in twenty lines ---------------------------------------------------------------------

FIELDS = {"width": int, "rope_base": float}


def read_config(data: Any) -> ModelConfig:
    found = check_fields(data, types=FIELDS, fixed={"act": "silu"}, skipped={"note"})
    return ModelConfig(
        vocab_size=8,
        d_model=found["width"],
        num_prelude_layers=0,
        num_core_layers=1,
        num_coda_layers=0,
        num_loops=1,
        attention=GQAConfig(num_heads=1, num_kv_heads=1, head_dim=4),
        feed_forward=SwiGLUConfig(d_ff=4),
        injection=NoInjectionConfig(),
        state_init=CopyInitConfig(),
        prelude_norm=False,
        rope=RopeConfig(theta=float(found["rope_base"])),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    assert config.rope is not None
    return {"width": config.d_model, "rope_base": config.rope.theta, "act": "silu"}


def rules(config: ModelConfig) -> list[AnyRule]:
    block = "core.0."
    return [
        Rename("wte", "embed.weight"),
        TiedCopy("lm_head", of="wte"),
        Recomputed("freqs_cis"),
        Join(("q", "k", "v"), block + "attention.qkv.weight"),
        Rename("o", block + "attention.out.weight"),
        Rename("n1", block + "attention_norm.weight"),
        Rename("n2", block + "feed_forward_norm.weight"),
        Rename("fc", block + "feed_forward.gate_up.weight"),
        Rename("proj", block + "feed_forward.down.weight"),
        Rename("ln_f", "final_norm.weight"),
    ]


FAMILY = Family(
    name="small",
    recognises=lambda data, names: "wte" in names,
    read_config=read_config,
    write_config=write_config,
    rules=rules,
)
CONFIG = {"width": 4, "rope_base": 100.0, "act": "silu", "note": "kept by nobody"}


@pytest.fixture
def model() -> RecurrentDepthLM:
    return RecurrentDepthLM(read_config(CONFIG))


@pytest.fixture
def tensors(model: RecurrentDepthLM) -> dict[str, Tensor]:
    return {**export_tensors(FAMILY, model), "freqs_cis": torch.zeros(9)}


@pytest.fixture
def read_all(
    model: RecurrentDepthLM, tensors: dict[str, Tensor], tmp_path: Path
) -> Callable[[], dict[str, Tensor]]:
    def read() -> dict[str, Tensor]:
        save_file(tensors, tmp_path / "model.safetensors")
        return dict(read_tensors(FAMILY, model, StoredWeights(tmp_path)))

    return read


def test_family_reads_what_it_writes(model: RecurrentDepthLM, read_all: ReadAll) -> None:
    found = read_all()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], t) for name, t in model.state_dict().items())
    assert export_config(FAMILY, model.config) == {k: v for k, v in CONFIG.items() if k != "note"}


def test_parameters_are_read_in_a_dtype(
    model: RecurrentDepthLM, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    found = dict(read_tensors(FAMILY, model, StoredWeights(tmp_path), torch.bfloat16))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor.bfloat16())


def test_skipped_tensors_may_be_absent(
    model: RecurrentDepthLM, tensors: dict[str, Tensor], read_all: ReadAll
) -> None:
    del tensors["freqs_cis"], tensors["lm_head"]
    assert len(read_all()) == len(model.state_dict())


def test_tied_copies_must_agree(
    model: RecurrentDepthLM, tensors: dict[str, Tensor], read_all: ReadAll
) -> None:
    tensors["lm_head"] = tensors["lm_head"] + 1
    with pytest.raises(ValueError, match="lm_head differs from wte, but the config ties them"):
        read_all()


def test_dead_tensors_must_be_there_and_are_written_as_zeros(
    model: RecurrentDepthLM, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    family = replace(FAMILY, rules=lambda config: [*rules(config), Dead("unused", (3, 2))])
    written = export_tensors(family, model.double())
    assert torch.equal(written["unused"], torch.zeros(3, 2, dtype=torch.float64))

    def read(**extra: Tensor) -> dict[str, Tensor]:
        save_file(tensors | extra, tmp_path / "model.safetensors")
        return dict(read_tensors(family, model, StoredWeights(tmp_path)))

    assert read(unused=torch.full((3, 2), float("nan"))).keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="missing: unused"):
        read()
    with pytest.raises(ValueError, match=r"wrong shape: unused is \[3\], expected \[3, 2\]"):
        read(unused=torch.zeros(3))


def test_names_and_shapes_are_the_familys(
    model: RecurrentDepthLM, tensors: dict[str, Tensor], read_all: ReadAll
) -> None:
    del tensors["v"], tensors["n1"]
    tensors["bias"] = torch.zeros(1)
    tensors["q"] = torch.zeros(4, 9)
    with pytest.raises(ValueError, match="do not fit") as error:
        read_all()
    assert "missing: n1, v; unexpected: bias; " in str(error.value)
    assert "wrong shape: q is [4, 9], expected [4, 4]" in str(error.value)


def test_rules_must_use_each_tensor_once(model: RecurrentDepthLM) -> None:
    short = Family(
        name="short",
        recognises=FAMILY.recognises,
        read_config=read_config,
        write_config=write_config,
        rules=lambda config: rules(config)[:-1],
    )
    with pytest.raises(ValueError, match=r"each of our tensors once: \['final_norm.weight'\]"):
        export_tensors(short, model)


def test_models_that_the_family_cannot_express(model: RecurrentDepthLM) -> None:
    config = replace(model.config, num_loops=3, feed_forward=SwiGLUConfig(d_ff=9))
    with pytest.raises(ValueError, match="small cannot express this model") as error:
        export_config(FAMILY, config)
    assert "feed_forward.d_ff is 9, there 4; num_loops is 3, there 1" in str(error.value)
    strict = replace(FAMILY, write_config=lambda config: write_config(config) | {"act": "gelu"})
    with pytest.raises(ValueError, match=r"small cannot express this model: .*act is 'gelu'"):
        export_config(strict, model.config)


def test_config_fields_are_checked() -> None:
    found = check_fields(
        {"a": 1, "b": 2, "c": "x", "d": None},
        types={"a": int, "b": float},
        fixed={"c": "x", "absent": 1},
        skipped={"d"},
    )
    assert found == {"a": 1, "b": 2.0}
    assert type(found["b"]) is float
    with pytest.raises(ValueError, match=r"config\.json") as error:
        check_fields(
            {"a": True, "c": "y", "e": 1},
            types={"a": int, "b": float},
            fixed={"c": "x"},
        )
    text = str(error.value)
    for part in (
        "missing b",
        "unknown e",
        "a is True, expected a whole number",
        "c is 'y'; only 'x' is supported",
    ):
        assert part in text
