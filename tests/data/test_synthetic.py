import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openmythos.data.synthetic import Curriculum, HopsConfig, Walks

WALKS = Walks(HopsConfig(seed=3))


def all_walks(of, num_hops):
    relations = range(of.config.num_entities, of.vocab_size)
    axes = [range(of.config.num_entities), *[relations] * num_hops]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, num_hops + 1)


def answers(of, walks):
    """The slow way: one walk after the other."""
    result = []
    for start, *relations in walks.tolist():
        entity = start
        for relation in relations:
            entity = int(of.relations[relation - of.config.num_entities][entity])
        result.append(entity)
    return result


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 40))
def test_batches_are_walks_with_their_answer_at_the_end(step, num_hops, batch_size):
    batch = WALKS.sample_batch(step, num_hops, batch_size)
    tokens = batch.tokens.numpy()
    assert tokens.shape == (batch_size, num_hops + 1)
    assert (tokens[:, 0] < 16).all() and (tokens[:, 1:] >= 16).all()
    assert tokens.max() < WALKS.vocab_size == 20
    assert batch.targets[:, -1].tolist() == answers(WALKS, tokens)
    assert (batch.targets[:, :-1] == -100).all()
    assert (batch.documents == 0).all() and batch.num_bytes == 0
    assert batch.positions[0].tolist() == list(range(num_hops + 1))
    assert not WALKS.is_held_out(tokens, num_hops).any()


def test_relations_are_permutations_that_differ():
    for row in WALKS.relations:
        assert sorted(row.tolist()) == list(range(16))
    assert len({tuple(row) for row in WALKS.relations.tolist()}) == 4
    other = Walks(HopsConfig(seed=4))
    assert not np.array_equal(WALKS.relations, other.relations)


def test_entities_along_a_walk():
    walks = all_walks(WALKS, 3)[::17]
    along = WALKS.entities_along(walks)
    for hops in range(1, 4):
        assert along[:, hops].tolist() == answers(WALKS, walks[:, : hops + 1])
    assert (along[:, 0] == walks[:, 0]).all()


@pytest.mark.parametrize("num_hops", [3, 4, 5])
def test_a_tenth_of_all_walks_is_held_out_whatever_the_batch(num_hops):
    walks = all_walks(WALKS, num_hops)
    held_out = WALKS.is_held_out(walks, num_hops)
    assert held_out.mean() == pytest.approx(0.1, abs=0.02)
    assert np.array_equal(held_out, Walks(HopsConfig(seed=3)).is_held_out(walks, num_hops))
    assert np.array_equal(held_out[::-1], WALKS.is_held_out(walks[::-1], num_hops))
    assert not np.array_equal(held_out, Walks(HopsConfig(seed=4)).is_held_out(walks, num_hops))


def test_training_and_evaluation_share_no_walk_and_miss_none():
    trained = {tuple(w) for s in range(60) for w in WALKS.sample_batch(s, 3, 256).tokens.tolist()}
    evaluated = {tuple(w) for w in WALKS.held_out_batch(3, 2000).tokens.tolist()}
    assert not trained & evaluated
    assert len(trained) + len(evaluated) == WALKS.num_examples(3)


def test_short_walks_are_all_trained():
    assert not WALKS.holds_out(1)
    assert not WALKS.holds_out(2)
    assert WALKS.holds_out(3)
    trained = {tuple(w) for s in range(20) for w in WALKS.sample_batch(s, 1, 64).tokens.tolist()}
    assert len(trained) == WALKS.num_examples(1) == 64
    assert {tuple(w) for w in WALKS.held_out_batch(1, 500).tokens.tolist()} <= trained
    nothing = Walks(HopsConfig(held_out_fraction=0.0))
    assert not nothing.holds_out(8)
    assert nothing.held_out_batch(8, 5).tokens.shape == (5, 9)


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 5), st.integers(1, 30))
def test_ranks_partition_the_global_batch(step, num_hops, world_size, batch_size):
    whole = WALKS.sample_batch(step, num_hops, batch_size).tokens
    for rank in range(world_size):
        part = WALKS.sample_batch(step, num_hops, batch_size, rank, world_size).tokens
        assert torch.equal(part, whole[rank::world_size])


def test_samples_are_pure_and_differ_between_steps_and_seeds():
    again = Walks(HopsConfig(seed=3))
    assert torch.equal(WALKS.sample_batch(5, 8, 32).tokens, again.sample_batch(5, 8, 32).tokens)
    batches = [WALKS.sample_batch(step, 20, 32).tokens for step in range(4)]
    batches += [WALKS.held_out_batch(20, 32, seed).tokens for seed in range(4)]
    rows = torch.cat(batches)
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert torch.equal(
        WALKS.held_out_batch(8, 9, 2).tokens, WALKS.held_out_batch(8, 32, 2).tokens[:9]
    )


def test_walks_are_uniform():
    tokens = torch.cat([WALKS.sample_batch(step, 3, 512).tokens for step in range(20)])
    starts = torch.bincount(tokens[:, 0], minlength=16) / len(tokens)
    assert torch.allclose(starts, torch.full((16,), 1 / 16), atol=0.012)
    for column in (1, 2, 3):
        relations = torch.bincount(tokens[:, column] - 16, minlength=4) / len(tokens)
        assert torch.allclose(relations, torch.full((4,), 1 / 4), atol=0.02)


@given(st.integers(1, 30), st.integers(0, 100))
def test_permutations_leak_nothing(num_hops, seed):
    leaks = Walks(HopsConfig(seed=seed, num_entities=20)).leak_baselines(num_hops)
    assert leaks == pytest.approx(
        {"chance": 0.05, "majority": 0.05, "last_token": 0.05, "suffix_only": 0.05}, abs=1e-9
    )


@pytest.mark.parametrize(
    ("num_entities", "num_hops", "expected"),
    [
        (20, 1, 0.162),
        (20, 4, 0.334),
        (20, 8, 0.487),
        (20, 16, 0.677),
        (20, 32, 0.860),
        (50, 8, 0.269),
    ],
)
def test_random_functions_leak_as_the_literature_says(num_entities, num_hops, expected):
    # 2,000 relations: almost every word composes functions that no other word of the sample uses.
    config = HopsConfig(num_entities=num_entities, num_relations=2000, permutations=False)
    leaks = Walks(config).leak_baselines(num_hops)
    assert leaks["suffix_only"] == pytest.approx(expected, abs=0.02)


def test_leaks_agree_with_the_best_guesses_fitted_to_all_walks():
    functions = Walks(HopsConfig(num_entities=7, num_relations=3, permutations=False, seed=1))
    walks = all_walks(functions, 4)
    targets = np.array(answers(functions, walks))

    def best_guess(seen):
        return sum(
            np.bincount(targets[(seen == key).all(axis=1)]).max() for key in np.unique(seen, axis=0)
        ) / len(targets)

    assert functions.leak_baselines(4) == pytest.approx(
        {
            "chance": 1 / 7,
            "majority": best_guess(walks[:, :0]),
            "last_token": best_guess(walks[:, -1:]),
            "suffix_only": best_guess(walks[:, 1:]),
        }
    )


def test_curriculum_passes_stages_and_resumes():
    curriculum = Curriculum(max_stage=3)
    assert not curriculum.observe(0.94)
    assert curriculum.observe(0.95)
    state = json.loads(json.dumps(curriculum.state_dict()))
    resumed = Curriculum(max_stage=3)
    resumed.load_state_dict(state)
    assert resumed == curriculum
    assert resumed.observe(1.0) and resumed.stage == 3
    assert not resumed.observe(1.0) and resumed.stage == 3


def test_curriculum_chooses_the_current_stage_two_times_in_three():
    curriculum = Curriculum(max_stage=8, stage=4)
    chosen = np.array([curriculum.choose_hops(0, step) for step in range(6000)])
    share = np.bincount(chosen, minlength=5) / len(chosen)
    assert share == pytest.approx([0, 1 / 9, 1 / 9, 1 / 9, 2 / 3], abs=0.02)
    assert {Curriculum(max_stage=8).choose_hops(0, s) for s in range(99)} == {1}


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 20))
def test_what_a_walk_passes_is_written_after_it(step, num_hops, batch_size):
    written = Walks(HopsConfig(seed=3, written_out=True))
    plain, batch = (of.sample_batch(step, num_hops, batch_size) for of in (WALKS, written))
    passed = torch.from_numpy(WALKS.entities_along(plain.tokens.numpy()))[:, 1:]
    assert torch.equal(batch.tokens, torch.cat([plain.tokens, passed[:, :-1]], dim=1))
    assert torch.equal(batch.targets[:, num_hops:], passed)
    assert (batch.targets[:, :num_hops] == -100).all()
    at = [*range(num_hops + 1), *range(1, num_hops)]  # as the relation that leads there
    assert batch.positions[0].tolist() == at
    assert (batch.documents == 0).all()


def test_written_out_or_not_the_same_walks_are_held_out():
    written = Walks(HopsConfig(seed=3, written_out=True))
    asked = written.held_out_batch(6, 50, seed=1).tokens[:, :7]
    assert torch.equal(asked, WALKS.held_out_batch(6, 50, seed=1).tokens)


@given(st.integers(0, 100), st.integers(2, 20), st.integers(1, 9))
def test_walks_of_summands_are_sums(seed, num_entities, num_hops):
    num_relations = min(4, num_entities - 1)
    sums = Walks(
        HopsConfig(seed=seed, num_entities=num_entities, num_relations=num_relations, shifts=True)
    )
    summands = sums.relations[:, 0]
    assert len(set(summands.tolist())) == num_relations and (summands > 0).all()
    batch = sums.sample_batch(0, num_hops, 30)
    start, relations = batch.tokens.numpy()[:, 0], batch.tokens.numpy()[:, 1:] - num_entities
    total = (start + summands[relations].sum(axis=1)) % num_entities
    assert batch.targets[:, -1].tolist() == total.tolist()
    leaks = list(sums.leak_baselines(num_hops).values())
    assert leaks == pytest.approx([1 / num_entities] * 4)


def test_arguments_out_of_range():
    for options, message in [
        ({"shifts": True, "permutations": False}, "shifts with permutations=False"),
        ({"shifts": True, "num_relations": 16}, "fewer relations than entities"),
        ({"num_entities": 1}, "num_entities is 1"),
        ({"max_train_hops": 0}, "max_train_hops is 0"),
        ({"held_out_fraction": 0.9}, "held_out_fraction is 0.9; it must be 0 to 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            HopsConfig(**options)
    with pytest.raises(ValueError, match="num_hops=0"):
        WALKS.sample_batch(0, 0, 4)
    with pytest.raises(ValueError, match="rank=2 of world_size=2"):
        WALKS.sample_batch(0, 1, 4, 2, 2)
    with pytest.raises(ValueError, match="num_hops=0"):
        WALKS.leak_baselines(0)
    with pytest.raises(ValueError, match="stage=9, max_stage=3"):
        Curriculum(max_stage=3, stage=9)
    with pytest.raises(ValueError, match="stage=7 is not in this curriculum"):
        Curriculum(max_stage=3).load_state_dict({"stage": 7})


def test_facts_that_are_held_out_are_trained_alone_only():
    config = HopsConfig(num_entities=40, num_relations=6, held_out_facts=0.2)
    walks = Walks(config)
    assert 0.1 < walks.alone.mean() < 0.3
    trained, held_out = (
        batch.tokens.numpy()
        for batch in (walks.sample_batch(0, 2, 400), walks.held_out_batch(2, 400))
    )
    assert walks.num_alone(trained).tolist() == [0] * 400
    assert {*walks.num_alone(held_out).tolist()} == {0, 2}
    shown = {*walks.num_alone(walks.sample_batch(0, 1, 400).tokens.numpy()).tolist()}
    assert shown == {0, 1}  # alone, they are all trained
    by_hand = [
        int(walks.alone[first - 40, start]) + int(walks.alone[second - 40, passed])
        for start, first, second in held_out.tolist()
        for passed in [walks.relations[first - 40, start]]
    ]
    assert by_hand == walks.num_alone(held_out).tolist()
    without = Walks(replace(config, held_out_facts=0.0))
    assert not without.alone.any() and without.possible(held_out).all()
    assert not walks.possible(without.sample_batch(0, 2, 400).tokens.numpy()).all()


def test_positions_are_drawn_and_sorted():
    plain, drawn = Walks(HopsConfig()), Walks(HopsConfig(position_range=64))
    batch = drawn.held_out_batch(10, 64)
    assert torch.equal(batch.tokens, plain.held_out_batch(10, 64).tokens)  # the same walks
    assert (batch.positions.diff(dim=1) > 0).all() and len(set(batch.positions[:, 0].tolist())) > 5
    assert batch.positions.min() == 0 and 50 < batch.positions.max() < 64
    assert torch.equal(batch.positions, drawn.held_out_batch(10, 64).positions)
    dense = Walks(HopsConfig(position_range=9)).held_out_batch(8, 4).positions
    assert torch.equal(dense, plain.held_out_batch(8, 4).positions)
    with pytest.raises(ValueError, match="11 tokens need a position_range of as many; it is 9"):
        Walks(HopsConfig(position_range=9)).held_out_batch(10, 4)
    with pytest.raises(ValueError, match="need at least 9"):
        HopsConfig(position_range=8)


def test_every_token_has_the_entity_reached_as_its_target():
    walks = Walks(HopsConfig())
    batch = walks.sample_batch(0, 5, 8)
    passed = walks.with_passed_targets(batch)
    assert torch.equal(passed.tokens, batch.tokens)
    assert torch.equal(passed.targets[:, -1], batch.targets[:, -1])
    assert torch.equal(passed.targets[:, 0], batch.tokens[:, 0])
    reached = walks.relations[batch.tokens[:, 3].numpy() - 16, passed.targets[:, 2].numpy()]
    assert passed.targets[:, 3].tolist() == reached.tolist()


def test_an_unmixed_curriculum_trains_the_longest_walks_only():
    assert {Curriculum(max_stage=8, stage=4, mixed=False).choose_hops(0, s) for s in range(99)} == {
        4
    }
