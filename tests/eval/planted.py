"""A model in which some tokens need one loop and the others seven, and texts of both."""

import math

import torch

from openmythos.config import GQAConfig, ModelConfig, SwiGLUConfig
from openmythos.engine.engine import Engine, EngineConfig
from openmythos.eval.calibration import Text
from openmythos.model.recurrent import RecurrentDepthLM

VOCAB, ENOUGH, MOST = 12, 7, 9


def planted_model(easy: set[int]) -> RecurrentDepthLM:
    """The token after x is x + 1. The core does nothing: the injection alone moves the state.

    Half of the channels have their value after one loop, the others near it, A = 0.8, by and by. Of
    an easy token the first ones say what is right; of another they say what is wrong, and what the
    others say outweighs that from loop 7 on.
    """
    config = ModelConfig(
        vocab_size=VOCAB,
        d_model=2 * VOCAB,
        num_prelude_layers=0,
        num_core_layers=1,
        num_coda_layers=0,
        num_loops=MOST,
        max_seq_len=64,
        attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=12),
        feed_forward=SwiGLUConfig(d_ff=8),
        prelude_norm=False,
        tie_embeddings=False,
    )
    model = RecurrentDepthLM(config).double().eval()
    assert model.head is not None
    with torch.no_grad():
        model.injection.dt_bias.fill_(math.log(math.e - 1))  # Delta = 1
        model.injection.a_log[:VOCAB] = 3.0  # A = exp(-exp(3)), almost 0
        model.injection.a_log[VOCAB:] = math.log(-math.log(0.8))
        model.embed.weight.zero_()
        model.head.weight.zero_()
        for token in range(VOCAB):
            right, wrong = (token + 1) % VOCAB, (token + 5) % VOCAB
            model.embed.weight[token, right if token in easy else wrong] = 1.0
            if token not in easy:
                model.embed.weight[token, VOCAB + right] = 1 / 3.8
            model.head.weight[token, token] = model.head.weight[token, VOCAB + token] = 100.0
    return model


def texts(count: int = 8, length: int = 12) -> list[Text]:
    """Texts of all tokens in turn, each of one byte."""
    found = [tuple((start + place) % VOCAB for place in range(length)) for start in range(count)]
    return [Text(tokens, num_bytes=length - 1) for tokens in found]


class CallCounter:
    """A clock that counts calls of the core and of the head, so that no machine's load matters."""

    def __init__(self, model: RecurrentDepthLM, head: float = 1.0) -> None:
        self.time = 0.0
        assert model.head is not None
        model.core[0].register_forward_hook(lambda *_: self._tick(1.0))
        model.head.register_forward_hook(lambda *_: self._tick(head))

    def _tick(self, cost: float) -> None:
        self.time += cost

    def __call__(self) -> float:
        return self.time


def planted_engine(model: RecurrentDepthLM, max_rows: int = 1) -> Engine:
    """An engine for the texts."""
    return Engine(model, EngineConfig(max_rows=max_rows, max_loops=MOST, max_len=16))
