from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from torch import Tensor

from openmythos.interop import gguf as ours
from openmythos.interop.gguf import convert_gguf
from openmythos.interop.loading import load_pretrained
from openmythos.tokenizer import Tokenizer, byte_tokenizer
from tests.interop.families.test_llama import llama_logits, random_llama

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "1 2"]
NAMES = {theirs: name for name, theirs in ours.TENSORS.items()}
OUTER = {theirs: name for name, theirs in ours.OUTER.items()}
TEXTS = ["the thing in  12 years", "in 2012\n\n\tthe   end", "<|im_end|> é 1234"]


def vocabulary() -> tuple[list[str], list[int]]:
    """Control tokens, one that users defined, the bytes, and what the merges make."""
    letters = sorted(byte_tokenizer()._config["model"]["vocab"])[:-3]
    tokens = [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in MERGES)]
    kinds = [ours.CONTROL] * 3 + [ours.USER_DEFINED] + [1] * (len(tokens) - 4)
    return tokens, kinds


def paired_rows(weight: Tensor, num_heads: int) -> Tensor:
    """As llama.cpp's writer reorders q and k."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(path: Path, model: transformers.LlamaForCausalLM, **changes: Any) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, changes.get("arch", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if "scaling" in changes:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    tokens, kinds = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        stem, _, rest = name.removeprefix("model.layers.").partition(".")
        inner = NAMES.get(rest.removesuffix(".weight"))
        place = OUTER.get(name) or f"blk.{stem}.{inner}.weight"
        if inner in ("attn_q", "attn_k"):
            kv = config.num_key_value_heads
            tensor = paired_rows(tensor, config.num_attention_heads if inner == "attn_q" else kv)
        if place != "output.weight" or not config.tie_word_embeddings:
            writer.add_tensor(place, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_llama(**changes: Any) -> transformers.LlamaForCausalLM:
    return random_llama(
        vocab_size=len(vocabulary()[0]), num_hidden_layers=2, rms_norm_eps=1e-5, **changes
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_the_llama_it_was_made_of(tmp_path: Path, tied: bool) -> None:
    theirs = small_llama(tie_word_embeddings=tied)
    folder = convert_gguf(write_gguf(tmp_path / "a.gguf", theirs), tmp_path / "model")
    model, tokens = load_pretrained(folder), torch.arange(24).view(2, 12)
    assert (model(tokens).logits - llama_logits(theirs, tokens)).abs().max() < 1e-5
    assert model.config.tie_embeddings is tied
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (llama_logits(opened, tokens) - llama_logits(theirs, tokens)).abs().max() < 1e-5


def test_the_rows_of_q_and_k_come_back() -> None:
    weight = torch.arange(48.0).view(24, 2)
    assert torch.equal(ours._rotate_half_rows(paired_rows(weight, 3), 3), weight)
    assert not torch.equal(paired_rows(weight, 3), weight)


def test_the_tokenizer_is_that_of_transformers(tmp_path: Path) -> None:
    """Digits one by one, as the model was trained: '12' is a merge that is never used."""
    folder = convert_gguf(write_gguf(tmp_path / "a.gguf", small_llama()), tmp_path / "model")
    found = Tokenizer.load(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    names = (theirs.bos_token, theirs.eos_token, theirs.pad_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (found.bos_id, found.eos_id, found.pad_id) == (1, 2, 2)
    for text in TEXTS:
        ids = found.encode(text)
        if "<|" not in text:  # ours never makes a special token out of text
            assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert found.decode(ids) == text
    assert found.encode("the")[0] != found.encode(" the")[0] == found._backend.token_to_id("Ġthe")
    plain = write_gguf(tmp_path / "b.gguf", small_llama(), pre="gpt-2")
    joined = Tokenizer.load(convert_gguf(plain, tmp_path / "plain"))
    assert len(joined.encode("12")) == 1 and len(found.encode("12")) == 2


def test_quantised_weights_are_the_numbers_that_the_file_stands_for(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, quantize

    theirs = small_llama(hidden_size=64, intermediate_size=64, tie_word_embeddings=True)
    state = theirs.state_dict()
    kind = GGMLQuantizationType.Q8_0  # 32 numbers share a scale
    name = "model.layers.0.mlp.down_proj.weight"
    packed = quantize(state[name].numpy(), kind)
    wide = torch.from_numpy(gguf.dequantize(packed, kind))
    assert 0 < (wide - state[name]).abs().max() < 0.02
    path = tmp_path / "a.gguf"
    writing = gguf.GGUFWriter.add_tensor

    def add(writer: gguf.GGUFWriter, place: str, data: Any) -> None:
        if place == "blk.0.ffn_down.weight":
            writing(writer, place, packed, raw_dtype=kind)
        else:
            writing(writer, place, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add)
        write_gguf(path, theirs)
    model = load_pretrained(convert_gguf(path, tmp_path / "model"))
    assert torch.equal(model.core[0].feed_forward.down.weight, wide)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arch": "gemma"}, "general.architecture is 'gemma'; only 'llama' is read"),
        ({"pre": "llama-bpe"}, "with pre 'llama-bpe'; allowed"),
        ({"scaling": True}, "scaled rotary positions are not read"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", small_llama(), **changes)
    with pytest.raises(ValueError, match=r"a\.gguf") as error:
        convert_gguf(path, tmp_path / "model")
    assert said in str(error.value)
    assert not (tmp_path / "model").exists()


def test_what_is_no_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        convert_gguf(tmp_path / "absent.gguf", tmp_path / "model")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        convert_gguf(other, tmp_path / "model")
    whole = write_gguf(tmp_path / "a.gguf", small_llama())
    short = tmp_path / "short.gguf"
    short.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"short\.gguf is truncated or damaged"):
        convert_gguf(short, tmp_path / "model")
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the gguf package"):
        convert_gguf(whole, tmp_path / "model")
    assert not (tmp_path / "model").exists()
