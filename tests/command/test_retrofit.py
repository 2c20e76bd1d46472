import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from openmythos import Tokenizer, load_pretrained, save_pretrained
from openmythos.command.retrofit import choose_layers, parse_layers, shown
from openmythos.config import CopyInitConfig, NormalInitConfig
from openmythos.config.schema import to_dict
from openmythos.folder import DEPTH_FILE
from openmythos.interop.families.llama import read_config
from openmythos.interop.loading import load_config
from openmythos.tokenizer import byte_tokenizer
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth, PoissonDepth
from openmythos.train.trained_depth import trained_depth
from tests.command.conftest import Invoke, refused
from tests.strategies import random_model

FIELDS = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain stack with a tokenizer. Read it only."""
    folder = tmp_path_factory.mktemp("llama") / "source"
    return save_pretrained(random_model(read_config(FIELDS)), folder, byte_tokenizer())


def test_layers_are_placed_and_dropped(invoke: Invoke, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    command = ("retrofit", source, "--prelude", "0-1", "--core", "3-4", "--coda", "5", "--out", out)
    said = json.loads(invoke(*command, "--json"))
    assert said["prelude"] == [0, 1] and said["core"] == [3, 4] and said["coda"] == [5]
    assert said["dropped"] == [2] and said["num_loops"] == 4
    model, original = load_pretrained(out), load_pretrained(source)
    assert said["total_params"] == sum(p.numel() for p in model.parameters())
    assert torch.equal(model.core[1].attention.out.weight, original.core[4].attention.out.weight)
    assert model.config.tie_embeddings
    assert Tokenizer.load(out).fingerprint == byte_tokenizer().fingerprint
    words = invoke(*command, "--state-init", "normal", "--untie", "--num-loops", 8)
    assert "dropped: 2\n" in words and "prelude: 0-1\n" in words and "num loops: 8" in words
    again = load_pretrained(out)
    assert again.config.state_init == NormalInitConfig(std=0.0087)
    assert not again.config.tie_embeddings and again.config.num_loops == 8


def test_the_new_loop_is_trained_at_its_own_depths(
    invoke: Invoke, source: Path, tmp_path: Path
) -> None:
    """A plain run was trained at one loop, at which the state never comes back."""
    plain, out = tmp_path / "plain", tmp_path / "made"
    shutil.copytree(source, plain)
    one = DepthSchedule(sampling=FixedDepth(mean_recurrence=1))
    (plain / DEPTH_FILE).write_text(json.dumps(to_dict(one)), encoding="utf-8")
    invoke("retrofit", plain, "--prelude", "0-1", "--coda", "5", "--out", out)
    found = trained_depth(out, load_config(out)).schedule
    assert found.sampling == PoissonDepth(mean_recurrence=4)


def test_without_a_core_it_is_what_lies_between(
    invoke: Invoke, source: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "made", "--json")
    said = json.loads(invoke("retrofit", source, "--prelude", "0", "--coda", "5", *out))
    assert said["core"] == [1, 2, 3, 4] and said["dropped"] == []
    original, model = load_pretrained(source), load_pretrained(tmp_path / "made")
    wanted = original(TOKENS).logits
    assert (model(TOKENS, num_loops=1).logits - wanted).abs().max() < 1e-5
    said = json.loads(invoke("retrofit", source, "--state-init", "copy", *out))
    assert said["core"] == list(range(6))
    assert load_pretrained(tmp_path / "made").config.state_init == CopyInitConfig()


def test_tying(invoke: Invoke, source: Path, tmp_path: Path) -> None:
    out, original = tmp_path / "made", load_pretrained(source)
    said = json.loads(invoke("retrofit", source, "--tie", 2, "--rank", 16, "--out", out, "--json"))
    assert said["num_loops"] == 3 and said["rank"] == 16 and said["relative_error"] < 1e-6
    wanted = original(TOKENS).logits
    assert (load_pretrained(out)(TOKENS).logits - wanted).abs().max() < 1e-5
    words = invoke("retrofit", source, "--tie", 2, "--start", "stepwise", "--out", out)
    assert "rank: 0\n" in words and re.search(r"relative error: \d\.\d{4}\n", words)
    assert load_pretrained(out).config.loop_adapter is None


def test_a_tokenizer_that_is_not_ours_is_left_out(
    invoke: Invoke, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = save_pretrained(load_pretrained(source), tmp_path / "bare")
    invoke("retrofit", bare, "--out", tmp_path / "made")
    (bare / "tokenizer.json").write_text("{}", encoding="utf-8")
    invoke("retrofit", bare, "--out", tmp_path / "made")
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "config.json", "manifest.json", "model.safetensors"
    ]  # fmt: skip


def test_refusals(invoke: Invoke, source: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "made")
    assert "--core is '3-1'; give layers" in refused(invoke, "retrofit", source, "--core", "3-1")
    assert "needs --tie" in refused(invoke, "retrofit", source, "--rank", 2, *out)
    assert "at most 5" in refused(invoke, "retrofit", source, "--core", "3-6", *out)
    wrong = refused(invoke, "retrofit", source, "--tie", 2, "--untie", *out)
    assert "leave --untie" in wrong
    assert "--state-init is 'x'" in refused(invoke, "retrofit", source, "--state-init", "x", *out)
    assert "need 3 loops" in refused(invoke, "retrofit", source, "--tie", 2, "--num-loops", 4, *out)
    assert "is the source itself" in refused(invoke, "retrofit", source, "--out", source)
    assert "does not exist" in refused(invoke, "retrofit", tmp_path / "absent", *out)
    assert not (tmp_path / "made").exists()


def test_lists_of_layers_in_words_and_back() -> None:
    assert parse_layers("", "--core") == ()
    assert parse_layers("0-3, 7,9-10", "--core") == (0, 1, 2, 3, 7, 9, 10)
    for wrong in ("a", "1-", "-1", "1,,2", "2-1"):
        with pytest.raises(ValueError, match="give layers like 0-3 or 0-3,7"):
            parse_layers(wrong, "--core")
    assert shown([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9-10"
    assert (shown([]), shown(1234567), shown(0.25)) == ("none", "1,234,567", "0.2500")
    assert choose_layers(6, (0,), (), (4, 5)).core == (1, 2, 3)
    with pytest.raises(ValueError, match="at least one layer"):
        choose_layers(6, (0, 1, 2), (), (3,))
