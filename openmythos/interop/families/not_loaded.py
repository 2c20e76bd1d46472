"""Published looped models that cannot be loaded, and what this library lacks for each of them.

``docs/families/README.md`` lists them beside the families that load.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class NotLoaded:
    """A published looped model that the model class cannot express.

    ``model_type`` is what its config.json says, None where that is not known; ``reason`` completes
    the sentence "it cannot be loaded: ...".
    """

    name: str
    model_type: str | None = None
    reason: str


NOT_LOADED = (
    NotLoaded(
        name="HRM-Text",
        model_type="hrm_text",
        reason=(
            "it has two states, one loop runs one stack of layers several times and then another, "
            "its attention has an output gate, and prompts are read in both directions"
        ),
    ),
    NotLoaded(
        name="IQuest-Coder-V1-40B-Loop",
        model_type="iquestloopcoder",
        reason=(
            "its second loop mixes, by a gate per head, attention to the first loop's keys and "
            "values with a window of its own"
        ),
    ),
    NotLoaded(
        name="LoopCoder-V2",
        model_type="iquestpltcoder",
        reason=(
            "its loops run in parallel on shifted positions, and share keys and values by gated "
            "windows"
        ),
    ),
    NotLoaded(
        name="LoopFormer",
        reason="its norms are modulated by the loop's time and step size (adaLN)",
    ),
    NotLoaded(
        name="LT2",
        reason="its blocks mix tokens by linear or sparse attention",
    ),
    NotLoaded(
        name="LoopUS",
        reason="its state passes an input-dependent selective gate in every loop",
    ),
    NotLoaded(
        name="LatentLoop",
        reason="its first loop runs on a shortened sequence, and each loop has its own attention",
    ),
    NotLoaded(
        name="Mixture-of-Recursions",
        reason="a router chooses which tokens take part in each loop",
    ),
    NotLoaded(
        name="retrofitted OLMo-2",
        reason="its blocks have norms after the branches, and norms over all queries and keys",
    ),
)


def why_not(data: Mapping[str, Any]) -> str | None:
    """Why the model of this config.json cannot be loaded; None if it is none of the list."""
    given = data.get("model_type")
    for model in NOT_LOADED:
        if model.model_type is not None and model.model_type == given:
            return f"{model.name} cannot be loaded: {model.reason}"
    return None
