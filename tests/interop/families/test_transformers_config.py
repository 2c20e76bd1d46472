import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from openmythos.config import Llama3ScalingConfig, RopeConfig
from openmythos.interop.families.transformers_config import (
    GENERIC_FIELDS,
    ROPE_FIELDS,
    read_rope,
    write_rope,
)

SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PART = Llama3ScalingConfig(factor=8.0)


def without(data: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != name}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"rope_theta": 1e6}, RopeConfig(theta=1e6)),
        ({"rope_theta": 10000, "rope_scaling": None}, RopeConfig(theta=10000.0)),
        ({"rope_theta": 5e5, "rope_scaling": SCALED}, RopeConfig(theta=5e5, scaling=PART)),
        (
            {"rope_theta": 5e5, "rope_scaling": {**SCALED, "type": "llama3"}},
            RopeConfig(theta=5e5, scaling=PART),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {**without(SCALED, "rope_type"), "type": "llama3"}},
            RopeConfig(theta=5e5, scaling=PART),
        ),
        ({"rope_parameters": {"rope_theta": 5e5, **SCALED}}, RopeConfig(theta=5e5, scaling=PART)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeConfig(theta=5e5)),
    ],
)
def test_rotary_positions_are_read(data: dict[str, Any], expected: RopeConfig) -> None:
    assert read_rope(data) == expected
    assert read_rope(write_rope(expected)) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"missing rope_theta \(of the rotary positions\)"),
        ({"rope_theta": None}, "rope_theta is None, expected a number"),
        ({"rope_theta": 5e5, "rope_scaling": "llama3"}, "expected an object or null"),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_theta": 5e5, "rope_scaling": without(SCALED, "factor")}, "missing factor"),
        ({"rope_theta": 5e5, "rope_scaling": {**SCALED, "beta": 1}}, "unknown beta"),
        ({"rope_theta": 5e5, "rope_scaling": {**SCALED, "factor": 0.5}}, "factor is 0.5"),
    ],
)
def test_other_positions_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rope(data)


def test_what_transformers_writes_today_is_known(tmp_path: Path) -> None:
    """Every field that its smallest config class writes is generic or about positions."""
    transformers.PretrainedConfig(id2label={0: "a"}, pad_token_id=1).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    everything = transformers.PretrainedConfig().to_dict()
    assert written.keys() | everything.keys() <= GENERIC_FIELDS | ROPE_FIELDS


def test_what_transformers_reads_is_what_is_written(tmp_path: Path) -> None:
    rope = RopeConfig(theta=5e5, scaling=PART)
    transformers.LlamaConfig(**write_rope(rope)).save_pretrained(tmp_path)
    assert read_rope(json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))) == rope


def test_fields_that_matter_are_not_generic() -> None:
    ours = {"quantization_config", "tie_word_embeddings", "sliding_window", "hidden_act"}
    assert not ours & GENERIC_FIELDS
