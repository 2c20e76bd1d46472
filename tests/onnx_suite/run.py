"""Exports in onnxruntime against transformers: the logits of every kind, at two lengths.

    make test-onnx                       or   make test-onnx ARGS="--only dense"

``make test-onnx`` installs ONNX's packages into ``.onnx``. Not part of the test suite: a graph
takes half a minute to make. ``tests/interop/hf/test_layers_openmythos.py`` holds the operators that
this has run.
"""

import argparse
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openmythos.config import ModelConfig
from openmythos.interop.export import export_hf
from tests.interop.hf.examples import CONFIGS
from tests.strategies import random_model, random_tokens

# Of a difference to the largest logit: fp32 sums in another order differ by up to 4e-6.
TOLERANCE = 6e-6
SHAPES = ((2, 7), (3, 11))  # the graph is made with the first


class Logits(nn.Module):
    """Ids to logits, without a cache."""

    def __init__(self, export: Any) -> None:
        super().__init__()
        self.export = export

    def forward(self, ids: Tensor) -> Tensor:
        return self.export(ids, use_cache=False).logits


def open_export(config: ModelConfig, parent: Path) -> Any:
    """The export of a random model as transformers opens it, with experts that ONNX can write."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = export_hf(random_model(config), parent / "export")
    export = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    if config.core_ff.kind == "moe":
        export.set_experts_implementation("batched_mm")
    return export.eval()


@torch.no_grad()
def differences(config: ModelConfig, parent: Path) -> list[float]:
    """Per shape: the largest difference of two logits, as a part of the largest logit."""
    import onnxruntime

    logits = Logits(open_export(config, parent)).eval()
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    program = torch.onnx.export(
        logits,
        (random_tokens(config, *SHAPES[0]),),
        dynamo=True,
        dynamic_shapes=sizes,
        verbose=False,
    )
    assert program is not None
    program.save(parent / "model.onnx")
    session = onnxruntime.InferenceSession(parent / "model.onnx")
    (name,) = (given.name for given in session.get_inputs())
    found = []
    for shape in SHAPES:
        ids = random_tokens(config, *shape, seed=1)
        expected = logits(ids)
        (theirs,) = session.run(None, {name: ids.numpy()})
        found.append(
            ((torch.from_numpy(theirs) - expected).abs().max() / expected.abs().max()).item()
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=Path(".onnx"), help="ONNX's, by pip")
    parser.add_argument("--only", choices=CONFIGS, help="one of the kinds")
    arguments = parser.parse_args()
    sys.path.append(str(arguments.packages.resolve()))  # behind those installed here
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision's absence
    torch.set_num_threads(1)
    print(f"{'kind':50}  difference as a part of the largest logit", flush=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as modules:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
        for kind in [arguments.only] if arguments.only else CONFIGS:
            with tempfile.TemporaryDirectory() as parent:
                found = differences(CONFIGS[kind], Path(parent))
            wrong += max(found) > TOLERANCE
            print(f"{kind:50}  {'  '.join(f'{x:.1e}' for x in found)}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
