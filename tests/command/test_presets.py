import json

from openmythos.config import counts
from openmythos.config.presets import PRESETS, preset
from tests.command.conftest import Invoke

TABLE_WIDTH = 100  # characters: what a terminal shows without wrapping


def test_presets_as_json(invoke: Invoke) -> None:
    rows = json.loads(invoke("presets", "--json"))
    assert [row["name"] for row in rows] == list(PRESETS)
    for row in rows:
        config = preset(row["name"])
        assert row["total_params"] == counts.total_params(config)
        assert row["active_params"] == counts.active_params(config)
        assert row["effective_depth"] == config.effective_depth()
        assert row["num_loops"] == config.num_loops
        assert row["kv_bytes_per_token"] == counts.kv_bytes_per_token(config)
        assert row["vocab_size"] == config.vocab_size
        assert sum(row["layers"]) == config.num_layers
    experts = {row["name"]: row["num_experts"] for row in rows}
    assert experts["tiny"] == 0
    assert experts["kimi-scale-1t"] == 384


def test_presets_as_a_table(invoke: Invoke) -> None:
    lines = invoke("presets").splitlines()
    assert max(map(len, lines)) <= TABLE_WIDTH
    (row,) = [line.split() for line in lines if line.startswith("kimi-scale-1t")]
    assert row[1:4] == ["993B", "31.7B", "384,"]
    assert {line.split()[0] for line in lines} >= set(PRESETS)
