"""Models of a run on one process; ``test_two_ranks.py`` has their parts on several."""

import torch

from openmythos.config import GateInjectionConfig, PonderNetConfig
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.train.ranks import Ranks
from openmythos.train.recipe import TrainConfig
from openmythos.train.setup import _DrawnOnMeta, new_model
from tests.strategies import MLA, MOE, small_config


def test_one_process_draws_the_model_as_always() -> None:
    config = small_config(core_feed_forward=MOE)
    made = new_model(config, TrainConfig(max_steps=1, seed=5), Ranks.alone()).state_dict()
    expected = RecurrentDepthLM(config, 5).state_dict()
    assert made.keys() == expected.keys()
    assert all(torch.equal(tensor, made[name]) for name, tensor in expected.items())


def test_only_what_is_drawn_goes_without_memory() -> None:
    """All else keeps the values of its constructor, which no rank could draw again."""
    parts = {"attention": MLA, "core_feed_forward": MOE, "halting": PonderNetConfig()}
    for config in (small_config(**parts), small_config(injection=GateInjectionConfig())):
        with _DrawnOnMeta():
            model = RecurrentDepthLM(config)
        whole = RecurrentDepthLM(config).state_dict()
        drawn = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
        assert "embed.weight" in drawn and "injection.a_log" not in drawn
        for name, tensor in model.state_dict().items():
            assert name in drawn or torch.equal(tensor, whole[name]), name
