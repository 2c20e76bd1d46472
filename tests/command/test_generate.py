import json
from pathlib import Path

from typer.testing import CliRunner

from openmythos.cli import app
from tests.command.conftest import Invoke, refused, sets

PROMPTS = ("--prompt", "the list", "--prompt", "a")


def test_generate_as_json(invoke: Invoke, text_run: Path) -> None:
    command = ("generate", text_run, *PROMPTS, "--max-new-tokens", 5, "--num-loops", 3, "--json")
    rows = json.loads(invoke(*command))
    assert [row["prompt"] for row in rows] == ["the list", "a"]
    for row in rows:
        assert 1 <= len(row["tokens"]) <= 5
        assert row["loops"] == [3] * len(row["tokens"])
    assert json.loads(invoke(*command)) == rows


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


def test_generate_refuses(invoke: Invoke, text_run: Path, hops_run: Path, tmp_path: Path) -> None:
    prompt = ("--prompt", "a")
    for arguments, said in (
        ((text_run,), "at least one --prompt"),
        ((tmp_path / "absent", *prompt), "does not exist"),
        ((hops_run, *prompt), "no tokenizer.json"),
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
        ((text_run, *prompt, "--max-new-tokens", 1000), "max_seq_len=64"),
        ((text_run, *prompt, "--device", "cuda:77"), "--device is 'cuda:77'"),
    ):
        message = refused(invoke, "generate", *arguments)
        assert said in message and "\n" not in message
