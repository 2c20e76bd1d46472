import json
from pathlib import Path

from openmythos.report.run import read_samples
from openmythos.report.sample import NEW_TOKENS, continuations, write_samples
from openmythos.train.run import set_up
from tests.train.examples import hops_config, text_config, write_text


def test_samples_of_a_run_continue_what_is_held_out(tmp_path: Path) -> None:
    run = set_up(text_config(write_text(tmp_path), max_steps=1, eval_every=0), tmp_path / "run")
    run.train()
    path = write_samples(run)
    assert path == tmp_path / "run" / "samples" / "step-00000001.json"
    samples, most = read_samples(path.parent), run.model.config.num_loops
    assert len(samples) == len(json.loads(path.read_text(encoding="utf-8"))) == 3
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    for sample in samples:
        assert sample.prompt.strip() in text
        assert 0 < len(sample.pieces) <= NEW_TOKENS
        assert all(1 <= piece.loops <= most for piece in sample.pieces)


def test_a_run_on_walks_has_no_samples(tmp_path: Path) -> None:
    run = set_up(hops_config(max_steps=1), tmp_path / "run")
    assert write_samples(run) is None
    assert list((tmp_path / "run" / "samples").iterdir()) == []


def test_an_end_token_is_not_shown(tmp_path: Path) -> None:
    run = set_up(text_config(write_text(tmp_path), max_steps=1), tmp_path / "run")
    tokenizer = run.folder.tokenizer
    assert tokenizer is not None
    made = continuations(run.model, tokenizer, ["the"], num_loops=2, max_new_tokens=3, seed=0)
    assert [sample.prompt for sample in made] == ["the"]
    assert tokenizer.decode([tokenizer.eos_id]) not in [piece.text for piece in made[0].pieces]
