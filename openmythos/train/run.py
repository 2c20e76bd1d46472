"""From a run's configuration to its parts: data on disk, model, task, run folder."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from openmythos.checkpoint.load import empty_model, fill_model
from openmythos.checkpoint.weights import check_shapes, tensor_shapes
from openmythos.config import ModelConfig
from openmythos.config.schema import to_dict
from openmythos.data.index import INDEX_FILE
from openmythos.data.loader import TokenLoader
from openmythos.data.prepare import prepare
from openmythos.data.synthetic import Curriculum, HopsConfig, HopsTask
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import load_pretrained
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.tokenizer import Tokenizer
from openmythos.train.recipe import HopsData, RunConfig, TextData
from openmythos.train.run_folder import RunFolder
from openmythos.train.task import HopsTraining, Task, TextTask


@dataclass(frozen=True)
class Run:
    """Everything that ``train`` needs; ``config`` is the resolved one."""

    config: RunConfig
    model: RecurrentDepthLM
    task: Task
    folder: RunFolder


def set_up(config: RunConfig, out: Path, device: str = "cpu") -> Run:
    """Prepare the data, fit the vocabulary, make the model and write the resolved configuration.

    Weights that ``train.init_from`` names are read unless the run has a checkpoint of its own, and
    keep their vocabulary.

    Raises:
        ValueError: The data cannot be used, ``out`` holds another run, or the weights to start from
            do not fit the model or the data's tokenizer.
    """
    tokenizer: Tokenizer | None = None
    task: Task
    # Before the data is prepared: that of another run must not be replaced.
    RunFolder(out).check_config(to_dict(config), ignore=("model.vocab_size",))
    if isinstance(config.data, TextData):
        task = text_task(config.data, config, out)
        tokenizer = task.train.tokenizer
        vocab_size = tokenizer.vocab_size
    else:
        task = hops_training(config.data, config.train.seed)
        vocab_size = task.task.vocab_size
    source = config.train.init_from
    if source is None:
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    elif vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the data has {vocab_size} token ids, the model in {source} "
            f"{config.model.vocab_size}; prepare the data with --tokenizer {source}"
        )
    folder = RunFolder(out, config.train.keep_checkpoints, tokenizer)
    generator = torch.Generator().manual_seed(config.train.seed)
    if source is None or folder.last_checkpoint() is not None:
        model = RecurrentDepthLM(config.model, generator).to(device)
    else:
        model = initial_model(Path(source), config.model, tokenizer, device)
    folder.write_config(to_dict(config))
    return Run(config, model, task, folder)


def initial_model(
    source: Path, config: ModelConfig, tokenizer: Tokenizer | None, device: str
) -> RecurrentDepthLM:
    """A model of this config with the weights of a checkpoint, in fp32.

    Raises:
        ValueError: The weights do not fit, or belong to another tokenizer.
    """
    folder = local_folder(source)
    if tokenizer is not None and (folder / "tokenizer.json").is_file():
        theirs = Tokenizer.load(folder).fingerprint
        if theirs != tokenizer.fingerprint:
            raise ValueError(
                f"tokenizer mismatch: {source} uses {theirs[:12]}, the data "
                f"{tokenizer.fingerprint[:12]}; prepare the data with --tokenizer {source}"
            )
    weights = load_pretrained(folder).state_dict()
    model = empty_model(config)
    check_shapes(tensor_shapes(weights), tensor_shapes(model.state_dict()), folder)
    return fill_model(model, weights.items(), folder, torch.float32, device)


def text_task(data: TextData, config: RunConfig, out: Path) -> TextTask:
    """Loaders over prepared data; a source that is not prepared yet goes to ``out/data``."""
    source = Path(data.source)
    if (source / INDEX_FILE).exists():
        prepared = source
    else:
        prepared = out / "data"
        start = config.train.init_from
        prepare(
            data.source,
            prepared,
            tokenizer=None if start is None else Tokenizer.load(local_folder(start)),
            vocab_size=config.model.vocab_size,
            val_fraction=data.val_fraction,
            column=data.column,
        )
    size, seed = config.train.batch_size, config.train.seed
    train = TokenLoader(prepared, "train", seq_len=data.seq_len, batch_size=size, seed=seed)
    validation = TokenLoader(prepared, "val", seq_len=data.seq_len, batch_size=size, seed=seed)
    return TextTask(train, validation)


def hops_training(data: HopsData, seed: int) -> HopsTraining:
    """The hops task with its curriculum."""
    walks = HopsConfig(
        num_entities=data.num_entities,
        num_relations=data.num_relations,
        max_train_hops=data.max_train_hops,
        seed=seed,
    )
    curriculum = Curriculum(max_stage=data.max_train_hops)
    return HopsTraining(HopsTask(walks), curriculum, data.check_loops, seed)
