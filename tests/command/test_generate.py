import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from typer.testing import CliRunner

import openmythos as om
from openmythos import Tokenizer, save_pretrained
from openmythos.cli import app
from openmythos.command.decoding import sampling_of
from openmythos.command.origin import puzzle_of
from openmythos.engine.runner import Runner
from openmythos.engine.sampling import SamplingConfig
from openmythos.eval.puzzle import puzzle_documents
from openmythos.interop.hub import local_folder
from openmythos.model.cache import LastLoop
from openmythos.model.exit import KLExit
from openmythos.tokenizer import byte_tokenizer
from tests.command.conftest import Invoke, refused, sets
from tests.foreign import END, backend, write_chat_folder, write_folder
from tests.strategies import scripted_model

PROMPTS = ("--prompt", "the list", "--prompt", "a")


def test_generate_as_json(invoke: Invoke, text_run: Path) -> None:
    command = ("generate", text_run, *PROMPTS, "--max-new-tokens", 5, "--num-loops", 3, "--json")
    rows = json.loads(invoke(*command))
    assert [row["prompt"] for row in rows] == ["the list", "a"]
    for row in rows:
        assert 1 <= len(row["tokens"]) <= 5
        assert row["loops"] == [3] * len(row["tokens"])
    assert json.loads(invoke(*command)) == rows


def test_weights_in_8_bits(invoke: Invoke, text_run: Path) -> None:
    command = ("generate", text_run, *PROMPTS, "--max-new-tokens", 5, "--weights", "int8", "--json")
    assert all(1 <= len(row["tokens"]) <= 5 for row in json.loads(invoke(*command)))
    message = refused(invoke, "generate", text_run, *PROMPTS, "--weights", "8")
    assert "weights is '8'; it must be stored or int8" in message


def test_generate_as_text(invoke: Invoke, text_run: Path) -> None:
    command = ["generate", str(text_run), *PROMPTS, "--prompt", "[/x]", "--max-new-tokens", "4"]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0
    assert "the list" in ran.stdout and "[/x]" in ran.stdout and "loops" not in ran.stdout
    assert ran.stderr.count("4.00 of 4 loops per token\n") == 3


def test_a_cache_that_cannot_fit_is_refused_with_its_size(invoke: Invoke, text_run: Path) -> None:
    for loops in (10**10, 10**18):
        command = ("generate", text_run, *PROMPTS, "--num-loops", loops, "--max-new-tokens", 4)
        message = refused(invoke, *command)
        assert f"and {loops} loops needs" in message and "iB free; lower num_loops" in message


def test_generate_with_an_exit_rule_and_sampling(invoke: Invoke, text_run: Path) -> None:
    rule = ("--exit-rule", "latent_difference", *sets("exit_rule.threshold=1e9"))
    options = ("--temperature", 1.0, "--top-k", 20, "--top-p", 0.9, "--max-new-tokens", 6, "--json")
    rows = json.loads(invoke("generate", text_run, *PROMPTS, *rule, *options))
    assert all(set(row["loops"]) == {1} for row in rows)
    seeds = [invoke("generate", text_run, *PROMPTS, *options, "--seed", seed) for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_generate_with_another_cache_layout_into_a_file(
    invoke: Invoke, text_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.json"
    options = ("generate", text_run, *PROMPTS, "--max-new-tokens", 6, "--json")
    exact = invoke(*options, "--cache-layout", "every_k", *sets("cache_layout.k=1"), "--out", out)
    assert json.loads(exact) == json.loads(invoke(*options)) == json.loads(out.read_text())
    for layout in ("last_loop", "first_loop"):
        assert len(json.loads(invoke(*options, "--cache-layout", layout))) == 2


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ((), {}),
        (
            ("--exit-rule", "kl", "--set", "exit_rule.threshold=0.01", "--temperature", 0.9),
            {"exit_rule": KLExit(threshold=0.01), "temperature": 0.9},
        ),
        (("--cache-layout", "last_loop", "--num-loops", 3), {"cache_layout": LastLoop()}),
    ],
)
def test_generate_gives_what_the_reference_gives(
    invoke: Invoke, text_run: Path, options: Any, fields: Any
) -> None:
    prompts = ["the list", "a", "def of_a_longer_text(and more):"]
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    rows = json.loads(
        invoke("generate", text_run, *given, "--max-new-tokens", 12, "--json", *options)
    )
    tokenizer = Tokenizer.load(text_run)
    depth = 3 if "--num-loops" in options else None
    wanted = om.generate(
        om.load_pretrained(text_run),
        [tokenizer.encode_prompt(prompt) for prompt in prompts],
        max_new_tokens=12,
        num_loops=depth,
        num_ids=tokenizer.vocab_size,
        stop_tokens=tokenizer.end_ids,
        **fields,
    )
    assert [row["tokens"] for row in rows] == wanted.tokens
    assert [row["loops"] for row in rows] == wanted.loops


def test_generate_says_that_a_model_has_diverged(
    invoke: Invoke, text_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave = Runner.leave

    def diverge(runner: Runner, seats: list[int]) -> Any:
        logits, loops = leave(runner, seats)
        return logits * torch.nan, loops

    monkeypatch.setattr(Runner, "leave", diverge)
    assert "diverged" in refused(invoke, "generate", text_run, *PROMPTS, "--max-new-tokens", 4)


def test_a_walk_is_answered_by_one_word(invoke: Invoke, hops_run: Path) -> None:
    words_of_walks = [*(f"e{i}" for i in range(16)), *(f"r{i}" for i in range(4))]
    for source in (hops_run, "zoo:walks"):
        words = ("generate", source, "--prompt", "e3 r1 r0", "--prompt", "e0", "--json")
        rows = json.loads(invoke(*words, "--num-loops", 6))
        assert [len(row["tokens"]) for row in rows] == [1, 1]
        assert {row["text"] for row in rows} <= {f" {word}" for word in words_of_walks}
        (longer, _) = json.loads(invoke(*words, "--max-new-tokens", 3))
        assert len(longer["tokens"]) == 3
    walks = puzzle_of(local_folder("zoo:walks"))
    assert walks is not None
    questions = puzzle_documents(walks, 6, count=20)
    asked = [word for question in questions for word in ("--prompt", question["context"])]
    given = [row["text"] for row in json.loads(invoke("generate", "zoo:walks", *asked, "--json"))]
    assert given == [question["target"] for question in questions]


def test_generate_refuses(invoke: Invoke, text_run: Path, hops_run: Path, tmp_path: Path) -> None:
    prompt = ("--prompt", "a")
    for arguments, said in (
        ((text_run,), "at least one --prompt"),
        ((tmp_path / "absent", *prompt), "does not exist"),
        ((hops_run, *prompt), "'a' is no word of a walk"),
        (("/usr", *prompt), "/usr is no checkpoint: it has no config.json"),
        ((text_run, *prompt, "--exit-rule", "hope"), "exit_rule.kind is 'hope'"),
        (
            (text_run, *prompt, *sets("threshold=1")),
            "only exit_rule.FIELD=VALUE and cache_layout.FIELD=VALUE",
        ),
        ((text_run, *prompt, "--exit-rule", "kl", *sets("exit_rule.treshold=1")), "'threshold'"),
        ((text_run, *prompt, "--exit-rule", "kl", *sets("exit_rule.threshold=x")), "not a number"),
        ((text_run, *prompt, "--exit-rule", "cumulative_threshold"), "threshold"),
        ((text_run, *prompt, "--cache-layout", "none"), "--cache-layout is 'none'"),
        ((text_run, *prompt, "--cache-layout", "every_k"), "missing"),
        ((text_run, *prompt, "--num-loops", 0), "num_loops is 0"),
        ((text_run, *prompt, "--max-new-tokens", 1000), "room for 64 in all"),
        ((text_run, *prompt, "--device", "cuda:77"), "--device is 'cuda:77'"),
    ):
        message = refused(invoke, "generate", *arguments)
        assert said in message and "\n" not in message


# --- what a checkpoint says besides its config ----------------------------------------------------

PADDED = 300  # the model's vocabulary, past the tokenizer's 261 ids


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After "a": b, c, an id without a token; after "d": its second end id; after it: "e"."""
    folder = tmp_path_factory.mktemp("scripted") / "model"
    tokenizer = Tokenizer.load(write_chat_folder(folder.parent / "tokenizer"))
    a, b, c, d, e = (tokenizer.encode(letter)[0] for letter in "abcde")
    (start,) = tokenizer.encode("<|im_start|>", special=True)
    assert tokenizer.end_ids == {258, 260} and tokenizer.eos_id == 260
    follows = {a: b, b: c, c: PADDED - 1, d: 258, 258: e, e: e, start: b}
    return save_pretrained(scripted_model(PADDED, follows), folder, tokenizer)


def answer(invoke: Invoke, folder: Path, prompt: str, *options: object) -> dict[str, Any]:
    greedy = ("--temperature", 0, "--max-new-tokens", 6, "--json")
    (row,) = json.loads(invoke("generate", folder, "--prompt", prompt, *greedy, *options))
    return row


def test_every_end_id_ends_an_answer(invoke: Invoke, scripted: Path) -> None:
    row = answer(invoke, scripted, "d")
    assert row["tokens"] == [258] and row["text"] == ""
    assert len(answer(invoke, scripted, "e")["tokens"]) == 6


def test_an_id_without_a_token_is_not_generated(invoke: Invoke, scripted: Path) -> None:
    row = answer(invoke, scripted, "a")
    assert row["text"].startswith("bc") and max(row["tokens"]) < 261


def test_stop_texts_end_an_answer_wherever_tokens_end(invoke: Invoke, scripted: Path) -> None:
    row = answer(invoke, scripted, "e", "--stop", "zz", "--stop", "eee")
    assert row["text"] == "" and len(row["tokens"]) == 3 == len(row["loops"])
    said = invoke("generate", scripted, "--prompt", "e", "--temperature", 0, "--stop", "eee")
    assert said.startswith("e\n")
    assert "texts, none of them empty" in refused(
        invoke, "generate", scripted, "--prompt", "e", "--stop", ""
    )


def test_marks_in_a_prompt_are_read_as_tokens_on_request(invoke: Invoke, scripted: Path) -> None:
    asked = answer(invoke, scripted, "x<|im_start|>", "--special")
    assert asked["text"].startswith("bc")
    assert not answer(invoke, scripted, "x<|im_start|>")["text"].startswith("bc")


def test_sampling_is_as_the_checkpoint_asks(scripted: Path) -> None:
    tokenizer, default = Tokenizer.load(scripted), SamplingConfig()
    asked = sampling_of(tokenizer, default, None, None, 0.5)
    assert (asked.temperature, asked.top_k, asked.top_p, asked.num_ids) == (0.6, 50, 0.5, 261)
    greedy = sampling_of(tokenizer, default, 0.0, None, None)
    assert (greedy.temperature, greedy.top_k, greedy.top_p) == (0.0, None, None)
    own = sampling_of(byte_tokenizer(), SamplingConfig(temperature=0.8), None, 7, None)
    assert (own.temperature, own.top_k) == (0.8, 7)


def test_a_tokenizer_that_changes_text_is_said_and_used(scripted: Path, tmp_path: Path) -> None:
    folder = save_pretrained(scripted_model(259, {}), tmp_path / "model")
    write_folder(folder, backend(END, normalizer=normalizers.NFC()))
    arguments = ["generate", str(folder), "--prompt", "a", "--max-new-tokens", "2"]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0 and "note: the tokenizer changes text" in ran.stderr
    assert "changes text" not in ran.stdout
