from tests.transformers_suite.run import FOREIGN, KINDS, judge


def test_only_what_is_listed_may_fail_and_it_must() -> None:
    assert FOREIGN.keys() <= set(KINDS) and all(FOREIGN.values())
    known, *others = FOREIGN["Parcae"]
    fails = dict.fromkeys([known, *others], "failed")
    assert judge("Parcae", {**fails, "test_a": "passed", "test_b": "skipped"}) == []
    assert judge("Dense", fails) == [f"{name}: FAILED" for name in sorted(fails)]
    stale = {**fails, known: "passed", "test_a": "failed"}
    assert judge("Parcae", stale) == [
        "test_a: FAILED",
        f"{known}: passed, strike it from FOREIGN",
    ]
    assert judge("Parcae", {"test_a": "passed"}) == []  # one test was asked for
