import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import openmythos as om
from openmythos.checkpoint.load import checkpoint_damage
from openmythos.checkpoint.save import EXIT_FILE, EXIT_PICTURE, save_pretrained
from openmythos.command.origin import puzzle_of
from openmythos.config import LearnedLoopConfig
from openmythos.config.adapter import AdapterConfig
from openmythos.folder import HELD_OUT_FILE, PUZZLE_FILE, WALKS_FILE
from openmythos.interop.adapter import new_adapter, save_adapter
from openmythos.interop.adapter import trained as own_tensors
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import load_pretrained
from openmythos.model.adapter import changes_of
from openmythos.tokenizer import Tokenizer, byte_tokenizer
from tests.command.conftest import Invoke, error_line, refused, stored
from tests.foreign import write_chat_folder
from tests.strategies import random_model, randomise, small_config


def test_a_published_checkpoint_is_converted_there_and_back(
    invoke: Invoke, golden_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    source, ours, theirs = golden_dir("openmythos-mla"), tmp_path / "ours", tmp_path / "theirs"
    invoke("convert", source, "--out", ours)
    assert stored(ours)["format"] == "openmythos"
    invoke("convert", ours, "--to", "original-openmythos", "--out", theirs)
    assert stored(theirs)["attn_type"] == "mla"
    tokens = torch.arange(12).view(2, 6)
    logits = load_pretrained(source)(tokens).logits
    assert torch.equal(load_pretrained(theirs)(tokens).logits, logits)
    invoke("convert", source, "--out", ours, "--dtype", "float16")
    assert load_pretrained(ours).embed.weight.dtype == torch.float16


def test_convert_reports_as_json(invoke: Invoke, text_run: Path, tmp_path: Path) -> None:
    said = json.loads(invoke("convert", text_run, "--out", tmp_path / "out", "--json"))
    count = sum(p.numel() for p in load_pretrained(text_run).parameters())
    assert said == {
        "folder": str(tmp_path / "out"),
        "format": "openmythos",
        "tokenizer": True,
        "total_params": count,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("convert", "RUN", "--to", "huggin"), "--to is 'huggin'; allowed: openmythos, original"),
        (("convert", "RUN", "--to", "original-openmythos"), "the original OpenMythos has experts"),
    ],
)
def test_refusals(
    invoke: Invoke, hops_run: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    words = [hops_run if word == "RUN" else word for word in arguments]
    assert said in refused(invoke, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_checkpoint_is_taken_on_request(
    invoke: Invoke, text_run: Path, tmp_path: Path
) -> None:
    changed, new = tmp_path / "changed", tmp_path / "new"
    shutil.copytree(next((text_run / "checkpoints").glob("step-*")), changed)
    config = stored(changed)
    (changed / "config.json").write_text(json.dumps(config | {"num_loops": 3}), encoding="utf-8")
    said = refused(invoke, "convert", changed, "--out", new)
    assert f"openmythos convert {changed} --no-verify --out NEW" in said
    invoke("convert", changed, "--no-verify", "--out", new)
    assert load_pretrained(new).config.num_loops == 3


def test_names_of_families_are_plain(invoke: Invoke, hops_run: Path, tmp_path: Path) -> None:
    said = refused(invoke, "convert", hops_run, "--to", "x", "--out", tmp_path / "out")
    names = said.partition("allowed: ")[2].split(", ")
    assert {"openmythos", "parcae", "parcae-gpt"} <= set(names)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)


@pytest.mark.parametrize("command", ["convert", "export"])
def test_walks_go_where_their_model_goes(invoke: Invoke, tmp_path: Path, command: str) -> None:
    asked = ("--prompt", "e3 r1 r0", "--json")
    expected = invoke("generate", "zoo:walks", *asked)
    for _ in range(2):  # what was written before is no stranger's
        invoke(command, "zoo:walks", "--out", tmp_path / "out")
        assert invoke("generate", tmp_path / "out", *asked) == expected
    walks, before = puzzle_of(tmp_path / "out"), puzzle_of(local_folder("zoo:walks"))
    assert walks is not None and before is not None and walks.config == before.config


def test_walks_go_to_other_families_and_from_older_runs(
    invoke: Invoke, golden_dir: Callable[[str], Path], hops_run: Path, tmp_path: Path
) -> None:
    settings = (local_folder("zoo:walks") / PUZZLE_FILE).read_bytes()
    source, out = tmp_path / "source", tmp_path / "out"
    invoke("convert", golden_dir("openmythos-mla"), "--out", source)
    (source / WALKS_FILE).write_bytes(settings)  # where an older version wrote them
    invoke("convert", source, "--to", "original-openmythos", "--out", out)
    written = json.loads((out / PUZZLE_FILE).read_bytes())  # with what newer versions added
    assert written.items() >= json.loads(settings).items() and not (out / WALKS_FILE).exists()
    older = shutil.copytree(hops_run, tmp_path / "older")
    (newest,) = older.glob("checkpoints/step-*")
    stored_walks = (newest / PUZZLE_FILE).read_bytes()
    (newest / PUZZLE_FILE).unlink()
    invoke("convert", older, "--no-verify", "--out", tmp_path / "new")
    assert (tmp_path / "new" / PUZZLE_FILE).read_bytes() == stored_walks


def test_held_out_text_goes_along_with_its_licence(invoke: Invoke, tmp_path: Path) -> None:
    out, source = tmp_path / "out", local_folder("zoo:text")
    for name in ("zoo:text", out):
        invoke("convert", name, "--out", out)
        for file in (HELD_OUT_FILE, "LICENSE-PYTHON.txt"):
            assert (out / file).read_bytes() == (source / file).read_bytes()
    assert checkpoint_damage(out) is None
    scores = [
        invoke("eval", name, "--num-loops", 1, "--limit", 1, "--tasks", "held_out", "--json")
        for name in ("zoo:text", out)
    ]
    assert json.loads(scores[0])["curves"] == json.loads(scores[1])["curves"]
    (out / HELD_OUT_FILE).write_text("{}", encoding="utf-8")
    assert checkpoint_damage(out) is not None


def test_what_was_measured_stays_with_the_same_weights(
    invoke: Invoke, text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    invoke("convert", text_run, "--out", source)
    for name in (EXIT_FILE, EXIT_PICTURE):
        (source / name).write_text(name)
    invoke("convert", source, "--out", out)
    assert (out / EXIT_FILE).read_text() == EXIT_FILE and (out / EXIT_PICTURE).is_file()
    (out / EXIT_FILE).write_text("measured again")
    assert checkpoint_damage(out) is None
    for words in (
        ("convert", source, "--dtype", "float16"),
        ("convert", source, "--no-verify"),
        ("export", source, "--num-loops", 1),
    ):
        target = tmp_path / "-".join(map(str, words[2:]))
        invoke(*words, "--out", target)
        assert not (target / EXIT_FILE).exists() and (source / EXIT_FILE).exists()
    invoke("export", source, "--out", tmp_path / "export")
    assert (tmp_path / "export" / EXIT_FILE).is_file()


def test_template_and_sampling_go_along(invoke: Invoke, tmp_path: Path) -> None:
    model = random_model(small_config())
    folder = write_chat_folder(save_pretrained(model, tmp_path / "chat"))
    invoke("convert", folder, "--out", tmp_path / "out")
    before, after = Tokenizer.load(folder), Tokenizer.load(tmp_path / "out")
    assert before.chat_template is not None and before.chat_template == after.chat_template
    assert before.generation and before.generation == after.generation
    assert before.end_ids == after.end_ids and before.sampling == after.sampling


def test_other_peoples_texts_and_licences_are_not_replaced(
    invoke: Invoke, text_run: Path, tmp_path: Path
) -> None:
    for name in (HELD_OUT_FILE, "LICENSE"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        assert "would delete" in refused(invoke, "convert", text_run, "--out", folder)
        assert (folder / name).read_text() == "mine"


# --- adapters -------------------------------------------------------------------------------------


def adapter_of(base: Path, folder: Path, num_loops: int | None = None) -> Path:
    """A base in a folder, and an adapter of it in another."""
    signal = None if num_loops is None else LearnedLoopConfig(num_loops=2)
    model = random_model(small_config(vocab_size=259, loop_embedding=signal))
    save_pretrained(model, base, byte_tokenizer())
    return random_adapter(model, base, folder, num_loops)


def random_adapter(
    model: om.RecurrentDepthLM, base: Path, folder: Path, num_loops: int | None = None
) -> Path:
    """An adapter of the model in a base's folder, in another."""
    adapter = new_adapter(model, AdapterConfig(rank=2, num_loops=num_loops), str(base), seed=0)
    for changes in changes_of(model).values():
        randomise(torch.nn.ModuleList(changes))
    folder.mkdir()
    save_adapter(own_tensors(model), adapter, folder)
    return folder


def test_an_adapter_alone_or_merged(invoke: Invoke, tmp_path: Path) -> None:
    folder = adapter_of(tmp_path / "base", tmp_path / "adapter", num_loops=2)
    invoke("convert", folder, "--out", tmp_path / "merged")
    merged, tokens = load_pretrained(tmp_path / "merged"), torch.arange(12).view(2, 6)
    assert stored(tmp_path / "merged")["loop_adapter"]["num_loops"] == 2
    assert torch.equal(merged(tokens).logits, load_pretrained(folder)(tokens).logits)
    said = refused(invoke, "convert", folder, "--adapter-only", "--out", tmp_path / "no")
    assert "has a change per loop, which PEFT cannot express" in said
    shared = adapter_of(tmp_path / "base", tmp_path / "shared")
    options = ("--adapter-only", "--out", tmp_path / "alone")
    assert json.loads(invoke("convert", shared, *options, "--json"))["format"] == "openmythos"
    said = refused(invoke, "convert", shared, *options, "--dtype", "bfloat16")
    assert "without --dtype bfloat16: leave one of them out" in said
    found = load_pretrained(tmp_path / "base", adapter=tmp_path / "alone")(tokens).logits
    assert (found - load_pretrained(shared)(tokens).logits).abs().max() < 1e-5
    said = refused(invoke, "convert", tmp_path / "base", *options)
    assert "base has no adapter: leave --adapter-only out" in said


def test_an_adapter_of_a_published_model_gets_its_familys_names(
    invoke: Invoke, golden_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(golden_dir("ouro"), base)
    folder = random_adapter(load_pretrained(base), base, tmp_path / "adapter")
    options = ("--adapter-only", "--to", "ouro", "--out", tmp_path / "lora")
    assert json.loads(invoke("convert", folder, *options, "--json"))["format"] == "ouro"
    own, published = (
        load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "lora")
    )
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert layer in published and len(published) == len(own)
    tokens = torch.arange(12).view(2, 6)
    found = load_pretrained(base, adapter=tmp_path / "lora")(tokens).logits
    merged = load_pretrained(folder)(tokens).logits
    assert (
        (found - merged).abs().max() < 1e-5 < (merged - load_pretrained(base)(tokens).logits).std()
    )


def test_bad_adapters_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    folder = adapter_of(base, tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    train = ("train", "--from", base, "--data", tmp_path / "text.txt", "--out", out, "--set")
    said = error_line(capsys, *train, 'train.adapter.targets=["q_poj"]')
    assert "no layer of the model is called 'q_poj'" in said and "nearest names are q_proj" in said
    said = error_line(capsys, *train, "train.adapter.num_loops=2")
    assert "the model's loops are all the same" in said
    said = error_line(capsys, "generate", folder, "--prompt", "a")
    assert "is an adapter without a tokenizer" in said
    shutil.copy(base / "tokenizer.json", folder)
    save_pretrained(random_model(small_config(vocab_size=259), seed=5), base, byte_tokenizer())
    said = error_line(capsys, "generate", folder, "--prompt", "a")
    assert (
        "is an adapter of another model than" in said and "it was trained on weights with" in said
    )
    assert not out.exists() or not (out / "config.json").exists()
