import sys
from dataclasses import replace

import torch

from openmythos.config import NormalInitConfig
from tests.interop.hf.conftest import Open
from tests.interop.hf.examples import HUGINN
from tests.strategies import random_tokens


@torch.no_grad()
def test_the_noise_of_a_seed_is_ours(opened: Open) -> None:
    model, export = (side.double() for side in opened(HUGINN))
    tokens = random_tokens(HUGINN, 2, 7)
    for seed in (0, 3, -1, 2**40 + 5):
        export.config.state_seed = seed
        ctx = model.context(tokens, seeds=seed)
        e = torch.zeros(2, 7, HUGINN.d_model, dtype=torch.float64)
        state = model.init_state(e, ctx)
        source = sys.modules[type(export.model.injection).__module__]
        theirs = source.initial_state(export.config, e, ctx.positions)
        assert torch.equal(state, theirs)
        ours = model(tokens, ctx=ctx).logits
        assert (export(tokens).logits - ours).abs().max() < 1e-5
    export.config.state_seed = 4
    assert (export(tokens).logits - ours).abs().max() > 1e-2


@torch.no_grad()
def test_the_noise_follows_the_position_and_not_the_column(opened: Open) -> None:
    config = replace(HUGINN, state_init=NormalInitConfig(std=1.0))
    _, export = opened(config)
    alone = export(torch.tensor([[5, 6, 7]])).logits
    padded = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = export(padded, attention_mask=mask).logits[:1, 2:]
    assert (found - alone).abs().max() < 1e-5
