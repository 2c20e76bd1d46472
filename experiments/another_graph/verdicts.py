"""The verdicts, from stored results only; the rules in words are in ``expected.json``."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, Literal

from experiments.claim import Claim, Conclusion, Decision, Found, Table, by_rule
from experiments.interval import Interval, gap, t_interval
from experiments.run_store import Results

BEFORE = "before"
SAYS: Mapping[str, str] = {
    "sampled": "2 to 8 loops, mixed walks",
    "fixed": "always 4 loops, mixed walks",
    "fixed_longest": "always 4 loops, longest walks only",
}
ARMS = tuple(SAYS)
HOPS, HOPS_PER_LOOP, MOST_LOOPS, ENOUGH_LOOPS = (2, 4, 6, 8), 2, 16, 8
SHOWN_HOPS, SHOWN_LOOPS = (2, 4, 6, 8, 10, 12), (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)
Graph = Literal["new", "old"]
Data = Mapping[str, Any]


def accuracy(data: Data, graph: Graph, hops: int, loops: int) -> float:
    """Of a run on one of the graphs; rows are hops from one on."""
    grid = data[graph]
    return float(grid["accuracy"][hops - 1][grid["loops"].index(loops)])


def dial(data: Data, graph: Graph) -> float:
    """Mean accuracy over the walks and numbers of loops at which a held answer is right."""
    return fmean(
        fmean(
            accuracy(data, graph, hops, loops)
            for loops in range(hops // HOPS_PER_LOOP, MOST_LOOPS + 1)
        )
        for hops in HOPS
    )


def known(data: Data, graph: Graph) -> float:
    """Mean accuracy over the walks at eight loops."""
    return fmean(accuracy(data, graph, hops, ENOUGH_LOOPS) for hops in HOPS)


def conclude(claims: Mapping[str, Claim], results: Results) -> Conclusion:
    """One verdict per claim, the tables and the figure's data."""
    seeds = {arm: len(results.of(arm)) for arm in ARMS}
    rules: dict[str, Callable[[Results, Mapping[str, float]], Found]] = {
        "the-dial-survives": survives,
        "fixed-depth-breaks-the-dial": fixed_breaks,
        "spare-loops-keep-the-dial": spare_loops_keep,
        "the-old-graph-is-forgotten": forgotten,
    }
    return Conclusion(
        verdicts=[
            by_rule(claims[name], partial(rule, results), seeds, "dial")
            for name, rule in rules.items()
        ],
        tables=[dial_table(results), *grid_tables(results), leak_table(results)],
        figures={"dial": drawn(results)},
    )


def survives(results: Results, least: Mapping[str, float]) -> Found:
    """The dial after sampled depth minus the base's on its own graph."""
    base = results.of(BEFORE)
    if not base:
        return "no result", None, "The base was not measured."
    before = dial(base[0].data, "old")
    number = t_interval(results.values("sampled", lambda d: dial(d, "new") - before))
    said = f"The dial is {before:.3f} before and {before + number.mean:.3f} on the new graph after."
    return against(number, -least["loss"], above="holds", below="fails"), number, said


def fixed_breaks(results: Results, least: Mapping[str, float]) -> Found:
    """Sampled depth minus fixed depth, mixed walks."""
    return between(results, "sampled", "fixed", least["least_gap"])


def spare_loops_keep(results: Results, least: Mapping[str, float]) -> Found:
    """Mixed walks minus the longest only, fixed depth."""
    return between(results, "fixed", "fixed_longest", least["least_gap"])


def forgotten(results: Results, least: Mapping[str, float]) -> Found:
    """Accuracy on the old graph after sampled depth."""
    number = t_interval(results.values("sampled", lambda d: known(d, "old")))
    said = f"At eight loops {number.mean:.1%} of the old graph's walks are answered; a guess 6.3 %."
    return against(number, least["most"], above="fails", below="holds"), number, said


def between(results: Results, first: str, second: str, least: float) -> Found:
    """The gap of two arms' dials on the new graph."""
    one, other = (results.values(arm, lambda d: dial(d, "new")) for arm in (first, second))
    found = gap(one, other)
    difference = found.difference
    decision: Decision = "no result"
    if found.is_result and difference.mean >= least:
        decision = "holds"
    elif difference.high < least:
        decision = "fails"
    said = (
        f"The dial on the new graph: {fmean(one):.3f} after {SAYS[first]}, {fmean(other):.3f} "
        f"after {SAYS[second]}."
    )
    return decision, difference, said


def against(number: Interval, bound: float, *, above: Decision, below: Decision) -> Decision:
    """What an interval on one side of a bound says; across it, nothing."""
    if number.low > bound:
        return above
    return below if number.high < bound else "no result"


# --- tables and the figure's data -----------------------------------------------------------------


def dial_table(results: Results) -> Table:
    """The number that decides, and its parts, by arm."""
    rows = []
    for arm, graphs in _shown(results):
        for graph in graphs:
            numbers = [
                t_interval(results.values(arm, partial(value, graph=graph)))
                for value in (dial, known)
            ]
            rows.append([_named(arm), f"{graph} graph", *map(str, numbers)])
    header = ["trained at", "asked on", "dial", "right at eight loops"]
    return Table("The dial, and right answers at eight loops: 2 to 8 hops", header, rows)


def grid_tables(results: Results) -> list[Table]:
    """Accuracy by hops and loops on the new graph; before: on the old one."""
    found = []
    for arm, graphs in _shown(results):
        loops = _loops(results, arm)
        rows = [
            [str(hops), *(f"{_mean(results, arm, graphs[0], hops, n):.1%}" for n in loops)]
            for hops in SHOWN_HOPS
        ]
        title = f"{_named(arm)}: right answers on the {graphs[0]} graph, means over seeds"
        header = ["hops", *(f"{n} loop{'s' * (n > 1)}" for n in loops)]
        found.append(Table(title, header, rows))
    return found


def leak_table(results: Results) -> Table:
    """What guessers reach on the new graphs."""
    leaks = [result.data["leaks"] for result in results if result.lost is None]
    names = list(leaks[0]) if leaks else []
    rows = [[name, f"{max(one[name] for one in leaks):.3f}"] for name in names]
    return Table("Leak baselines, the best over graphs and hops", ["guesser", "right"], rows)


def drawn(results: Results) -> dict[str, Any]:
    """By arm: accuracy by hops (rows) and loops (columns), means over seeds."""
    return {
        arm: {
            "loops": _loops(results, arm),
            "accuracy": [
                [_mean(results, arm, graphs[0], hops, n) for n in _loops(results, arm)]
                for hops in SHOWN_HOPS
            ],
        }
        for arm, graphs in _shown(results)
    }


def _shown(results: Results) -> list[tuple[str, Sequence[Graph]]]:
    """Arms with results, each with the graphs that are worth a row."""
    graphs: dict[str, Sequence[Graph]] = {BEFORE: ("old", "new")}
    both: Sequence[Graph] = ("new", "old")
    return [(arm, graphs.get(arm, both)) for arm in (BEFORE, *ARMS) if results.of(arm)]


def _named(arm: str) -> str:
    return SAYS.get(arm, "before")


def _loops(results: Results, arm: str) -> list[int]:
    stored = results.of(arm)[0].data["new"]["loops"]
    return [n for n in SHOWN_LOOPS if n in stored]


def _mean(results: Results, arm: str, graph: Graph, hops: int, loops: int) -> float:
    return fmean(results.values(arm, lambda d: accuracy(d, graph, hops, loops)))
