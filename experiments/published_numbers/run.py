"""Published numbers, counted again from the configurations. No training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claim import Claim, Conclusion, Decision, Table, Verdict, no_result
from experiments.published_numbers.counting import (
    CONTEXT,
    cache_by_loops,
    counted,
    equal_tokens,
    sequences,
)
from experiments.published_numbers.sources import HOPS, LOOPED, LOWER_IS_BETTER, QUALITY
from experiments.run_store import Results, Run
from experiments.study import Study, main

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRESETS = (
    *("parcae-770m", "parcae-1.3b", "parcae-gpt-770m", "parcae-gpt-1.3b"),
    *("huginn-3.5b", "ouro-1.4b", "ouro-2.6b"),
)
LOOP, PLAIN = "parcae-770m", "parcae-gpt-1.3b"
CACHES = ("huginn-3.5b", "ouro-2.6b", "mythos-1b")


class PublishedNumbers(Study):
    number = 8
    title = "Published numbers, counted again"
    loads = ()

    def runs(self, scale: str, done: Results) -> Sequence[Run]:
        return [
            Run("sizes", 0, {"presets": PRESETS, "context": CONTEXT}),
            Run("caches", 0, {"presets": CACHES}),
            Run("sources", 0, {"quality": QUALITY, "looped": LOOPED, "hops": HOPS}),
        ]

    def measure(self, run: Run, scale: str, out: Path) -> Mapping[str, Any]:
        if run.arm == "sizes":
            return {name: counted(name) for name in run.settings["presets"]}
        if run.arm == "caches":
            return {name: cache_by_loops(name) for name in run.settings["presets"]}
        return dict(run.settings)

    def conclude(self, results: Results) -> Conclusion:
        found = {arm: results.of(arm) for arm in ("sizes", "caches", "sources")}
        if not all(found.values()):
            missing = [no_result(claim, "Runs are missing.") for claim in self.claims.values()]
            return Conclusion(verdicts=missing)
        sizes, caches, sources = (runs[0].data for runs in found.values())
        claims = self.claims
        return Conclusion(
            verdicts=[
                smaller_but_more(claims["smaller-more-compute"], sizes),
                equal_quality(claims["equals-1-3b"], sources["quality"]),
                half_memory(claims["half-the-memory"], sizes),
                compression(claims["mla-manageable"], caches),
                largest(claims["huginn-largest"], sources["looped"]),
                five_to_ten(claims["saunshi-5-to-10"], sources["hops"]),
                haiku(claims["looped-haiku"], sizes),
            ],
            tables=[
                size_table(sizes),
                cache_table(caches),
                quality_table(sources["quality"]),
                looped_table(sources["looped"]),
                hops_table(sources["hops"]),
            ],
            figures={"memory": memory_curves(sizes)},
        )

    def draw(self, conclusion: Conclusion) -> Mapping[str, Figure]:
        from experiments.published_numbers.picture import draw_memory

        return {"memory": draw_memory(conclusion.figures["memory"])}


# --- verdicts -------------------------------------------------------------------------------------


def smaller_but_more(claim: Claim, sizes: Mapping[str, Any]) -> Verdict:
    small, large, limit = sizes[LOOP], sizes[PLAIN], claim.thresholds
    weights = small["weight_bytes"] / large["weight_bytes"]
    flops = small["flops"] / large["flops"]
    smaller, more = weights <= limit["most_weights"], flops >= limit["least_flops"]
    decision: Decision = "holds" if smaller and more else "in part" if smaller or more else "fails"
    sentence = (
        f"{LOOP} with {small['loops']} loops stores {weights:.2f} of the bytes of {PLAIN} and "
        f"takes {flops:.2f} times its FLOPs per token."
    )
    return Verdict(claim=claim.name, decision=decision, sentence=sentence, number=flops)


def equal_quality(claim: Claim, quality: Mapping[str, Any]) -> Verdict:
    behind = {name: behind_by(quality, name) for name in quality[LOOP]}
    equal = [name for name, share in behind.items() if share <= claim.thresholds["most_behind"]]
    decision: Decision = "fails" if not equal else "in part"
    decision = "holds" if len(equal) == len(behind) else decision
    core = {name: values["core"] for name, values in quality.items()}
    closed = (core[LOOP] - core["parcae-gpt-770m"]) / (core[PLAIN] - core["parcae-gpt-770m"])
    said = ", ".join(f"{name} {share:.1%}" for name, share in behind.items())
    sentence = (
        f"Published scores, not measured here: the 770M loop is behind the 1.3B stack by {said}; "
        f"of the gap in Core between the two plain sizes it closes {closed:.1%}. "
        "Parameters and tokens are equal there, FLOPs are not."
    )
    return Verdict(claim=claim.name, decision=decision, sentence=sentence, number=closed)


def behind_by(quality: Mapping[str, Any], name: str) -> float:
    """How much worse the loop is, as a share of the plain model's value."""
    loop, plain = quality[LOOP][name], quality[PLAIN][name]
    return float((loop - plain if name in LOWER_IS_BETTER else plain - loop) / plain)


def half_memory(claim: Claim, sizes: Mapping[str, Any]) -> Verdict:
    small, large = sizes[LOOP], sizes[PLAIN]
    most = claim.thresholds["most_share"]
    weights = small["weight_bytes"] / large["weight_bytes"]
    one = memory(small, "per_loop", CONTEXT) / memory(large, "per_loop", CONTEXT)
    sixteen = memory(small, "per_loop", 16 * CONTEXT) / memory(large, "per_loop", 16 * CONTEXT)
    shared = memory(small, "last_loop", CONTEXT) / memory(large, "per_loop", CONTEXT)
    whole = one <= most and sixteen <= most
    decision: Decision = "holds" if whole else "in part" if weights <= most else "fails"
    even = equal_tokens(small, large, "per_loop")
    said = "never" if even is None else f"from {even:,.0f} tokens in the cache on"
    sentence = (
        f"The weights take {weights:.2f} of the memory. With one full context of {CONTEXT:,} "
        f"tokens it is {one:.2f}, with sixteen {sixteen:.2f}: every loop keeps keys and values of "
        f"its own, and the loop needs more memory {said}. With a cache of the last loop only it is "
        f"{shared:.2f} with one context."
    )
    return Verdict(
        claim=claim.name, decision=decision, sentence=sentence, number=one, figure="memory"
    )


def memory(model: Mapping[str, Any], layout: str, tokens: int) -> float:
    """Bytes of weights and of a cache of so many tokens."""
    return float(model["weight_bytes"] + tokens * model["kv_bytes"][layout])


def compression(claim: Claim, caches: Mapping[str, Any]) -> Verdict:
    limit, own = claim.thresholds, caches["mythos-1b"]
    growth = caches["huginn-3.5b"]["own"]["32"] / caches["huginn-3.5b"]["own"]["1"]
    still = own["own"]["32"] / own["own"]["1"]
    share = own["own"]["8"] / own["uncompressed"]["8"]
    parts = (growth >= limit["least_growth"], share <= limit["most_share"])
    decision: Decision = "holds" if all(parts) else "in part" if any(parts) else "fails"
    sentence = (
        f"From 1 to 32 loops Huginn's cache grows {growth:.1f} times. MLA keeps {share:.3f} of the "
        f"bytes of full keys and values (mythos-1b, 8 loops), at every loop: from 1 to 32 loops "
        f"its cache still grows {still:.1f} times."
    )
    return Verdict(claim=claim.name, decision=decision, sentence=sentence, number=share)


def largest(claim: Claim, looped: Sequence[Mapping[str, Any]]) -> Verdict:
    own = next(m["billions"] for m in looped if m["model"].startswith("Huginn"))
    above = sorted((m for m in looped if m["billions"] > own), key=lambda m: -m["billions"])
    few = len(above) <= claim.thresholds["most_larger"]
    said = ", ".join(f"{m['model']} ({m['billions']:g}B, {m['loops']} loops)" for m in above)
    return Verdict(
        claim=claim.name,
        decision="holds" if few else "fails",
        sentence=f"Larger than its {own:g}B parameters: {said or 'none known'}.",
        number=float(len(above)),
    )


def five_to_ten(claim: Claim, hops: Sequence[Mapping[str, Any]]) -> Verdict:
    own = [row for row in hops if row["work"].startswith("Saunshi")]
    split = [row for row in own if row["trained"] and max(row["tested"]) > max(row["trained"])]
    enough = len(split) >= claim.thresholds["least_experiments"]
    others = [row["work"] for row in hops if row not in own]
    sentence = (
        f"Of the paper's {len(own)} groups of experiments on synthetic reasoning, {len(split)} "
        f"test more hops than they train; none has 5 and 10. Who did train on few and test on "
        f"more: {'; '.join(others)}."
    )
    return Verdict(
        claim=claim.name,
        decision="holds" if enough else "fails",
        sentence=sentence,
        number=float(len(split)),
    )


def haiku(claim: Claim, sizes: Mapping[str, Any]) -> Verdict:
    room, small, large = claim.thresholds["memory_bytes"], sizes[LOOP], sizes[PLAIN]
    plain = sequences(room, large, "per_loop", CONTEXT)
    each, shared = (sequences(room, small, kind, CONTEXT) for kind in ("per_loop", "last_loop"))
    sentence = (
        "The sizes of these models are not published. Of the nearest published pair, a device of "
        f"{room / 1e9:.0f} GB holds {plain} full contexts beside the weights of {PLAIN}, {each} "
        f"beside those of {LOOP}, whose loops keep a cache each, and {shared} if only the last "
        "loop keeps one; and each token takes more FLOPs."
    )
    return Verdict(
        claim=claim.name,
        decision="not decidable here",
        sentence=sentence,
        number=each / plain,
    )


# --- tables and the figure's data -----------------------------------------------------------------


def size_table(sizes: Mapping[str, Any]) -> Table:
    rows = [
        [
            name,
            f"{one['parameters']:,}",
            str(one["loops"]),
            f"{one['flops'] / 1e9:.2f}",
            f"{one['kv_bytes']['per_loop'] / 1024:,.0f}",
            f"{one['kv_bytes']['last_loop'] / 1024:,.0f}",
        ]
        for name, one in sizes.items()
    ]
    header = ["model", "parameters", "loops", "GFLOPs per token", "KV KiB per token", "last loop"]
    return Table(f"Counted from the configurations, context {CONTEXT:,}, bfloat16", header, rows)


def cache_table(caches: Mapping[str, Any]) -> Table:
    rows = [
        [name, kind, *(f"{own[kind][loops] / 1024:,.1f}" for loops in own[kind])]
        for name, own in caches.items()
        for kind in ("own", "uncompressed")
    ]
    loops = list(next(iter(caches.values()))["own"])
    header = ["model", "cache", *(f"{n} loops" for n in loops)]
    return Table("KiB of cache per token by loops", header, rows)


def quality_table(quality: Mapping[str, Any]) -> Table:
    names = list(quality[LOOP])
    rows = [[model, *(f"{own[name]:.2f}" for name in names)] for model, own in quality.items()]
    return Table("Parcae (arXiv 2604.12946), table 5", ["model", *names], rows)


def looped_table(looped: Sequence[Mapping[str, Any]]) -> Table:
    rows = [[m["model"], f"{m['billions']:g}B", str(m["loops"]), m["source"]] for m in looped]
    return Table("Trained looped models", ["model", "parameters", "loops", "source"], rows)


def hops_table(hops: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [row["work"], row["task"], *(_listed(row[part]) for part in ("trained", "tested"))]
        for row in hops
    ]
    return Table(
        "Who trained and tested how many hops", ["work", "task", "trained", "tested"], rows
    )


def _listed(values: Sequence[int] | None) -> str:
    return "no hops" if values is None else ", ".join(map(str, values))


def memory_curves(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Gigabytes of weights and cache by tokens in the cache."""
    tokens = [1000 * n for n in range(0, 33, 2)]
    plain, loop = sizes[PLAIN], sizes[LOOP]
    curves = {
        f"{PLAIN}, plain": (plain, "per_loop"),
        f"{LOOP}, a cache per loop": (loop, "per_loop"),
        f"{LOOP}, of the last loop": (loop, "last_loop"),
    }
    return {
        "tokens": tokens,
        "gigabytes": {
            name: [memory(model, layout, n) / 1e9 for n in tokens]
            for name, (model, layout) in curves.items()
        },
    }


STUDY = PublishedNumbers()

if __name__ == "__main__":
    main(STUDY)
