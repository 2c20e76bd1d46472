import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from openmythos import generate
from openmythos.checkpoint.save import save_pretrained
from openmythos.config import ModelConfig
from openmythos.config.adapter import AdapterConfig
from openmythos.interop.adapter import chosen_layers, new_adapter, save_adapter
from openmythos.interop.adapter import trained as own_tensors
from openmythos.interop.export import export_hf
from openmythos.interop.loading import load_pretrained
from openmythos.model.adapter import changes_of
from openmythos.tokenizer import byte_tokenizer
from tests.interop.hf.conftest import Open
from tests.interop.hf.examples import CONFIGS, DENSE, LATENT, ORIGINAL, PARCAE, SPARSE
from tests.strategies import random_model, random_tokens, randomise, small_config

PROMPTS = [[5, 6, 7, 8, 9], [3, 4]]
PADDED = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 0, 3, 4]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def continued(export: Any, **options: Any) -> list[list[int]]:
    """The new tokens of both prompts, left-padded into one batch."""
    options = {"attention_mask": MASK, **GREEDY, **options}
    return export.generate(PADDED, **options)[:, PADDED.shape[1] :].tolist()


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SPARSE, LATENT, ORIGINAL], ids=["sparse", "latent", "original"])
def test_greedy_tokens_are_ours_with_every_cache(opened: Open, config: ModelConfig) -> None:
    model, export = opened(config)
    for num_loops in (4, 2):
        ours = generate(model, PROMPTS, max_new_tokens=8, num_loops=num_loops).tokens
        assert continued(export, num_loops=num_loops) == ours
        static = {"cache_implementation": "static", "disable_compile": True}
        assert continued(export, num_loops=num_loops, **static) == ours
        assert continued(export, num_loops=num_loops, use_cache=False) == ours
    alone = export.generate(torch.tensor(PROMPTS[1:]), num_loops=2, **GREEDY)
    assert alone[0, 2:].tolist() == ours[1]


def test_generate_batch_gives_our_tokens(opened: Open, transformers: ModuleType) -> None:
    """Continuous batching numbers the cache by module: a slot too few would go unnoticed."""
    model, export = opened(SPARSE)
    settings = transformers.GenerationConfig(eos_token_id=-1, **GREEDY)
    small = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    outputs = export.generate_batch(
        inputs=PROMPTS, generation_config=settings, continuous_batching_config=small
    )
    found = {tuple(out.prompt_ids): list(out.generated_tokens) for out in outputs.values()}
    ours = generate(model, PROMPTS, max_new_tokens=8).tokens
    assert found == dict(zip(map(tuple, PROMPTS), ours, strict=True))


def test_beams_and_samples_do_not_depend_on_the_cache(opened: Open) -> None:
    _, export = opened(DENSE)
    static = {"cache_implementation": "static", "disable_compile": True}
    for num_loops in (4, 2):
        beams = [
            continued(export, num_beams=3, num_loops=num_loops, **cache)
            for cache in ({}, static, {"use_cache": False})
        ]
        assert beams[0] == beams[1] == beams[2]
    samples = []
    for cache in ({}, static, {"use_cache": False}):
        torch.manual_seed(1)
        samples.append(continued(export, do_sample=True, temperature=1.5, num_loops=2, **cache))
    assert samples[0] == samples[1] == samples[2] != continued(export, num_loops=2)


def test_depths_that_a_cache_cannot_be_true_to_are_refused(
    opened: Open, transformers: ModuleType
) -> None:
    _, export = opened(DENSE)
    with pytest.raises(ValueError, match=r"num_loops is 5; with a cache it must be at most the 4"):
        continued(export, num_loops=5)
    with pytest.raises(ValueError, match="num_loops is 0; it must be at least 1"):
        export(PADDED, num_loops=0)
    cache = transformers.StaticCache(config=export.config, max_cache_len=8)
    export(PADDED, num_loops=4, past_key_values=cache)
    with pytest.raises(ValueError, match="num_loops is 2, but the cache was filled at 4"):
        export(PADDED[:, :1], num_loops=2, past_key_values=cache)
    cache.reset()
    export(PADDED, num_loops=2, past_key_values=cache)


def test_a_depth_set_on_the_config_is_the_default_up_to_what_the_model_owns(opened: Open) -> None:
    """Slots are made once; the config may be changed after that."""
    model, export = opened(SPARSE)
    static = {"cache_implementation": "static", "disable_compile": True}
    for num_loops in (1, 2, 4):
        export.config.num_loops = num_loops
        ours = generate(model, PROMPTS, max_new_tokens=8, num_loops=num_loops).tokens
        assert continued(export) == continued(export, **static) == ours
        assert continued(export, use_cache=False) == ours
    export.config.num_loops = 5
    for call in (continued, lambda model: model(PADDED)):
        with pytest.raises(ValueError, match="at most the 4 that this model was made with"):
            call(export)
    deep = export(PADDED, use_cache=False).logits
    assert (deep - model(PADDED, num_loops=5).logits).abs().max() < 2e-5


def test_a_cache_with_too_few_layers_is_refused(opened: Open, transformers: ModuleType) -> None:
    _, export = opened(DENSE)
    export.config.num_loops = 2
    caches = [
        transformers.StaticCache(config=export.config, max_cache_len=8),
        transformers.DynamicCache(config=export.config),
    ]
    export.config.num_loops = 4
    for cache in caches:
        with pytest.raises(ValueError, match="the cache has 6 layers, room for 2"):
            export(PADDED, past_key_values=cache)
        export(PADDED, num_loops=2, past_key_values=cache)


def test_a_generation_config_carries_the_depth(opened: Open, transformers: ModuleType) -> None:
    model, export = opened(DENSE)
    ours = {n: generate(model, PROMPTS, max_new_tokens=8, num_loops=n).tokens for n in (1, 2, 4)}
    settings = transformers.GenerationConfig(**GREEDY, num_loops=1)

    def found(**options: Any) -> list[list[int]]:
        out = export.generate(PADDED, settings, attention_mask=MASK, **options)
        return out[:, PADDED.shape[1] :].tolist()

    assert found() == ours[1] and found(num_loops=2) == ours[2]
    export.generation_config.num_loops = 2
    assert continued(export) == ours[2] and continued(export, num_loops=4) == ours[4]


def test_continuous_batching_obeys_the_config_and_ignores_nothing(
    opened: Open, transformers: ModuleType
) -> None:
    model, export = opened(DENSE)
    settings = transformers.GenerationConfig(eos_token_id=-1, **GREEDY)
    options = {
        "generation_config": settings,
        "continuous_batching_config": transformers.ContinuousBatchingConfig(
            num_blocks=4, max_batch_tokens=32
        ),
    }
    for wrong, message in (
        ({"num_loops": 1}, "num_loops is 1, but continuous batching .* model.config.num_loops = 1"),
        ({"num_beams": 3}, "generate_batch takes no num_beams"),
    ):
        with pytest.raises(ValueError, match=message):
            export.generate_batch(PROMPTS, **options, **wrong)
    settings.num_loops = 1
    with pytest.raises(ValueError, match="num_loops is 1, but continuous batching"):
        export.generate_batch(PROMPTS, **options)
    export.config.num_loops = 1
    found = export.generate_batch(PROMPTS, **options, num_loops=1).values()
    ours = generate(model, PROMPTS, max_new_tokens=8, num_loops=1).tokens
    assert sorted(out.generated_tokens for out in found) == sorted(ours)


def test_drafts_of_fewer_loops_change_no_token(opened: Open) -> None:
    """``assistant_early_exit`` counts slots: 2 outside the core, then 2 per loop."""
    model, export = opened(DENSE)
    prompt = torch.tensor(PROMPTS[:1])
    ours = generate(model, PROMPTS[:1], max_new_tokens=8).tokens
    for num_layers in (4, 6):
        out = export.generate(prompt, assistant_early_exit=num_layers, **GREEDY)
        assert out[:, prompt.shape[1] :].tolist() == ours
    for num_layers in (3, 5, 10):
        with pytest.raises(ValueError, match=rf"exit is {num_layers}; .* one of \[4, 6, 8\]"):
            export.generate(prompt, assistant_early_exit=num_layers, **GREEDY)
    with pytest.raises(ValueError, match="assistant_early_exit and num_loops do not go together"):
        export.generate(prompt, assistant_early_exit=4, num_loops=2, **GREEDY)
    assert continued(export) == generate(model, PROMPTS, max_new_tokens=8).tokens


def test_a_deeper_model_is_a_reload(transformers: ModuleType, tmp_path: Path) -> None:
    model = random_model(DENSE)
    folder = export_hf(model, tmp_path / "export")
    auto = transformers.AutoModelForCausalLM
    export = auto.from_pretrained(folder, trust_remote_code=True, num_loops=6)
    ours = generate(model, PROMPTS, max_new_tokens=8, num_loops=6).tokens
    assert continued(export) == ours
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert base(PADDED).last_hidden_state.shape == (2, 5, 16)  # what vLLM asks for
    states = base(PADDED, output_hidden_states=True).hidden_states
    assert len(states) == 1 + DENSE.effective_depth()


def test_inputs_that_do_not_fit_together_are_refused(opened: Open) -> None:
    _, export = opened(DENSE)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        export(PADDED, inputs_embeds=torch.zeros(1, 2, 16))
    embeds = export.get_input_embeddings()(PADDED)
    assert torch.equal(export(inputs_embeds=embeds).logits, export(PADDED).logits)


# --- another process, without this package --------------------------------------------------------

PROGRAM = """
import json, sys
sys.modules["openmythos"] = None  # importing it is an error from here on
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(["def <|eos|>", "a"], return_tensors="pt", padding=True)
out = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_loops=2)
ids = inputs["input_ids"]
print(json.dumps([ids.tolist(), out[:, ids.shape[1]:].tolist()]))
"""


@pytest.mark.slow
def test_a_fresh_process_needs_neither_this_package_nor_a_network(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = random_model(small_config(vocab_size=tokenizer.vocab_size))
    folder = export_hf(model, tmp_path / "export", tokenizer=tokenizer)
    ran = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(folder)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    ids, new = json.loads(ran.stdout.splitlines()[-1])
    texts = ["def <|eos|>", "a"]
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    assert ids == [rows[0], [tokenizer.pad_id] * (len(rows[0]) - len(rows[1])) + rows[1]]
    stops = [tokenizer.eos_id]
    ours = generate(model, rows, max_new_tokens=8, num_loops=2, stop_tokens=stops).tokens
    for found, expected in zip(new, ours, strict=True):
        assert found[: len(expected)] == expected


# --- a vocabulary of another size -----------------------------------------------------------------


@pytest.mark.parametrize("config", [PARCAE, DENSE], ids=["parcae", "dense"])
@pytest.mark.parametrize("size", [37, 29])
@torch.no_grad()
def test_tables_of_values_follow_the_vocabulary(
    opened: Open, transformers: ModuleType, tmp_path: Path, config: ModelConfig, size: int
) -> None:
    _, export = opened(config)
    tokens = random_tokens(replace(config, vocab_size=min(size, config.vocab_size)), 2, 9)
    before = export(tokens).logits[..., : min(size, config.vocab_size)]
    export.resize_token_embeddings(size, mean_resizing=False)
    new = torch.tensor([[size - 1, 3]])
    assert (export(tokens).logits[..., : before.shape[-1]] - before).abs().max() < 1e-5
    export.save_pretrained(tmp_path / "resized")
    model = load_pretrained(tmp_path / "resized")
    again = type(export).from_pretrained(tmp_path / "resized")
    assert model.config == replace(config, vocab_size=size)
    for found in (model(new).logits, again(new).logits):
        assert (found - export(new).logits).abs().max() < 1e-5


# --- training -------------------------------------------------------------------------------------


def test_labels_are_shifted_by_the_loss(opened: Open) -> None:
    model, export = opened(DENSE)
    tokens = random_tokens(DENSE, 2, 9)
    labels = tokens.clone()
    labels[0, :4] = -100
    logits = model(tokens).logits[:, :-1].reshape(-1, DENSE.vocab_size)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1))
    assert (export(tokens, labels=labels).loss - expected).abs() < 1e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_a_loss_reaches_every_trainable_weight(opened: Open, config: ModelConfig) -> None:
    """DistributedDataParallel stops at the second step otherwise."""
    _, export = opened(config)
    tokens = random_tokens(config, 2, 9)
    export.train()
    export(tokens, labels=tokens).loss.backward()
    assert all(parameter.requires_grad for parameter in export.parameters())
    assert not [name for name, parameter in export.named_parameters() if parameter.grad is None]


def trained(transformers: ModuleType, model: Any, folder: Path, rate: float) -> list[float]:
    """Losses of a few steps of transformers' Trainer on rows that repeat themselves."""
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(DENSE, 8, 12)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=rate,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trainer_lowers_the_loss_and_the_result_loads_here(
    opened: Open, transformers: ModuleType, tmp_path: Path
) -> None:
    _, export = opened(SPARSE)
    before = export.model.core[0].self_attn.q_proj.weight.detach().clone()
    losses = trained(transformers, export, tmp_path / "run", 5e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert (export.model.core[0].self_attn.q_proj.weight - before).abs().max() > 1e-3
    export.save_pretrained(tmp_path / "tuned")
    model = load_pretrained(tmp_path / "tuned")
    assert model.config == SPARSE
    tokens = random_tokens(SPARSE, 2, 9)
    with torch.no_grad():
        assert (model(tokens).logits - export.eval()(tokens).logits).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_peft_lora_lowers_the_loss(opened: Open, transformers: ModuleType, tmp_path: Path) -> None:
    import peft

    _, export = opened(LATENT)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_up_proj", "o_proj", "up_proj", "down_proj"]
    )
    tuned = peft.get_peft_model(export, lora)
    losses = trained(transformers, tuned, tmp_path / "run", 3e-2)
    assert losses[-1] < 0.95 * losses[0]
    changed = [
        name for name, p in tuned.named_parameters() if p.grad is not None or "lora_B" in name
    ]
    core = [p for name, p in tuned.named_parameters() if "core.0" in name and "lora_B" in name]
    assert core and all(parameter.abs().max() > 0 for parameter in core)
    assert all("lora" in name for name in changed)
    tokens = random_tokens(LATENT, 2, 9)
    tuned.eval()
    with torch.no_grad():
        expected = tuned(tokens).logits
        tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
        found = load_pretrained(tmp_path / "merged")(tokens).logits
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("config", [LATENT, SPARSE], ids=["latent", "sparse"])
def test_adapters_go_to_peft_and_back(opened: Open, config: ModelConfig, tmp_path: Path) -> None:
    """Ours on the export, and one that PEFT made there on our model; all layers, the head not."""
    import peft

    model, export = opened(config)
    base, tokens = save_pretrained(model, tmp_path / "base"), random_tokens(config, 2, 9)
    ours = load_pretrained(base)
    adapter = new_adapter(ours, AdapterConfig(rank=3, alpha=1.5), str(base), seed=1)
    for changes in changes_of(ours).values():
        randomise(torch.nn.ModuleList(changes))
    (tmp_path / "ours").mkdir()
    save_adapter(own_tensors(ours), adapter, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(export, tmp_path / "ours")
    with torch.no_grad():
        found = theirs(tokens).logits
        assert (found - ours(tokens).logits).abs().max() < 1e-5
        assert (found - model(tokens).logits).abs().max() > 0.1
    names = sorted(
        {layer.name.rpartition(".")[2] for layer in chosen_layers(config, AdapterConfig())}
    )
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=2, target_modules=names)
    tuned = peft.get_peft_model(theirs.unload(), lora)
    randomise(torch.nn.ParameterList(p for p in tuned.parameters() if p.requires_grad), seed=3)
    tuned.eval().save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        wanted = tuned(tokens).logits
        for loaded in (
            load_pretrained(base, adapter=tmp_path / "theirs"),
            load_pretrained(tmp_path / "theirs"),  # its base is the export
        ):
            assert (loaded(tokens).logits - wanted).abs().max() < 1e-5
    assert (wanted - found).abs().max() > 0.1
