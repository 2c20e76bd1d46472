"""Cases for two ranks and more: what each rank reads."""

import itertools
from dataclasses import replace
from pathlib import Path

import torch

from openmythos.train.ranks import Ranks
from openmythos.train.recipe import MixtureData, MixtureSource
from openmythos.train.run import text_task
from tests.train.examples import text_config, write_text
from tests.train.ranks_save import in_a_folder


@in_a_folder
def the_first_rank_prepares_a_mixture_and_all_read_their_rows(folder: Path, ranks: Ranks) -> None:
    names = [folder / name for name in ("a", "b")]
    for number, name in enumerate(names):
        ranks.on_first(name.mkdir)
        ranks.on_first(lambda n=number, f=name: str(write_text(f, 60 + 20 * n)))
    weights = (0.75, 0.25)
    sources = tuple(
        MixtureSource(source=str(name), weight=weight)
        for name, weight in zip(names, weights, strict=True)
    )
    config = text_config(names[0], batch_size=4 * ranks.world)
    config = replace(config, data=MixtureData(sources=sources, seq_len=32))
    task = text_task(config.data, config, folder / "run", ranks)
    alone = text_task(
        config.data, config, folder / "run", replace(ranks, row_rank=0, num_row_ranks=1)
    )
    for step, whole in enumerate(itertools.islice(alone.batches(0, config.train.batch_size), 3)):
        own = whole.tokens[ranks.rank :: ranks.world]
        assert torch.equal(task.train.batch(step).tokens, own)
    ranks.wait()  # the folder is read until here


CASES = [the_first_rank_prepares_a_mixture_and_all_read_their_rows]
