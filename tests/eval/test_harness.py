import json
import math
import re
import socket
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval.tasks
import pytest
import torch
from lm_eval.api.registry import Registry, get_model
from lm_eval.tasks import TaskManager

from openmythos import save_pretrained
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.eval import harness, python_docs
from openmythos.eval.harness import (
    SHIPPED_FOLDER,
    HarnessModel,
    HarnessTasks,
    generation_request,
    load_tasks,
    read_task,
    task_files,
)
from openmythos.eval.puzzle import PuzzleCodec
from openmythos.eval.score import sweep
from openmythos.eval.task import TEXT_TASKS, measure_tasks, shipped_task
from openmythos.interop.export import export_hf
from openmythos.model.int8 import Int8Weight
from openmythos.tokenizer import Tokenizer, byte_tokenizer
from tests.eval.backends import assert_equal_scores, through_hf, through_ours
from tests.eval.examples import bpe, documents, scorer, text_model, write_tasks
from tests.foreign import CHATML, write_chat_folder
from tests.strategies import random_model, small_config

ROOT = Path(__file__).parents[2]

WALKS = Walks(HopsConfig(num_entities=12, num_relations=4, seed=2))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As with HF_HUB_OFFLINE=1, and without a way out should something try."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    cache = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a test goes to {arguments[-1]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


# --- equal to the Hugging Face backend ------------------------------------------------------------


@pytest.mark.parametrize("num_loops", [2, 5])
def test_an_export_scores_in_the_hugging_face_backend_as_here(
    tasks: Path, tmp_path: Path, num_loops: int
) -> None:
    codec = bpe()
    model = text_model(codec.vocab_size, max_seq_len=96)
    folder = export_hf(model, tmp_path / "export", tokenizer=codec)
    theirs = through_hf(folder, tasks, trust_remote_code=True, num_loops=num_loops, dtype="float32")
    assert theirs["results"].keys() == {"some_answer", "some_choice", "some_text"}
    asked = scorer(model, codec=codec, num_loops=num_loops, batch_size=4, add_bos=False)
    assert_equal_scores(through_ours(asked, tasks), theirs, 1e-4)
    shallow = scorer(model, codec=codec, num_loops=1, add_bos=False)
    with pytest.raises(AssertionError):
        assert_equal_scores(through_ours(shallow, tasks), theirs, 1e-4)


def test_conversations_score_in_the_hugging_face_backend_as_here(
    tasks: Path, tmp_path: Path
) -> None:
    """With ``--apply_chat_template``: the same prompts, ids and answers, ended by the same mark."""
    codec = Tokenizer.load(write_chat_folder(tmp_path / "tokenizer"))
    model = text_model(codec.vocab_size, max_seq_len=192)
    folder = export_hf(model, tmp_path / "export", tokenizer=codec)
    options: dict[str, Any] = {"trust_remote_code": True, "num_loops": 2, "dtype": "float32"}
    theirs = through_hf(folder, tasks, apply_chat_template=True, **options)
    asked = scorer(model, codec=codec, num_loops=2, add_bos=False)
    ours = through_ours(asked, tasks, apply_chat_template=True)
    assert ours["samples"]["some_answer"][0]["arguments"][0][0].startswith("<|im_start|>user")
    assert_equal_scores(ours, theirs, 1e-4)
    with pytest.raises(AssertionError):
        assert_equal_scores(through_ours(asked, tasks), theirs, 1e-4)


# --- the adapter ----------------------------------------------------------------------------------


def test_the_batch_size_does_not_change_scores(tasks: Path) -> None:
    model = text_model()
    found = [through_ours(scorer(model, batch_size=size, add_bos=False), tasks) for size in (1, 8)]
    assert_equal_scores(*found, 1e-5)


def test_the_adapter_has_what_the_harness_asks_for() -> None:
    asked = scorer()
    model, codec = HarnessModel(asked), byte_tokenizer()
    assert model.num_loops == 3 and model.max_length == 256 and model.batch_size == 16
    model.num_loops = 5
    assert asked.num_loops == 5
    assert model.eot_token_id == codec.eos_id and model.prefix_token_id == codec.bos_id
    assert model.tok_encode("ab") == [codec.bos_id, *codec.encode("ab")]
    assert model.tok_encode("ab", add_special_tokens=False) == codec.encode("ab")
    assert codec.fingerprint in model.tokenizer_name
    walks = HarnessModel(scorer(random_model(small_config()), codec=PuzzleCodec(WALKS)))
    assert "PuzzleCodec" in walks.tokenizer_name


def test_the_harness_knows_the_model_by_name(tmp_path: Path) -> None:
    """With the arguments that its command line passes."""
    assert get_model("openmythos") is HarnessModel
    assert get_model("hf").__name__ == "HFLM"
    model = text_model()
    save_pretrained(model, tmp_path, byte_tokenizer())

    def made(arguments: str, **given: Any) -> HarnessModel:
        text = f"pretrained={tmp_path},{arguments}"
        return get_model("openmythos").create_from_arg_string(text, given)

    few = made("num_loops=2,dtype=auto", batch_size=2, device="cpu")
    assert (few.num_loops, few.batch_size, few.scorer.add_bos) == (2, 2, True)
    pairs = [("The sky is", " blue"), ("", "x")]
    expected = scorer(model, num_loops=2).loglikelihood(pairs)
    for (nats, _), (wanted, _) in zip(few.scorer.loglikelihood(pairs), expected, strict=True):
        assert nats == pytest.approx(wanted, abs=1e-5)
    other = made(
        "dtype=bfloat16,max_length=64,add_bos_token=False,trust_remote_code=True,revision=main",
        batch_size="auto:4",
        max_batch_size=8,
    )
    assert (other.max_length, other.batch_size, other.scorer.add_bos) == (64, 8, False)
    assert other.scorer.model.embed.weight.dtype == torch.bfloat16
    assert len(other.scorer._row(0, generation_request("a" * 99, {"max_gen_toks": 4})).tokens) == 60
    assert made("", batch_size="auto").batch_size > 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": "many"}, "batch_size is 'many'; give a positive number or auto"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; give auto, float16"),
        ({"max_length": 999}, "max_length is 999; it must be at least 1 and at most the model's"),
        ({"peft": "a"}, "model_args has peft='a'; supported are add_bos_token, batch_size"),
        ({"parallelize": True}, "model_args has parallelize=True"),
    ],
)
def test_arguments_that_cannot_be_obeyed_are_refused_by_name(
    tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    save_pretrained(text_model(), tmp_path, byte_tokenizer())
    with pytest.raises(ValueError, match=re.escape(said)):
        HarnessModel(str(tmp_path), **arguments)


@pytest.mark.slow
def test_the_harness_finds_the_model_after_installation(tmp_path: Path) -> None:
    """As its releases after 0.4.13 do: by an entry point; the others have a command of ours."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["lm_eval.models"].items()
    assert name == "openmythos"
    described = tmp_path / "some-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: some\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(f"[lm_eval.models]\n{name} = {value}\n")
    (found,) = metadata.Distribution.at(described).entry_points.select(group="lm_eval.models")
    registry: Registry[Any] = Registry("model")
    registry.register(name, target=found)
    assert registry.get("openmythos") is HarnessModel
    command = [sys.executable, "-m", "openmythos.eval.harness", "run", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "--apply_chat_template" in said


def test_generation_options() -> None:
    request = generation_request("a", {"until": "x", "max_gen_toks": 7, "do_sample": False})
    assert (request.stops, request.max_new_tokens, request.temperature) == (("x",), 7, 0.0)
    drawn = generation_request("a", {"do_sample": True, "temperature": 0.5, "top_p": 0.9})
    assert (drawn.temperature, drawn.top_p, drawn.max_new_tokens) == (0.5, 0.9, 256)
    assert generation_request("a", {"do_sample": True, "top_k": 0}).temperature == 1.0
    assert generation_request("a", {"temperature": 0.0, "top_p": 0.9}).top_p is None
    plain = {"num_beams": 1, "do_sample": False, "temperature": 0.7, "repetition_penalty": 1.0}
    plain |= {"top_k": 50, "use_cache": True, "min_p": None, "no_repeat_ngram_size": 0}
    assert generation_request("a", plain) == generation_request("a", {})
    for name, value in (("num_beams", 4), ("repetition_penalty", 1.2), ("eos_token_id", 3)):
        said = f"generation_kwargs has {name}={value}; supported are do_sam"
        with pytest.raises(ValueError, match=re.escape(said)):
            generation_request("a", {"until": ["x"], name: value})


def test_conversations_as_text(tmp_path: Path) -> None:
    codec = Tokenizer.load(write_chat_folder(tmp_path))
    model = HarnessModel(scorer(text_model(codec.vocab_size), codec=codec))
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So: "}]
    begun = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.apply_chat_template(talk[:1]) == begun
    assert model.apply_chat_template(talk, add_generation_prompt=False) == begun + "So: "
    assert model.tok_encode(begun) == codec.encode_chat(talk[:1])
    ended = model.scorer._row(
        0, generation_request(begun, {"until": ["<|im_start|>"], "max_gen_toks": 8})
    )
    assert ended.stop_tokens == codec.end_ids | {259}
    assert model.chat_template(False) is None and model.chat_template(True) == CHATML
    with pytest.raises(ValueError, match=r"chat template 'tools' was asked for, .* only default"):
        model.chat_template("tools")
    with pytest.raises(ValueError, match=r"'default' was asked for, and the tokenizer has none"):
        HarnessModel(scorer()).apply_chat_template(talk)
    unsystematic = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}x"
    model._template = unsystematic
    assert model.apply_chat_template([{"role": "system", "content": "a"}, *talk]) == "x"
    model._template = "{{ raise_exception('never') }}"
    with pytest.raises(ValueError, match="chat template fails: never"):
        model.apply_chat_template(talk)


# --- tasks ----------------------------------------------------------------------------------------


def test_our_own_evaluator_gives_the_harness_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "documents", documents)
    asked = scorer(batch_size=32)
    ours = measure_tasks(asked, [task for name in TEXT_TASKS if (task := shipped_task(name, None))])
    theirs = load_tasks([str(SHIPPED_FOLDER / f"{name}.yaml") for name in TEXT_TASKS])
    found = theirs.measure(asked, None)
    names = {metric.split(" (")[0]: key for key in found for metric in [key[1]]}
    assert len(found) == len(ours) == 3
    for (task, metric), mine in ours.items():
        other = found[names[metric]]
        assert names[metric][0] == task and other.higher_is_better == mine.higher_is_better
        assert mine.score.value == pytest.approx(other.score.value, abs=1e-9)
        assert mine.score.stderr == pytest.approx(other.score.stderr, abs=1e-9)
        assert mine.score.num_questions == other.score.num_questions
        assert mine.outcomes is not None and other.outcomes is not None
        for one, two in zip(mine.outcomes, other.outcomes, strict=True):
            assert one == pytest.approx(two, abs=1e-6)
    assert ours["python_docs_choice", "acc"].baselines == pytest.approx(
        dict(found["python_docs_choice", "acc"].baselines)
    )


def test_walks_in_the_harness_are_our_own() -> None:
    model = random_model(small_config(vocab_size=16))
    asked = scorer(model, codec=PuzzleCodec(WALKS), num_loops=2, batch_size=64)
    fields = {"num_entities": 12, "num_relations": 4, "seed": 2}
    config = read_task(
        SHIPPED_FOLDER / "hops.yaml", task="hops_3", metadata={"num_hops": 3, "walks": fields}
    )
    loaded = TaskManager(include_defaults=False).load([config])
    (theirs,) = HarnessTasks(loaded).measure(asked, None).values()
    task = shipped_task("hops_3", WALKS)
    assert task is not None
    (ours,) = measure_tasks(asked, [task]).values()
    assert theirs.score.value == pytest.approx(ours.score.value)
    assert theirs.score.stderr == pytest.approx(ours.score.stderr)


def test_a_folder_of_tasks_at_several_depths(tasks: Path) -> None:
    others = load_tasks([str(tasks)], num_fewshot=1)
    curves = sweep((1, 3), lambda n: others.measure(scorer(num_loops=n), None))
    named = {(curve.task, curve.metric): curve for curve in curves}
    assert named.keys() == {
        ("some_choice", "acc"),
        ("some_choice", "acc_norm"),
        ("some_text", "bits_per_byte"),
        ("some_text", "byte_perplexity"),
        ("some_answer", "exact_match"),
    }
    for curve in curves:
        assert list(curve.scores) == [1, 3]
        assert all(math.isfinite(score.value) for score in curve.scores.values())
    bits = named["some_text", "bits_per_byte"]
    assert not bits.higher_is_better and bits.scores[1].stderr is not None
    assert bits.scores[1] != bits.scores[3]
    assert named["some_text", "byte_perplexity"].scores[1].stderr is None
    choice = named["some_choice", "acc"]
    assert choice.scores[1].num_questions == 3 and choice.gain is not None
    limited = load_tasks([str(tasks / "some_text.yaml")]).measure(scorer(), 1)
    assert next(iter(limited.values())).score.num_questions == 1


def test_task_files(tasks: Path, tmp_path: Path) -> None:
    assert [path.name for path in task_files(str(tasks)) or []] == [
        "some_answer.yaml",
        "some_choice.yaml",
        "some_text.yaml",
    ]
    assert task_files("arc_easy") is None
    with pytest.raises(ValueError, match=r"task file .*gone.yaml does not exist"):
        task_files(str(tmp_path / "gone.yaml"))
    with pytest.raises(ValueError, match="holds no task file"):
        task_files(str(tmp_path))
    read = read_task(tasks / "some_text.yaml")
    assert read["dataset_kwargs"]["data_files"] == {"test": str(tasks / "some_text.jsonl")}
    for text, said in (("[1, 2", "cannot be read as a task"), ("a: 1", "has no task: NAME")):
        (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            read_task(tmp_path / "bad.yaml")


def test_what_cannot_be_loaded_is_one_clear_line(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the harness' own tasks of one folder: reading all its folders takes ten seconds."""
    arc = Path(lm_eval.tasks.__file__).parent / "arc"
    shipped, none = (TaskManager(include_defaults=False, include_path=path) for path in (arc, None))
    monkeypatch.setattr(harness, "_manager", lambda defaults: shipped if defaults else none)

    def refused(spec: str) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            load_tasks([spec])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no task 'arc_eazy'; did you mean 'arc_easy'?" in refused("arc_eazy")
    said = refused("arc_easy")
    assert "task arc_easy has its data on the Hugging Face hub" in said
    assert "offline, use task files or python_docs_choice" in said
    config = json.loads((tasks / "some_text.yaml").read_text(encoding="utf-8"))
    config["dataset_kwargs"] = {"data_files": {"test": "gone.jsonl"}}
    (tmp_path / "lost.yaml").write_text(json.dumps(config), encoding="utf-8")
    assert "lost.yaml cannot be loaded" in refused(str(tmp_path / "lost.yaml"))


def test_a_folder_is_loaded_in_8_bits(tmp_path: Path) -> None:
    codec = byte_tokenizer()
    folder = save_pretrained(text_model(codec.vocab_size), tmp_path / "model", codec)
    made = HarnessModel(folder, weights="int8")
    assert any(isinstance(module, Int8Weight) for module in made.scorer.model.modules())
    with pytest.raises(ValueError, match="weights is 'int4'; it must be stored or int8"):
        HarnessModel(folder, weights="int4")
