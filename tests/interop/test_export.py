import ast
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file

from openmythos.config import ModelConfig, SwiGLUConfig, counts
from openmythos.config.member import Member
from openmythos.interop import export
from openmythos.interop.export import CODE_FILES, FAMILY, SOURCES, check_covered, export_hf
from openmythos.interop.families.llama import LLAMA
from openmythos.interop.loading import load_pretrained
from openmythos.interop.mapping import export_config, export_tensors
from openmythos.interop.writing import save_as
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer, byte_tokenizer
from tests.command.conftest import invoke_app
from tests.foreign import CHATML, write_chat_folder
from tests.interop.hf.examples import CONFIGS, DENSE, PARCAE, SPARSE
from tests.strategies import random_model, unchecked


def stored(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_an_export_loads_back_as_the_same_model(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config)
    again = load_pretrained(export_hf(model, tmp_path / "export"))
    assert again.config == config
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


GOLDENS = ["openmythos-mla", "openmythos-gqa", "huginn", "parcae", "ouro"]


@pytest.mark.parametrize("name", GOLDENS)
def test_a_published_model_exports_and_comes_back(
    golden_dir: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    model = load_pretrained(golden_dir(name))
    again = load_pretrained(export_hf(model, tmp_path / "export"))
    tokens = load_file(golden_dir(name) / "io.safetensors")["input_ids"]
    assert again.config == model.config
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_loading_does_not_run_the_code_of_the_folder(tmp_path: Path) -> None:
    folder = export_hf(random_model(DENSE), tmp_path / "export")
    for name in CODE_FILES:
        (folder / name).write_text("raise SystemExit('ran')\n", encoding="utf-8")
    assert load_pretrained(folder).config == DENSE
    assert not any(name.startswith("openmythos.interop.hf.") for name in sys.modules)


def test_names_are_the_ones_that_engines_look_for() -> None:
    names = set(export_tensors(FAMILY, random_model(SPARSE)))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert {f"model.prelude.0.self_attn.{x}_proj.weight" for x in "qkvo"} <= names
    assert {f"model.coda.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")} <= names
    moe = "model.core.1.mlp"
    assert {
        f"{moe}.gate.weight",
        f"{moe}.gate.selection_bias",
        f"{moe}.experts.gate_up_proj",
        f"{moe}.experts.down_proj",
        f"{moe}.shared_experts.up_proj.weight",
    } <= names
    assert "lm_head.weight" in export_tensors(FAMILY, random_model(PARCAE))


def test_fields_that_transformers_leaves_out_or_adds() -> None:
    written = export_config(FAMILY, DENSE)
    assert "attention" in written and "kv_lora_rank" not in written
    del written["tie_word_embeddings"]  # its default
    read = FAMILY.read_config({**written, "transformers_version": "5.23.0", "head_dim": 4})
    assert read == DENSE
    with pytest.raises(ValueError, match="unknown key 'sliding_window'"):
        FAMILY.read_config({**written, "sliding_window": 4})


# --- the folder -----------------------------------------------------------------------------------


def test_the_folder_holds_what_transformers_reads(tmp_path: Path) -> None:
    folder = export_hf(random_model(DENSE), tmp_path / "export", tokenizer=byte_tokenizer())
    config, generation = stored(folder), stored(folder, "generation_config.json")
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["architectures"] == ["OpenMythosForCausalLM"]
    assert (config["hidden_size"], config["num_loops"], config["dtype"]) == (16, 4, "float32")
    for data in (config, generation):
        assert [data[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [0, 1, 2]
    settings = stored(folder, "tokenizer_config.json")
    assert settings["bos_token"] == "<|bos|>" and settings["pad_token"] == "<|pad|>"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{counts.total_params(DENSE):,} parameters" in card and "$" not in card
    assert (
        load_file(folder / "model.safetensors").keys()
        == export_tensors(FAMILY, random_model(DENSE)).keys()
    )


def test_dtype_depth_and_shards(tmp_path: Path) -> None:
    model = random_model(SPARSE)
    folder = export_hf(
        model, tmp_path / "export", dtype=torch.bfloat16, num_loops=7, max_shard_bytes=4000
    )
    index = stored(folder, "model.safetensors.index.json")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2 and {path.name for path in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for path in files for tensor in load_file(path).values()
    )
    again = load_pretrained(folder)
    assert again.config == replace(SPARSE, num_loops=7)
    assert stored(folder)["dtype"] == "bfloat16"
    assert torch.equal(again.embed.weight, model.embed.weight.bfloat16())
    bias = again.core[0].feed_forward.bias
    assert bias.dtype == torch.float32 and torch.equal(bias, model.core[0].feed_forward.bias)
    # Written again as one file: the shards of the first time are gone.
    export_hf(model, folder)
    assert not list(folder.glob("model-*.safetensors"))
    assert load_pretrained(folder).config == SPARSE


def test_another_projects_tokenizer_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    (source / "config.json").write_text('{"bos_token_id": 5, "other": 1}', encoding="utf-8")
    folder = export_hf(random_model(DENSE), tmp_path / "export", tokenizer=source)
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == "{}"
    assert stored(folder)["bos_token_id"] == 5
    assert stored(folder, "generation_config.json") == {"bos_token_id": 5, "do_sample": False}


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    model, folder = random_model(DENSE), tmp_path / "export"
    export_hf(model, folder)
    export_hf(model, folder)
    (folder / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex"):
        export_hf(model, folder)
    (folder / "thesis.tex").unlink()
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ValueError, match="a checkpoint that is no export"):
        export_hf(model, folder)
    assert stored(folder) == {"model_type": "llama"}


def test_a_writer_that_fails_leaves_the_old_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_hf(random_model(DENSE), tmp_path / "export")

    def fails(*arguments: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", fails)
    with pytest.raises(OSError, match="disk full"):
        export_hf(random_model(SPARSE), folder)
    assert load_pretrained(folder).config == DENSE
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


# --- what is refused ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NewFeedForward(SwiGLUConfig):
    kind = "new"


@dataclass(frozen=True, kw_only=True)
class NewAdapter(Member):
    kind = "new"
    rank: int = 2


@pytest.mark.parametrize(
    ("seam", "part"),
    [("feed_forward", NewFeedForward(d_ff=8)), ("loop_adapter", NewAdapter())],
)
def test_a_member_that_nobody_has_heard_of_is_refused_by_name(seam: str, part: Member) -> None:
    with unchecked():
        config = replace(DENSE, **{seam: part})
        with pytest.raises(ValueError, match=f"does not cover {seam} of kind 'new'; train without"):
            check_covered(config)


def test_every_field_of_what_is_covered_is_known() -> None:
    """Otherwise a field that is covered would be refused, or one that is gone would hide here."""
    for part, names in export.COVERED.items():
        assert set(names) <= {field.name for field in fields(part)}, part.__name__


def test_what_the_code_does_not_compute_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_covered(DENSE)
    config = replace(DENSE, readout="linear")
    covered = [name for name in export.COVERED[ModelConfig] if name != "readout"]
    monkeypatch.setitem(export.COVERED, ModelConfig, covered)
    check_covered(DENSE)
    with pytest.raises(ValueError, match=r"does not cover readout='linear'; train without"):
        export_hf(RecurrentDepthLM(config), tmp_path / "export")
    monkeypatch.delitem(export.COVERED, type(DENSE.attention))
    object.__setattr__(config, "readout", "none")
    with pytest.raises(ValueError, match=r"cover attention of kind 'gqa'; train"):
        check_covered(config)
    assert not (tmp_path / "export").exists()


def test_bad_numbers_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = random_model(DENSE)
    with pytest.raises(ValueError, match="num_loops is 0"):
        export_hf(model, tmp_path / "export", num_loops=0)
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; a checkpoint may have"):
        export_hf(model, tmp_path / "export", dtype=torch.int8)
    with torch.device("meta"):
        hollow = RecurrentDepthLM(DENSE)
    with pytest.raises(ValueError, match="meta device"):
        export_hf(hollow, tmp_path / "export")
    assert not (tmp_path / "export").exists()


# --- the sources ----------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_the_sources_stand_alone() -> None:
    assert {path.name for path in SOURCES.glob("*_openmythos.py")} == set(CODE_FILES)
    siblings = {f".{Path(name).stem}" for name in CODE_FILES}
    for name in CODE_FILES:
        for module in imported(SOURCES / name) - siblings:
            first = module.split(".")[0]
            assert first in {"torch", "transformers"} or first in sys.stdlib_module_names, module


def test_nothing_imports_the_sources(repo_root: Path) -> None:
    """They are files to copy; a module that imports them needs transformers."""
    paths = [path for path in (repo_root / "openmythos").rglob("*.py") if path.parent != SOURCES]
    assert len(paths) > 50
    assert not [path for path in paths if any("interop.hf." in name for name in imported(path))]
    assert not [path for path in paths if "openmythos.interop.hf" in imported(path)]


# --- tokenizers of other projects -----------------------------------------------------------------


def llama_folder(folder: Path, **config: Any) -> Path:
    """A small Llama with an instruct model's tokenizer, as another project writes it."""
    fields = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        **config,
    }
    save_as(LLAMA, random_model(LLAMA.read_config(fields)), folder)
    return write_chat_folder(folder)


TALK = [{"role": "user", "content": "a <|im_end|> b"}]
TEXTS = ["the thé", "", "a <|im_end|> b", "  \n"]


def tokenised(folder: Path) -> list[Any]:
    """What transformers makes of a folder's tokenizer: ids, a conversation, and its generation."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    return [
        theirs(TEXTS)["input_ids"],
        theirs.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"],
        (theirs.eos_token, theirs.padding_side),
        (generation.eos_token_id, generation.do_sample, generation.temperature),
    ]


def test_a_chat_model_stays_one_through_export_and_retrofit(tmp_path: Path) -> None:
    """Marks in a text, the template, end ids and sampling are the source's, whichever way."""
    source = llama_folder(tmp_path / "source")
    way = [("export", source, "a"), ("export", "a", "b"), ("retrofit", source, "c")]
    way += [("export", "c", "d"), ("convert", source, "e"), ("export", "e", "f")]
    for command, start, out in way:
        invoke_app(command, tmp_path / start, "--out", tmp_path / out)
    expected = tokenised(source)
    assert expected[3] == ([260, 258], True, 0.6) and len(expected[0][0]) > 3
    for name in "abdf":
        assert tokenised(tmp_path / name) == expected, name
        found = Tokenizer.load(tmp_path / name)
        assert found.chat_template == CHATML and found.end_ids == {258, 260}
        for_llama_cpp = gguf.SpecialVocab(tmp_path / name)  # as its conversion reads a folder
        assert for_llama_cpp.chat_template == CHATML
        assert for_llama_cpp.special_token_ids["eos"] == 260
    for name in "ce":  # our own form
        found = Tokenizer.load(tmp_path / name)
        assert found.chat_template == CHATML and found.encode_chat(TALK)
        assert found.encode_prompt("the thé") == expected[0][0]


def test_what_was_tuned_in_transformers_is_exported_again_as_it_was(tmp_path: Path) -> None:
    """Its ``save_pretrained`` puts the template into a file of its own."""
    source = llama_folder(tmp_path / "source")
    first, tuned, again = (tmp_path / name for name in ("first", "tuned", "again"))
    invoke_app("export", source, "--out", first)
    export = transformers.AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True)
    with torch.no_grad():
        export.model.norm.weight.mul_(2)
    export.save_pretrained(tuned)
    theirs = transformers.AutoTokenizer.from_pretrained(first, trust_remote_code=True)
    theirs.save_pretrained(tuned)
    assert (tuned / "chat_template.jinja").is_file()
    invoke_app("export", tuned, "--out", again)
    assert tokenised(again) == tokenised(first) == tokenised(source)
    opened = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    ids = torch.arange(8)[None]
    assert torch.equal(opened(ids).logits, export(ids).logits)


def test_our_own_tokenizer_begins_texts_in_an_export_as_here(tmp_path: Path) -> None:
    model = random_model(replace(DENSE, vocab_size=259))
    folder = export_hf(model, tmp_path / "export", tokenizer=byte_tokenizer())
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for text in ("the", "<|eos|>", ""):
        assert theirs(text)["input_ids"] == byte_tokenizer().encode_prompt(text)
