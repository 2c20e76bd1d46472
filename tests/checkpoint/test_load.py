import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openmythos.checkpoint import load
from openmythos.checkpoint.load import checkpoint_folder, load_checkpoint, load_weights
from openmythos.checkpoint.save import save_pretrained
from openmythos.checkpoint.weights import StoredWeights
from openmythos.config.schema import apply_overrides
from openmythos.interop.loading import load_pretrained
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.plan import memory
from tests.checkpoint.examples import (
    CONFIG,
    TOKENS,
    edit_json,
    edit_weights,
    make_model,
    without_checksums,
)

# --- there and back -------------------------------------------------------------------------------


def test_load_returns_what_was_saved(model: RecurrentDepthLM, folder: Path) -> None:
    loaded = load_checkpoint(folder)
    assert loaded.config == model.config
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for num_loops in (1, 5):
        logits = loaded(TOKENS, num_loops=num_loops).logits
        assert torch.equal(logits, model(TOKENS, num_loops=num_loops).logits)


def test_loaded_model_trains_and_is_independent_of_its_file(folder: Path) -> None:
    loaded = load_checkpoint(folder).train()
    before = (folder / "model.safetensors").read_bytes()
    loaded(TOKENS, num_loops=2).logits.square().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in loaded.parameters())
    torch.optim.SGD(loaded.parameters(), lr=1.0).step()
    loaded.core[0].feed_forward.update_bias(0.1)
    assert (folder / "model.safetensors").read_bytes() == before
    kept = loaded.embed.weight.clone()
    (folder / "model.safetensors").write_bytes(b"\0" * len(before))
    assert torch.equal(loaded.embed.weight, kept)


def test_dtype_and_device(folder: Path) -> None:
    model = load_checkpoint(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # Steps of 1e-3 on the balancing bias would be lost in bf16.
    assert model.core[0].feed_forward.bias.dtype == torch.float32
    assert model.core[0].feed_forward.load.dtype == torch.int64
    assert model(TOKENS).logits.dtype == torch.bfloat16
    again = load_checkpoint(save_pretrained(model, folder))
    without_checksums(folder)
    assert again.embed.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"torch\.int8; it must be a floating dtype"):
        load_checkpoint(folder, dtype=torch.int8)
    edit_weights(folder, lambda tensors: tensors["final_norm.weight"].fill_(7e4))
    with pytest.raises(ValueError, match=r"final_norm\.weight has weights that are too large"):
        load_checkpoint(folder, dtype=torch.float16)


@pytest.mark.slow
def test_peak_memory_is_about_one_copy_or_a_quarter(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of one process is read from /proc")
    big = apply_overrides(
        CONFIG, ["d_model=512", "num_prelude_layers=40", "feed_forward.d_ff=1024"]
    )
    folder = save_pretrained(RecurrentDepthLM(big), tmp_path / "saved")  # 260 MB
    size = (folder / "model.safetensors").stat().st_size
    program = (
        "import sys, torch\n"
        "from openmythos.checkpoint.load import load_checkpoint\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return [int(line.split()[1]) for line in lines if line.startswith('VmHWM')][0]\n"
        "load = lambda path: load_checkpoint(path, weights=sys.argv[3])\n"
        "load(sys.argv[2])\n"  # so that what it imports is not counted
        "before = peak()\n"
        "model = load(sys.argv[1])\n"
        "print(peak() - before)\n"
    )
    small = save_pretrained(make_model(0), tmp_path / "small")
    # A quarter, and pages of the file that the system maps ahead: 20 to 50 MB at this size.
    for weights, most in (("stored", 1.3), ("int8", 0.5)):
        command = [sys.executable, "-c", program, str(folder), str(small), weights]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        grown = 1024 * int(ran.stdout)
        assert grown < most * size, (weights, grown, size)


def test_load_weights_fills_a_model_in_place(model: RecurrentDepthLM, folder: Path) -> None:
    other = make_model(1)
    parameter = other.embed.weight
    load_weights(other, folder)
    assert other.embed.weight is parameter
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    edit_weights(folder, lambda tensors: tensors["final_norm.weight"].fill_(float("nan")))
    third = make_model(2)
    before = third(TOKENS).logits
    with pytest.raises(ValueError, match=r"final_norm\.weight holds NaN"):
        load_weights(third, folder)
    assert torch.equal(third(TOKENS).logits, before)


def test_weights_are_stored_or_in_int8(folder: Path) -> None:
    with pytest.raises(ValueError, match="weights is 'int4'; it must be stored or int8"):
        load_pretrained(folder, weights="int4")
    with pytest.raises(ValueError, match=r"dtype is torch\.bfloat16; it must be None or"):
        load_pretrained(folder, weights="int8", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="device is 'meta'; it must be cpu with weights in int8"):
        load_pretrained(folder, weights="int8", device="meta")
    half = load_checkpoint(save_pretrained(make_model(0).bfloat16(), folder), weights="int8")
    assert {p.dtype for p in half.parameters()} == {torch.float32}


# --- refusals -------------------------------------------------------------------------------------


def test_all_wrong_names_are_listed(folder: Path) -> None:
    def spoil(tensors: dict) -> None:
        tensors["extra.a"] = tensors["extra.b"] = torch.zeros(1)
        tensors["extra.b"] = torch.zeros(2)
        del tensors["embed.weight"], tensors["core.0.feed_forward.bias"]
        tensors["final_norm.weight"] = torch.zeros(3)

    edit_weights(folder, spoil)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_checkpoint(folder)
    text = str(error.value)
    assert "missing: core.0.feed_forward.bias, embed.weight;" in text
    assert "unexpected: extra.a, extra.b;" in text
    assert "wrong shape: final_norm.weight is [3], expected [16]" in text
    assert "\n" not in text


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_weights_are_refused(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        load_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    def spoil(tensors: dict) -> None:
        tensors["core.0.feed_forward.down"][2, 3, 4] = value

    edit_weights(folder, spoil)
    message = r"model\.safetensors: core\.0\.feed_forward\.down holds NaN or infinite"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_a_lost_manifest_is_damage_unless_the_format_had_none(
    model: RecurrentDepthLM, tmp_path: Path
) -> None:
    folder = save_pretrained(model, tmp_path / "saved")
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"saved is damaged: manifest\.json is missing; .*convert"):
        load_checkpoint(folder)
    assert load_checkpoint(folder, verify=False).config == model.config
    save_pretrained(model, folder)
    assert load_checkpoint(without_checksums(folder)).config == model.config


def test_weights_that_cannot_fit_are_refused_before_they_are_read(
    model: RecurrentDepthLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_pretrained(model, tmp_path / "saved")
    size = (folder / "model.safetensors").stat().st_size

    def read(*_: object) -> None:
        pytest.fail("weights were read")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "free_bytes", lambda: size - 1)
        patch.setattr(StoredWeights, "read", read)
        patch.setattr(load, "checkpoint_damage", read)
        for call in (load_checkpoint, load_pretrained):
            with pytest.raises(ValueError, match=rf"loading \S+saved needs {size / 1024:.1f} KiB"):
                call(folder)
    monkeypatch.setattr(memory, "free_bytes", lambda: size - 1)
    assert load_pretrained(folder, dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="needs"):
        load_pretrained(folder, dtype=torch.float64)


def test_bad_configs_are_refused(folder: Path) -> None:
    path = folder / "config.json"
    good = path.read_text(encoding="utf-8")
    edit_json(path, lambda data: data.update(d_modle=16))
    with pytest.raises(ValueError, match=r"config\.json: unknown key 'd_modle'; did you mean"):
        load_checkpoint(folder)
    path.write_text(good, encoding="utf-8")
    edit_json(path, lambda data: data.update(format_version=3))
    with pytest.raises(
        ValueError, match=r"version 3; this program reads 'openmythos', versions 1 to 2"
    ):
        load_checkpoint(folder)
    path.write_text(good[:-10], encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_checkpoint(folder)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_checkpoint(folder)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="holds a list, not an object"):
        load_checkpoint(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        load_checkpoint(folder)


def test_bad_paths_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent does not exist; give a folder"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"model\.safetensors is a file; give a folder"):
        load_checkpoint(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights; expected model\.safetensors"):
        load_checkpoint(folder)


def test_a_huge_config_beside_small_weights_allocates_nothing(folder: Path) -> None:
    edit_json(folder / "config.json", lambda data: data.update(vocab_size=10**12))
    with pytest.raises(ValueError, match=r"wrong shape: embed\.weight"):
        load_checkpoint(folder)


def test_reader_finds_the_old_folder_between_two_renames(folder: Path) -> None:
    expected = load_checkpoint(folder).embed.weight
    shutil.move(folder, folder.parent / ".saved.old")
    assert torch.equal(load_checkpoint(folder).embed.weight, expected)


def test_a_run_folder_means_its_newest_checkpoint(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    assert checkpoint_folder(plain) == plain
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="written no checkpoint yet"):
        checkpoint_folder(run)
    for name in ("step-00000002", "step-00000010", ".step-00000011.tmp"):
        (run / "checkpoints" / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            (run / "checkpoints" / name / file).touch()
    assert checkpoint_folder(run) == run / "checkpoints" / "step-00000010"
    with pytest.raises(ValueError, match="does not exist"):
        checkpoint_folder(tmp_path / "absent")


def test_an_empty_model_needs_no_compiler() -> None:
    """Drawing weights on the meta device imports it: 80 MB of memory, and a second."""
    program = (
        "import sys, openmythos as om\n"
        "from openmythos.checkpoint.load import empty_model\n"
        "for name in ('tiny', 'huginn-3.5b', 'mythos-1b', 'ouro-1.4b', 'parcae-140m'):\n"
        "    assert all(p.is_meta for p in empty_model(om.preset(name)).parameters())\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["False"]
