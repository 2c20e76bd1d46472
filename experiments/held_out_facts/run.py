"""Two hops over facts that training shows alone only: do loops combine what a stack cannot?

Every fact (where a relation leads from an entity) is trained as a walk of one hop. Walks of two
hops are trained over nine tenths of the facts. Asked are three kinds of them: trained ones, others
over the same facts, and those over the facts that no walk of two hops has had.

Source: "Loop, Think & Generalize" (2604.07822v2), systematicity, scaled down: two layers four times
against both plain stacks; permutations instead of a random graph, so that relations alone say
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.claim import Claim, Conclusion, Decision, Table, Verdict, no_result, verdict
from experiments.interval import gap, t_interval
from experiments.matching import Size, matching
from experiments.run_store import Results, Run
from experiments.study import Study, main
from experiments.tuning import tuned

if TYPE_CHECKING:
    from jaxtyping import Int
    from matplotlib.figure import Figure

    from openmythos.config import ModelConfig
    from openmythos.data.synthetic import Walks
    from openmythos.model.recurrent import RecurrentDepthLM
    from openmythos.train.recipe import RunConfig

LOOP, PLAIN = "loop", ("shallow", "deep")
ARMS = {LOOP: (2, 4), "shallow": (2, 1), "deep": (8, 1)}  # layers, loops
SEEDS, RATES = (0, 1, 2), (0.001, 0.003, 0.01)
STEPS, TUNING_STEPS, BATCH, D_MODEL = 8000, 2000, 256, 64
ENTITIES, RELATIONS, HELD_OUT_FACTS = 100, 9, 0.1  # 7.3 trained walks of two hops per fact
KINDS = ("facts", "trained", "same_facts", "new_facts")


class HeldOutFacts(Study):
    number = 10
    title = "Two hops over facts that training shows alone (hours, on request)"
    scales = ("smoke", "full")
    page_scale = "full"

    def runs(self, scale: str, done: Results) -> list[Run]:
        """Every arm tuned by walks over facts that others combine, never by those over new ones."""
        if scale == "smoke":
            return [Run(LOOP, 0, {"steps": 2, "batch": 8, "walks": 20, "rate": RATES[1]})]
        settings, found = {"steps": STEPS, "batch": BATCH, "walks": 4096}, []
        short = {**settings, "steps": TUNING_STEPS}  # after all steps every rate may have learnt it
        for arm in ARMS:
            choice = tuned(done, arm, short, RATES, lambda r: float(r.data["same_facts"]))
            found += choice.then(arm, settings, SEEDS)
        return found

    def measure(self, run: Run, scale: str, out: Path) -> dict[str, Any]:
        """Accuracy on the facts and on walks of two hops of each kind, and the leak baselines."""
        from openmythos.data.synthetic import Walks
        from openmythos.train.run import set_up
        from openmythos.train.task import PuzzleTask

        trained = set_up(recipe(run), out / "model")
        if trained.train().interrupted:
            raise KeyboardInterrupt
        assert isinstance(trained.task, PuzzleTask) and isinstance(trained.task.puzzle, Walks)
        walks, loops, most = trained.task.puzzle, ARMS[run.arm][1], run.settings["walks"]
        found: dict[str, Any] = {
            kind: accuracy(trained.model, walks, given[:most], loops)
            for kind, given in kinds_of(walks).items()
        }
        return {**found, "leaks": walks.leak_baselines(2)}

    def conclude(self, results: Results) -> Conclusion:
        return Conclusion(
            verdicts=[decide(self.claims["two-hops-over-held-out-facts"], results)],
            tables=[score_table(results), size_table()],
            figures={"two_hops": scores(results)},
        )

    def draw(self, conclusion: Conclusion) -> Mapping[str, Figure]:
        from experiments.held_out_facts.picture import draw

        return {"two_hops": draw(conclusion.figures["two_hops"])}


def model_of(arm: str) -> ModelConfig:
    """Pre-norm layers; the state begins as the embedding, and nothing is injected."""
    from openmythos.config import (
        CopyInitConfig,
        GQAConfig,
        ModelConfig,
        NoInjectionConfig,
        ReLUSquaredConfig,
    )

    layers, loops = ARMS[arm]
    return ModelConfig(
        vocab_size=ENTITIES + RELATIONS,
        d_model=D_MODEL,
        num_prelude_layers=0,
        num_core_layers=layers,
        num_coda_layers=0,
        num_loops=loops,
        max_seq_len=8,
        attention=GQAConfig(num_heads=4, num_kv_heads=4, head_dim=16, qk_norm="weightless"),
        feed_forward=ReLUSquaredConfig(d_ff=4 * D_MODEL),
        injection=NoInjectionConfig(),
        state_init=CopyInitConfig(),
    )


def recipe(run: Run) -> RunConfig:
    """The training of a run: once the facts are known, two steps of two hops to each of one."""
    from openmythos.train.depth_schedule import DepthSchedule, FixedDepth
    from openmythos.train.optim import OptimizerConfig
    from openmythos.train.recipe import HopsData, RunConfig, TrainConfig

    loops, rate = ARMS[run.arm][1], run.settings["rate"]
    return RunConfig(
        model=model_of(run.arm),
        train=TrainConfig(
            seed=run.seed,
            max_steps=run.settings["steps"],
            batch_size=run.settings["batch"],
            optimizer=OptimizerConfig(
                lr=rate, embedding_lr=None, muon_lr=rate, betas=(0.9, 0.98), weight_decay=0.1
            ),
            depth=DepthSchedule(sampling=FixedDepth(mean_recurrence=loops)),
            eval_loops=(),
            save_every=500,
            keep_checkpoints=1,
        ),
        data=HopsData(
            num_entities=ENTITIES,
            num_relations=RELATIONS,
            max_train_hops=2,
            held_out_facts=HELD_OUT_FACTS,
            check_loops=loops,
        ),
    )


def kinds_of(walks: Walks) -> dict[str, Int[np.ndarray, "N T"]]:
    """All facts and all walks of two hops, by what training has seen of them, in drawn order."""
    entities, relations = walks.config.num_entities, walks.config.num_relations
    axes = (np.arange(entities), *[entities + np.arange(relations)] * 2)
    every = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    every = np.random.default_rng(0).permutation(every)
    alone, held_out = walks.num_alone(every), walks.is_held_out(every, 2)
    return {
        "facts": np.unique(every[:, :2], axis=0),
        "trained": every[~held_out & (alone == 0)],
        "same_facts": every[held_out & (alone == 0)],
        "new_facts": every[alone == 2],
    }


def accuracy(
    model: RecurrentDepthLM, walks: Walks, given: Int[np.ndarray, "N T"], loops: int
) -> float:
    """Share of right answers."""
    import torch

    from openmythos.model.inference import inference

    answers = torch.from_numpy(walks.targets(given)[:, -1])
    with inference(model):
        chosen = [
            model(part, num_loops=loops).logits[:, -1].argmax(dim=-1)
            for part in torch.from_numpy(given).split(512)
        ]
    return float((torch.cat(chosen) == answers).double().mean())


# --- what the results say -------------------------------------------------------------------------


def decide(claim: Claim, results: Results) -> Verdict:
    """The loop against the better plain stack, on walks over new facts."""
    new = {arm: results.values(arm, lambda d: d["new_facts"]) for arm in ARMS}
    if min(map(len, new.values())) < 2:
        return no_result(claim, "Fewer than two seeds.")
    limits = claim.thresholds
    known = {arm: fmean(results.values(arm, lambda d: d["facts"])) for arm in ARMS}
    best = max(PLAIN, key=lambda arm: fmean(new[arm]))
    found, loop = gap(new[LOOP], new[best]), fmean(new[LOOP])
    said = "Walks over facts that no walk of two hops had: " + ", ".join(
        f"{arm} {fmean(new[arm]):.2f}" for arm in ARMS
    )
    decision: Decision = "fails"
    if min(known.values()) < limits["learnt"]:
        decision = "not decidable here"
        worst = min(known, key=lambda arm: known[arm])
        said = f"{said}; of the facts themselves {worst} knows {known[worst]:.2f}"
    elif loop > limits["collapsed"] and not found.is_result:
        decision = "no result"
    elif loop > limits["collapsed"] and found.difference.mean > 0:
        passed = loop >= limits["passed"] and fmean(new[best]) <= limits["collapsed"]
        part = found.difference.mean >= limits["least_gap"]
        decision = "holds" if passed else "in part" if part else "fails"
    by_seed = ", ".join(f"{value:.3f}" for value in new[best])
    said = f"{said}; {best} by seed {by_seed}, where the rule allows {limits['collapsed']:g}"
    return verdict(claim.name, decision, f"{said}.", found.difference, figure="two_hops")


def scores(results: Results) -> dict[str, dict[str, list[float]]]:
    """Accuracy of every seed by arm and kind of question."""
    return {
        arm: {kind: results.values(arm, lambda d, kind=kind: d[kind]) for kind in KINDS}
        for arm in ARMS
        if results.of(arm)
    }


def score_table(results: Results) -> Table:
    """Means and deviations over seeds, and what guessers reach."""
    rows = []
    for arm, kinds in scores(results).items():
        found = [t_interval(values) for values in kinds.values()]
        rows.append([arm, *(f"{one.mean:.3f} ± {one.deviation:.3f}" for one in found)])
    leaks = next((r.data["leaks"] for arm in ARMS for r in results.of(arm)), {})
    if leaks:
        rows.append(["the best guesser", "", *[f"{max(leaks.values()):.3f}"] * 3])
    header = ["arm", "facts", "trained walks", "others over the same facts", "over new facts"]
    return Table("Two hops: accuracy", header, rows)


def size_table() -> Table:
    """Parameters and FLOPs of the arms."""
    sizes = {arm: Size(model_of(arm), loops, loops) for arm, (_, loops) in ARMS.items()}
    found = matching(sizes, LOOP, context_length=2)
    return Table("Two hops: the arms, and how far from the loop", found.header, found.rows)


STUDY = HeldOutFacts()

if __name__ == "__main__":
    main(STUDY)
