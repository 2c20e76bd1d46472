import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from openmythos import load_pretrained
from openmythos.checkpoint.parts import Box, own_box, own_parts, places_metadata, rank_file, whole
from openmythos.checkpoint.save import save_pretrained, save_tensors
from openmythos.checkpoint.weights import StoredTensors, StoredWeights
from openmythos.folder import write_manifest
from openmythos.model.recurrent import RecurrentDepthLM
from tests.checkpoint.examples import TOKENS, make_model


def lay_out(folder: Path, world: int) -> Path:
    """Write a checkpoint's weights as so many ranks would: each has some rows of each tensor."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    for rank in range(world):
        values, boxes = {}, {}
        for name, tensor in tensors.items():
            rows = -(-len(tensor) // world)
            part = tensor[rank * rows : (rank + 1) * rows]
            if len(part):
                values[name] = part
                boxes[name] = Box((rank * rows, *[0] * (tensor.ndim - 1)), tuple(part.shape))
        path = folder / rank_file("model", rank, world)
        save_tensors(values, path, places_metadata(boxes))
    write_manifest(folder)
    return folder


@pytest.fixture
def model() -> RecurrentDepthLM:
    return make_model(0)


@pytest.fixture
def folder(model: RecurrentDepthLM, tmp_path: Path) -> Path:
    return lay_out(save_pretrained(model, tmp_path / "saved"), 3)


def test_a_checkpoint_in_parts_is_read_as_any_other(
    model: RecurrentDepthLM, folder: Path, tmp_path: Path
) -> None:
    loaded = load_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
    again = save_pretrained(loaded, tmp_path / "whole")
    assert torch.equal(load_pretrained(again)(TOKENS).logits, loaded(TOKENS).logits)
    save_pretrained(loaded, folder)  # replaces the parts, too
    assert not list(folder.glob("*-rank-*")) and (folder / "model.safetensors").is_file()


def test_torch_reads_the_same_files(model: RecurrentDepthLM, folder: Path) -> None:
    found = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with pytest.warns(UserWarning, match="to load in a single process"):
        dcp.load(found, storage_reader=reader, no_dist=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found[name]), name


def test_any_part_is_read_of_any_parts(model: RecurrentDepthLM, folder: Path) -> None:
    stored, tensor = StoredWeights(folder), model.embed.weight
    rows, columns = tensor.shape
    for box in (
        Box((0, 0), (rows, columns)),
        Box((1, 2), (rows - 2, columns - 3)),
        Box((rows - 1, 0), (1, 1)),
        Box((rows, 0), (0, columns)),
        Box((rows // 2, 1), (0, 0)),
    ):
        part = stored.read_part("embed.weight", box)
        assert tuple(part.shape) == box.size and torch.equal(part, tensor[box.slices])
    for name, each in model.state_dict().items():
        assert torch.equal(stored.read(name), each)


def test_missing_and_misplaced_parts_are_refused(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.glob("*-rank-*"))
    assert [file.name for file in files] == [rank_file("model", i, 3) for i in range(3)]
    content = files[1].read_bytes()
    files[1].unlink()
    with pytest.raises(ValueError, match="has 2 of the 3 files model-rank-00000-of-00003"):
        StoredWeights(folder)
    with pytest.raises(ValueError, match=r"rank-00001-of-00003\.safetensors is missing"):
        load_pretrained(folder)
    files[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"00001-of-00003\.safetensors is truncated or damaged"):
        StoredWeights(folder)
    tensors = {"a": torch.ones(2, 3)}
    for places, said in (
        (json.dumps({"a": {"saved_offsets": [1, 0]}}), "parts of a are missing"),
        ("{", "where its parts belong cannot be read"),
        ("[1]", "where its parts belong cannot be read"),
    ):
        path = tmp_path / "part.safetensors"
        save_tensors(tensors, path, {"DCP_SHARDING_INFO": places})
        with pytest.raises(ValueError, match=said):
            StoredTensors([path])


def test_a_process_alone_has_everything() -> None:
    tensors = {"a": torch.ones(2, 3), "step": torch.tensor(1.0)}
    parts = own_parts(tensors)
    tensors["a"].zero_()
    copy = parts.copy()
    tensors["a"].fill_(2)
    assert parts.values["a"] is tensors["a"] and not copy.values["a"].any()
    assert parts.values.keys() == copy.values.keys() == tensors.keys()
    assert copy.boxes == parts.boxes == {"a": Box((0, 0), (2, 3)), "step": Box((), ())}
    assert own_box(tensors["a"]) == whole((2, 3)) and whole(()).count == 1
    one, other = Box((0, 2), (2, 3)), Box((1, 0), (5, 4))
    assert one.overlap(other) == Box((1, 2), (1, 2))
    assert one.overlap(Box((2, 2), (1, 1))).count == 0
    assert Box((1, 2), (1, 2)).seen_from((1, 0)) == Box((0, 2), (1, 2))
