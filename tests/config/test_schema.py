import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from openmythos.config import schema
from tests.strategies import unchecked


@dataclass(frozen=True, kw_only=True)
class Circle:
    kind: ClassVar[str] = "circle"
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Polygon:
    kind: ClassVar[str] = "polygon"
    corners: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Frame:
    style: Literal["thin", "thick"] = "thin"
    width: int | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    size: int
    shape: Circle | Polygon = field(default_factory=Circle)
    frame: Frame = field(default_factory=Frame)
    stamp: Circle | Polygon | None = None
    only: Circle | None = None
    label: str | int = "none"
    signed: bool = False


DATA = {
    "size": 3,
    "shape": {"kind": "polygon", "corners": [1, 2]},
    "frame": {"style": "thick", "width": None},
    "stamp": None,
    "only": {"kind": "circle", "radius": 2.0},
    "label": "a",
    "signed": True,
}
PICTURE = Picture(
    size=3,
    shape=Polygon(corners=(1, 2)),
    frame=Frame(style="thick"),
    only=Circle(radius=2.0),
    label="a",
    signed=True,
)


def test_round_trip():
    assert schema.to_dict(PICTURE) == DATA
    assert schema.from_dict(Picture, DATA) == PICTURE
    assert schema.from_dict(Picture, {"size": 3}) == Picture(size=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sise": 3}, "unknown key 'sise'; did you mean 'size'?"),
        ({"frame": {"widht": 1}}, "unknown key 'frame.widht'; did you mean 'width'?"),
        ({"frame": {"kind": "thin"}}, "unknown key 'frame.kind'"),
        ({"kind": "picture"}, "unknown key 'kind'"),
        ({"size": "3"}, "size is '3'; expected a whole number"),
        ({"size": 3.0}, "size is 3.0; expected a whole number"),
        ({"size": True}, "size is true; expected a whole number"),
        ({"signed": 1}, "signed is 1; expected true or false"),
        ({"shape": {"kind": "circle", "radius": True}}, "shape.radius is true; expected a number"),
        (
            {"shape": {"kind": "circle", "radius": "big"}},
            "shape.radius is 'big'; expected a number",
        ),
        ({"shape": {"kind": "square"}}, "shape.kind is 'square'; allowed: circle, polygon"),
        ({"shape": None}, "shape.kind is null; allowed: circle, polygon"),
        ({"shape": {"radius": 1.0}}, "shape.kind is null; allowed: circle, polygon"),
        ({"shape": {"kind": "polygon"}}, "shape: missing corners"),
        ({"shape": {"kind": "polygon", "corners": 3}}, "shape.corners is 3; expected a list"),
        (
            {"shape": {"kind": "polygon", "corners": [1, "b"]}},
            "shape.corners[1] is 'b'; expected a whole number",
        ),
        ({"stamp": "square"}, "stamp.kind is 'square'; allowed: circle, polygon or null"),
        ({"only": {"kind": "polygon"}}, "only.kind is 'polygon'; allowed: 'circle'"),
        ({"frame": {"style": "wavy"}}, "frame.style is 'wavy'; allowed: 'thin', 'thick'"),
        ({"frame": 3}, "frame: expected an object, got a whole number"),
        ({"label": 1.5}, "label is 1.5; expected text or a whole number"),
    ],
)
def test_errors_name_the_field_in_one_line(change, message):
    with unchecked(), pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared below
        schema.from_dict(Picture, {**DATA, **change})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"^missing size"):
        schema.from_dict(Picture, {})


def test_an_integer_is_a_float():
    made = schema.from_dict(Picture, {"size": 1, "shape": {"kind": "circle", "radius": 2}})
    assert isinstance(made.shape.radius, float)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["size=5"], {"size": 5}),
        (["label=hello"], {"label": "hello"}),
        (["label=7"], {"label": 7}),
        (["frame.style=thin", "frame.width=4"], {"frame": Frame(width=4)}),
        (["shape.corners=[4, 5]"], {"shape": Polygon(corners=(4, 5))}),
        (["shape=circle"], {"shape": Circle()}),
        (["shape.kind=circle"], {"shape": Circle()}),
        (["shape.kind=circle", "shape.radius=9"], {"shape": Circle(radius=9.0)}),
        (['shape={"kind": "circle", "radius": 4}'], {"shape": Circle(radius=4.0)}),
        (["shape.kind=polygon"], {}),  # already so: the other fields stay
        (["stamp=circle"], {"stamp": Circle()}),
        (["stamp.kind=polygon", "stamp.corners=[]"], {"stamp": Polygon(corners=())}),
        (["only=null"], {"only": None}),
        (["only.radius=4"], {"only": Circle(radius=4.0)}),
        (["signed=false"], {"signed": False}),
    ],
)
def test_overrides(overrides, wanted):
    fields = {name: getattr(PICTURE, name) for name in DATA}
    assert schema.apply_overrides(PICTURE, overrides) == Picture(**{**fields, **wanted})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("size", "override 'size' is not of the form key.subkey=value"),
        ("=3", "override '=3' is not of the form key.subkey=value"),
        ("sise=3", "unknown key 'sise'; did you mean 'size'?"),
        ("frane.width=3", "unknown key 'frane'; did you mean 'frame'?"),
        ("frame.widht=3", "unknown key 'frame.widht'; did you mean 'width'?"),
        ("frame.kind=thin", "unknown key 'frame.kind'"),
        ("size.big=3", "'size' has no fields; cannot set 'size.big'"),
        ("size=big", "size is 'big'; expected a whole number"),
        ("size=null", "size is null; expected a whole number"),
        ("shape.kind=square", "shape.kind is 'square'; allowed: circle, polygon"),
        ("shape.radius=3", "unknown key 'shape.radius'"),
        ("stamp.radius=3", "stamp.kind is null; allowed: circle, polygon or null"),
    ],
)
def test_bad_overrides(override, message):
    with unchecked(), pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared below
        schema.apply_overrides(PICTURE, [override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_whole_numbers_of_any_library(value):
    number = schema.as_integer("size", value, least=3)
    assert number == 3
    assert type(number) is int


@pytest.mark.parametrize(
    ("value", "least", "said"),
    [
        (2.0, None, "size is 2.0; it must be an integer"),
        ("3", 1, "size is '3'; it must be an integer of at least 1"),
        (True, None, "size is True; it must be an integer"),
        (None, None, "size is None; it must be an integer"),
        (torch.tensor([3]), None, "size is [3]; it must be an integer"),
        (np.int32(0), 1, "size is 0; it must be an integer of at least 1"),
    ],
)
def test_what_is_no_whole_number_is_refused(value, least, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        schema.as_integer("size", value, least)


@dataclass(frozen=True, kw_only=True)
class Size:
    num_rows: int
    share: float = 1.0
    most: int | None = None

    def __post_init__(self):
        schema.require_positive(self, "num_rows", "share", *([] if self.most is None else ["most"]))


def test_positive_fields_are_numbers_of_python():
    with unchecked():
        size = Size(num_rows=np.int64(3), share=np.float64(1.5), most=torch.tensor(4))
        assert [type(value) for value in vars(size).values()] == [int, float, int]
        assert size == Size(num_rows=3, share=1.5, most=4)
        assert schema.to_dict(Size(num_rows=3, share=2)) == {
            "num_rows": 3,
            "share": 2,
            "most": None,
        }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *(({"num_rows": x}, "an integer of at least 1") for x in (2.0, True, "2", None, b"2", [2])),
        ({"num_rows": torch.tensor([[2], [2]])}, "an integer of at least 1"),
        ({"num_rows": np.int64(0)}, "at least 1"),
        ({"share": 0.5}, "at least 1"),
        ({"share": "1"}, "a number of at least 1"),
        ({"most": 2.5}, "an integer of at least 1"),
    ],
    ids=str,
)
def test_what_is_no_positive_number_is_refused_in_a_line(given, said):
    with unchecked(), pytest.raises(ValueError, match=f"must be {said}$") as error:
        Size(**{"num_rows": 1, **given})
    assert str(error.value).startswith(next(iter(given))) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, 6, 5.0, 10**40, True])
def test_an_integer_in_a_range(value):
    with (
        unchecked(),
        pytest.raises(ValueError, match=r"size is .*; it must be an integer in 1\.\.5"),
    ):
        schema.as_integer("size", value, 1, 5)
    assert schema.as_integer("size", np.int8(5), 1, 5) == 5
