"""TRL on exports: its collator's labels are ours; ten steps of SFT, DPO and GRPO at a fixed depth.

    make test-trl                        or   make test-trl ARGS="-k dpo"

Not part of the test suite: TRL takes as long to import as all of this to run.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import dynamic_module_utils

from openmythos.data.loader import TokenLoader
from openmythos.data.prepare import prepare
from openmythos.interop.export import export_hf
from openmythos.interop.loading import load_pretrained
from openmythos.tokenizer import Tokenizer
from tests.foreign import MARKED, backend, write_chat_folder, write_folder
from tests.interop.hf.examples import CONFIGS
from tests.strategies import random_model, random_tokens
from tests.test_chat_template import public_templates

pytestmark = [pytest.mark.filterwarnings("ignore")]
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()

PUBLIC = ("qwen2_5", "qwen3", "llama3", "gemma", "phi3", "lfm2")
SPECIALS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "<|eos|>"),
)
DEPTH = 2  # that of the configs is 3


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """TRL, offline, with a folder of its own for the code that transformers copies."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    trl = pytest.importorskip("trl")
    before = dynamic_module_utils.HF_MODULES_CACHE
    dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
    yield trl
    dynamic_module_utils.HF_MODULES_CACHE = before


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def exported(kind: str, folder: Path, tokenizer: Path | None = None) -> Path:
    """The export of a random model that reads conversations."""
    if tokenizer is None:
        tokenizer = write_chat_folder(folder / "tokenizer")
        template = MARKED["chatml (Qwen, SmolLM)"]
        (tokenizer / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = replace(CONFIGS[kind], vocab_size=320, max_seq_len=256)
    return export_hf(random_model(config), folder / "export", tokenizer=tokenizer)


def settings(folder: Path) -> dict[str, Any]:
    """Of ten steps, whose lines the documentation has too."""
    return {
        "output_dir": str(folder),
        "trust_remote_code": True,
        "model_init_kwargs": {"num_loops": DEPTH},
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def trained(trainer: Any, key: str) -> list[float]:
    """A metric of each of the steps, in which all weights but constants and idle heads move."""
    model = trainer.model
    assert model.config.num_loops == DEPTH
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(model.named_parameters())
    still = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert [name for name in still if "halting" not in name] == []
    rows = [row for row in trainer.state.log_history if key in row]
    assert len(rows) == 10 and all(torch.tensor(row["loss"]).isfinite() for row in rows)
    return [row[key] for row in rows]


@pytest.mark.parametrize("kind", CONFIGS)
def test_supervised_fine_tuning(trl: Any, kind: str, tmp_path: Path) -> None:
    folder = exported(kind, tmp_path)
    talks = [[turn("user", f"q{i}"), turn("assistant", "aaaa")] for i in range(40)]
    trainer = trl.SFTTrainer(
        model=str(folder),
        args=trl.SFTConfig(**settings(tmp_path / "run"), assistant_only_loss=True),
        train_dataset=datasets.Dataset.from_list([{"messages": talk} for talk in talks]),
    )
    losses = trained(trainer, "loss")
    assert losses[-1] < 0.6 * losses[0]
    trainer.save_model(str(tmp_path / "tuned"))
    tokens, tuned = random_tokens(CONFIGS[kind], 2, 9), load_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        wanted = trainer.model.eval()(tokens).logits
        assert (tuned(tokens, num_loops=DEPTH).logits - wanted).abs().max() < 1e-4


def preferences() -> datasets.Dataset:
    """Forty questions whose chosen answer is all a, the rejected one all b."""
    good, bad = [turn("assistant", "aaaa")], [turn("assistant", "bbbb")]
    rows = [{"prompt": [turn("user", f"q{i}")], "chosen": good, "rejected": bad} for i in range(40)]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("kind", ["dense", "sparse", "huginn"])
def test_preferences(trl: Any, kind: str, tmp_path: Path) -> None:
    """The reference model, which TRL loads itself, has the same depth: its loss begins at ln 2."""
    folder = exported(kind, tmp_path)
    trainer = trl.DPOTrainer(
        model=str(folder),
        args=trl.DPOConfig(**settings(tmp_path / "run")),
        train_dataset=preferences(),
    )
    assert trainer.ref_model.config.num_loops == DEPTH
    losses = trained(trainer, "loss")
    assert losses[0] == pytest.approx(0.693147, abs=1e-5) and losses[-1] < 0.1


@pytest.mark.parametrize("kind", ["dense", "sparse", "huginn"])
def test_rewards(trl: Any, kind: str, tmp_path: Path) -> None:
    def first_half(completion_ids: list[list[int]], **_: Any) -> list[float]:
        """The share of tokens from the first half of the vocabulary."""
        return [sum(token < 160 for token in ids) / 12 for ids in completion_ids]

    folder = exported(kind, tmp_path)
    rows = [{"prompt": [turn("user", f"q{i}")]} for i in range(40)]
    trainer = trl.GRPOTrainer(
        model=str(folder),
        reward_funcs=first_half,
        args=trl.GRPOConfig(
            **settings(tmp_path / "run") | {"per_device_train_batch_size": 16},
            num_generations=8,
            max_completion_length=12,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    rewards = trained(trainer, "reward")
    assert sum(rewards[-3:]) > 1.2 * sum(rewards[:3])


def test_an_adapter_of_trl_loads_here(trl: Any, tmp_path: Path) -> None:
    folder = exported("dense", tmp_path)
    trainer = trl.DPOTrainer(
        model=str(folder),
        args=trl.DPOConfig(**settings(tmp_path / "run")),
        train_dataset=preferences(),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj", "down_proj"]
        ),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    tokens = random_tokens(CONFIGS["dense"], 2, 9)
    tuned, base = load_pretrained(tmp_path / "adapter"), load_pretrained(folder)
    with torch.no_grad():
        wanted = trainer.model.eval()(tokens).logits
        assert (tuned(tokens, num_loops=DEPTH).logits - wanted).abs().max() < 1e-5
        assert (base(tokens, num_loops=DEPTH).logits - wanted).abs().max() > 0.1


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("counted", ["answers", "all"])
def test_labels_of_the_collator_are_ours(trl: Any, name: str, counted: str, tmp_path: Path) -> None:
    tokenizer = write_folder(
        tmp_path / "tokenizer",
        backend(*SPECIALS),
        tokenizer_config={"bos_token": "<|im_start|>", "eos_token": "<|eos|>"},
    )
    template = public_templates()[f"{name}_training"]
    (tokenizer / "chat_template.jinja").write_text(template, encoding="utf-8")
    talks = [
        [turn("user", "one <b>"), turn("assistant", "two\n 2")],
        [turn("user", "漢字"), turn("assistant", "b."), turn("user", "c"), turn("assistant", "d")],
    ]
    rows = [{"messages": talk} for talk in talks]
    trainer = trl.SFTTrainer(
        model=str(exported("dense", tmp_path, tokenizer)),
        args=trl.SFTConfig(
            **settings(tmp_path / "run"),
            assistant_only_loss=counted == "answers",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(2)])
    theirs = [
        (ids[real].tolist(), labels[real].tolist())
        for ids, labels, real in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
        )
    ]
    table = tmp_path / "talks.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = prepare(
        str(table),
        tmp_path / "data",
        tokenizer=Tokenizer.load(tokenizer),
        conversations=counted,
        val_fraction=0.0,
    )
    loader = TokenLoader(data.folder, seq_len=1000, batch_size=1)
    for ids, labels in theirs:
        ours = [loader.document(number) for number in range(2)]
        (counts,) = [c for document, c in ours if document.tolist() == ids]
        # The first token is never predicted.
        assert [label != -100 for label in labels][1:] == counts[1:].tolist()
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
