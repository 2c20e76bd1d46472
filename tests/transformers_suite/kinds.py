"""transformers' own model tests on every kind of export; ``run`` prepares what this imports.

A class per kind. What the tests ask of a model is in ``KindTester``, which makes a small config of
the kind and inputs; the classes under test are those of ``openmythos/interop/hf``.
"""

import unittest
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, set_seed
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto
from transformers_tests import test_expert_parallel_mixin, test_tensor_parallel_mixin
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_expert_parallel_mixin import ExpertParallelTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from openmythos.config import ModelConfig
from openmythos.interop.export import SOURCES, write_config
from tests.interop.hf.examples import CONFIGS

Base, ForCausalLM = (
    get_class_from_dynamic_module(f"modeling_openmythos.{name}", str(SOURCES))
    for name in ("OpenMythosModel", "OpenMythosForCausalLM")
)

# Known to transformers as its own models are: its tests look for labels, say, in these tables.
AutoModel.register(Base.config_class, Base)
AutoModelForCausalLM.register(Base.config_class, ForCausalLM)
modeling_auto.MODEL_MAPPING_NAMES["openmythos"] = Base.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["openmythos"] = ForCausalLM.__name__
# Only some models of transformers run on two ranks there.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None


class KindTester:
    """A small config of one kind, and inputs."""

    batch_size, seq_length, is_training = 3, 7, True
    base_model_class, causal_lm_class = Base, ForCausalLM

    def __init__(self, config: ModelConfig) -> None:
        self.kind = replace(config, vocab_size=99, num_loops=2)
        example = self.get_config()
        self.hidden_size, self.vocab_size = example.hidden_size, example.vocab_size
        self.num_hidden_layers = example.num_hidden_layers
        self.num_attention_heads = example.num_attention_heads

    def get_config(self) -> Any:
        return Base.config_class(
            **write_config(self.kind), pad_token_id=0, bos_token_id=1, eos_token_id=2
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids).tril()
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Suite(
    TrainingTesterMixin,
    ExpertParallelTesterMixin,
    TensorParallelTesterMixin,
    ModelTesterMixin,
    GenerationTesterMixin,
):
    """What all kinds share."""

    kind: ModelConfig
    all_model_classes = (Base, ForCausalLM)
    model_tester: Any = None
    training_overfit_learning_rate = 5e-3  # these models are narrow

    def setUp(self) -> None:
        set_seed(0)
        self.model_tester = KindTester(self.kind)

    @unittest.skip("a layer per loop is counted: more than two")
    def test_num_layers_is_small(self) -> None: ...


def without_experts(self: Suite, *_: object) -> None:
    self.skipTest("the class under test has experts, models of this kind have none")


for name, config in CONFIGS.items():
    label = "".join(word.capitalize() for word in name.replace(",", "").replace("-", " ").split())
    fields: dict[str, Any] = {"kind": config, "__module__": __name__}
    if config.core_ff.kind != "moe":
        asked = "test_eager_matches_batched_and_grouped_inference"
        fields |= {test: without_experts for test in dir(Suite) if test.startswith(asked)}
    globals()[f"Test{label}"] = type(f"Test{label}", (Suite, unittest.TestCase), fields)
del Suite
