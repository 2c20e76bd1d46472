import pytest
import torch

from openmythos.analysis.example import CONTROL, puzzle_examples, text_examples
from openmythos.analysis.lens import (
    ANSWER,
    CHOICE,
    LensSums,
    coda_lens,
    logit_lens,
    measure_lenses,
    ranks,
)
from openmythos.analysis.observe import observe
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.model.inference import inference
from tests.analysis.family import KINDS, model_of
from tests.strategies import random_model, random_tokens, small_config


def test_rank_counts_the_larger_logits() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0], [1.0, 2.0, 3.0]])
    assert ranks(logits, torch.tensor([2, 1, -100])).tolist()[:2] == [2.0, 2.0]
    assert ranks(logits, torch.tensor([0, 2, 0])).tolist() == [1.0, 1.0, 3.0]
    assert bool(ranks(logits, torch.tensor([2, 1, -100])).isnan()[2])


def test_logit_lens_is_the_head_on_the_normalised_state() -> None:
    for tied in (True, False):
        model = random_model(small_config(tie_embeddings=tied))
        h = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1))
        size = (h.square().mean(dim=-1, keepdim=True) + model.config.block.norm_eps).sqrt()
        head = model.embed.weight if tied else model.head.weight
        by_hand = (h / size * model.final_norm.weight) @ head.T
        with torch.no_grad():
            assert torch.allclose(logit_lens(model, h), by_hand, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_lenses_meet_the_logits_at_their_ends(kind: str) -> None:
    model, last = model_of(kind), []
    tokens = random_tokens(model.config, 2, 5)
    ctx = model.context(tokens)
    with inference(model):
        *_, loop = observe(model, tokens, 3, ctx)
        hooks = [model.final_norm.register_forward_pre_hook(lambda m, x: last.append(x[0]))]
        logits = model(tokens, num_loops=3, ctx=ctx).logits
        hooks[0].remove()
        # The logit lens is what decoding does last; the coda lens is all of it.
        assert torch.equal(logit_lens(model, last[-1]), logits)
        if model.halting is None:
            assert torch.equal(coda_lens(model, loop.state.h, ctx), logits)


def test_mean_ranks_equal_a_computation_by_hand() -> None:
    walks = Walks(HopsConfig(num_entities=8, num_relations=2))
    model = random_model(small_config(vocab_size=walks.vocab_size))
    examples = puzzle_examples(walks, 3, 6)
    logit, coda = measure_lenses(model, examples, 2, 1 << 30)
    assert logit.places == coda.places == ("block 1", "block 2", "state")
    middle = ["entity after hop 1", "entity after hop 2"]
    assert coda.targets == (CHOICE, ANSWER, *middle, CONTROL)
    assert coda.num_positions == 6 and coda.vocab_size == 10
    ctx = examples.context(model)
    with inference(model):
        final = model(examples.tokens, num_loops=2, ctx=ctx).logits[:, -1].argmax(-1)
        wanted = [final, examples.answers[:, -1]]
        wanted += [examples.concepts[name][:, -1] for name in coda.targets[2:]]
        for number, loop in enumerate(observe(model, examples.tokens, 2, ctx)):
            for place, h in enumerate((*loop.places[1:], loop.state.h)):
                read = {logit: logit_lens(model, h), coda: coda_lens(model, h, ctx)}
                for lens, logits in read.items():
                    for target, ids in enumerate(wanted):
                        rows = [
                            1 + sum(other > row[own] for other in row)
                            for row, own in zip(logits[:, -1].tolist(), ids.tolist(), strict=True)
                            if own >= 0
                        ]
                        mean = sum(rows) / len(rows)
                        assert lens.rank[target][place][number] == pytest.approx(mean)
                        share = sum(rank == 1 for rank in rows) / len(rows)
                        assert lens.first[target][place][number] == pytest.approx(share)


def test_batches_do_not_change_ranks() -> None:
    model = model_of("signals")
    examples = text_examples([*random_tokens(model.config, 3, 6).tolist(), [1, 2, 3]], "random")
    whole, parts = LensSums(), LensSums()
    whole.add(model, examples, 2)
    for part in examples.batches(1):
        parts.add(model, part, 2)
    for one, other in zip(whole.lenses(), parts.lenses(), strict=True):
        assert one.rank[1][0] == pytest.approx(other.rank[1][0])
        assert one.num_positions == other.num_positions == 17
