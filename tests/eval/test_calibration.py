"""Rules against depths through the cache; a planted model must get a rule, another must not."""

import math
from pathlib import Path

import pytest
import torch

from openmythos.data.loader import TokenLoader
from openmythos.data.puzzle_table import CONFIGS, make_puzzle
from openmythos.data.synthetic import HopsConfig, Walks
from openmythos.engine.engine import Engine, EngineConfig
from openmythos.engine.reference import Session
from openmythos.eval.calibration import (
    PARTS,
    Frontier,
    Point,
    Setting,
    Text,
    added_up,
    choose,
    depths_up_to,
    faster,
    measure,
    observe,
    questions_of,
    read,
    rules_to_try,
    shallowest,
    texts_of,
    windows_of,
)
from openmythos.model.exit import (
    CumulativeThreshold,
    Fixed,
    KLExit,
    LatentDifferenceExit,
    Rule,
)
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import byte_tokenizer
from tests.engine.coherence import make_model
from tests.eval.planted import (
    ENOUGH,
    MOST,
    VOCAB,
    CallCounter,
    planted_engine,
    planted_model,
    texts,
)
from tests.strategies import unchecked
from tests.train.examples import write_text

HALF = set(range(0, VOCAB, 2))
KINDS = {"latent_difference", "kl"}


def frontier_of(model: RecurrentDepthLM) -> Frontier:
    """Of some depths and the rules of two kinds, timed by calls of the core and of the head."""
    given, depths, clock = texts(4, 7), [1, 2, ENOUGH - 1, ENOUGH, MOST], CallCounter(model)
    with unchecked():
        enough = shallowest(model, given, depths, "bits_per_byte", 0.01)
        rules = rules_to_try(model, given, enough)
        settings = [Setting(n) for n in depths]
        settings += [Setting(enough, rule) for rule in rules if rule.kind in KINDS]
        parts = list(measure(planted_engine(model), settings, given, clock))
    return choose(added_up(parts), "bits_per_byte", 0.01)


def test_a_model_in_which_half_of_the_tokens_need_one_loop_gets_a_rule() -> None:
    found = frontier_of(planted_model(HALF))
    assert found.best.setting.num_loops >= ENOUGH and found.fixed.setting == Setting(ENOUGH)
    chosen = found.chosen
    assert chosen.setting.exit_rule is not None and chosen.setting.num_loops == ENOUGH
    assert chosen.mean_loops < 5 and found.gain(chosen) > 1.3
    assert found.loss(chosen).value <= 0.01 and chosen in found.undominated


def test_a_rule_that_saves_nothing_is_not_chosen() -> None:
    assert frontier_of(planted_model(set())).chosen.setting == Setting(ENOUGH)


def test_a_rule_that_reads_logits_pays_only_where_the_head_is_cheap() -> None:
    rule, gain = KLExit(threshold=1e-9, min_loops=2), {}
    for head in (0.1, 20.0):
        model = planted_model(HALF)
        clock, engine = CallCounter(model, head), planted_engine(model)
        with unchecked():
            ruled, fixed = (
                read(engine, Setting(ENOUGH, each), texts(1), clock) for each in (rule, None)
            )
        gain[head] = faster(ruled, fixed)
    assert gain[20.0] < 1 < gain[0.1]


def test_a_text_is_read_as_the_reference_generates_it_through_the_cache() -> None:
    """What an early exit leaves in the cache is what later tokens read."""
    model = make_model("gqa")
    setting = Setting(4, LatentDifferenceExit(threshold=0.6))
    given = [Text((3, 1, 4, 1, 5, 9, 2, 6), 7), Text((5, 3, 5, 8), 9), Text((2, 7), 1)]
    engine = Engine(model, EngineConfig(max_rows=2, max_loops=5, page_size=2, prefill_chunk=4))
    point = read(engine, setting, given)
    loops = 0
    for text, (bits, size) in zip(given, point.outcomes, strict=True):
        request = text.request(setting)
        alone = list(Session.fitting(model, [request]).stream([request]))
        assert [new.token for new in alone] == list(text.tokens[1:])
        total = -sum(new.logprobs.chosen for new in alone if new.logprobs) / math.log(2)
        assert (bits, size) == (pytest.approx(total, abs=1e-9), text.num_bytes)
        loops += sum(new.num_loops for new in alone)
    assert point.num_tokens == 7 + 3 + 1 and point.num_loops == loops < 4 * point.num_tokens
    fixed = read(engine, Setting(4), given)
    whole = [_plain_bits(model, text, 4) for text in given]
    assert [bits for bits, _ in fixed.outcomes] == pytest.approx(whole, abs=1e-9)


def _plain_bits(model: RecurrentDepthLM, text: Text, num_loops: int) -> float:
    tokens = torch.tensor([text.tokens])
    with torch.no_grad():
        logprobs = model(tokens, num_loops=num_loops).logits[0, :-1].log_softmax(dim=-1)
    return -float(logprobs.gather(1, tokens[0, 1:, None]).sum()) / math.log(2)


def test_questions_are_as_many_of_each_size() -> None:
    given = questions_of(Walks(HopsConfig()), range(1, 4), 27)
    assert [len(text.tokens) for text in given] == [2] * 3 + [3] * 3 + [4] * 3
    assert {len(text.answer) for text in given} == {1}
    sums = questions_of(make_puzzle(CONFIGS["addition"](), 0), range(2, 4), 40)
    assert [len(text.tokens) for text in sums] == [6] * 2 + [9] * 2
    for text in sums:
        tens, ones = text.tokens[1::3], text.tokens[::3]
        assert text.read == (*text.tokens, *text.answer[:2])
        total = 10 * sum(tens) + sum(ones)
        assert total == sum(digit * 10**place for place, digit in enumerate(text.answer))


def test_of_a_question_the_whole_answer_counts() -> None:
    model = planted_model(HALF)
    asked = [Text((0, 1, 2), answer=(9, 4)), Text((2, 3), answer=(3, 5)), Text((2,), answer=(4, 4))]
    point = read(planted_engine(model, 2), Setting(MOST), asked)
    assert point.outcomes == [(0.0, 1.0)] * 3 and point.num_tokens == 4 + 3 + 2
    good = [Text((0, 1, 2), answer=(3, 4, 5)), Text((7,), answer=(8, 9))]
    assert read(planted_engine(model, 2), Setting(MOST), good).outcomes == [(1.0, 1.0)] * 2
    with unchecked():
        assert shallowest(model, good, [1, ENOUGH, MOST], "accuracy", 0.0) == ENOUGH
        assert shallowest(model, asked, [1, ENOUGH, MOST], "accuracy", 0.0) == 1  # none is right


def test_of_a_walk_the_answer_counts() -> None:
    model = planted_model(HALF)
    asked = [Text((0, 1, 2), answer=(3,)), Text((4,), answer=(5,)), Text((2,), answer=(4,))]
    point = read(planted_engine(model, 2), Setting(MOST), asked)
    assert point.outcomes == [(1.0, 1.0), (1.0, 1.0), (0.0, 1.0)] and point.num_tokens == 5


def test_texts_are_parts_of_documents(tmp_path: Path) -> None:
    from openmythos.data.prepare import prepare

    folder = tmp_path / "data"
    prepare(str(write_text(tmp_path)), folder, val_fraction=0.5, vocab_size=300)
    loader = TokenLoader(folder, "val", seq_len=16, batch_size=4)
    found = texts_of(loader, 4)
    batch = loader.batch(0)
    assert sum(text.num_bytes for text in found) == batch.num_bytes
    bos = loader.tokenizer.bos_id
    for text in found:
        assert 2 <= len(text.tokens) <= 17 and bos not in text.tokens[1:]


def test_depths_are_dense_where_models_are_shallow() -> None:
    assert depths_up_to(1) == [1]
    assert depths_up_to(8) == list(range(1, 9))
    assert depths_up_to(20) == [*range(1, 9), 10, 12, 14, 16, 20]
    assert depths_up_to(64)[-5:] == [32, 40, 48, 56, 64]


@pytest.mark.parametrize("rule", [Fixed(), KLExit(threshold=0.2, check_every=2), KLExit(), None])
def test_what_a_rule_would_do_is_what_it_does_to_the_first_token(rule: Rule | None) -> None:
    """The first token of a text has nothing before it whose exit it could feel."""
    model = make_model("act")
    rule = CumulativeThreshold(threshold=0.6) if rule is None else rule
    given = [Text((token, 1), 1) for token in range(8)]
    seen = observe(model, given, 5)
    engine = Engine(model, EngineConfig(max_rows=8, max_loops=5))
    first = read(engine, Setting(5, rule), given)
    only = seen._replace(
        start=seen.start[::2],
        h=[h[::2] for h in seen.h],
        logits=[logits[::2] for logits in seen.logits],
        mass=seen.mass and [mass[::2] for mass in seen.mass],
    )
    assert only.mean_loops(rule) == pytest.approx(first.mean_loops)


def test_a_model_of_one_loop_has_no_rules_and_halting_heads_have_one_more() -> None:
    assert rules_to_try(planted_model(HALF), texts(), 1) == []
    kinds = {rule.kind for rule in rules_to_try(make_model("gqa"), [Text(tuple(range(19)))], 4)}
    more = {rule.kind for rule in rules_to_try(make_model("act"), [Text(tuple(range(19)))], 4)}
    assert more - kinds == {"cumulative_threshold"}


def point(setting: Setting, right: list[int], *speeds: float, loops: float = 0) -> Point:
    outcomes = [(float(each), 1.0) for each in right]
    num_loops = int(100 * (loops or setting.num_loops))
    return Point(setting, outcomes, 100, num_loops, tuple(map(float, speeds)))


def test_the_choice_is_the_fastest_that_loses_little() -> None:
    rule = Setting(2, KLExit())
    one, two, four = (
        point(Setting(n), right, speed)
        for n, right, speed in ((1, [0] * 100, 400), (2, [1] * 100, 200), (4, [1] * 100, 100))
    )
    barely = point(rule, [1] * 100, 205, loops=1.5)
    clearly = point(rule, [1] * 100, 240, loops=1.5)
    worse = point(rule, [0] * 5 + [1] * 95, 390, loops=1.1)
    lucky = point(rule, [0] + [1] * 99, 390, loops=1.1)  # 0.01 lost, and as much again as its error
    assert choose([one, two, four, barely, worse, lucky], "accuracy", 0.01).chosen is two
    found = choose([one, two, four, clearly, worse], "accuracy", 0.01)
    assert found.chosen is clearly and found.best is two and found.fixed is two
    assert found.undominated == [one, worse, clearly]
    assert choose([one, two, four, worse], "accuracy", 0.1).chosen is worse
    assert choose([one, two, four], "accuracy", 1.0).chosen is one
    assert choose([one, two, four], "bits_per_byte", 0.0).chosen is one  # fewer bits are better
    with pytest.raises(ValueError, match="--within is -1"):
        choose([one], "accuracy", -1.0)


def test_a_machine_that_changes_its_speed_meanwhile_decides_nothing() -> None:
    fixed = point(Setting(4), [1] * 10, 100, 100, 100, 900, 900)
    same = point(Setting(4, KLExit()), [1] * 10, 95, 95, 855, 855, 855, loops=3)
    found = choose([fixed, same], "accuracy", 0.0)
    assert found.gain(same) == 0.95 and found.chosen is fixed
    saves_none = point(Setting(4, KLExit()), [1] * 10, *[2000] * 5)
    assert choose([fixed, saves_none], "accuracy", 0.0).chosen is fixed
    saves = point(Setting(4, KLExit()), [1] * 10, 120, 120, 120, 120, 1080, loops=3)
    found = choose([fixed, saves], "accuracy", 0.0)
    assert found.chosen is saves and found.tokens_per_s(saves) == pytest.approx(120)


def test_all_texts_are_read_once_by_each_setting() -> None:
    model = planted_model(HALF)
    parts = list(measure(planted_engine(model, 4), [Setting(1), Setting(2)], texts(5, 4)))
    assert len(parts) == 2 * PARTS
    assert [part.setting.num_loops for part in parts] == [1, 2] * PARTS
    assert [total.num_tokens for total in added_up(parts)] == [5 * 3] * 2


def test_a_model_that_has_diverged_is_refused() -> None:
    model = planted_model(HALF)
    with torch.no_grad():
        model.injection.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="fixed 2 cannot be measured: the logits are not finite"):
        read(planted_engine(model), Setting(2), texts(1))


def test_settings_in_words() -> None:
    assert str(Setting(3)) == "fixed 3"
    assert str(Setting(3, KLExit(threshold=0.25, check_every=2))) == (
        "kl, check_every 2, threshold 0.25"
    )


def test_windows_are_the_whole_text_and_nothing_twice() -> None:
    tokenizer = byte_tokenizer().marking_begin()
    given = ["a text of some bytes", "", "another"]
    windows = list(windows_of(given, tokenizer, 8))
    assert [len(window.tokens) for window in windows] == [8, 8, 5, 8]
    ids = [token for window in windows for token in window.tokens]
    assert tokenizer.decode(ids) == "".join(given)
    assert [window.num_bytes for window in windows] == [7, 7, 4, 7]
