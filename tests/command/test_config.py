import json

from tests.command.conftest import Invoke, refused


def test_config_lists_a_part(invoke: Invoke) -> None:
    said = invoke("config", "model.injection")
    head, first, *rest = said.splitlines()
    assert head.split() == ["field", "default", "type", "meaning"]
    assert first.startswith("model.injection ") and "lti | original_lti | linear" in first
    assert any(line.startswith("model.injection=gate ") for line in rest)
    assert any(
        line.startswith("model.injection.decay_init ") and "With lti: Initial" in line
        for line in rest
    )
    assert "train.max_steps" not in said and "train.max_steps" in invoke("config")


def test_config_as_json(invoke: Invoke) -> None:
    fields = json.loads(invoke("config", "train.depth", "--json"))["fields"]
    assert {field["name"].split(".")[1] for field in fields} == {"depth"}
    (ramp,) = (field for field in fields if field["name"] == "train.depth.ramp")
    assert ramp["default"] == 0.0 and ramp["type"] == "number" and ramp["kind"] is None
    whole = json.loads(invoke("config", "--json"))["fields"]
    assert {field["name"] for field in whole} > {"model", "train", "data"}


def test_an_unknown_part_is_answered_with_the_nearest(invoke: Invoke) -> None:
    assert "did you mean 'model.injection'?" in refused(invoke, "config", "injection")
    assert "did you mean 'train.max_steps'?" in refused(invoke, "config", "train.max_step")
    assert "give model, train, data" in refused(invoke, "config", "qqqq")
