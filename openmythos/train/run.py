"""A training run: resolve its configuration, set up its parts, train."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from openmythos.config import ModelConfig, presets
from openmythos.config.counts import training_bytes
from openmythos.config.schema import apply_overrides, from_dict, to_dict
from openmythos.data.index import INDEX_FILE, read_index
from openmythos.data.loader import TokenLoader
from openmythos.data.mixture import MixtureLoader, tokenizer_texts
from openmythos.data.prepare import MAX_BPE_TRAINING_BYTES, prepare
from openmythos.data.puzzle_table import CONFIGS, SeededConfig, make_puzzle
from openmythos.data.synthetic import Curriculum, HopsConfig, Walks
from openmythos.folder import in_a_sentence, locked
from openmythos.interop.adapter import chosen_layers, new_adapter
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import load_config
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.plan.memory import require_memory
from openmythos.tokenizer import Tokenizer, train_bpe
from openmythos.train import loop
from openmythos.train.depth_schedule import FixedDepth
from openmythos.train.display import TrainDisplay
from openmythos.train.loop import TrainResult
from openmythos.train.metrics import Recorder
from openmythos.train.optim import ADAPTING, FINE_TUNING
from openmythos.train.ranks import Ranks, join
from openmythos.train.recipe import HopsData, MixtureData, RunConfig, TextData, TrainConfig
from openmythos.train.run_folder import RunFolder, refuse_foreign
from openmythos.train.setup import initial_model, new_model
from openmythos.train.task import MixtureTask, PuzzleTask, Task, TextTask
from openmythos.train.tracking import Tracker
from openmythos.train.trained_depth import loops_to_score, trained_depth

DEFAULT_PRESET, DEFAULT_DATA = "tiny", "python-docs"
PUZZLE_DATA: Mapping[str, Callable[[], HopsData | SeededConfig]] = {"hops": HopsData, **CONFIGS}


@dataclass(frozen=True)
class Run:
    """Everything that training needs.

    ``config`` is the resolved configuration, ``ranks`` this process's place among those that train;
    ``changes`` says in words what differs from the configuration that the run's earlier steps were
    done with.
    """

    config: RunConfig
    model: RecurrentDepthLM
    task: Task
    folder: RunFolder
    ranks: Ranks
    changes: tuple[str, ...] = ()

    def in_words(self, data: str) -> str:
        """One line about the model and what it is trained on."""
        config = self.model.config
        count = sum(p.numel() for p in self.model.parameters())
        p, c, d = config.num_prelude_layers, config.num_core_layers, config.num_coda_layers
        layers = f"{p} prelude + {c} core (looped) + {d} coda layers"
        if self.folder.adapter is not None:
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            layers += f", of which an adapter's {trained:,} are trained"
        return f"{count:,} parameters, {layers}, on {data}"

    def train(self, display: TrainDisplay | None = None) -> TrainResult:
        """Train to the configured end, from the last checkpoint if there is one.

        Raises:
            TrainingStopped: The loss or a gradient is not finite, or the loss diverged.
            ValueError: Another process is training in the same folder.
        """
        if display is not None:
            display.max_steps = self.config.train.max_steps
        ranks, path = self.ranks, self.folder.path
        library = self.config.train.track if ranks.first else "none"
        tracker = None if library == "none" else Tracker(library, path, to_dict(self.config))
        shown = display if ranks.first else None
        recorder = Recorder(path, shown, tracker=tracker, writes=ranks.first)
        with _locked_once(path, ranks):
            config = self.config.train
            return loop.train(self.model, self.task, config, self.folder, recorder, ranks)


def resolve(
    preset: str | None,
    data: str | MixtureData | None,
    config: Path | None,
    overrides: list[str],
    init_from: Path | None = None,
) -> RunConfig:
    """The run's configuration: defaults, then preset, checkpoint or file, then overrides.

    A checkpoint gives the depths, too: those that it was trained at. Its weights have lower
    learning rates than new ones.

    Raises:
        ValueError: A field is unknown or out of range, or two arguments choose the same thing.
    """
    if init_from is not None and (preset is not None or config is not None):
        raise ValueError(
            f"--from {init_from} already names the model; leave the preset and --config out, and "
            "change fields with --set"
        )
    if config is not None:
        if preset is not None or data is not None:
            raise ValueError(
                f"--config {config} already names model and data; leave the preset and --data out, "
                "and change fields with --set"
            )
        try:
            stored = json.loads(config.read_text(encoding="utf-8"))
            base = from_dict(RunConfig, stored)
        except (OSError, ValueError) as error:  # of JSON, of UTF-8 or of a field
            said = in_a_sentence(error)
            raise ValueError(f"--config {config} cannot be used: {said}") from None
    else:
        start = None if init_from is None else str(init_from)
        settings = TrainConfig(max_steps=1000, eval_every=200, init_from=start)
        if init_from is None:
            model = presets.preset(preset or DEFAULT_PRESET)
        else:
            model = load_config(init_from)
            settings = _as_trained(settings, init_from, model, overrides)
        seq_len = min(TextData.seq_len, model.max_seq_len)
        base = RunConfig(model=model, train=settings, data=_data_of(data, seq_len))
    found = apply_overrides(base, overrides)
    return found if init_from is None else apply_overrides(_to_go_on(base, found), overrides)


def _to_go_on(base: RunConfig, found: RunConfig) -> RunConfig:
    """Rates and a curriculum for a checkpoint, by what the overrides made of it.

    A gate that is trained alone is new, at the rates of a training from scratch.
    """
    if not found.train.objective.trains_gate_only:
        rates = FINE_TUNING if found.train.adapter is None else ADAPTING
        base = replace(base, train=replace(base.train, optimizer=rates))
    if isinstance(base.data, HopsData):
        # It asks at the loops that are trained, unless an override says at which.
        sampling, loops = found.train.depth.sampling, found.model.num_loops
        loops = sampling.mean_recurrence if type(sampling) is FixedDepth else loops
        base = replace(base, data=replace(base.data, check_loops=loops))
    return base


def _as_trained(
    settings: TrainConfig, init_from: Path, model: ModelConfig, overrides: list[str]
) -> TrainConfig:
    """The settings with the depths that a checkpoint was trained at.

    Raises:
        ValueError: They are not known, and no override gives others.
    """
    try:
        known = trained_depth(init_from, model).schedule
    except ValueError:
        if any(override.startswith("train.depth") for override in overrides):
            return settings
        raise
    return replace(settings, depth=known, eval_loops=loops_to_score(known))


def _data_of(
    data: str | MixtureData | None, seq_len: int
) -> TextData | MixtureData | HopsData | SeededConfig:
    """What an option names: a mixture, a puzzle, or a source of text."""
    if isinstance(data, MixtureData):
        return replace(data, seq_len=seq_len)
    if (puzzle := PUZZLE_DATA.get(data or DEFAULT_DATA)) is not None:
        return puzzle()
    return TextData(source=data or DEFAULT_DATA, seq_len=seq_len)


def set_up(config: RunConfig, out: Path, device: str = "cpu") -> Run:
    """Prepare the data, fit the vocabulary, make the model and write the resolved configuration.

    A run with a checkpoint goes on with its own data and weights: neither the source nor
    ``train.init_from`` is read again, except by a run that trains an adapter of it. Before that,
    the weights of ``train.init_from`` are loaded, and the vocabulary is theirs.

    Raises:
        ValueError: The data cannot be used, ``out`` holds another run or other files or is in use,
            or the initial weights do not fit the model or the data's tokenizer.
    """
    if torch.device(device).type == "cpu":
        needed = training_bytes(config.model, moment_bytes=2)  # Muon keeps one moment
        if config.train.adapter is not None:  # of frozen weights there is nothing else
            needed = training_bytes(config.model, grad_bytes=0, moment_bytes=0)
        require_memory(needed, "training this model", "choose a smaller preset, or --set its sizes")
        rows = config.train.batch_size
        states = 8 * rows * config.data.seq_len * config.model.d_model  # at least h and e, in fp32
        advice = "lower train.batch_size and raise train.grad_accumulation"
        require_memory(needed + states, f"training on {rows} rows at once", advice)
    ranks = join(config.train.parallel, device)
    ranks.on_first(lambda: refuse_foreign(out))
    with _locked_once(out, ranks):
        return _set_up(config, out, ranks)


@contextlib.contextmanager
def _locked_once(path: Path, ranks: Ranks) -> Iterator[None]:
    """The folder's lock, held by the first rank for all."""
    with contextlib.ExitStack() as stack:
        ranks.on_first(lambda: bool(stack.enter_context(locked(path))))
        yield


def _set_up(config: RunConfig, out: Path, ranks: Ranks) -> Run:
    tokenizer: Tokenizer | None = None
    task: Task
    # Checked before the data is prepared, so that another run's data is not replaced.
    changed = ranks.on_first(
        lambda: RunFolder(out).changes(to_dict(config), ignore=("model.vocab_size",))
    )
    if config.train.adapter is not None:
        chosen_layers(config.model, config.train.adapter)  # refuses what it lacks
    if isinstance(config.data, TextData | MixtureData):
        task = text_task(config.data, config, out, ranks)
        tokenizer = task.train.tokenizer
        vocab_size = tokenizer.vocab_size
    else:
        task = puzzle_task(config.data, config.train.seed, ranks)
        vocab_size = task.puzzle.vocab_size
    source = config.train.init_from
    if source is None:
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    elif vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the data has {vocab_size} token ids, the model in {source} "
            f"{config.model.vocab_size}; prepare the data with --tokenizer {source}"
        )
    settings = config.train
    keep, in_background = settings.keep_checkpoints, settings.save_in_background
    folder = RunFolder(out, keep, tokenizer, ranks, in_background)
    adapter = settings.adapter
    if source is None or (adapter is None and folder.last_checkpoint() is not None):
        model = new_model(config.model, config.train, ranks)
    else:
        model = initial_model(Path(source), config.model, tokenizer, config.train, ranks)
    config = _with_full_paths(config)
    if adapter is not None:
        base = str(config.train.init_from)
        folder.adapter = new_adapter(model, adapter, base, config.train.seed)
    said = _changes_in_words(folder, changed, config.train)
    ranks.on_first(lambda: folder.write_config(to_dict(config)))
    return Run(config, model, task, folder, ranks, said)


def _with_full_paths(config: RunConfig) -> RunConfig:
    """The same with absolute paths, which mean the same from every working directory."""
    data, start = config.data, config.train.init_from
    if isinstance(data, TextData):
        data = replace(data, source=_full_path(data.source))
    if isinstance(data, MixtureData):
        full = (replace(part, source=_full_path(part.source)) for part in data.sources)
        data = replace(data, sources=tuple(full))
    start = None if start is None else _full_path(start)
    return replace(config, data=data, train=replace(config.train, init_from=start))


def _full_path(name: str) -> str:
    """The absolute path, if the name is one of a file or folder."""
    return os.path.realpath(name) if Path(name).exists() else name


def _changes_in_words(
    folder: RunFolder, changed: dict[str, tuple[str, str]], config: TrainConfig
) -> tuple[str, ...]:
    """A sentence for each field that is not what it was, and one for a schedule that moves."""
    state = folder.last_state()
    if state is None:
        return ()
    said = [f"{name} is {new} from now on (it was {old})" for name, (old, new) in changed.items()]
    length = {
        name: json.loads(changed[f"train.{name}"][0])
        for name in ("max_steps", "max_seconds")
        if f"train.{name}" in changed
    }
    if length:
        old = replace(config, **length).progress(state.step, state.seconds)
        new, rate = config.progress(state.step, state.seconds), config.optimizer.rate
        ramp = " and of the depth" if config.depth.ramp > 0 else ""
        said.append(
            f"the schedule of the learning rates{ramp} spans the new length: after step "
            f"{state.step}, {new:.0%} of the run is done instead of {old:.0%}, and the rates go on "
            f"at {rate(new):.3g} of their full values instead of {rate(old):.3g}"
        )
    return tuple(said)


def text_task(data: TextData | MixtureData, config: RunConfig, out: Path, ranks: Ranks) -> TextTask:
    """Loaders over the run's own data in ``out/data``, which the first rank makes.

    The shards' SHA-256 are checked before the first step, at about 1 GB/s.
    """
    own, parts = [out / "data"], [data] if isinstance(data, TextData) else data.parts
    if isinstance(data, MixtureData):
        own = [out / "data" / str(number) for number in range(len(parts))]

    def make() -> None:
        if RunFolder(out).last_checkpoint() is None:
            tokenizer = _tokenizer(data, config)
            for part, folder in zip(parts, own, strict=True):
                make_own_data(part, folder, tokenizer, config.model.vocab_size)

    ranks.on_first(make)
    folders = [_own_data(part, folder, out) for part, folder in zip(parts, own, strict=True)]
    each = [_loaders(folder, config, ranks) for folder in folders]
    if isinstance(data, TextData):
        return TextTask(each[0]["train"], each[0].get("val"), ranks)
    weights = [part.weight for part in data.sources]
    held_out = [
        (part.source, part.weight, loaders["val"])
        for part, loaders in zip(data.sources, each, strict=True)
        if "val" in loaders
    ]
    return MixtureTask(MixtureLoader([of["train"] for of in each], weights), held_out, ranks)


def _loaders(folder: Path, config: RunConfig, ranks: Ranks) -> dict[str, TokenLoader]:
    """A loader for each split of a prepared folder that has one."""
    return {
        split: TokenLoader(
            folder,
            split,
            seq_len=config.data.seq_len,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            rank=ranks.row_rank,
            world_size=ranks.num_row_ranks,
        )
        for split, content in read_index(folder).splits.items()
        if split == "train" or content.num_documents
    }


def _tokenizer(data: TextData | MixtureData, config: RunConfig) -> Tokenizer | None:
    """What a run's data is prepared with; None: it is prepared, or one source trains its own.

    That is the tokenizer of the checkpoint that the run starts from; else, of a mixture, that of a
    source which is prepared already; else one that is trained on the beginnings of the sources,
    each by its weight.
    """
    sources = [data.source] if isinstance(data, TextData) else [p.source for p in data.sources]
    prepared = [source for source in sources if _is_prepared(source)]
    if prepared == sources:
        return None
    if config.train.init_from is not None:
        return Tokenizer.load(local_folder(config.train.init_from))
    if isinstance(data, TextData):
        return None
    if prepared:
        return read_index(prepared[0]).load_tokenizer()
    texts = tokenizer_texts(
        [(part.source, part.column) for part in data.sources],
        [part.weight for part in data.sources],
        val_fraction=data.val_fraction,
        seed=0,
        max_bytes=MAX_BPE_TRAINING_BYTES,
    )
    return train_bpe(texts, config.model.vocab_size)


def _is_prepared(source: str) -> bool:
    return (Path(source) / INDEX_FILE).is_file()


def make_own_data(data: TextData, own: Path, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Fill ``own`` with a source's tokens: hard links if it is prepared already.

    Where links are impossible, nothing is written: prepared data is then read at its source.

    Raises:
        ValueError: The source cannot be used.
    """
    if _is_prepared(data.source):
        own.parent.mkdir(parents=True, exist_ok=True)
        read_index(data.source).link(own)
        return
    prepare(
        data.source,
        own,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        val_fraction=data.val_fraction,
        column=data.column,
        skip_bad=data.skip_bad,
        conversations=data.conversations,
    )


def _own_data(data: TextData, own: Path, out: Path) -> Path:
    """The folder of prepared data that a run reads of a source; see ``make_own_data``.

    Raises:
        ValueError: The run has no data any more.
    """
    if _is_prepared(str(own)):
        return own
    if _is_prepared(data.source):  # there were no links
        return Path(data.source)
    raise ValueError(
        f"{own} is missing, and a run goes on with its own data only; restore it, or choose "
        f"another --out (--from {out} starts from this run's weights)"
    )


def puzzle_task(data: HopsData | SeededConfig, seed: int, ranks: Ranks | None = None) -> PuzzleTask:
    """A puzzle with the run's seed; walks with their curriculum."""
    if not isinstance(data, HopsData):
        return PuzzleTask(make_puzzle(data, seed), None, 1, seed, ranks=ranks)
    config = HopsConfig(
        num_entities=data.num_entities,
        num_relations=data.num_relations,
        max_train_hops=data.max_train_hops,
        held_out_facts=data.held_out_facts,
        shifts=data.shifts,
        written_out=data.written_out,
        position_range=data.position_range,
        seed=seed,
    )
    curriculum = Curriculum(max_stage=data.max_train_hops, mixed=data.mixed)
    return PuzzleTask(Walks(config), curriculum, data.check_loops, seed, data.passed_targets, ranks)
