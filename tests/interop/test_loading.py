import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import openmythos
from benchmarks import load_memory
from openmythos import cli
from openmythos.checkpoint.save import save_pretrained
from openmythos.checkpoint.weights import StoredWeights
from openmythos.config import GQAConfig, ModelConfig, SwiGLUConfig
from openmythos.config.presets import preset
from openmythos.config.schema import apply_overrides
from openmythos.interop.families import parcae
from openmythos.interop.loading import FAMILIES, load_config, load_pretrained, own_tokenizer
from openmythos.interop.mapping import export_config, export_tensors
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import byte_tokenizer
from tests.checkpoint.examples import without_checksums
from tests.checkpoint.test_weights import Harmful
from tests.strategies import random_model, small_config

GoldenDir = Callable[[str], Path]

CONFIG = ModelConfig(
    vocab_size=8,
    d_model=8,
    num_prelude_layers=1,
    num_core_layers=1,
    num_coda_layers=1,
    num_loops=2,
    attention=GQAConfig(num_heads=1, num_kv_heads=1, head_dim=8),
    feed_forward=SwiGLUConfig(d_ff=8),
)


def test_our_own_folder_is_loaded_with_its_options(tmp_path: Path) -> None:
    model = RecurrentDepthLM(CONFIG)
    folder = save_pretrained(model, tmp_path / "saved")
    loaded = load_pretrained(str(folder), dtype=torch.float64)
    assert loaded.config == CONFIG
    assert torch.equal(loaded.embed.weight, model.embed.weight.double())


def test_another_projects_tokenizer_is_not_ours(tmp_path: Path, golden_dir: GoldenDir) -> None:
    model = random_model(small_config())
    save_pretrained(model, tmp_path / "ours", byte_tokenizer())
    found = own_tokenizer(tmp_path / "ours")
    assert found is not None and found.fingerprint == byte_tokenizer().fingerprint
    save_pretrained(model, tmp_path / "without")
    assert own_tokenizer(tmp_path / "without") is None
    shutil.copytree(golden_dir("openmythos-gqa"), tmp_path / "theirs")
    byte_tokenizer().save(tmp_path / "theirs")
    assert own_tokenizer(tmp_path / "theirs") is None


def test_the_package_names_the_loader() -> None:
    assert openmythos.load_pretrained is load_pretrained


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    folder = save_pretrained(RecurrentDepthLM(CONFIG), tmp_path / "saved")
    (folder / "config.json").write_text('{"format": "gguf"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"saved is damaged: config\.json has 18 bytes instead of"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="has format 'gguf'"):
        load_pretrained(folder, verify=False)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has format 'gguf'"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="does not exist"):
        load_pretrained(tmp_path / "absent")


# --- every family: what is damaged is refused, in one line that names the place -------------------

GOLDEN_ROOT = Path(__file__).parent.parent / "golden"
# Further goldens of a family, whose files are read by the same code.
VARIANTS = {"ifm-linear", "ifm-orthoinj", "ifm-middle", "ifm-moe", "looplm-parcae"}
GOLDENS = sorted({path.name for path in GOLDEN_ROOT.iterdir() if path.is_dir()} - VARIANTS)
KINDS = ["ours", "parcae-gpt", *GOLDENS]


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A good checkpoint in a folder of its own."""
    target = tmp_path / "checkpoints" / request.param
    if request.param == "ours":
        return without_checksums(save_pretrained(random_model(CONFIG), target))
    if request.param == "parcae-gpt":
        words = ["d_model=32", "vocab_size=40", "attention.num_heads=2", "attention.head_dim=16"]
        words += ["attention.num_kv_heads=2", "feed_forward.d_ff=48", "max_seq_len=32"]
        model = random_model(apply_overrides(preset("parcae-gpt-140m"), words))
        target.mkdir(parents=True)
        config = export_config(parcae.GPT_FAMILY, model.config)
        (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(export_tensors(parcae.GPT_FAMILY, model), target / "model.safetensors")
        return target
    shutil.copytree(GOLDEN_ROOT / request.param, target)
    (target / "io.safetensors").unlink()
    return target


def used(folder: Path) -> str:
    names = [name for name, shape in StoredWeights(folder).shapes.items() if len(shape) == 2]
    candidates = [name for name in names if "att" in name.lower() or "qkv" in name.lower()]
    return sorted(candidates)[0]


def change_weights(change: Callable[[dict, str], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors, name = load_file(folder / "model.safetensors"), used(folder)
        change(tensors, name)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def truncate(kept: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: int(kept * len(data))])

    return spoil


def pickle_code(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    proof = folder.parent / "ran"
    torch.save({**tensors, "x": Harmful(proof)}, folder / "pytorch_model.bin")


def shard(folder: Path, first: str = "part-0.safetensors", lost: str | None = None) -> None:
    """Two shards; the first may stand elsewhere, one may be lost."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = [first, "part-1.safetensors"]
    places = {name: shards[i % 2] for i, name in enumerate(sorted(tensors))}
    for place in shards:
        save_file({n: t for n, t in tensors.items() if places[n] == place}, folder / place)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    if lost is not None:
        (folder / lost).unlink()


def write_config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text, encoding="utf-8") and None


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated in the header": (truncate(0.001), "model.safetensors is truncated or damaged"),
    "truncated in the data": (truncate(0.9), "model.safetensors is truncated or damaged"),
    "empty": (truncate(0.0), "model.safetensors is truncated or damaged"),
    "a pickle that would run code": (pickle_code, "pytorch_model.bin is damaged or holds code"),
    "a shard is missing": (
        lambda folder: shard(folder, lost="part-1.safetensors"),
        "model.safetensors.index.json names shards that are missing: part-1.safetensors",
    ),
    "the index points outside": (
        lambda folder: shard(folder, first="../part-0.safetensors"),
        "model.safetensors.index.json has no weight_map of file names in its own folder",
    ),
    "a wrong shape": (
        change_weights(lambda tensors, name: tensors.update({name: tensors[name][1:].clone()})),
        "wrong shape: ",
    ),
    "a missing tensor": (change_weights(lambda tensors, name: tensors.pop(name)), "missing: "),
    "an unknown tensor": (
        change_weights(lambda tensors, name: tensors.update({"stray": torch.zeros(1)})),
        "unexpected: stray",
    ),
    "NaN": (
        change_weights(lambda tensors, name: tensors[name].view(-1)[-1:].fill_(float("nan"))),
        "holds NaN or infinite weights",
    ),
    "infinity": (
        change_weights(lambda tensors, name: tensors[name].view(-1)[:1].fill_(float("inf"))),
        "holds NaN or infinite weights",
    ),
    "integers": (
        change_weights(lambda tensors, name: tensors.update({name: tensors[name].int()})),
        "has dtype torch.int32; it must be float16",
    ),
    "a config of an unknown family": (write_config('{"model_type": "gpt2"}'), "no known family"),
    "an empty config": (write_config("{}"), "no known family"),
    "a config that is not JSON": (write_config('{"n_embd": '), "config.json is not JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
}
ONLY_WHEN_READ = {"NaN", "infinity", "integers"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_refused(folder: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    load_pretrained(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=r".") as error:
        load_pretrained(folder)
    text = str(error.value)
    assert message in text and str(folder) in text and "\n" not in text
    assert not (folder.parent / "ran").exists()
    if damage in ONLY_WHEN_READ:
        assert used(folder) in text
        load_config(folder)
    else:
        with pytest.raises(ValueError, match=r"."):
            load_config(folder)


def test_sharded_checkpoints_of_every_family_load(folder: Path) -> None:
    expected = load_pretrained(folder).state_dict()
    shard(folder)
    found = load_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_config_alone_is_that_of_the_model(folder: Path) -> None:
    assert load_config(folder) == load_pretrained(folder).config


def test_each_folder_belongs_to_one_family(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = StoredWeights(folder).shapes
    owners = [family.name for family in FAMILIES if family.recognises(data, names)]
    assert len(owners) == (0 if folder.name == "ours" else 1)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


# --- the same from the command line ---------------------------------------------------------------


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["openmythos", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.mark.parametrize("folder", ["ours", "parcae"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_command_line_says_it_in_one_line(
    folder: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save(folder)
    DAMAGES[damage][0](folder)
    commands = [("generate", folder, "--prompt", "a")]
    if damage not in ONLY_WHEN_READ | {"no weights"}:  # it reads names, shapes and the config
        commands.append(("inspect", folder))
    for words in commands:
        status, out, err = said(monkeypatch, capsys, *words)
        assert (status, out) == (2, "")
        *notes, line = err.splitlines()
        assert line.startswith("error: ") and folder.name in line
        assert all(text.endswith(" ...") for text in notes)
    assert not (folder.parent / "ran").exists()


def test_inspect_reads_checkpoints_of_every_family(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_pretrained(folder)
    status, out, _ = said(monkeypatch, capsys, "inspect", folder, "--json")
    assert status == 0
    assert json.loads(out)["total_params"] == sum(p.numel() for p in model.parameters())


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["original, sharded torch, float32", "original, one torch file, float32"]
)
def test_peak_memory_is_the_model_and_little_more(tmp_path: Path, case: str) -> None:
    """Mapped pages of what was read, and the parts of a joined tensor, must not pile up."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of one process is read from /proc")
    row = load_memory.measure(case, 300_000_000, tmp_path)
    assert float(row["ratio"]) < 1.3, row


def test_a_config_is_read_without_the_weights(tmp_path: Path) -> None:
    folder = save_pretrained(RecurrentDepthLM(CONFIG), tmp_path / "saved")
    assert load_config(folder) == CONFIG
    stored = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(stored.replace('"d_model"', '"dmodel"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown key 'dmodel'"):
        load_config(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(ValueError, match="of no known family"):
        load_config(folder)
