"""Continuations of a prompt with the loops of each token: what a run's samples are."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from openmythos.engine.reference import generate
from openmythos.folder import write_json
from openmythos.model.exit import KLExit
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.report.page import Piece, Sample
from openmythos.tokenizer import Tokenizer
from openmythos.train.run import Run
from openmythos.train.task import TextTask

EXIT_KL = 1e-3
NUM_SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 3, 8, 32


def continuations(
    model: RecurrentDepthLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    num_loops: int,
    max_new_tokens: int,
    seed: int,
) -> list[Sample]:
    """One sampled continuation per prompt; each token exits when its prediction stands still."""
    result = generate(
        model,
        [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts],
        max_new_tokens=max_new_tokens,
        num_loops=num_loops,
        exit_rule=KLExit(threshold=EXIT_KL),
        temperature=0.7,
        top_k=40,
        num_ids=tokenizer.vocab_size,
        stop_tokens=[tokenizer.eos_id],
        seed=seed,
    )
    samples = []
    for prompt, tokens, loops in zip(prompts, result.tokens, result.loops, strict=True):
        pieces = [
            Piece(text=tokenizer.decode([token]), loops=count)
            for token, count in zip(tokens, loops, strict=True)
            if token != tokenizer.eos_id
        ]
        samples.append(Sample(prompt=prompt, pieces=pieces))
    return samples


def write_samples(run: Run) -> Path | None:
    """Continue the beginnings of held-out rows, and write that to the run's folder.

    Returns:
        The file; None if the run is not on text, or holds none out.
    """
    task, tokenizer = run.task, run.folder.tokenizer
    state = run.folder.last_state()
    if not isinstance(task, TextTask) or task.validation is None or tokenizer is None:
        return None
    rows = next(iter(task.validation.validation_batches(1))).tokens[:NUM_SAMPLES, :PROMPT_TOKENS]
    prompts = [tokenizer.decode(row) for row in rows.tolist()]
    samples = continuations(
        run.model,
        tokenizer,
        prompts,
        num_loops=run.model.config.num_loops,
        max_new_tokens=NEW_TOKENS,
        seed=run.config.train.seed,
    )
    return write_sample_file(samples, run.folder.path, 0 if state is None else state.step)


def write_sample_file(samples: Sequence[Sample], folder: Path, step: int) -> Path:
    """Write samples to a run's folder, under the step whose weights made them."""
    path = folder / "samples" / f"step-{step:08d}.json"
    write_json(path, [asdict(sample) for sample in samples])
    return path
