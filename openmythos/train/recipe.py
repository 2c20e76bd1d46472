"""The configuration of a training run."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from openmythos.config import ModelConfig
from openmythos.config.adapter import AdapterConfig
from openmythos.config.parallel import ParallelConfig
from openmythos.config.schema import as_seed, require, require_literals, require_positive
from openmythos.data.mixture import rows_per_cycle
from openmythos.data.puzzle_table import SeededConfig
from openmythos.data.source import STANDARD_INPUT
from openmythos.train.depth_schedule import ClippedPoissonDepth, DepthSchedule, FixedDepth
from openmythos.train.objective import FinalLoopObjective, ObjectiveConfig, PerLoopObjective
from openmythos.train.optim import OptimizerConfig

# How torch compiles for ``compile``. A graph for one row and one for more, with and without
# gradients, per shape of a call: with a depth per sequence more than the 8 that torch allows.
COMPILING: dict[str, Any] = {
    "fullgraph": True,
    "recompile_limit": 64,
    "isolate_recompiles": True,
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run trains; it ends at ``max_steps`` or ``max_seconds``, whichever comes first.

    The learning rate and the depth ramp follow the share of the run that is done. With
    ``max_steps`` alone that share is a pure function of the step, so that a resumed run is equal to
    an uninterrupted one. A checkpoint is also written before every evaluation, and at the end.

    Attributes:
        seed: Seed of everything that is random.
        init_from: Checkpoint folder, of any family, with the initial weights; null: new ones are
            drawn.
        adapter: What is trained beside frozen weights, those of ``init_from``; null: the weights.
        max_steps: Optimiser steps in all; null: no limit.
        max_seconds: Seconds of training in all; null: no limit.
        batch_size: Rows of one optimiser step, over all its micro-batches.
        grad_accumulation: Micro-batches of a step; a divisor of ``batch_size``.
        optimizer: Learning rates and their schedule.
        depth: How many loops a step runs, and how many get gradients.
        objective: What the loss sees.
        balance_rate: Step of the experts' selection bias per optimiser step.
        autocast: Precision of the forward's products: that of the weights, or bfloat16.
        compile: Whether the core is compiled; needs a C++ compiler.
        recompute: Activation checkpointing per loop: the forward keeps the states only, and the
            backward pass runs each loop again.
        log_every: Steps between two rows of metrics.jsonl.
        eval_every: Steps between two evaluations; 0: at the end only.
        eval_loops: Numbers of loops that are evaluated.
        eval_batches: Batches of held-out text in an evaluation.
        save_every: Steps between two checkpoints; 0: not by number of steps.
        save_in_background: Whether training goes on while a checkpoint is written: a copy of
            weights and optimiser state lies in the host's memory meanwhile.
        keep_checkpoints: Newest checkpoints that are kept.
        track: Where the rows of metrics.jsonl are sent as well.
        parallel: How the run is laid out over processes.
    """

    seed: int = 0
    init_from: str | None = None
    adapter: AdapterConfig | None = None
    max_steps: int | None = None
    max_seconds: float | None = None
    batch_size: int = 16
    grad_accumulation: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    depth: DepthSchedule = field(
        default_factory=lambda: DepthSchedule(sampling=ClippedPoissonDepth())
    )
    objective: ObjectiveConfig = field(default_factory=FinalLoopObjective)
    balance_rate: float = 0.01
    autocast: Literal["none", "bfloat16"] = "none"
    compile: bool = False
    recompute: bool = False
    log_every: int = 10
    eval_every: int = 0
    eval_loops: tuple[int, ...] = (1, 2, 4, 8, 16)
    eval_batches: int = 16
    save_every: int = 200
    save_in_background: bool = False
    keep_checkpoints: int = 2
    track: Literal["none", "trackio", "wandb"] = "none"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        names = ("batch_size", "grad_accumulation", "log_every", "eval_batches", "keep_checkpoints")
        require_positive(self, *names)
        require_literals(self)
        object.__setattr__(self, "seed", as_seed("seed", self.seed))
        for name in ("balance_rate", "eval_every", "save_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(min(self.eval_loops, default=1) >= 1, "eval_loops", self.eval_loops, "at least 1")
        bounded = self.max_steps is not None or self.max_seconds is not None
        if not bounded:
            raise ValueError("the run has no end: give max_steps or max_seconds")
        if self.max_steps is not None:
            require_positive(self, "max_steps")
        if self.max_seconds is not None:
            require(self.max_seconds > 0, "max_seconds", self.max_seconds, "above 0")
        whole = self.batch_size % self.grad_accumulation == 0
        allowed = f"a divisor of batch_size={self.batch_size}"
        require(whole, "grad_accumulation", self.grad_accumulation, allowed)
        parts = self.parallel.num_row_ranks * self.grad_accumulation
        allowed = f"a multiple of dp_replicate x dp_shard x grad_accumulation, {parts}"
        require(self.batch_size % parts == 0, "batch_size", self.batch_size, allowed)
        if self.adapter is not None:
            self._check_adapter(self.adapter)
        exchanges = self.parallel.ep > 1 or self.parallel.tp > 1
        allowed = "false with parallel.ep or parallel.tp above 1"
        require(not (self.compile and exchanges), "compile", self.compile, allowed)
        if self.parallel.same_loops and self.depth.per_sequence:
            per_draw, ranks = self.depth.rows_per_draw, self.parallel.num_row_ranks
            allowed = f"a multiple of dp_replicate x dp_shard, {ranks}: all run the same loops"
            require(per_draw % ranks == 0, "depth.rows_per_draw", per_draw, allowed)

    def _check_adapter(self, adapter: AdapterConfig) -> None:
        allowed = "null without train.init_from (--from), the model that it changes"
        require(self.init_from is not None, "train.adapter", adapter, allowed)
        allowed = "null where the objective trains the gate only: an adapter trains all but it"
        require(not self.objective.trains_gate_only, "train.adapter", adapter, allowed)
        if adapter.num_loops is not None:
            depth, fixed = self.depth, type(self.depth.sampling) is FixedDepth
            most = depth.sampling.mean_recurrence if fixed else depth.max_loops
            allowed = f"at most {most}, the loops of the deepest step: others are never trained"
            within = adapter.num_loops <= most
            require(within, "train.adapter.num_loops", adapter.num_loops, allowed)
        require(self.parallel.tp == 1, "parallel.tp", self.parallel.tp, "1 with train.adapter")

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is done before ``step``, 0..1."""
        by_step = step / self.max_steps if self.max_steps is not None else 0.0
        by_time = seconds / self.max_seconds if self.max_seconds is not None else 0.0
        return min(1.0, max(by_step, by_time))


# What may change while a run goes on: up to rounding, the steps already done are the same with it.
# A new length moves the schedules of the steps to come.
FREE_FIELDS = frozenset(
    f"train.{name}"
    for name in (
        *("max_steps", "max_seconds", "grad_accumulation", "compile", "log_every", "save_every"),
        *("keep_checkpoints", "eval_every", "eval_loops", "eval_batches", "recompute", "track"),
        "save_in_background",
        *(f"parallel.{name}" for name in ("dp_replicate", "dp_shard", "ep", "tp", "core_gather")),
    )
)
# Compared as the places that they lead to.
PATH_FIELDS = ("data.source", "data.sources.source", "train.init_from")


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Packed text.

    Attributes:
        source: What `openmythos prepare` accepts as its source, or a folder that it prepared.
        seq_len: Tokens of a row.
        val_fraction: Share of the documents that is held out.
        column: Text column of tables.
        skip_bad: Whether files and rows that cannot be read are left out; otherwise they are
            errors.
        conversations: Of rows that are conversations, which tokens count: the assistant's answers
            or all; null: rows are text.
    """

    kind: ClassVar[str] = "text"
    source: str = "python-docs"
    seq_len: int = 256
    val_fraction: float = 0.1
    column: str = "text"
    skip_bad: bool = False
    conversations: Literal["answers", "all"] | None = None

    @property
    def in_words(self) -> str:
        """What a run trains on."""
        return self.source

    def __post_init__(self) -> None:
        require_positive(self, "seq_len")
        require(0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One of the sources of a mixture.

    Attributes:
        source: What `openmythos prepare` accepts as its source, or a folder that it prepared.
        weight: Its share of the rows; at most four decimals.
        column: Text column of tables.
        conversations: As ``TextData`` has it.
    """

    source: str
    weight: float
    column: str = "text"
    conversations: Literal["answers", "all"] | None = None


@dataclass(frozen=True, kw_only=True)
class MixtureData:
    """Packed text of several sources, each with its share of the rows.

    Attributes:
        sources: Each ``{"source": ..., "weight": ..., "column": ...}``; the weights sum to 1.
        seq_len: Tokens of a row.
        val_fraction: Share of the documents of each source that is held out.
        skip_bad: Whether files and rows that cannot be read are left out; otherwise they are
            errors.
    """

    kind: ClassVar[str] = "mixture"
    sources: tuple[MixtureSource, ...]
    seq_len: int = TextData.seq_len
    val_fraction: float = TextData.val_fraction
    skip_bad: bool = False

    @property
    def in_words(self) -> str:
        """What a run trains on."""
        return " and ".join(f"{part.source} ({part.weight:.2%})" for part in self.sources)

    @property
    def parts(self) -> list[TextData]:
        """Each source as the only one."""
        return [
            TextData(
                source=part.source,
                column=part.column,
                conversations=part.conversations,
                seq_len=self.seq_len,
                val_fraction=self.val_fraction,
                skip_bad=self.skip_bad,
            )
            for part in self.sources
        ]

    def __post_init__(self) -> None:
        require_positive(self, "seq_len")
        require(0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "in [0, 1)")
        rows_per_cycle([part.weight for part in self.sources])
        names = [part.source for part in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, "data.sources", twice, "sources that are all different")
        require(
            STANDARD_INPUT not in names,
            "data.sources",
            STANDARD_INPUT,
            "files, folders or datasets: standard input can be read once only; prepare it first",
        )


@dataclass(frozen=True, kw_only=True)
class HopsData:
    """Walks over a graph of permutations; stage k of the curriculum trains up to k hops.

    Attributes:
        num_entities: Nodes of the graph.
        num_relations: Permutations of the nodes.
        max_train_hops: Longest walks of the training, in hops.
        held_out_facts: Fraction of the facts that are trained alone only, in no longer walk.
        check_loops: Loops at which the curriculum measures whether a stage is learnt.
        shifts: Whether each relation adds a number to the entity's, modulo the number of entities.
        written_out: Whether the entities that a walk passes are written after it, and all of them
            are targets: a chain of thought.
        mixed: Whether shorter walks than the stage's are trained, too.
        passed_targets: Whether every token of a training walk has a target: the entity reached
            there. ``train.objective.targets_per_loop`` uses them.
        position_range: Positions are drawn from 0 up to this; null: 0, 1, 2 and so on.
    """

    kind: ClassVar[str] = "hops"
    num_entities: int = 16
    num_relations: int = 4
    max_train_hops: int = 8
    held_out_facts: float = 0.0
    check_loops: int = 8
    shifts: bool = False
    written_out: bool = False
    mixed: bool = True
    passed_targets: bool = False
    position_range: int | None = None

    @property
    def seq_len(self) -> int:
        """Tokens of the longest walk: where it starts, its relations, and what is written out."""
        passed = self.max_train_hops - 1 if self.written_out else 0
        return 1 + self.max_train_hops + passed

    @property
    def in_words(self) -> str:
        """What a run trains on."""
        relations = "summands" if self.shifts else "permutations"
        written = ", written out" if self.written_out else ""
        return (
            f"walks over {self.num_entities} entities and {self.num_relations} {relations}{written}"
        )

    def __post_init__(self) -> None:
        names = ("num_entities", "num_relations", "max_train_hops", "check_loops")
        require_positive(self, *names)
        both = self.passed_targets and self.written_out
        require(not both, "data.passed_targets", True, "false if walks are written out")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a whole run: what its ``config.json`` holds and ``--config`` reads.

    Attributes:
        model: What the model is.
        train: How it is trained.
        data: What it is trained on.
    """

    model: ModelConfig
    train: TrainConfig
    data: TextData | MixtureData | HopsData | SeededConfig

    def __post_init__(self) -> None:
        data, most = self.data, self.model.max_seq_len
        is_text = isinstance(data, TextData | MixtureData)
        name = "data.seq_len" if is_text else "the longest example, in tokens,"
        require(data.seq_len <= most, name, data.seq_len, f"at most model.max_seq_len={most}")
        if isinstance(data, HopsData) and data.position_range is not None:
            allowed = f"at most model.max_seq_len={most}"
            require(
                data.position_range <= most, "data.position_range", data.position_range, allowed
            )
        objective = self.train.objective
        if isinstance(objective, PerLoopObjective) and objective.targets_per_loop:
            passed = isinstance(data, HopsData) and data.passed_targets
            needs = "0, or data.kind=hops with data.passed_targets=true"
            require(passed, "objective.targets_per_loop", objective.targets_per_loop, needs)
        objective.check(self.model.halting)
        self.train.parallel.check(self.model)
