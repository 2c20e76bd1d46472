import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from openmythos.checkpoint.load import empty_model
from openmythos.checkpoint.weights import StoredWeights
from openmythos.interop.families.openmythos_original import FAMILY
from openmythos.interop.loading import load_pretrained
from openmythos.interop.mapping import Join, export_tensors
from openmythos.interop.writing import save_as
from openmythos.tokenizer import byte_tokenizer
from tests.strategies import random_model, small_config

GoldenDir = Callable[[str], Path]


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000, 1])
def test_the_original_is_written_as_it_was(
    golden_dir: GoldenDir, tmp_path: Path, max_shard_bytes: int
) -> None:
    """One file, several, one a tensor: the same names and bytes, its tied copy included."""
    source = golden_dir("openmythos-mla")
    model = load_pretrained(source)
    folder = save_as(FAMILY, model, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    expected, found = load_file(source / "model.safetensors"), StoredWeights(folder)
    assert found.shapes.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found.read(name), tensor), name
    files = list(folder.glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_bytes == 10**9)
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= max_shard_bytes
        with safetensors.safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(load_pretrained(folder)(tokens).logits, model(tokens).logits)


def test_a_cast_concerns_parameters_and_keeps_tensors_aligned(
    golden_dir: GoldenDir, tmp_path: Path
) -> None:
    model = load_pretrained(golden_dir("openmythos-gqa"))
    save_as(FAMILY, model, tmp_path / "out", dtype=torch.bfloat16, tokenizer=byte_tokenizer())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    wide = {name for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}
    assert wide == {"recurrent.block.ffn.router_bias"}
    expected = export_tensors(FAMILY, model)
    assert all(torch.equal(t, expected[n].to(t.dtype)) for n, t in tensors.items())
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    del header["__metadata__"]
    assert length % 8 == 0
    assert all(
        entry["data_offsets"][0] % (4 if name in wide else 2) == 0 for name, entry in header.items()
    )


def test_memory_holds_one_rule_at_a_time(
    golden_dir: GoldenDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a rule made is gone when the next but one is asked."""
    model = load_pretrained(golden_dir("openmythos-mla"))
    alive: list[list[weakref.ref[torch.Tensor]]] = []
    write = Join.write

    def watched(self: Join, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        parts = write(self, tensors)
        if not parts[0].is_meta:
            assert not any(ref() is not None for refs in alive[:-1] for ref in refs)
            alive.append([weakref.ref(part) for part in parts])
        return parts

    monkeypatch.setattr(Join, "write", watched)
    save_as(FAMILY, model, tmp_path / "out")
    assert len(alive) > 5


def test_what_the_family_cannot_express_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the original OpenMythos has experts in the core"):
        save_as(FAMILY, random_model(small_config()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sharded_weights_of_before_do_not_stay(golden_dir: GoldenDir, tmp_path: Path) -> None:
    model = load_pretrained(golden_dir("openmythos-mla"))
    for max_shard_bytes in (20_000, 30_000, 10**9):
        save_as(FAMILY, model, tmp_path / "out", max_shard_bytes=max_shard_bytes)
        assert load_pretrained(tmp_path / "out").config == model.config
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        save_as(FAMILY, model, tmp_path / "out")


def test_a_model_without_weights_is_refused(golden_dir: GoldenDir, tmp_path: Path) -> None:
    config = load_pretrained(golden_dir("openmythos-mla")).config
    with pytest.raises(ValueError, match="meta device: it has shapes but no weights"):
        save_as(FAMILY, empty_model(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()
