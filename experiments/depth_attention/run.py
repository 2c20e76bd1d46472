"""Depth attention against the same bytes of cache spent otherwise, on text.

Depth attention reads the keys and values of a token's own earlier loops, which a cache of every
loop holds anyway. The same bytes can hold the same loop without it, or twice the key-value heads if
only those of the last loop are kept.

Source: MoDA (2603.15619), Dreamer (2601.21582); the comparison at equal memory is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.claim import Claim, Conclusion, Decision, Table, Verdict, no_result, verdict
from experiments.docs_text import ROWS, SEQ_LEN, recipe, source_of, train_on_text
from experiments.interval import gap, t_interval
from experiments.run_store import Results, Run
from experiments.study import Study, main
from experiments.tuning import tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from openmythos.config import ModelConfig

DEPTH, OTHERS = "depth_attention", ("plain", "last_loop")
ARMS = (DEPTH, *OTHERS)
LOOPS, KV_HEADS = 4, 2
SEEDS, RATES = (0, 1, 2), (0.01, 0.02, 0.04)
STEPS = 300


class DepthAttention(Study):
    number = 13
    title = "Depth attention at equal memory (hours, on request)"
    scales = ("smoke", "full")
    page_scale = "full"

    def runs(self, scale: str, done: Results) -> list[Run]:
        """Every arm tuned by what it is compared by."""
        if scale == "smoke":
            few = {"steps": 1, "rows": 2, "seq_len": 16, "batches": 1, "rate": RATES[1]}
            return [Run(arm, 0, few) for arm in ARMS]
        settings = {"steps": STEPS, "rows": ROWS, "seq_len": SEQ_LEN, "batches": 8}
        found: list[Run] = []
        for arm in ARMS:
            choice = tuned(done, arm, settings, RATES, lambda r: -float(r.data["bits"]))
            found += choice.then(arm, settings, SEEDS)
        return found

    def measure(self, run: Run, scale: str, out: Path) -> dict[str, Any]:
        """Bits per byte as they come through the arm's cache; one of every loop changes nothing."""
        from experiments.text_loops.held_out import bits_per_token, last_loop_logits
        from openmythos.model.inference import inference

        trained = {key: given for key, given in run.settings.items() if key != "batches"}
        config = recipe(model_of(run.arm), run.seed, source=source_of(scale), **trained)
        model, held_out = train_on_text(config, out)
        bits, size = 0.0, 0
        for batch in held_out.validation_batches(run.settings["batches"]):
            targets = batch.tokens[:, 1:]
            with inference(model):
                if run.arm == "last_loop":
                    logits = last_loop_logits(model, batch.tokens, LOOPS)
                else:
                    logits = model(batch.tokens, num_loops=LOOPS).logits[:, :-1]
            bits += bits_per_token(logits, targets) * targets.numel()
            size += int(held_out.tokenizer.token_num_bytes[targets.numpy()].sum())
        return {"bits": bits / size, "bytes": size}

    def conclude(self, results: Results) -> Conclusion:
        return Conclusion(
            verdicts=[decide(self.claims["depth-attention-at-matched-memory"], results)],
            tables=[bits_table(results), size_table()],
            figures={"bits": bits(results)},
        )

    def draw(self, conclusion: Conclusion) -> Mapping[str, Figure]:
        from experiments.depth_attention.picture import draw

        return {"bits": draw(conclusion.figures["bits"])}


def model_of(arm: str) -> ModelConfig:
    """Preset ``tiny``, and what the arm does with the memory."""
    from openmythos.config import DepthAttentionConfig, GQAConfig, presets

    tiny = replace(presets.preset("tiny"), num_loops=LOOPS)
    if arm == "last_loop":  # prelude, one loop of the core, coda: three layers, four heads
        return tiny
    assert isinstance(tiny.attention, GQAConfig)
    few = replace(tiny, attention=replace(tiny.attention, num_kv_heads=KV_HEADS))  # six layers
    if arm == DEPTH:
        return replace(few, depth_attention=DepthAttentionConfig(num_recent_loops=LOOPS - 1))
    return few


def cache_bytes(arm: str) -> int:
    """Bytes of cache per token, in half precision."""
    from openmythos.config.counts import kv_bytes_per_token

    kept = 1 if arm == "last_loop" else LOOPS
    return kv_bytes_per_token(model_of(arm), num_loops=LOOPS, kept_loops=kept)


# --- what the results say -------------------------------------------------------------------------


def decide(claim: Claim, results: Results) -> Verdict:
    """Depth attention against both other uses of the memory."""
    found = bits(results)
    if min(map(len, found.values())) < 2:
        return no_result(claim, "Fewer than two seeds.")
    gaps = {arm: gap(found[DEPTH], found[arm]) for arm in OTHERS}
    below = [arm for arm, one in gaps.items() if one.is_result and one.difference.mean < 0]
    decision: Decision = "in part" if below else "fails"
    if len(below) == len(OTHERS):
        decision = "holds"
    elif not any(one.is_result for one in gaps.values()):
        decision = "no result"
    best = min(OTHERS, key=lambda arm: fmean(found[arm]))
    said = ", ".join(f"{arm} {fmean(values):.4f}" for arm, values in found.items())
    return verdict(
        claim.name, decision, f"Bits per byte: {said}.", gaps[best].difference, figure="bits"
    )


def bits(results: Results) -> dict[str, list[float]]:
    """Bits per byte of every seed by arm."""
    return {arm: results.values(arm, lambda d: d["bits"]) for arm in ARMS}


def bits_table(results: Results) -> Table:
    """Bits per byte by arm."""
    rows = []
    for arm, values in bits(results).items():
        if values:
            found = t_interval(values)
            rows.append([arm, f"{found.mean:.4f} ± {found.deviation:.4f}", str(len(values))])
    header = ["arm", "bits per byte", "seeds"]
    return Table("Depth attention: held-out text", header, rows)


def size_table() -> Table:
    """Cache, parameters and FLOPs of the arms."""
    from openmythos.config import counts

    rows = []
    for arm in ARMS:
        config, context = model_of(arm), (SEQ_LEN + 1) // 2
        flops = counts.forward_flops(config, num_loops=LOOPS, context_length=context)
        sizes = (cache_bytes(arm), counts.total_params(config), flops)
        rows.append([arm, *(f"{size:,.0f}" for size in sizes)])
    header = ["arm", "bytes of cache per token", "parameters", "test FLOPs per token"]
    return Table("Depth attention: the arms", header, rows)


STUDY = DepthAttention()

if __name__ == "__main__":
    main(STUDY)
