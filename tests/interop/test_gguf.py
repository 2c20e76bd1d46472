from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from openmythos.config import Llama3ScalingConfig, RopeConfig
from openmythos.interop import gguf as ours
from openmythos.interop.families.llama import LLAMA
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import load_config, load_pretrained
from openmythos.interop.writing import save_as
from openmythos.tokenizer import Tokenizer
from tests.foreign import CHATML
from tests.interop.families.test_llama import llama_logits, random_llama
from tests.interop.test_gguf_tokenizer import MERGES, vocabulary

NAMES = {theirs: name for name, theirs in ours.TENSORS.items()}
OUTER = {theirs: name for name, theirs in ours.OUTER.items()}
# Llama 3.1's and 3.2's; then limits that are nobody's.
SCALINGS = {
    "3.1": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8192},
    "3.2": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8192},
    "other": {"factor": 4.0, "low_freq_factor": 1.5, "high_freq_factor": 6.0, "original": 2048},
}


def paired_rows(weight: Tensor, num_heads: int) -> Tensor:
    """As llama.cpp's writer reorders q and k."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(path: Path, model: transformers.LlamaForCausalLM, **changes: Any) -> Path:
    config = model.config
    most = changes.get("tensors_per_part", 0)
    writer = gguf.GGUFWriter(path, changes.get("arch", "llama"), split_max_tensors=most)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if changes.get("scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    if "factors" in changes:
        writer.add_tensor(ours.ROPE_FACTORS, changes["factors"])
    tokens, kinds = vocabulary()
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
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
    path = write_gguf(tmp_path / "a.gguf", theirs)
    model, tokens = load_pretrained(path), torch.arange(24).view(2, 12)
    assert (model(tokens).logits - llama_logits(theirs, tokens)).abs().max() < 1e-5
    assert model.config.tie_embeddings is tied and load_config(path) == model.config
    assert load_pretrained(path, dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16
    folder = save_as(LLAMA, model, tmp_path / "model", tokenizer=Tokenizer.load(local_folder(path)))
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (llama_logits(opened, tokens) - llama_logits(theirs, tokens)).abs().max() < 1e-5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gguf", "model"]
    text = Tokenizer.load(folder)
    assert (text.bos_id, text.eos_id, text.chat_template) == (1, 2, CHATML)


def test_the_rows_of_q_and_k_come_back() -> None:
    weight = torch.arange(48.0).view(24, 2)
    assert torch.equal(ours.rotate_half_rows(paired_rows(weight, 3), 3), weight)
    assert not torch.equal(paired_rows(weight, 3), weight)


def llama3(name: str, theta: float = 500_000.0) -> dict[str, Any]:
    fields = dict(SCALINGS[name])
    fields["original_max_position_embeddings"] = fields.pop("original")
    return {"rope_type": "llama3", "rope_theta": theta, **fields}


def rope_factors(config: transformers.LlamaConfig) -> Any:
    """As llama.cpp's writer has them: by how much transformers divides each frequency."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = {**config.rope_parameters, "rope_type": "default"}
    unscaled = LlamaRotaryEmbedding.compute_default_rope_parameters(
        transformers.LlamaConfig(**{**config.to_dict(), "rope_parameters": plain})
    )[0]
    return (unscaled / scaled).numpy()


@pytest.mark.parametrize("name", SCALINGS)
def test_the_scaled_positions_of_llama_3(tmp_path: Path, name: str) -> None:
    """Head size 64 as in Llama 3.2, in which the file has 32 factors."""
    changes: dict[str, Any] = {"head_dim": 64, "max_position_embeddings": 20_000}
    theirs = small_llama(rope_parameters=llama3(name), **changes)
    factors = rope_factors(theirs.config)
    assert factors.min() == 1 and factors.max() == pytest.approx(SCALINGS[name]["factor"])
    path = write_gguf(tmp_path / "a.gguf", theirs, factors=factors, pre="llama-bpe")
    model, tokens = load_pretrained(path), torch.arange(24).view(2, 12)
    far = torch.arange(19_000, 19_012).expand(2, 12)
    with torch.no_grad():
        wanted = theirs(input_ids=tokens, position_ids=far, use_cache=False).logits
    found = model(tokens, ctx=model.context(tokens, positions=far)).logits
    plain = small_llama(**changes)
    plain.load_state_dict(theirs.state_dict())
    off = (llama_logits(plain, tokens) - llama_logits(theirs, tokens)).abs().max()
    assert (found - wanted).abs().max() < 1e-3 < off
    scaling = model.config.rope.scaling
    assert scaling is not None and scaling.factor == SCALINGS[name]["factor"]
    if name != "other":
        expected = Llama3ScalingConfig(factor=scaling.factor)
        assert scaling == expected


def test_factors_that_scale_nothing_and_those_of_others(tmp_path: Path) -> None:
    theirs = small_llama()
    ones = np.ones(theirs.config.head_dim // 2, dtype=np.float32)
    path = write_gguf(tmp_path / "a.gguf", theirs, factors=ones)
    assert load_config(path).rope == RopeConfig(theta=1e4)
    for wrong in (ones * 2 - np.arange(len(ones), dtype=np.float32) / 9, ones[:-1]):
        path = write_gguf(tmp_path / f"{len(wrong)}.gguf", theirs, factors=wrong)
        with pytest.raises(ValueError, match=r"the factors in rope_freqs.weight are not those"):
            load_config(path)


def test_the_parts_of_a_split_file_are_one_model(tmp_path: Path) -> None:
    theirs, tokens = small_llama(), torch.arange(24).view(2, 12)
    write_gguf(tmp_path / "b.gguf", theirs, tensors_per_part=8)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"b-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    for part in parts:
        logits = load_pretrained(part)(tokens).logits
        assert (logits - llama_logits(theirs, tokens)).abs().max() < 1e-5
    whole = parts[1].read_bytes()
    renamed = tmp_path / "c.gguf"
    renamed.write_bytes(whole)
    with pytest.raises(ValueError, match=r"c\.gguf says that it is part 2 of 3"):
        load_pretrained(renamed)
    parts[1].unlink()
    for part in (parts[0], parts[2], parts[1]):
        with pytest.raises(ValueError, match=r"of 3 parts; missing: b-00002-of-00003\.gguf$"):
            load_pretrained(part)
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(ValueError, match=r"b-00002-of-00003\.gguf says that it is part 1 of 3"):
        load_pretrained(parts[0])


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
    assert torch.equal(load_pretrained(path).core[0].feed_forward.down.weight, wide)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arch": "gemma"}, "general.architecture is 'gemma'; only 'llama' is read"),
        ({"scaling": True}, "scaling.type=linear: such scaled rotary positions are not supported"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", small_llama(), **changes)
    with pytest.raises(ValueError, match=r"a\.gguf") as error:
        load_pretrained(path)
    assert said in str(error.value)


def test_a_tokenizer_that_cannot_be_mapped_is_left_out_aloud(tmp_path: Path) -> None:
    theirs, tokens = small_llama(), torch.arange(24).view(2, 12)
    path = write_gguf(tmp_path / "a.gguf", theirs, tokenizer="llama")
    with pytest.warns(UserWarning, match=r"tokenizer of .*a\.gguf is left out: it is of the kind"):
        model = load_pretrained(path)
    assert (model(tokens).logits - llama_logits(theirs, tokens)).abs().max() < 1e-5
    assert not (local_folder(path) / "tokenizer.json").exists()
    assert local_folder(local_folder(path)) == local_folder(path)  # named as the file


def test_weights_that_are_not_a_llamas(tmp_path: Path) -> None:
    theirs = small_llama()
    with torch.no_grad():
        theirs.model.norm.weight[3] = float("nan")
    path = write_gguf(tmp_path / "a.gguf", theirs)
    with pytest.raises(ValueError, match=r"a\.gguf: output_norm.weight holds NaN"):
        load_pretrained(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OUTER, "model.norm.weight", "output_norm.bias")
        path = write_gguf(tmp_path / "b.gguf", theirs)
    with pytest.raises(ValueError, match=r"b\.gguf: unknown tensor output_norm.bias"):
        load_pretrained(path)


def test_what_is_no_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_pretrained(tmp_path / "absent.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        load_pretrained(other)
    whole = write_gguf(tmp_path / "a.gguf", small_llama())
    short = tmp_path / "short.gguf"
    short.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"short\.gguf is truncated or damaged"):
        load_pretrained(short)
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the gguf package"):
        load_pretrained(whole)
