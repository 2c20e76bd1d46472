"""A Llama of transformers, and our model of one loop with the same weights."""

import tempfile
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

from openmythos.interop.loading import load_pretrained
from openmythos.model.recurrent import RecurrentDepthLM

FIELDS = {  # 24.7 million parameters
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@cache
def make_pair() -> tuple[nn.Module, RecurrentDepthLM]:
    """Theirs with random weights, and ours with the same weights through ``interop``."""
    torch.manual_seed(0)
    theirs: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**FIELDS)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_pretrained(folder)
