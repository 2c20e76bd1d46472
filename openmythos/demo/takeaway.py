"""Sentences about the demo's results, chosen by the numbers.

Nothing is claimed in advance: each function looks at a result and says what happened. A number
stands with its standard error; two settings differ only if the difference, on the same documents or
walks, is larger than two of its own standard errors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from openmythos.analysis.trace import LoopTrace
from openmythos.demo.result import DemoResults, HopsResult, TextResult, paired
from openmythos.eval.score import Score, is_clear, with_error

HARMLESS_LOSS = 0.01  # relative
LEARNT = 0.8  # accuracy on trained lengths
CARRIED_OVER = 0.4  # accuracy on unseen lengths
NO_DECLINE = 0.02  # accuracy
FOLLOWS = 0.8  # rank correlation of loops with hops
COLLAPSED = 0.9  # token correlation


@dataclass(frozen=True)
class Takeaway:
    """A sentence; ``holds`` says whether the hoped-for happened, and is None for a plain fact."""

    text: str
    holds: bool | None = None


def takeaways(results: DemoResults) -> dict[str, list[Takeaway]]:
    """The sentences of each act, by the act's name."""
    thinking = hops_takeaways(results.hops)
    if results.original_halting is not None:
        thinking += halting_takeaways(results.hops, results.original_halting)
    return {"Reading": text_takeaways(results.text), "Thinking": thinking}


# --- act 1 ---------------------------------------------------------------------------------------


def text_takeaways(text: TextResult) -> list[Takeaway]:
    """What more loops gain on text."""
    values, depth = text.validation, text.trained_depth
    found = []
    few, deep = min(values), max(values)
    if few < depth:
        found.append(_looping(text, few, depth))
    if deep > depth:
        found.append(_deeper(text, depth, deep))
    best = values[text.best]
    said = f"Its best is {with_error(best)} bits per byte, at {_loops(text.best)}."
    if text.marks:
        others = [
            f"{name} needs {mark:.3f} ({_gap(mark - best.value)})"
            for name, mark in text.marks.items()
        ]
        said += f" On the same held-out text {', '.join(others)}."
    return [*found, Takeaway(said), *_spent(text)]


def _gap(more: float) -> str:
    return f"{abs(more):.3f} {'more' if more >= 0 else 'less'}"


def _looping(text: TextResult, few: int, depth: int) -> Takeaway:
    values, change = text.validation, text.difference(depth, few)
    read = (
        f"{_loops(depth)} read{'s' if depth == 1 else ''} held-out text at "
        f"{with_error(values[depth])} bits per byte, {_loops(few)} at {with_error(values[few])}"
    )
    size = f"{with_error(_scaled(change, -1.0), 4)} bits ({_share(change, -values[few].value)})"
    if not is_clear(change):
        return Takeaway(f"{read}: looping saves {size}, no clear difference.", False)
    if change.value > 0:
        size = f"{with_error(change, 4)} bits ({_share(change, values[few].value)})"
        return Takeaway(f"{read}: looping does not help here, it costs {size}.", False)
    return Takeaway(f"{read}: looping saves {size} with the same parameters.", True)


def _deeper(text: TextResult, depth: int, deep: int) -> Takeaway:
    change, level = text.difference(deep, depth), text.validation[depth].value
    share = change.value / level
    times = f"{deep / text.mean_recurrence:.3g} times the trained mean depth"
    size = _share(_scaled(change, -1.0 if change.value < 0 else 1.0), level)
    side = f"{size} {'better' if change.value < 0 else 'worse'} than at {depth}"
    if not is_clear(change):
        said = f"{side}: no clear difference"
    elif change.value < 0:
        said = f"{side}: running deeper than trained does not hurt"
    elif share <= HARMLESS_LOSS:
        said = f"{side}: running deeper than trained does little harm"
    else:
        said = f"{side}: this model should not be run that deep"
    holds = share <= HARMLESS_LOSS
    unknown = not holds and not is_clear(change)
    return Takeaway(f"At {_loops(deep)}, {times}, the loss is {said}.", None if unknown else holds)


def _spent(text: TextResult) -> list[Takeaway]:
    taken = [piece.loops for sample in text.samples for piece in sample.pieces]
    if not taken:
        return []
    if min(taken) == max(taken):
        said = f"gave every generated token {_loops(taken[0])}: it did not tell them apart."
        return [Takeaway(f"The exit rule {said}", False)]
    mean = sum(taken) / len(taken)
    return [
        Takeaway(
            f"Left to itself, the model spent {min(taken)} to {max(taken)} loops on a generated "
            f"token, {mean:.1f} on average of the {len(taken)} shown (limit {text.max_loops})."
        )
    ]


# --- act 2 ---------------------------------------------------------------------------------------


def hops_takeaways(result: HopsResult) -> list[Takeaway]:
    """What more loops gain on walks."""
    found = []
    if result.trained_hops:
        worst, loops, value = min(
            ((hops, *result.best(hops)) for hops in result.trained_hops),
            key=lambda item: item[2].value,
        )
        spread = f"lengths that training showed (up to {result.max_train_hops} hops)"
        found.append(
            Takeaway(
                f"On held-out walks of the {spread}, accuracy is at least "
                f"{with_error(value)} with the "
                f"right number of loops (lowest: {_hops(worst)}, {_loops(loops)})"
                + (
                    "."
                    if value.value >= LEARNT
                    else ": the task was not fully learnt in this time."
                ),
                value.value >= LEARNT,
            )
        )
    if result.unseen_hops:
        first, last = result.unseen_hops[0], result.unseen_hops[-1]
        found.append(_beyond(result, first))
        if last != first:
            loops, value = result.best(last)
            found.append(
                Takeaway(
                    f"The longest walks, {last} hops ({last / result.max_train_hops:.2g} times the "
                    f"longest in training), reach {with_error(value)} at {_loops(loops)}."
                )
            )
    found.extend(_overthinking(result))
    found.append(_following(result))
    found.extend(_leak(result))
    return found


def _beyond(result: HopsResult, hops: int) -> Takeaway:
    """Accuracy at the first number of hops beyond training: the best depth against few loops."""
    loops, best = result.best(hops)
    few = 2 if 2 in result.loops else result.loops[0]
    shallow = result.at(hops, few)
    gain = paired(result.answers(hops, loops), result.answers(hops, few))
    numbers = (
        f"{with_error(best)} at {_loops(loops)} against {with_error(shallow)} at {few}, "
        f"{with_error(gain, sign='+')}"
    )
    start = f"Walks of {_hops(hops)}, never trained: {numbers} (chance {result.chance:.2f})"
    if best.value < CARRIED_OVER:
        return Takeaway(f"{start}: the skill did not carry over to longer walks.", False)
    if gain.value < 0.1 or not is_clear(gain):
        return Takeaway(f"{start}: it carries over, but not because of the loops.", False)
    return Takeaway(f"{start}: the extra loops carry the skill to longer walks.", True)


def _overthinking(result: HopsResult) -> list[Takeaway]:
    """Whether accuracy falls at twice the deepest trained number of loops or more."""
    high = result.trained_loops[1]
    inside = [n for n in result.loops if n <= high]
    beyond = [n for n in result.loops if n >= 2 * high]
    hops = result.trained_hops or list(result.hops)
    if not inside or not beyond:
        return []
    deep = beyond[0]
    falls = {n: paired(result.answers(n, inside[-1]), result.answers(n, deep)) for n in hops}
    worst = max(falls, key=lambda n: falls[n].value)
    setting = (
        f"At {deep} loops, {deep / high:.2g} times the most in training, accuracy on trained "
        f"lengths falls by at most {with_error(falls[worst])} ({_hops(worst)})"
    )
    if falls[worst].value <= NO_DECLINE or not is_clear(falls[worst]):
        return [Takeaway(f"{setting}: it does not decline.", True)]
    return [Takeaway(f"{setting}: it overthinks.", False)]


def _following(result: HopsResult) -> Takeaway:
    """Whether the loops taken rise with the difficulty."""
    (first, _), (last, _) = (result.of_decider(result.hops[end]) for end in (0, -1))
    rank = result.rank_correlation
    taken = (
        f"The {result.decider} takes {with_error(first, 2)} loops at {_hops(result.hops[0])} and "
        f"{with_error(last, 2)} at {_hops(result.hops[-1])}"
    )
    if rank is None or not math.isfinite(rank):
        return Takeaway(f"{taken}: the same everywhere.", False)
    follows = rank >= FOLLOWS
    said = "longer walks get more loops" if follows else "it does not follow the difficulty"
    return Takeaway(f"{taken} (rank correlation {rank:.2f}): {said}.", follows)


def _leak(result: HopsResult) -> list[Takeaway]:
    """Whether guessing without following the walk would do as well."""
    hardest = [hops for hops in result.hops if result.leak_baselines.get(hops)]
    if not hardest:
        return []
    margins = {
        hops: result.best(hops)[1].value - max(result.leak_baselines[hops].values())
        for hops in hardest
    }
    worst = min(margins, key=lambda n: margins[n])
    guess = max(result.leak_baselines[worst].values())
    best = result.best(worst)[1]
    said = (
        f"The best guess without following the walk scores {guess:.3f} at {_hops(worst)}, the "
        f"model {with_error(best)}"
    )
    if margins[worst] > max(0.05, 2 * (best.stderr or 0.0)):
        return [Takeaway(f"{said}: it does follow the walk.", True)]
    return [Takeaway(f"{said}: there its accuracy proves nothing.", False)]


def halting_takeaways(result: HopsResult, original: HopsResult) -> list[Takeaway]:
    """What happened to the same model with the original's halting, on all never-trained hops."""
    low, high = min(original.exit_loops), max(original.exit_loops)
    rank = original.rank_correlation
    if high - low < 0.5:
        mean = sum(original.exit_loops) / len(original.exit_loops)
        loops = f"takes {mean:.1f} loops whatever the length of the walk"
    elif rank is not None and rank >= FOLLOWS:
        loops = f"takes {low:.1f} to {high:.1f} loops, more on longer walks"
    else:
        loops = f"takes {low:.1f} to {high:.1f} loops, which do not follow the length"
    shared = [hops for hops in result.unseen_hops or result.hops if hops in original.hops]
    taken = Takeaway(f"With the original's halting, the same model {loops}.")
    if not shared:
        return [taken]
    where = "walks never trained" if result.unseen_hops else "walks"
    return [
        taken,
        _best_loops(result, original, shared, where),
        _deciders(result, original, shared),
    ]


def _best_loops(
    result: HopsResult, original: HopsResult, shared: list[int], where: str
) -> Takeaway:
    """Accuracy of both, each at its own best number of loops."""
    changes = {}
    for hops in shared:
        (ours, _), (theirs, _) = result.best(hops), original.best(hops)
        changes[hops] = paired(original.answers(hops, theirs), result.answers(hops, ours))
    return Takeaway(
        f"On {where}, both at their best number of loops, its accuracy minus that without it is "
        f"{_listed(changes)}: {_by_sign(changes, 'better', 'worse')}."
    )


def _deciders(result: HopsResult, original: HopsResult, shared: list[int]) -> Takeaway:
    """Loops and accuracy of both where each stops by itself."""
    loops, accuracy = {}, {}
    for hops in shared:
        row, other = list(result.hops).index(hops), list(original.hops).index(hops)
        loops[hops] = paired(original.taken[other], result.taken[row])
        accuracy[hops] = paired(original.taken_right[other], result.taken_right[row])
    return Takeaway(
        f"Where both stop by themselves ({original.decider}; {result.decider}), its loops minus "
        f"those without it are {_listed(loops, 2)}: {_by_sign(loops, 'more', 'fewer')}. The "
        f"accuracy then differs by {_listed(accuracy)}: {_by_sign(accuracy, 'better', 'worse')}."
    )


def _listed(changes: Mapping[int, Score], digits: int = 3) -> str:
    return ", ".join(
        f"{with_error(change, digits, sign='+')} at {_hops(hops)}"
        for hops, change in changes.items()
    )


def _by_sign(changes: Mapping[int, Score], more: str, less: str) -> str:
    """Where a difference is clear, and in which direction: better at 10 and 12 hops."""
    groups: dict[str, list[int]] = {}
    for hops, change in changes.items():
        word = "no clear difference" if not is_clear(change) else more if change.value > 0 else less
        groups.setdefault(word, []).append(hops)
    parts = []
    for word, found in groups.items():
        numbers = ", ".join(map(str, found[:-1])) + (" and " if found[1:] else "") + str(found[-1])
        parts.append(f"{word} at {numbers} {'hop' if found == [1] else 'hops'}")
    return ", ".join(parts)


# --- the state -----------------------------------------------------------------------------------


def trace_takeaway(trace: LoopTrace) -> Takeaway:
    """What the state does, and what rho(A) does not say about it."""
    ratios = [value for value in trace.step_ratio[trace.num_loops // 2 :] if value is not None]
    last = trace.relative_step[-1]
    parts = [f"after {_loops(trace.num_loops)} a loop still moves the state by {last:.1%}"]
    if ratios:
        shrink = math.exp(sum(math.log(max(value, 1e-9)) for value in ratios) / len(ratios))
        if shrink < 0.98:
            parts.append(f"in the later half each step is {shrink:.2f} times the one before")
        else:
            parts.append(f"the steps do not shrink (each is {shrink:.2f} times the one before)")
    alike = trace.token_correlation[-1]
    parts.append(
        f"the tokens have nearly become one (correlation {alike:.2f})"
        if alike > COLLAPSED
        else f"tokens stay distinct (correlation {alike:.2f})"
    )
    text = "; ".join(parts)
    rho = "" if trace.rho is None else f" rho(A) is {trace.rho:.3f}: a bound, no convergence."
    return Takeaway(f"On {trace.num_tokens} tokens: {text}.{rho}", alike <= COLLAPSED)


def _loops(count: int) -> str:
    return f"{count} loop" if count == 1 else f"{count} loops"


def _hops(count: int) -> str:
    return f"{count} hop" if count == 1 else f"{count} hops"


def _scaled(score: Score, factor: float) -> Score:
    error = None if score.stderr is None else abs(factor) * score.stderr
    return Score(factor * score.value, error, score.num_questions)


def _share(change: Score, level: float) -> str:
    """A change as percent of a level, with its error."""
    share = _scaled(change, 100 / level)
    error = "" if share.stderr is None else f" ± {share.stderr:.2f}"
    return f"{share.value:.2f}{error} %"
