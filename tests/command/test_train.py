import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import openmythos as om
from openmythos.cli import app
from openmythos.interop.hub import zoo_folder
from openmythos.train import loop
from openmythos.train.metrics import read_metrics
from openmythos.train.run import resolve
from tests.command.conftest import SMALL, Invoke, refused, sets, stored
from tests.train.examples import assert_equal_runs, measured


def test_train_writes_a_run(invoke: Invoke, text_run: Path) -> None:
    config = stored(text_run)
    assert config["model"]["d_model"] == 16
    assert config["train"]["max_steps"] == 4
    assert [path.name for path in (text_run / "checkpoints").iterdir()] == ["step-00000004"]
    rows = measured(text_run)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 4]
    assert [row["num_loops"] for row in rows if row["kind"] == "validation"] == [1, 2]


def test_the_written_config_makes_the_same_run(
    invoke: Invoke, text_run: Path, tmp_path: Path
) -> None:
    said = invoke("train", "--config", text_run / "config.json", "--out", tmp_path / "again")
    assert str(text_run / "config.json") in said
    assert "done: step 4" in said
    assert_equal_runs(text_run, tmp_path / "again")


def test_training_on_walks_names_the_leak_baselines(invoke: Invoke, tmp_path: Path) -> None:
    small = [word for word in SMALL if not word.startswith(("data.", "model.vocab"))]
    small += ["data.num_entities=5", "data.num_relations=2", "data.max_train_hops=3"]
    said = invoke("train", "tiny", "--data", "hops", "--out", tmp_path, *sets(*small))
    share = "0.200"  # one in five, whatever a guesser knows
    guesses = f"chance {share}, majority {share}, last token {share}, suffix only {share}"
    assert f"leak baselines at 3 hops: {guesses}" in said


def test_the_seed_of_a_config_can_be_changed(
    invoke: Invoke, text_run: Path, tmp_path: Path
) -> None:
    config = text_run / "config.json"
    invoke("train", "--config", config, "--out", tmp_path, "--seed", 5, *sets("train.max_steps=1"))
    assert stored(tmp_path)["train"]["seed"] == 5
    assert stored(text_run)["train"]["seed"] == 0


def test_train_refuses_in_one_line(invoke: Invoke, text_run: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    assert "no preset 'tiney'; did you mean 'tiny'?" in refused(invoke, "train", "tiney", *out)
    unknown = refused(invoke, "train", *sets("train.batchsize=4"), *out)
    assert "unknown key 'train.batchsize'; did you mean 'batch_size'?" in unknown
    assert "expected a whole number" in refused(invoke, "train", *sets("train.batch_size=x"), *out)
    assert "--device is 'tpu'" in refused(invoke, "train", "--device", "tpu", *out)
    bad = tmp_path / "bad.json"
    for text, said in (("{", "Expecting"), ("{}", "missing model")):
        bad.write_text(text, encoding="utf-8")
        message = refused(invoke, "train", "--config", bad, *out)
        assert message.startswith(f"--config {bad} cannot be used:") and said in message
    bad.write_bytes(b"\xff\xfe{")
    assert "cannot be used" in refused(invoke, "train", "--config", bad, *out)
    assert "cannot be used" in refused(invoke, "train", "--config", tmp_path / "absent", *out)
    for both in (("tiny",), ("--data", "hops")):
        message = refused(invoke, "train", *both, "--config", text_run / "config.json", *out)
        assert "already names model and data" in message
    assert not (tmp_path / "run").exists()
    message = refused(invoke, "train", "--data", "hops", "--out", text_run)
    assert "holds a run with another configuration" in message and "data.kind" in message


def test_a_mixture_is_chosen_by_sources_and_weights(invoke: Invoke, tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = (json.dumps({"text": f"{name} {i} " * 20}) + "\n" for i in range(80))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    out = ("--out", tmp_path / "run", *sets(*SMALL))
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    both = ("train", "--data", first, "--weight", 0.75, "--data", second, "--weight", 0.25)
    said = invoke(*both, *out)
    assert f"on {first} (75.00%) and {second} (25.00%)" in " ".join(said.split())
    data = stored(tmp_path / "run")["data"]
    assert data["kind"] == "mixture" and data["sources"][1]["weight"] == 0.25
    rows = [row for row in measured(tmp_path / "run") if row["kind"] == "validation"]
    assert all(f"bits_per_byte of {second}" in row for row in rows) and len(rows) == 2
    assert "is of 2 sources; give one" in refused(invoke, "eval", tmp_path / "run")
    invoke("eval", tmp_path / "run", "--data", tmp_path / "run" / "data" / "0", "--json")
    for command, message in (
        (both[:5], "--weight 0.75 = 0.75; they must sum to 1"),
        (both[:-2], "--data is given 2 times and --weight 1 times"),
        (("train", "--weight", 1), "--data is given 0 times and --weight 1 times"),
        ((*both[:-3], "hops", *both[-2:]), "--data hops is a puzzle"),
    ):
        assert message.removeprefix("--weight 0.75 = ") in refused(invoke, *command, *out)


def test_a_model_that_cannot_fit_is_refused_before_anything_is_built(
    invoke: Invoke, tmp_path: Path
) -> None:
    message = refused(invoke, "train", "mythos-1t", "--out", tmp_path / "run")
    assert "training this model needs" in message and "TiB of memory" in message
    command = ["train", "--data", "hops", "--out", tmp_path / "run"]
    message = refused(invoke, *command, "--set", "train.batch_size=1000000000")
    assert "training on 1000000000 rows at once needs" in message
    assert not (tmp_path / "run").exists()


def test_options_are_short_for_fields(invoke: Invoke, tmp_path: Path) -> None:
    small = [word for word in SMALL if word.startswith(("model.d", "model.num", "train.eval"))]
    walks = ("train", "--data", "hops", "--out", tmp_path / "run", *sets(*small))
    short = ("--steps", 2, "--batch-size", 3, "--lr", 1e-5)
    said = json.loads(invoke(*walks, *short, "--json"))
    train = stored(tmp_path / "run")["train"]
    assert (train["max_steps"], train["batch_size"], train["optimizer"]["lr"]) == (2, 3, 1e-5)
    assert said["step"] == 2 and not said["interrupted"]
    assert said["checkpoint"].endswith("step-00000002")
    assert Path(said["page"]).is_file()
    assert [row["num_loops"] for row in said["held_out"]] == [1, 2]
    for option, value, field in (
        ("--steps", 9, "train.max_steps=9"),
        ("--batch-size", 9, "train.batch_size=8"),
        ("--lr", 0.1, "train.optimizer.lr=0.1"),
        ("--lr", 0.1, 'train.optimizer={"lr": 0.1}'),
        ("--seed", 9, "train.seed=9"),
    ):
        message = refused(invoke, *walks, option, value, *sets(field))
        assert f"{option} {value} and --set {field} set the same field" in message
    for option, field in (("--data", "data.source=b"), ("--from", "train.init_from=b")):
        message = refused(invoke, "train", option, "a", "--out", tmp_path / "x", *sets(field))
        assert f"{option} a and --set {field} set the same field" in message
    assert "must be at least 1" in refused(invoke, *walks, "--steps", 0)


def test_a_lost_run_ends_with_status_1_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.DivergenceGuard, "check", lambda self, metrics: "the loss is nan")
    small = [word for word in SMALL if not word.startswith(("data.", "model.vocab"))]
    command = ["train", "--data", "hops", "--out", str(tmp_path / "run"), *sets(*small)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    said = "error: the loss is nan at step 1; last checkpoint: none was written yet\n"
    *notes, _ = result.stderr.splitlines()
    assert result.stderr.endswith(said) and all(line.endswith(" ...") for line in notes)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "stopped at step 0" in page  # what was logged until then


def test_fixed_depth_is_possible_and_says_what_it_costs(invoke: Invoke, tmp_path: Path) -> None:
    few = sets("train.eval_loops=[]", "train.log_every=1")
    walks = ("train", "--from", "zoo:walks", "--data", "hops", "--steps", 1, "--batch-size", 2)
    said = " ".join(invoke(*walks, "--out", tmp_path / "a", *few).split())
    assert "depth: 2 to 8 loops around 4 (Poisson)" in said and "as zoo:walks was trained" in said
    said = " ".join(invoke(*walks, "--fixed-depth", 3, "--out", tmp_path / "b", *few).split())
    assert "depth: always 3 loops" in said and "what it can cost is the dial" in said
    sampling = stored(tmp_path / "b")["train"]["depth"]["sampling"]
    assert sampling == {"kind": "fixed", "mean_recurrence": 3}
    assert stored(tmp_path / "a")["train"]["depth"]["per_sequence"]
    both = sets("train.depth.sampling.kind=poisson")
    message = refused(invoke, *walks, "--fixed-depth", 3, *both)
    assert "--fixed-depth 3 and --set train.depth.sampling.kind=poisson set the same" in message
    message = refused(invoke, *walks, "--fixed-depth", 99)
    assert "at most max_loops=64, which --set train.depth.max_loops=N raises" in message
    message = refused(invoke, *walks, *few, "--base-text", "absent.txt")
    assert "--base-text absent.txt is scored at the loops of train.eval_loops, and these" in message


@pytest.mark.slow
def test_fine_tuning_begins_where_the_checkpoint_stands_and_scores_both_by_loops(
    invoke: Invoke, tmp_path: Path
) -> None:
    loops = sets("train.eval_loops=[2,8]", "train.log_every=1")
    walks = ("train", "--from", "zoo:walks_fixed_longest", "--data", "hops", "--batch-size", 2)
    out = tmp_path / "tuned"
    said = invoke(*walks, "--steps", 2, "--out", out, *loops)
    assert stored(out)["data"]["check_loops"] == 4  # those that it was trained at
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["stage"] for row in rows if "stage" in row] == [8.0, 8.0]
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    for when, checkpoint in (("before", "zoo:walks_fixed_longest"), ("after", out)):
        asked = ("eval", checkpoint, "--tasks", "hops_8", "--num-loops", "2,8", "--json")
        (curve,) = json.loads(invoke(*asked, "--data", "zoo:walks_fixed_longest"))["curves"]
        (kept,) = [curve for curve in scores[when] if curve["task"] == "hops_8"]
        assert [p["value"] for p in kept["scores"]] == [p["value"] for p in curve["scores"]]
        for point in kept["scores"]:
            assert f"{point['value']:.4f}" in said
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_fine_tuning_keeps_what_the_checkpoint_knows(invoke: Invoke, tmp_path: Path) -> None:
    """At the default rates; those of a training from scratch leave 8 % of these walks."""
    out = tmp_path / "tuned"
    given = ("--data", "hops", "--steps", 20, "--out", out)
    invoke("train", "--from", "zoo:walks", *given, *sets("train.eval_loops=[4]"))
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    for when in ("before", "after"):
        (curve,) = [curve for curve in scores[when] if curve["task"] == "hops_8"]
        assert curve["scores"][0]["value"] > 0.97


def test_a_model_of_text_is_not_trained_on_a_puzzle(
    invoke: Invoke, text_run: Path, tmp_path: Path
) -> None:
    walks = ("--data", "hops", "--steps", 1, "--out", tmp_path / "walks")
    message = refused(invoke, "train", "--from", text_run, *walks)
    assert "reads text, and a puzzle's tokens are no words of it" in message


def test_the_rates_are_lower_for_weights_that_are_trained_already() -> None:
    start = zoo_folder("zoo:walks")

    def rates(*overrides: str, checkpoint: Path | None = start) -> tuple[float | None, ...]:
        given = resolve(None, "hops", None, list(overrides), checkpoint).train.optimizer
        return given.lr, given.embedding_lr, given.muon_lr

    assert rates(checkpoint=None) == (3e-3, 1e-2, 0.02)
    assert rates() == (2e-4, None, 3e-4)
    assert rates("train.adapter.rank=8") == (1e-3, None, None)
    gate = ("model.halting.kind=exit_gate", "train.objective.kind=exit_gain")
    assert rates(*gate) == (3e-3, 1e-2, 0.02)  # a gate that is trained alone is new
    assert rates("train.optimizer.lr=0.5") == (0.5, None, 3e-4)


def test_prepare_and_train_from_a_checkpoint(
    invoke: Invoke, text_run: Path, text_file: Path, tmp_path: Path
) -> None:
    """A run's model, weights and tokenizer, on data prepared with that tokenizer."""
    data, out = tmp_path / "data", tmp_path / "run"
    report = json.loads(
        invoke("prepare", text_file, "--tokenizer", text_run, "--out", data, "--json")
    )
    assert report["vocab_size"] == stored(text_run)["model"]["vocab_size"]
    file = text_run / "checkpoints" / "step-00000004" / "tokenizer.json"
    invoke("prepare", text_file, "--tokenizer", file, "--out", data)
    invoke("prepare", text_file, "--tokenizer", data, "--out", tmp_path / "same")
    fingerprints = {om.Tokenizer.load(place).fingerprint for place in (text_run, data, file)}
    assert fingerprints == {om.Tokenizer.load(tmp_path / "same").fingerprint}
    small = [word for word in SMALL if not word.startswith("model.")]
    invoke("train", "--from", text_run, "--data", data, "--out", out, *sets(*small))
    assert stored(out)["model"] == stored(text_run)["model"]
    first, before = (next(iter(measured(folder)))["loss"] for folder in (out, text_run))
    assert first < before  # four steps ahead
    both = ("prepare", text_file, "--out", tmp_path / "other", "--bytes", "--tokenizer", file)
    assert "both name a tokenizer" in refused(invoke, *both)
    for other in (("tiny",), ("--config", out / "config.json")):
        message = refused(invoke, "train", *other, "--from", text_run)
        assert "already names the model" in message
