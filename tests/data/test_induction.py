import itertools
from collections import Counter

import numpy as np
import pytest

from openmythos.data.induction import Induction, InductionConfig

ROWS = Induction(InductionConfig(length=12, max_train_hops=3), seed=1)


def targets_of(text: str, hops: int) -> list[str]:
    tokens = np.array([[4 + hops - 1, *("abcd".index(letter) for letter in text)]])
    found = ROWS.targets(tokens)[0]
    assert found[0] == -100
    return ["." if target == -100 else "abcd"[target] for target in found[1:]]


def test_hops_by_hand() -> None:
    # place    0123456
    # letter   abacbab     hop: a(2) -> b(1); b(4) -> a(2); a(5) -> c(3); b(6) -> a(5)
    assert targets_of("abacbab", 1) == list("..b.aca")
    # Two hops: b(4) -> a(2) -> b(1); a(5) -> c(3) -> none; b(6) -> a(5) -> c(3).
    assert targets_of("abacbab", 2) == list("....b.c")
    # Three: b(4) -> a(2) -> b(1) -> none; b(6) -> a(5) -> c(3) -> none.
    assert targets_of("abacbab", 3) == list(".......")


def slow(letters: list[int], place: int, hops: int) -> int | None:
    for _ in range(hops):
        before = [p for p in range(place) if letters[p] == letters[place]]
        if not before:
            return None
        place = before[-1] + 1
    return letters[place]


def test_rows_end_with_a_target_and_have_no_letter_twice_in_a_row() -> None:
    for hops in (1, 3):
        batch = ROWS.sample_batch(hops, hops, 40)
        for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            assert ROWS.words[row[0]] == f"hop{hops}"
            letters = row[1:]
            assert all(one != other for one, other in itertools.pairwise(letters))
            expected = [slow(letters, place, hops) for place in range(12)]
            assert [None if t == -100 else t for t in targets[1:]] == expected
            assert expected[-1] is not None


def test_leaks_agree_with_what_can_be_known() -> None:
    leaks = Induction(InductionConfig(), seed=1).leak_baselines(1)
    assert leaks["chance"] == 1 / 4
    assert leaks["majority"] == pytest.approx(1 / 4, abs=0.01)
    # One hop never leads to the letter itself: three are left.
    assert leaks["last_token"] == pytest.approx(1 / 3, abs=0.01)
    rows = Induction(InductionConfig(), seed=1).sample_batch(0, 1, 20000)
    counts: dict[tuple[int, ...], Counter[int]] = {}
    ends, answers = rows.tokens[:, -4:].tolist(), rows.targets[:, -1].tolist()
    for end, answer in zip(ends, answers, strict=True):
        counts.setdefault(tuple(end), Counter())[answer] += 1
    # The letter is among the last four in some rows, and the answer then known.
    assert max(counts[0, 1, 2, 0].values()) == counts[0, 1, 2, 0].total()
    best = sum(max(count.values()) for count in counts.values()) / len(answers)
    assert leaks["suffix_only"] == pytest.approx(best, abs=0.02)


def test_settings() -> None:
    with pytest.raises(ValueError, match="length is 8; it must be at least 9"):
        InductionConfig(length=8)
    with pytest.raises(ValueError, match="num_letters is 2; it must be 3 to 26"):
        InductionConfig(num_letters=2)
    assert InductionConfig().in_words == "induction of up to 4 hops over 32 of 4 letters"
