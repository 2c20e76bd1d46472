import subprocess
import sys

import pytest

from openmythos.config import counts
from openmythos.config.presets import PRESETS, preset
from openmythos.config.published import PUBLISHED

PARAMS = {
    "huginn-3.5b": 3_564_976_800,
    "ouro-1.4b": 1_434_652_673,
    "ouro-2.6b": 2_667_974_657,
    "parcae-140m": 144_323_136,
    "parcae-370m": 388_003_328,
    "parcae-770m": 776_655_680,
    "parcae-1.3b": 1_338_591_744,
    "parcae-gpt-140m": 143_141_184,
    "parcae-gpt-370m": 385_903_104,
    "parcae-gpt-770m": 773_375_040,
    "parcae-gpt-1.3b": 1_333_868_544,
}


def test_every_published_model_has_a_stated_count() -> None:
    assert PARAMS.keys() == PUBLISHED.keys()
    assert PUBLISHED.keys() <= PRESETS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_exactly_the_published_ones(name: str) -> None:
    assert counts.total_params(preset(name)) == PARAMS[name]


@pytest.mark.parametrize("size", ["140m", "370m", "770m", "1.3b"])
def test_a_baseline_has_the_layers_of_its_model(size: str) -> None:
    model, plain = preset(f"parcae-{size}"), preset(f"parcae-gpt-{size}")
    assert model.num_layers == plain.num_layers == plain.effective_depth()
    assert model.effective_depth() == model.num_layers * 10 // 3
    assert model.value_embedding == plain.value_embedding
    more = counts.total_params(model) - counts.total_params(plain)
    assert more == 2 * model.d_model**2 + 3 * model.d_model  # B and C; A, Delta and the norm of e


def test_published_needs_no_torch() -> None:
    code = "import sys, openmythos.config.published; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]
