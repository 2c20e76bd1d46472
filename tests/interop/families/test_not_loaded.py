import re
from pathlib import Path

import pytest
import torch
import transformers

from openmythos.command.convert import family_named
from openmythos.interop import export
from openmythos.interop.families.not_loaded import NOT_LOADED, why_not
from openmythos.interop.loading import FAMILIES, load_config, load_pretrained

PAGE = Path(__file__).parents[3] / "docs" / "families" / "README.md"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the page, without its head."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_lists_the_families_that_load() -> None:
    listed = [(name, word.strip("`")) for name, word, *_ in rows("Loaded and written")]
    published = [family for family in FAMILIES if family is not export.FAMILY]
    assert sorted(name for name, _ in listed) == sorted(family.name for family in published)
    for name, word in listed:
        assert family_named(word).name == name


def test_the_page_lists_the_models_that_do_not() -> None:
    listed = {name: (kind.strip("`"), reason) for name, kind, reason in rows("Not loaded")}
    assert listed.keys() == {model.name for model in NOT_LOADED}
    for model in NOT_LOADED:
        kind, reason = listed[model.name]
        assert (kind or None) == model.model_type
        assert re.sub(r"\s+", " ", reason) == model.reason


def test_hrm_text_is_refused_by_name(tmp_path: Path) -> None:
    """As transformers itself writes it."""
    config = transformers.HrmTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
    )
    with torch.random.fork_rng():
        transformers.HrmTextForCausalLM(config).save_pretrained(tmp_path)
    for load in (load_pretrained, load_config):
        with pytest.raises(ValueError, match="HRM-Text cannot be loaded: it has two states") as e:
            load(tmp_path)
        assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_other_types_are_not_known() -> None:
    assert why_not({"model_type": "gpt2"}) is None
    assert why_not({}) is None
    loop = why_not({"model_type": "iquestloopcoder"})
    assert loop is not None and loop.startswith("IQuest-Coder-V1-40B-Loop cannot be loaded: ")
