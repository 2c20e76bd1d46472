"""What the numbers say, in sentences that the numbers choose.

Nothing here is claimed in advance: each function looks at a result and says what happened.
"""

import math
from dataclasses import dataclass

from openmythos.analysis.trace import LoopTrace
from openmythos.demo.result import DemoResults, HopsResult, TextResult

SAME_LOSS = 0.0005  # relative
HARMLESS_LOSS = 0.01  # relative
LEARNT = 0.8  # accuracy on trained lengths
CARRIED_OVER = 0.4  # accuracy on unseen lengths
NO_DECLINE = 0.02  # accuracy
FOLLOWS = 0.8  # rank correlation of loops with hops
COLLAPSED = 0.9  # token correlation


@dataclass(frozen=True)
class Takeaway:
    """A sentence; ``holds`` says whether what one hopes for happened, None for a plain fact."""

    text: str
    holds: bool | None = None


def takeaways(results: DemoResults) -> dict[str, list[Takeaway]]:
    """The sentences of each act, by its name."""
    thinking = hops_takeaways(results.hops)
    if results.original_halting is not None:
        thinking.append(halting_takeaway(results.hops, results.original_halting))
    return {"Reading": text_takeaways(results.text), "Thinking": thinking}


# --- act 1 ---------------------------------------------------------------------------------------


def text_takeaways(text: TextResult) -> list[Takeaway]:
    """What loops buy on text."""
    values, depth = text.validation, text.trained_depth
    found = []
    few, deep = min(values), max(values)
    if few < depth:
        gain = values[few] - values[depth]
        found.append(
            Takeaway(
                f"{_loops(depth)} read{'s' if depth == 1 else ''} held-out text at "
                f"{values[depth]:.3f} bits per byte, {_loops(few)} at {values[few]:.3f}: "
                + (
                    f"looping saves {gain:.3f} bits ({gain / values[few]:.1%}) with the same "
                    "parameters."
                    if gain > 0
                    else "looping does not help here."
                ),
                gain > 0,
            )
        )
    if deep > depth:
        found.append(_deeper(text, depth, deep))
    best = min(values, key=lambda n: (values[n], n))
    for label, mark in text.marks.items():
        gap = values[best] - mark
        side = "short of" if gap > 0 else "ahead of"
        found.append(
            Takeaway(
                f"Its best is {values[best]:.3f} bits per byte, at {_loops(best)}; {label} needs "
                f"{mark:.3f}: the model is {abs(gap):.3f} {side} it."
            )
        )
    return found + _spent(text)


def _deeper(text: TextResult, depth: int, deep: int) -> Takeaway:
    change = text.validation[deep] / text.validation[depth] - 1
    times = f"{deep / text.mean_recurrence:.3g} times the trained mean depth"
    if abs(change) <= SAME_LOSS:
        said = "the loss is the same: running deeper than trained does no harm"
    elif change < 0:
        said = f"the loss is {-change:.1%} better: running deeper than trained does not hurt"
    elif change <= HARMLESS_LOSS:
        said = f"the loss is {change:.1%} worse: running deeper than trained does little harm"
    else:
        said = f"the loss is {change:.1%} worse: this model should not be run that deep"
    compared = f"than at {depth}" if abs(change) > SAME_LOSS else f"as at {depth}"
    said = said.replace(":", f" {compared}:", 1)
    return Takeaway(f"At {_loops(deep)}, {times}, {said}.", change <= HARMLESS_LOSS)


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
            f"token, {mean:.1f} on average (limit {text.max_loops})."
        )
    ]


# --- act 2 ---------------------------------------------------------------------------------------


def hops_takeaways(result: HopsResult) -> list[Takeaway]:
    """What loops buy on thinking."""
    found = []
    if result.trained_hops:
        worst, loops, value = min(
            ((hops, *result.best(hops)) for hops in result.trained_hops), key=lambda item: item[2]
        )
        spread = f"lengths that training showed (up to {result.max_train_hops} hops)"
        found.append(
            Takeaway(
                f"On held-out walks of the {spread}, accuracy is at least {value:.2f} with the "
                f"right number of loops (lowest: {_hops(worst)}, {_loops(loops)})"
                + ("." if value >= LEARNT else ": the task was not fully learnt in this time."),
                value >= LEARNT,
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
                    f"longest in training), reach {value:.2f} at {_loops(loops)}."
                )
            )
    found.extend(_overthinking(result))
    found.append(_following(result))
    found.extend(_leak(result))
    return found


def _beyond(result: HopsResult, hops: int) -> Takeaway:
    """The first length that training never showed: best loops against few."""
    loops, best = result.best(hops)
    few = 2 if 2 in result.loops else result.loops[0]
    shallow = result.at(hops, few)
    numbers = f"{best:.2f} at {_loops(loops)} against {shallow:.2f} at {few}"
    start = f"Walks of {_hops(hops)}, never trained: {numbers} (chance {result.chance:.2f})"
    if best < CARRIED_OVER:
        return Takeaway(f"{start}: the skill did not carry over to longer walks.", False)
    if best - shallow < 0.1:
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
    falls = {n: result.at(n, inside[-1]) - result.at(n, deep) for n in hops}
    worst = max(falls, key=lambda n: falls[n])
    setting = f"At {deep} loops, {deep / high:.2g} times the most in training,"
    if falls[worst] <= NO_DECLINE:
        return [Takeaway(f"{setting} accuracy on trained lengths does not decline.", True)]
    return [
        Takeaway(
            f"{setting} accuracy on {_hops(worst)} is {falls[worst]:.2f} lower: it overthinks.",
            False,
        )
    ]


def _following(result: HopsResult) -> Takeaway:
    """Whether the loops taken rise with the difficulty."""
    first, last = result.exit_loops[0], result.exit_loops[-1]
    rank = result.rank_correlation
    taken = (
        f"The {result.decider} takes {first:.1f} loops at {_hops(result.hops[0])} and {last:.1f} "
        f"at {_hops(result.hops[-1])}"
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
        hops: result.best(hops)[1] - max(result.leak_baselines[hops].values()) for hops in hardest
    }
    worst = min(margins, key=lambda n: margins[n])
    guess = max(result.leak_baselines[worst].values())
    best = result.best(worst)[1]
    said = f"The best guess without following the walk scores {guess:.2f} at {_hops(worst)}"
    if margins[worst] > 0.05:
        return [Takeaway(f"{said}, the model {best:.2f}: it does follow the walk.", True)]
    return [Takeaway(f"{said}, the model {best:.2f}: there its accuracy proves nothing.", False)]


def halting_takeaway(result: HopsResult, original: HopsResult) -> Takeaway:
    """What happened to the loops of the same model with the original's halting."""
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
    if not shared:
        return Takeaway(f"With the original's halting, the same model {loops}.")
    theirs, ours = original.best(shared[0])[1], result.best(shared[0])[1]
    verdict = "less than" if theirs < ours - NO_DECLINE else "about the same as"
    verdict = "more than" if theirs > ours + NO_DECLINE else verdict
    return Takeaway(
        f"With the original's halting, the same model {loops}, and its best accuracy at "
        f"{_hops(shared[0])} is {theirs:.2f}, {verdict} the {ours:.2f} without it."
    )


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
    rho = "" if trace.rho is None else f" rho(A) is {trace.rho:.3f}, which bounds A alone."
    return Takeaway(f"Measured: {text}.{rho}", alike <= COLLAPSED)


def _loops(count: int) -> str:
    return f"{count} loop" if count == 1 else f"{count} loops"


def _hops(count: int) -> str:
    return f"{count} hop" if count == 1 else f"{count} hops"
