import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import openmythos.checkpoint.weights
from openmythos.checkpoint.weights import StoredWeights, check_shapes, read_json, tensor_shapes

TENSORS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "b.weight": torch.ones(4, dtype=torch.bfloat16),
    "c.bias": torch.tensor(0.5, dtype=torch.float64),
}


def read_all(folder: Path) -> dict[str, Tensor]:
    weights = StoredWeights(folder)
    return {name: weights.read(name).clone() for name in weights.shapes}


def assert_read(folder: Path) -> None:
    found = read_all(folder)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert StoredWeights(folder).shapes == tensor_shapes(TENSORS)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        read_all(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- one file -------------------------------------------------------------------------------------


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_read(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.pt", "model.pth"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors_are_read(
    tmp_path: Path, name: str, wrapper: str | None, zipped: bool
) -> None:
    data = TENSORS if wrapper is None else {"step": 3, wrapper: TENSORS}
    torch.save(data, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_wrappers_that_all_names_have_are_dropped(tmp_path: Path, prefix: str, name: str) -> None:
    named = {prefix + key: tensor for key, tensor in TENSORS.items()}
    save_file(named, tmp_path / name) if name.endswith("s") else torch.save(named, tmp_path / name)
    assert_read(tmp_path)
    named["c"] = torch.zeros(1)  # now they are a part of the names
    save_file(named, tmp_path / name) if name.endswith("s") else torch.save(named, tmp_path / name)
    assert read_all(tmp_path).keys() == named.keys()


def test_strip_drops_further_prefixes_in_any_order(tmp_path: Path) -> None:
    save_file({f"y.x.{name}": t for name, t in TENSORS.items()}, tmp_path / "model.safetensors")
    weights = StoredWeights(tmp_path)
    weights.strip(("x.", "y.", "z."))
    assert weights.shapes.keys() == TENSORS.keys()
    assert torch.equal(weights.read("a.weight"), TENSORS["a.weight"])
    save_file({"x.": torch.zeros(1)}, tmp_path / "model.safetensors")
    weights = StoredWeights(tmp_path)
    weights.strip(("x.",))
    assert list(weights.shapes) == ["x."]  # no name may become empty


def test_sizes_are_counted_in_numbers(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    weights = StoredWeights(tmp_path)
    assert weights.size(["a.weight", "c.bias"]) == 7
    assert weights.size([]) == 0


def test_nothing_is_no_weights(tmp_path: Path) -> None:
    assert "has no weights; expected model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_files_are_opened_again_so_that_little_stays_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save_file(TENSORS, tmp_path / name) if name.endswith("s") else torch.save(
        TENSORS, tmp_path / name
    )
    opened: list[Path] = []
    original = openmythos.checkpoint.weights._Tensors.__init__

    def count(self: object, path: Path) -> None:
        opened.append(path)
        original(self, path)

    monkeypatch.setattr(openmythos.checkpoint.weights._Tensors, "__init__", count)
    read_all(tmp_path)
    assert len(opened) == 2
    monkeypatch.setattr(openmythos.checkpoint.weights, "REOPEN_BYTES", 1)
    assert_read(tmp_path)
    assert len(opened) > 2 + 3


# --- shards ---------------------------------------------------------------------------------------

Save = Callable[[dict[str, Tensor], Path], None]
FORMS = {
    "safetensors": ("model.safetensors.index.json", "part-{}.safetensors", save_file),
    "pickles": ("pytorch_model.bin.index.json", "part-{}.bin", torch.save),
}


@pytest.fixture(params=list(FORMS))
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The index of two shards."""
    index_name, shard_name, save = FORMS[request.param]
    places = {name: shard_name.format(i % 2) for i, name in enumerate(TENSORS)}
    for shard in set(places.values()):
        save({n: t for n, t in TENSORS.items() if places[n] == shard}, tmp_path / shard)
    (tmp_path / index_name).write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return tmp_path / index_name


def edit_map(index: Path, **change: object) -> None:
    data = json.loads(index.read_text(encoding="utf-8"))
    data["weight_map"] |= change
    index.write_text(json.dumps(data), encoding="utf-8")


def test_shards_are_read(index: Path) -> None:
    assert_read(index.parent)


def test_shards_must_be_there_and_hold_what_the_index_says(index: Path) -> None:
    first = sorted(index.parent.glob("part-*"))[0].name
    edit_map(index, ghost=first)
    assert "the shards lack what the index promises: ghost" in refusal(index.parent)
    edit_map(index, ghost="absent.safetensors")
    message = refusal(index.parent)
    assert f"{index} names shards that are missing: absent.safetensors" in message


@pytest.mark.parametrize("place", ["../part-0.safetensors", "/etc/hosts", "..", "", "a/b", 3, None])
def test_an_index_that_points_elsewhere_is_refused(index: Path, place: object) -> None:
    edit_map(index, ghost=place)
    assert refusal(index.parent) == f"{index} has no weight_map of file names in its own folder"


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', "[1]", "{", "[" * 100_000])
def test_an_index_that_is_none_is_refused(index: Path, text: str) -> None:
    index.write_text(text, encoding="utf-8")
    assert str(index) in refusal(index.parent)


def test_a_truncated_shard_is_named(index: Path) -> None:
    shard = sorted(index.parent.glob("part-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-20])
    message = refusal(index.parent)
    assert message.startswith(str(shard)) and "damaged" in message


# --- pickles that are not tensors -----------------------------------------------------------------


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, proof = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    data = {**TENSORS, "x": Harmful(proof)}
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path)
    assert message.startswith(f"{path} is damaged or holds code besides tensors")
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the same file does run code where it is let
    assert proof.exists()


def test_a_plain_pickle_of_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "model.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Harmful(proof)))
    assert str(path) in refusal(tmp_path)
    assert not proof.exists()


def test_other_contents_are_refused(tmp_path: Path) -> None:
    for data in ([1, 2], {"a": 1}, torch.zeros(1), {"model": {"a": 1}}):
        torch.save(data, tmp_path / "model.bin")
        assert refusal(tmp_path) == f"{tmp_path / 'model.bin'} is not a dictionary of tensors"


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pickles_are_refused(tmp_path: Path, kept: float, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    message = refusal(tmp_path)
    assert str(path) in message and "damaged" in message


def test_pickles_with_a_wrong_byte_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "model.pt", set()
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        spoilt = bytearray(whole)
        spoilt[place] ^= 0x55
        path.write_bytes(spoilt)
        try:
            read_all(tmp_path)
        except ValueError as error:
            outcomes.add((str(path) in str(error), "\n" in str(error)))
    assert outcomes == {(True, False)}


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "no tensors here")
    assert "model.pt is truncated or damaged" in refusal(tmp_path)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_that_are_not_finite_are_refused(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    bad = torch.ones(3, 5, dtype=dtype)
    bad[2, 4] = value
    path = tmp_path / "model.safetensors"
    save_file({**TENSORS, "x": bad}, path)
    assert refusal(tmp_path) == f"{path}: x holds NaN or infinite weights"


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"x": torch.zeros(3).to(dtype)}, tmp_path / "model.safetensors")
    message = refusal(tmp_path)
    assert f"x has dtype {dtype}; it must be float16, bfloat16, float32 or float64" in message


def test_empty_tensors_are_finite(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(0, 3)}, tmp_path / "model.safetensors")
    assert read_all(tmp_path)["x"].shape == (0, 3)


# --- names and JSON -------------------------------------------------------------------------------


def test_shapes_are_compared(tmp_path: Path) -> None:
    check_shapes({"a": (1,)}, {"a": (1,)}, tmp_path)
    with pytest.raises(ValueError, match="do not fit its config") as error:
        check_shapes({"a": (1,), "b": (2,)}, {"a": (3,), "c": (2,)}, tmp_path)
    assert "missing: c; unexpected: b; wrong shape: a is [1], expected [3]" in str(error.value)
    names = {f"layer.{i:04}": (1,) for i in range(1000)}
    with pytest.raises(ValueError, match=r"layer\.0029 and 970 more"):
        check_shapes({}, names, tmp_path)


def test_json_objects_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}', encoding="utf-8")
    assert read_json(path) == {"a": 1}
    path.write_text("3", encoding="utf-8")
    with pytest.raises(ValueError, match="holds a whole number, not an object"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        read_json(path)
