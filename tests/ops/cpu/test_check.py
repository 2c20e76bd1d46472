"""Wrong calls of the public operators raise an error, and nothing is read or written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openmythos.ops.cpu import build, narrow, paged

Case = dict[str, object]


@pytest.fixture(autouse=True)
def kernels(compiler: None) -> None:
    assert narrow.load() and paged.load() and all(build.load(name) for name in build.EAGER)


def integers(*values: int) -> Tensor:
    return torch.tensor(values)


def linear() -> Case:
    return {"x": torch.ones(2, 5), "weight": torch.ones(3, 5)}


def narrow_experts() -> Case:
    return {
        "x": torch.ones(2, 5),
        "expert": torch.tensor([[0, 3], [1, 1]]),
        "weight": torch.ones(2, 2),
        "gate_up": torch.ones(4, 6, 5),
        "down": torch.ones(4, 5, 3),
    }


def multiply() -> Case:
    return {
        "x": torch.ones(2, 64),
        "source": integers(0, 1, 1),
        "weights": torch.ones(2, 32, 64),
        "ends": integers(1, 3),
        "transposed": True,
    }


def multiply_add() -> Case:
    case = multiply() | {"x": torch.ones(3, 32), "transposed": False, "rows": 2}
    return {"x": case.pop("x"), "target": case.pop("source"), **case}


def gradient() -> Case:
    return {
        "out": torch.zeros(2, 32, 64),
        "left": [torch.ones(3, 32)],
        "left_rows": [integers(2, 0)],
        "right": [torch.ones(1, 64)],
        "right_rows": [integers(0, 0)],
        "ends": [integers(1, 2)],
    }


def attend() -> Case:
    q = torch.ones(2, 4, 5, 32)
    case = {"q": q, "k": q[:, :2], "v": torch.ones(2, 2, 5, 64), "mask": torch.ones(2, 1, 5, 5)}
    return {**case, "scale": 1.0, "keep": True}


def attend_backward() -> Case:
    case = attend()
    _, kept = torch.ops.openmythos_attention.forward(*case.values())
    q, k, v = case["q"], case["k"], case["v"]
    return {"grad": torch.ones(2, 4, 5, 64), "q": q, "k": k, "v": v, "kept": kept, "scale": 1.0}


def attend_pages() -> Case:
    pools = {"k": torch.ones(5, 3, 2, 6), "v": torch.ones(5, 3, 2, 7)}
    where = {"table": torch.tensor([[4, 2], [1, 0]]), "length": integers(6, 2)}
    return {"q": torch.ones(2, 4, 6), **pools, **where, "scale": 1.0, "width": 7}


OPERATORS: dict[str, tuple[str, Callable[[], Case]]] = {
    "linear": ("openmythos_narrow::linear", linear),
    "narrow experts": ("openmythos_narrow::experts", narrow_experts),
    "multiply": ("openmythos_experts::multiply", multiply),
    "multiply_add": ("openmythos_experts::multiply_add", multiply_add),
    "gradient": ("openmythos_experts::gradient", gradient),
    "attention": ("openmythos_attention::forward", attend),
    "attention backward": ("openmythos_attention::backward", attend_backward),
    "pages": ("openmythos_paged::attend", attend_pages),
}


def call(name: str, case: Case) -> object:
    namespace, operator = OPERATORS[name][0].split("::")
    return getattr(getattr(torch.ops, namespace), operator)(*case.values())


@pytest.mark.parametrize("name", OPERATORS)
def test_the_case_itself_is_taken(name: str) -> None:
    call(name, OPERATORS[name][1]())


def other_forms(value: Tensor) -> list[Tensor]:
    """Of another dtype, with one dimension more, with every dimension one longer, not packed."""
    longer = [
        torch.cat((value, value.narrow(dim, 0, 1)), dim=dim).contiguous()
        for dim in range(value.ndim)
    ]
    strided = torch.stack((value, value), dim=-1)[..., 0]
    return [value.double(), value.to(torch.int32), value[None], *longer, strided]


@pytest.mark.parametrize("name", OPERATORS)
def test_every_other_form_of_an_operand_is_taken_for_what_it_is_or_refused(name: str) -> None:
    """Nothing here may crash; a dimension whose size is free may be longer, alone."""
    _, make = OPERATORS[name]
    refused = []
    for key, value in make().items():
        tensors = value if isinstance(value, list) else [value]
        if not isinstance(tensors[0], Tensor):
            continue
        for index, form in enumerate(other_forms(tensors[0])):
            changed = make() | {key: [form] if isinstance(value, list) else form}
            try:
                call(name, changed)
            except RuntimeError:
                refused.append((key, index))
    for key, value in make().items():
        if isinstance(value, Tensor | list):
            assert {(key, 0), (key, 1), (key, 2)} <= set(refused), key


BAD: dict[str, tuple[str, Case, str]] = {
    "columns": ("linear", {"x": torch.ones(2, 4)}, r"x has the shape \[2, 4\]; .* \[\*, 5\]"),
    "a vector": ("linear", {"weight": torch.ones(5)}, r"weight has the shape \[5\]"),
    "an expert too many": (
        "narrow experts",
        {"expert": torch.tensor([[0, 4], [1, 1]])},
        r"expert holds 4; it must be in 0\.\.3",
    ),
    "an expert below": (
        "narrow experts",
        {"expert": torch.tensor([[0, -1], [1, 1]])},
        "expert holds -1",
    ),
    "narrow experts of no expert": (
        "narrow experts",
        {"gate_up": torch.ones(0, 6, 5), "down": torch.ones(0, 5, 3)},
        "expert holds 0",
    ),
    "a source too many": ("multiply", {"source": integers(0, 2, 1)}, "source holds 2"),
    "a source below": ("multiply", {"source": integers(0, -1, 1)}, "source holds -1"),
    "ends that shrink": ("multiply", {"ends": integers(4, 3)}, "ends must grow and end at 3"),
    "ends below": ("multiply", {"ends": integers(-1, 3)}, "ends must grow and end at 3"),
    "ends too early": ("multiply", {"ends": integers(1, 2)}, "ends must grow and end at 3"),
    "ends too late": ("multiply", {"ends": integers(1, 4)}, "ends must grow and end at 3"),
    "widths": ("multiply", {"weights": torch.ones(2, 24, 64)}, "multiples of"),
    "the other way": ("multiply", {"transposed": False}, "x has the shape"),
    "a target too many": ("multiply_add", {"target": integers(0, 2, 1)}, "target holds 2"),
    "rows below": ("multiply_add", {"rows": 0}, "target holds 0"),
    "lists of two lengths": ("gradient", {"left": []}, "lists of one length"),
    "a row too many": ("gradient", {"left_rows": [integers(3, 0)]}, "left_rows holds 3"),
    "a right row too many": ("gradient", {"right_rows": [integers(0, 1)]}, "right_rows holds 1"),
    "ends of a use": ("gradient", {"ends": [integers(1, 3)]}, "ends must grow and end at 2"),
    "a target of another width": ("gradient", {"out": torch.zeros(2, 32, 32)}, "right has"),
    "heads": ("attention", {"k": torch.ones(2, 3, 5, 32)}, "v has the shape"),
    "heads in no groups": (
        "attention",
        {"k": torch.ones(2, 3, 5, 32), "v": torch.ones(2, 3, 5, 64)},
        "a multiple of the 3 heads",
    ),
    "no heads": (
        "attention",
        {"k": torch.ones(2, 0, 5, 32), "v": torch.ones(2, 0, 5, 64)},
        "a multiple of the 0 heads",
    ),
    "more keys": ("attention", {"k": torch.ones(2, 2, 6, 32)}, "k has the shape"),
    "channels": (
        "attention",
        {"q": torch.ones(2, 4, 5, 24), "k": torch.ones(2, 2, 5, 24)},
        "multiples of",
    ),
    "a mask of one row": ("attention", {"mask": torch.ones(2, 1, 1, 5)}, "mask has the shape"),
    "a mask by columns": (
        "attention",
        {"mask": torch.ones(2, 1, 5, 5).mT.contiguous().mT},
        "last stride of 1",
    ),
    "a page too many": ("pages", {"table": torch.tensor([[4, 5], [1, 0]])}, "table holds 5"),
    "a page below": ("pages", {"table": torch.tensor([[-1, 2], [1, 0]])}, "table holds -1"),
    "tokens too many": ("pages", {"length": integers(7, 2)}, r"length holds 7; .* 1\.\.6"),
    "no token": ("pages", {"length": integers(6, 0)}, "length holds 0"),
    "a table of other rows": ("pages", {"table": torch.tensor([[4, 2]])}, "table has the shape"),
    "pages of other heads": ("pages", {"v": torch.ones(5, 3, 1, 7)}, "v has the shape"),
    "pages in no groups": ("pages", {"q": torch.ones(2, 3, 6)}, "a multiple of the 2 heads of k"),
    "too wide": ("pages", {"width": 8}, r"width is 8; it must be in 1\.\.7"),
    "fewer weights": ("attention backward", {"kept": torch.ones(2, 4, 5)}, "kept has the shape"),
    "another gradient": ("attention backward", {"grad": torch.ones(2, 4, 5, 32)}, "grad has the"),
}


@pytest.mark.parametrize(("name", "change", "said"), BAD.values(), ids=list(BAD))
def test_wrong_calls_say_what_is_wrong(name: str, change: Case, said: str) -> None:
    case = OPERATORS[name][1]() | change
    with pytest.raises(RuntimeError, match=said):
        call(name, case)
