"""The tables of the page and the data of its figures."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from experiments import equal_accuracy
from experiments.claim import Table
from experiments.halting.arm import (
    ACT_ARMS,
    ARMS,
    LEVEL,
    MOST_LOOPS,
    PLAIN,
    PONDERNET,
    STEPPING,
    TRAINED_HOPS,
)
from experiments.halting.conclude import (
    Data,
    all_hops,
    at_depth,
    best_fixed,
    own_loops,
    own_right,
    rule_on,
    wasted,
)
from experiments.halting.exits import follows_difficulty, mean_loops
from experiments.interval import t_interval
from experiments.matching import Size, matching
from experiments.run_store import Results

LAST_STAGE = str(max(TRAINED_HOPS))


def tables(results: Results) -> list[Table]:
    """What every arm did, loops by hops, the rules, how the arms match, and the leak baselines."""
    ran = [arm for arm in ARMS.values() if results.of(arm.name)]
    if not ran:
        return []
    sizes = {}
    for arm in ran:
        config = arm.config(0, 1.0, 1)
        mean = config.train.depth.sampling.mean_recurrence
        sizes[arm.in_words] = Size(config.model, mean, config.model.num_loops)
    found = [_arms(results), _equal(results), _by_hops(results), _leaks(results)]
    if results.of(PLAIN.name):
        found.append(_rules(results))
        found.append(matching(sizes, PLAIN.in_words, context_length=max(TRAINED_HOPS) + 1))
    return found


def _arms(results: Results) -> Table:
    header = [
        "arm",
        "ponder cost",
        "last stage from step",
        "own halting: loops",
        "right",
        "rank correlation with hops",
        "loops after settling",
        "right at the best fixed depth",
        f"at {2 * MOST_LOOPS} loops",
    ]
    rows = []
    for arm in ARMS.values():
        runs = results.of(arm.name)
        if not runs:
            continue
        owns: list[Callable[[Data], float]] = [own_loops, own_right, _follows, wasted]
        has_own = runs[0].data["own"] is not None
        last = [r.data["stages"].get(LAST_STAGE) for r in runs]
        rows.append([
            arm.in_words,
            f"{arm.cost:g}",
            ", ".join("never" if step is None else str(step) for step in last),
            *(_cell(results.values(arm.name, of)) if has_own else "" for of in owns),
            _cell(results.values(arm.name, best_fixed)),
            _cell(results.values(arm.name, lambda d: at_depth(d, 2 * MOST_LOOPS))),
        ])  # fmt: skip
    return Table("Arms: means and deviations over seeds, walks of 1 to 8 hops", header, rows)


def _equal(results: Results) -> Table:
    """What halting does in runs that are as good on what they are trained on."""

    def shown(_: Sequence[str], early: Sequence[Data]) -> list[str]:
        owns: list[Callable[[Data], float]] = [own_loops, own_right, _follows]
        has_own = early[0]["own"] is not None
        return [
            *(_cell([of(one) for one in early]) if has_own else "" for of in owns),
            _cell([best_fixed(one) for one in early]),
            *(_cell([max(one["accuracy"][str(n)]) for one in early]) for n in (8, 10)),
        ]

    return equal_accuracy.table(
        f"At equal training accuracy: the first checkpoint with {LEVEL:g} of the trained walks",
        ["arm"],
        [
            *("own halting: loops", "right", "rank correlation with hops"),
            "right at the best fixed depth",
            *(f"{n} hops at the best loops" for n in (8, 10)),
        ],
        [
            ([arm.in_words], [result.data["equal_accuracy"] for result in own])
            for arm in ARMS.values()
            if (own := results.of(arm.name))
        ],
        shown,
    )


def _by_hops(results: Results) -> Table:
    hops = _stored_hops(results)
    rows = []
    for arm in ARMS.values():
        runs = results.of(arm.name)
        if runs and runs[0].data["own"] is not None:
            cells = []
            for n in hops:
                found = [r.data["own"]["test"][n] for r in runs]
                loops = fmean(mean_loops(each["loops"]) for each in found)
                cells.append(f"{loops:.1f} ({fmean(each['right'] for each in found):.0%})")
            rows.append([arm.in_words, *cells])
    return Table("Loops taken and right answers by hops", ["arm", *hops], rows)


def _leaks(results: Results) -> Table:
    hops = _stored_hops(results)
    leaks = next(iter(results)).data["leaks"]
    rows = [
        [name.replace("_", " "), *(f"{leaks[n][name]:.3f}" for n in hops)]
        for name in leaks[hops[0]]
    ]
    return Table("What guessers reach that do not follow the walk", ["guesser", *hops], rows)


def _rules(results: Results) -> Table:
    runs = [r.data for r in results.of(PLAIN.name)]
    rows = []
    for number, stored in enumerate(runs[0]["rules"]):
        pairs = [rule_on(data["rules"][number], "test", all_hops()) for data in runs]
        rows.append([
            _rule_in_words(stored["rule"]),
            _cell([loops for loops, _ in pairs]),
            _cell([right for _, right in pairs]),
        ])  # fmt: skip
    for loops in range(1, MOST_LOOPS + 1):
        right = results.values(PLAIN.name, lambda d, n=loops: at_depth(d, n))
        rows.append([f"fixed {loops}", f"{loops}", _cell(right)])
    header = ["rule", "loops", "right"]
    return Table("Exit rules on the model without a head, walks of 1 to 8 hops", header, rows)


def figures(results: Results) -> dict[str, Any]:
    """The data of each figure: means over seeds, and every seed's value where there is one axis."""
    costs = {
        depth: [
            {
                "cost": arm.cost,
                "loops": results.values(arm.name, own_loops),
                "right": results.values(arm.name, own_right),
            }
            for arm in arms
        ]
        for depth, arms in ACT_ARMS.items()
    }
    hops = _stored_hops(results)
    by_hops = {}
    for arm in ARMS.values():
        runs = [r.data for r in results.of(arm.name)]
        if runs and runs[0]["own"] is not None:
            by_hops[arm.name] = [
                fmean(mean_loops(data["own"]["test"][n]["loops"]) for data in runs) for n in hops
            ]
    points = {
        arm.name: [
            fmean(results.values(arm.name, own_loops)),
            fmean(results.values(arm.name, own_right)),
        ]
        for arm in ARMS.values()
        if arm.name in by_hops
    }
    plain = [r.data for r in results.of(PLAIN.name)]
    rules: dict[str, list[list[float]]] = {}
    for number, stored in enumerate(plain[0]["rules"] if plain else ()):
        pairs = [rule_on(data["rules"][number], "test", all_hops()) for data in plain]
        point = [fmean(loops for loops, _ in pairs), fmean(right for _, right in pairs)]
        rules.setdefault(stored["rule"]["kind"], []).append(point)
    fixed = [
        fmean(results.values(PLAIN.name, lambda d, n=n: at_depth(d, n)))
        for n in range(1, MOST_LOOPS + 1)
        if plain
    ]
    return {
        "depth_by_cost": costs,
        "loops_by_hops": {"hops": [int(n) for n in hops], "loops": by_hops},
        "rules_and_depths": {"fixed": fixed, "rules": rules, "heads": points},
        "overthinking": {
            arm.name: [
                [fmean(column) for column in zip(*(d["accuracy"][n] for d in runs), strict=True)]
                for n in all_hops()
            ]
            for arm in (PONDERNET, STEPPING, PLAIN, ACT_ARMS["fixed"][0])
            if (runs := [r.data for r in results.of(arm.name)])
        },
    }


def _stored_hops(results: Results) -> list[str]:
    done = next((r for r in results if r.lost is None), None)
    return [] if done is None else list(done.data["accuracy"])


def _follows(data: Data) -> float:
    return follows_difficulty(data["own"]["test"], TRAINED_HOPS)


def _cell(numbers: Sequence[float]) -> str:
    found = t_interval(numbers)
    return f"{found.mean:.3f} ± {found.deviation:.3f}"


def _rule_in_words(rule: Data) -> str:
    own = [
        f"{name} {value:g}"
        for name, value in rule.items()
        if name not in ("kind", "min_loops", "check_every")
    ]
    return f"{rule['kind'].replace('_', ' ')}, {', '.join(own)}"
