import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openmythos.checkpoint.load import checkpoint_folder
from openmythos.checkpoint.save import save_pretrained
from openmythos.command.evaluate import held_out
from openmythos.config import LearnedLoopConfig, LinearInjectionConfig
from openmythos.config.adapter import AdapterConfig
from openmythos.config.parallel import ParallelConfig
from openmythos.config.schema import from_dict, to_dict
from openmythos.data.prepare import prepare
from openmythos.folder import locked
from openmythos.interop.loading import load_config, load_pretrained
from openmythos.tokenizer import byte_tokenizer
from openmythos.train.metrics import read_metrics
from openmythos.train.objective import ExitGainObjective
from openmythos.train.recipe import FREE_FIELDS, MixtureData, MixtureSource, RunConfig, TextData
from openmythos.train.run import resolve, set_up
from openmythos.train.run_folder import RunFolder
from openmythos.train.task import MixtureTask, PuzzleTask, TextTask
from tests.strategies import random_model
from tests.train import examples
from tests.train.examples import (
    changed,
    hops_config,
    measured,
    text_config,
    tiny_model,
    write_text,
)


def test_text_from_a_file(tmp_path: Path) -> None:
    config = text_config(write_text(tmp_path))
    run = set_up(config, tmp_path / "run")
    assert isinstance(run.task, TextTask)
    tokenizer = run.folder.tokenizer
    assert tokenizer is not None
    assert run.config.model.vocab_size == tokenizer.vocab_size <= 300
    assert run.model.embed.weight.shape[0] == tokenizer.vocab_size
    stored = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert from_dict(RunConfig, stored) == run.config
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints", "config.json", "data", "samples"
    ]  # fmt: skip


def test_text_from_a_prepared_folder(tmp_path: Path) -> None:
    prepare(str(write_text(tmp_path)), tmp_path / "data", tokenizer=byte_tokenizer())
    run = set_up(text_config(tmp_path / "data"), tmp_path / "run")
    assert run.config.model.vocab_size == 259
    ours, theirs = (
        {p.relative_to(f): p.stat().st_ino for p in f.rglob("*") if p.is_file()}
        for f in (tmp_path / "run" / "data", tmp_path / "data")
    )
    assert ours == theirs  # links, not copies


def test_a_run_without_held_out_text_is_trained_and_measures_nothing(tmp_path: Path) -> None:
    config = changed(text_config(write_text(tmp_path)), max_steps=2, eval_every=1)
    config = replace(config, data=replace(config.data, val_fraction=0.0))
    run = set_up(config, tmp_path / "run")
    assert run.train().step == 2
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {row["kind"] for row in rows} == {"train"}


def test_a_run_inside_its_own_data_folder_goes_on(tmp_path: Path) -> None:
    config = changed(text_config(write_text(tmp_path).parent), max_steps=1)
    run = set_up(config, tmp_path / "runs" / "x")
    run.train()
    fingerprint = run.task.state_dict()
    assert set_up(config, tmp_path / "runs" / "x").task.state_dict() == fingerprint
    assert set_up(config, tmp_path / "runs" / "y").task.state_dict() == fingerprint


def test_a_run_does_not_mix_with_other_files(tmp_path: Path) -> None:
    config = text_config(write_text(tmp_path))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"other files than a run's \(text\.txt\): choose"):
        set_up(config, tmp_path)
    with pytest.raises(ValueError, match=r"text\.txt is a file; a run is a folder"):
        set_up(config, tmp_path / "text.txt")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".gitignore").write_text("*")  # hidden files are not in the way
    set_up(config, tmp_path / "run")
    (tmp_path / "run" / "notes.md").write_text("mine")  # nor what was added to a run
    set_up(config, tmp_path / "run")


def test_bad_rows_stop_a_run_unless_it_skips_them(tmp_path: Path) -> None:
    config = text_config(write_text(tmp_path).parent)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="skip_bad=true"):
        set_up(config, tmp_path / "run")
    config = replace(config, data=replace(config.data, skip_bad=True))
    run = set_up(config, tmp_path / "run")
    assert isinstance(run.task, TextTask)
    first, run_itself = run.task.train.data.left_out[::-1]
    assert "bad.txt is not UTF-8" in first and run_itself.endswith("is a run")


def test_the_written_configuration_makes_the_same_run(tmp_path: Path) -> None:
    first = set_up(text_config(write_text(tmp_path)), tmp_path / "one")
    second = set_up(first.config, tmp_path / "two")
    assert second.config == first.config
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    one, other = (next(run.task.batches(2, 4)) for run in (first, second))
    assert torch.equal(one.tokens, other.tokens)


def test_the_seed_decides_weights_batches_and_walks(tmp_path: Path) -> None:
    runs = [
        set_up(changed(hops_config(), seed=s), tmp_path / f"{i}") for i, s in enumerate((1, 1, 2))
    ]
    same, again, other = runs
    assert isinstance(same.task, PuzzleTask)
    assert same.config.model.vocab_size == 4
    assert torch.equal(same.model.embed.weight, again.model.embed.weight)
    assert not torch.equal(same.model.embed.weight, other.model.embed.weight)
    first = [itertools.islice(run.task.batches(0, 16), 4) for run in runs]
    tokens = [torch.cat([batch.tokens[:, :2] for batch in batches]) for batches in first]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


def test_a_run_in_words(tmp_path: Path) -> None:
    run = set_up(hops_config(), tmp_path)
    count = sum(p.numel() for p in run.model.parameters())
    layers = "1 prelude + 1 core (looped) + 0 coda layers"
    assert run.in_words("walks") == f"{count:,} parameters, {layers}, on walks"


def test_another_runs_data_is_not_touched(tmp_path: Path) -> None:
    config = text_config(write_text(tmp_path))
    set_up(config, tmp_path / "run")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = replace(config, data=TextData(source=str(write_text(elsewhere, 70)), seq_len=32))
    with pytest.raises(ValueError, match=r"data\.source"):
        set_up(other, tmp_path / "run")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == files


# --- going on -------------------------------------------------------------------------------------


def stopped(config: RunConfig, out: Path, at: int = 4) -> Path:
    """A run folder as Ctrl-C after step ``at`` leaves it."""
    config = changed(config, save_every=at, keep_checkpoints=100)
    examples.run(config, out)
    for folder in RunFolder(out).checkpoints():
        if not folder.name.endswith(f"{at:08d}"):
            shutil.rmtree(folder)
    return out


def new_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openmythos.data.prepare.source_version", lambda source: "another")


CHANGES_OF_DATA: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "a file more": lambda f, patch: (f / "more.md").write_text("one more\n\nand another\n"),
    "a file changed": lambda f, patch: (f / "text.txt").write_text("all of it is new\n\n" * 300),
    "deleted": lambda f, patch: shutil.rmtree(f),
    "another version": lambda f, patch: new_python(patch),
}


@pytest.mark.parametrize("change", CHANGES_OF_DATA)
@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_run_owns_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, is_prepared: bool
) -> None:
    text, source = tmp_path / "text", tmp_path / "text"
    text.mkdir()
    write_text(text)
    if is_prepared:
        source = tmp_path / "prepared"
        prepare(str(text), source, tokenizer=byte_tokenizer())
    config = text_config(source, max_steps=8)
    examples.run(changed(config, save_every=4), tmp_path / "whole")
    run = stopped(config, tmp_path / "run")
    before = contents(run / "data")
    if change != "another version" or not is_prepared:
        CHANGES_OF_DATA[change](text, monkeypatch)
    if is_prepared and change == "deleted":
        shutil.rmtree(source)
    elif is_prepared:
        prepare(str(text), source, tokenizer=byte_tokenizer(), seed=1)
    examples.run(changed(config, save_every=4), run)
    assert contents(run / "data") == before
    examples.assert_equal_runs(tmp_path / "whole", run)
    assert held_out(checkpoint_folder(run), run, [1], 4, None, 1, "cpu")  # what `eval` does


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_run_without_links_reads_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    prepare(str(write_text(tmp_path)), tmp_path / "data", tokenizer=byte_tokenizer())
    config = text_config(tmp_path / "data", max_steps=8)
    run = stopped(config, tmp_path / "run")
    assert not (run / "data").exists()
    assert examples.run(config, run).step == 8


def mixture(tmp_path: Path, **changes: Any) -> RunConfig:
    """Prepared data and a file."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        write_text(tmp_path / name, 90 if name == "a" else 60)
    first = tmp_path / "a" / "data"
    prepare(str(tmp_path / "a" / "text.txt"), first, tokenizer=byte_tokenizer())
    parts = (
        MixtureSource(source=str(first), weight=0.7),
        MixtureSource(source=str(tmp_path / "b" / "text.txt"), weight=0.3),
    )
    data = MixtureData(sources=parts, seq_len=32)
    return replace(text_config(first, **changes), data=data)


def test_a_mixture_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    config = mixture(tmp_path, max_steps=4, eval_every=0, eval_loops=(2,))
    whole = set_up(changed(config, save_every=2), tmp_path / "whole")
    assert isinstance(whole.task, MixtureTask)
    assert whole.config.model.vocab_size == 259  # that of what is prepared
    whole.train()
    run = stopped(config, tmp_path / "run", at=2)
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / name)
    examples.run(changed(config, save_every=2), run)
    examples.assert_equal_runs(tmp_path / "whole", run)
    rows = [row for row in measured(run) if row["kind"] == "validation"]
    names = [f"bits_per_byte of {part.source}" for part in config.data.sources]
    for row in rows:
        mean = 0.7 * row[names[0]] + 0.3 * row[names[1]]
        assert row["bits_per_byte"] == pytest.approx(mean)
    checkpoint, own = checkpoint_folder(run), run / "data" / "1"
    assert held_out(checkpoint, own, [1], 4, None, 1, "cpu")
    with pytest.raises(ValueError, match=r"run is of 2 sources; give one of them as --data: .*/0"):
        held_out(checkpoint, run, [1], 4, None, 1, "cpu")
    other = replace(config.data.sources[1], weight=0.3, column="body")
    data = replace(config.data, sources=(config.data.sources[0], other))
    with pytest.raises(ValueError, match=r"data\.sources\.1\.column \(\"text\" there"):
        set_up(replace(config, data=data), run)


def test_a_mixture_of_other_tokenizers_is_refused(tmp_path: Path) -> None:
    config = mixture(tmp_path)
    prepare(str(tmp_path / "b" / "text.txt"), tmp_path / "b" / "data", vocab_size=280)
    second = replace(config.data.sources[1], source=str(tmp_path / "b" / "data"))
    data = replace(config.data, sources=(config.data.sources[0], second))
    with pytest.raises(ValueError, match="were prepared with different tokenizers"):
        set_up(replace(config, data=data), tmp_path / "run")


def test_lost_data_is_one_clear_error(tmp_path: Path) -> None:
    config = text_config(write_text(tmp_path), max_steps=8)
    run = stopped(config, tmp_path / "run")
    shutil.rmtree(run / "data")
    with pytest.raises(ValueError, match=r"data is missing, and a run goes on with its own data"):
        examples.run(config, run)
    assert not (run / "data").exists()


FREE_VALUES: dict[str, Any] = {
    "max_steps": 12,
    "max_seconds": 1e6,
    "grad_accumulation": 2,
    "compile": False,  # what it changes is tested with the loop
    "log_every": 3,
    "save_every": 1,
    "keep_checkpoints": 7,
    "eval_every": 2,
    "eval_loops": (2, 5),
    "eval_batches": 3,
    "recompute": True,
    "track": "none",  # as compile
    "save_in_background": True,
}


@pytest.mark.parametrize("name", sorted(f for f in FREE_FIELDS if ".parallel." not in f))
def test_what_may_change_while_a_run_goes_on(tmp_path: Path, name: str) -> None:
    field = name.removeprefix("train.")
    config = changed(hops_config(), max_steps=8, eval_every=4, save_every=4, keep_checkpoints=100)
    examples.run(config, tmp_path / "whole")
    run = stopped(config, tmp_path / "run")
    other = changed(config, **{field: FREE_VALUES[field]})
    going_on = set_up(other, run)
    result = going_on.train()
    assert json.loads((run / "config.json").read_text())["train"] == to_dict(other.train)
    assert any(name in said for said in going_on.changes) == (field not in ("compile", "track"))
    if field == "max_steps":
        assert result.step == 12
        assert "after step 4, 33% of the run is done instead of 50%" in going_on.changes[1]
        assert "at 1 of their full values instead of 0.833" in going_on.changes[1]
        return
    expected, got = examples.weights(tmp_path / "whole"), examples.weights(run)
    for key, tensor in expected.items():
        close = torch.allclose(tensor, got[key], rtol=1e-3, atol=1e-5)
        assert (
            close if field in ("grad_accumulation", "recompute") else torch.equal(tensor, got[key])
        ), key
    assert len(RunFolder(run).checkpoints()) == {"save_every": 5, "eval_every": 3}.get(field, 2)


def test_everything_else_may_not_change(tmp_path: Path) -> None:
    """Each field of the configuration, the model's and the data's too."""
    config = text_config(write_text(tmp_path))
    folder = RunFolder(tmp_path / "run")
    folder.write_config(to_dict(config))

    def leaves(data: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
        for key, value in data.items():
            if isinstance(value, dict):
                yield from ((d, k, f"{key}.{name}") for d, k, name in leaves(value))
            else:
                yield data, key, key

    for index, (_, _, name) in enumerate(leaves(to_dict(config))):
        other = to_dict(config)
        owner, key, _ = list(leaves(other))[index]
        owner[key] = "another"
        if name in FREE_FIELDS:
            assert list(folder.changes(other)) == [name]
            continue
        with pytest.raises(ValueError, match="holds a run with another configuration") as caught:
            folder.changes(other)
        assert f"{name} (" in str(caught.value)


def test_a_finished_run_is_prolonged(tmp_path: Path) -> None:
    config = changed(hops_config(), max_steps=4)
    examples.run(config, tmp_path)
    longer = set_up(changed(config, max_steps=8), tmp_path)
    assert longer.train().step == 8
    assert "instead of 100%, and the rates go on at 0.833" in longer.changes[-1]
    steps = [row["step"] for row in measured(tmp_path) if row["kind"] == "train"]
    assert steps == list(range(1, 9))


def test_paths_are_compared_by_where_they_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    write_text(tmp_path / "text")
    start = checkpoint(tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    config = from_checkpoint(Path("text"), Path("start"), max_steps=8)
    run = stopped(config, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for text, weights in (("../text/", "../start"), (tmp_path / "text", f"{start}/.")):
        again = set_up(from_checkpoint(text, weights, max_steps=8), run)
        assert not [said for said in again.changes if "source" in said or "init_from" in said]
    for text, weights, name in ((tmp_path, start, "data.source"), ("../text", run, "init_from")):
        with pytest.raises(ValueError, match=name):
            set_up(from_checkpoint(text, weights, max_steps=8), run)


def test_a_lost_configuration_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    config = changed(hops_config(), max_steps=8)
    run = stopped(config, tmp_path / "run")
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match=r"train\.batch_size \(16 there, 4 here\)"):
        set_up(changed(config, batch_size=4), run)
    assert examples.run(config, run).step == 8
    assert json.loads((run / "config.json").read_text())["train"]["max_steps"] == 8


def test_a_damaged_configuration_is_not_believed(tmp_path: Path) -> None:
    """Nor by who gives the run its own file; that of the newest intact checkpoint counts."""
    config = changed(hops_config(), max_steps=8, save_every=4, keep_checkpoints=100)
    run, whole = stopped(config, tmp_path / "run"), tmp_path / "whole"
    examples.run(config, whole)
    file = run / "config.json"
    content, damaged = file.read_text(), file.read_text().replace('"lr": 0.01', '"lr": 0.03')
    file.write_text(damaged)
    with pytest.raises(ValueError, match=r"train\.optimizer\.lr \(0\.01 there, 0\.03 here\)"):
        set_up(resolve(None, None, file, [], None), run)
    newest = shutil.copytree(run / "checkpoints/step-00000004", run / "checkpoints/step-00000006")
    (newest / "training_state.json").write_text(damaged)  # is not read either
    for broken in (damaged, "{", ""):
        file.write_text(broken)
        set_up(config, run)
        assert file.read_text() == content
    with pytest.warns(UserWarning, match="step-00000006 is damaged"):
        examples.run(config, run)
    examples.assert_equal_runs(whole, run)


def test_a_configuration_of_an_older_version_is_completed(tmp_path: Path) -> None:
    config = changed(hops_config(), max_steps=4)
    examples.run(config, tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():  # there it was not kept
        (path / "manifest.json").unlink()
        record = json.loads((path / "training_state.json").read_text())
        del record["run"]
        (path / "training_state.json").write_text(json.dumps(record))
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["train"]["balance_rate"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert set_up(config, tmp_path).changes == ()


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    run = set_up(hops_config(), tmp_path)
    with locked(tmp_path):
        for start in (run.train, lambda: set_up(hops_config(), tmp_path)):
            with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"):
                start()
    assert not (tmp_path / "metrics.jsonl").exists()
    run.train()
    assert not (tmp_path / ".lock").exists()


def test_a_damaged_shard_is_refused_before_the_first_step(tmp_path: Path) -> None:
    data = prepare(str(write_text(tmp_path)), tmp_path / "data", tokenizer=byte_tokenizer())
    set_up(text_config(tmp_path / "data"), tmp_path / "run")
    for split in ("train", "val"):
        shard = tmp_path / "data" / data.splits[split].shards[0].file
        content = shard.read_bytes()
        shard.write_bytes(content[:-2] + b"\0\0")
        with pytest.raises(ValueError, match="does not match its SHA-256"):
            set_up(text_config(tmp_path / "data"), tmp_path / "run")
        shard.write_bytes(content)


def test_unusable_text_is_one_clear_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.txt"):
        set_up(text_config(empty), tmp_path / "run")


# --- starting from a checkpoint -------------------------------------------------------------------


def checkpoint(folder: Path, vocab_size: int = 259) -> Path:
    """A model with random weights, and the byte tokenizer."""
    config = replace(tiny_model(injection=LinearInjectionConfig()), vocab_size=vocab_size)
    return save_pretrained(random_model(config), folder, byte_tokenizer())


def from_checkpoint(source: str | Path, start: str | Path, **changes: Any) -> RunConfig:
    config = text_config(source, init_from=str(start), **changes)
    return replace(config, model=load_config(start))


def test_a_run_starts_from_a_checkpoint(tmp_path: Path) -> None:
    """Its weights, its tokenizer, and a vocabulary that may be larger than the tokenizer's."""
    start, source = checkpoint(tmp_path / "start", vocab_size=264), write_text(tmp_path)
    run = set_up(from_checkpoint(source, start), tmp_path / "run")
    assert run.config.model.vocab_size == 264
    assert run.folder.tokenizer.fingerprint == byte_tokenizer().fingerprint
    wanted = load_pretrained(start)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, wanted.state_dict()[name])
    assert all(p.requires_grad for p in run.model.parameters())
    stored = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert stored["train"]["init_from"] == str(start)


def test_half_precision_weights_train_in_full(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start")
    save_pretrained(load_pretrained(start).bfloat16(), start, byte_tokenizer())
    run = set_up(from_checkpoint(write_text(tmp_path), start), tmp_path / "run")
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_a_run_that_goes_on_keeps_what_it_has_learnt(tmp_path: Path) -> None:
    """The start is read once; after that the run needs it no more."""
    start, source = checkpoint(tmp_path / "start"), write_text(tmp_path)
    prepare(str(source), tmp_path / "data", tokenizer=byte_tokenizer())
    config = from_checkpoint(tmp_path / "data", start, max_steps=4)
    whole = examples.run(config, tmp_path / "whole")
    shutil.rmtree(start)
    again = examples.run(config, tmp_path / "whole")
    assert again.step == whole.step == 4
    trained = load_pretrained(tmp_path / "whole")
    assert trained.config == config.model


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    start, source = checkpoint(tmp_path / "start"), write_text(tmp_path)
    config = from_checkpoint(source, start)
    wider = replace(config, model=replace(config.model, num_core_layers=2))
    with pytest.raises(ValueError, match=r"missing: core\.1\."):
        set_up(wider, tmp_path / "run")
    prepare(str(source), tmp_path / "data", vocab_size=300)
    other = replace(config, data=TextData(source=str(tmp_path / "data"), seq_len=32))
    with pytest.raises(ValueError, match=r"300 token ids, the model in .* --tokenizer"):
        set_up(other, tmp_path / "other")
    prepare(str(source), tmp_path / "data", vocab_size=260)
    larger = checkpoint(tmp_path / "larger", vocab_size=270)
    mixed = replace(from_checkpoint(source, larger), data=other.data)
    with pytest.raises(ValueError, match="tokenizer mismatch"):
        set_up(mixed, tmp_path / "mixed")
    assert not (tmp_path / "mixed" / "config.json").exists()


# --- adapters -------------------------------------------------------------------------------------


def adapter_config(folder: Path, **adapter: Any) -> RunConfig:
    """Experts, per-sequence depths and a random base, beside which an adapter is trained."""
    start = folder / "start"
    if not start.exists():
        base = random_model(
            replace(
                tiny_model(core_feed_forward=examples.MOE),
                vocab_size=259,
                loop_embedding=LearnedLoopConfig(num_loops=2),
            )
        )
        save_pretrained(base, start, byte_tokenizer())
    config = from_checkpoint(write_text(folder), start, max_steps=9, save_every=1)
    return changed(config, adapter=AdapterConfig(**{"rank": 2, **adapter}))


@pytest.mark.parametrize("num_loops", [None, 3])
def test_an_adapter_is_trained_and_its_base_stays(tmp_path: Path, num_loops: int | None) -> None:
    config, out = adapter_config(tmp_path, num_loops=num_loops), tmp_path / "run"
    config = changed(config, save_in_background=True)
    base = tmp_path / "start"
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    run = set_up(config, out)
    initial = {name: p.clone() for name, p in run.model.named_parameters()}
    buffers = {name: b.clone() for name, b in run.model.named_buffers()}
    count = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert f"of which an adapter's {count:,} are trained" in run.in_words("text")
    run.train()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, initial[name]) == (".changes." not in name), name
    for name, buffer in run.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name  # the experts' selection, too
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    kept = checkpoint_folder(out)
    assert (kept / "adapter_model.safetensors").is_file() and (kept / "tokenizer.json").is_file()
    assert not (kept / "model.safetensors").exists()
    loaded, tokens = load_pretrained(out), torch.arange(8)[None]
    run.model.eval()
    with torch.no_grad():
        assert (loaded(tokens).logits - run.model(tokens).logits).abs().max() < 1e-5
        assert (loaded(tokens).logits - load_pretrained(base)(tokens).logits).abs().max() > 1e-3
    losses = [row["loss"] for row in measured(out) if row["kind"] == "train"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("num_loops", [None, 3])
def test_a_killed_run_of_an_adapter_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_loops: int | None
) -> None:
    config = adapter_config(tmp_path, num_loops=num_loops)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    examples.run(config, whole)
    saves, save = itertools.count(1), RunFolder.save

    def killed(self: RunFolder, *args: Any, **options: Any) -> Path:
        path = save(self, *args, **options)
        if next(saves) in (4, 6):
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(RunFolder, "save", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            examples.run(config, out)
    examples.run(config, out)
    examples.assert_equal_runs(whole, out)
    with pytest.raises(ValueError, match=r"another configuration: train\.adapter\.rank \(2 there"):
        set_up(adapter_config(tmp_path, rank=3, num_loops=num_loops), out)
    save_pretrained(random_model(config.model, seed=5), tmp_path / "start", byte_tokenizer())
    with pytest.raises(ValueError, match="is an adapter of another model"):
        examples.run(config, out)


def test_adapters_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    config = adapter_config(tmp_path, targets=("q_poj",))
    with pytest.raises(ValueError, match="nearest names are q_proj"):
        set_up(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(ValueError, match=r"train\.adapter is .*; it must be null without"):
        changed(config, init_from=None)
    with pytest.raises(ValueError, match=r"parallel\.tp is 2; it must be 1 with train\.adapter"):
        changed(config, parallel=ParallelConfig(tp=2))
    with pytest.raises(ValueError, match="objective trains the gate only"):
        changed(config, objective=ExitGainObjective())
    start = str(tmp_path / "start")
    words = ["train.adapter.rank=4", 'train.adapter.targets=["core"]']
    adapter = resolve(None, str(tmp_path / "text.txt"), None, words, Path(start)).train.adapter
    assert adapter == AdapterConfig(rank=4, targets=("core",))
