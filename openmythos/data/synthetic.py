"""The hops task: follow a chain of relations of any length; no shortcut gives the answer.

Entities are joined by relations, each a permutation of the entities. A walk is written

    <entity> <relation 1> ... <relation k>   ->   the entity reached

and only the last position has a target. Written out, as a chain of thought, the entities that the
walk passes follow it, and each is a target:

    <entity 0> <relation 1> ... <relation k> <entity 1> ... <entity k-1>   ->   <entity k>

Ids 0 .. E-1 are entities and E .. E+R-1 are relations; there are no special tokens. All rows of a
batch have the same number of hops.

With permutations the relations alone say nothing about the answer. With random functions they do,
the more hops the more, so a model can score well without following the walk: `leak_baselines`
measures how well.

Source: "Loop, Think & Generalize" (2604.07822v2), the depth extrapolation task, scaled down; the
positions of what is written out are coupled as in Cho et al. 2024 (arXiv 2405.20671).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt64

from openmythos.config.schema import as_seed, from_dict, require, to_dict
from openmythos.data.hashing import mix, permutation, threshold
from openmythos.data.packing import IGNORED_TARGET, Batch
from openmythos.folder import WALKS_FILE, write_json

_MIN_WALKS_TO_HOLD_OUT = 1000
_MAX_ENUMERATED_WORDS = 4096

# One random stream per purpose, so that two uses of the same seed never share a draw.
_RELATIONS, _HELD_OUT, _TRAIN, _EVAL, _WORDS, _CHOICE, _POSITIONS = range(7)


@dataclass(frozen=True, kw_only=True)
class HopsConfig:
    """Settings of the hops task.

    Attributes:
        num_entities: Entities E; chance is 1 / E.
        num_relations: Relations R.
        max_train_hops: Most hops in training.
        held_out_fraction: Fraction of the walks of each hop count that training never samples.
        permutations: Whether relations are permutations; False: random functions, which leak.
        shifts: Whether each relation adds a number of its own to the entity's, modulo E: walks
            are then sums of several numbers.
        written_out: Whether the entities that a walk passes are written after it. Each has the
            position of the relation that leads to it, so that the next relation is always one on.
        position_range: The positions of a walk's tokens are so many numbers of 0 up to this, drawn
            for each walk and sorted; null: 0, 1, 2 and so on. Distances then say nothing, and a
            short walk shows those of a long one.
        seed: Seed of the relations, the held-out walks and the samples.
    """

    num_entities: int = 16
    num_relations: int = 4
    max_train_hops: int = 8
    held_out_fraction: float = 0.1
    permutations: bool = True
    shifts: bool = False
    written_out: bool = False
    position_range: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        as_seed("seed", self.seed)
        if self.num_entities < 2 or self.num_relations < 1:
            raise ValueError(
                f"num_entities is {self.num_entities} and num_relations {self.num_relations}; "
                "give at least 2 entities and 1 relation"
            )
        if self.max_train_hops < 1:
            raise ValueError(f"max_train_hops is {self.max_train_hops}; it must be at least 1")
        if self.shifts and not (self.permutations and self.num_relations < self.num_entities):
            raise ValueError(
                f"shifts with permutations={self.permutations}, {self.num_relations} relations "
                f"and {self.num_entities} entities: each relation adds another number, which is a "
                "permutation; give permutations=True and fewer relations than entities"
            )
        if self.position_range is not None and self.position_range <= self.max_train_hops:
            raise ValueError(
                f"position_range is {self.position_range}; walks of {self.max_train_hops} hops "
                f"need at least {self.max_train_hops + 1}"
            )
        if not 0.0 <= self.held_out_fraction <= 0.5:
            raise ValueError(
                f"held_out_fraction is {self.held_out_fraction}; it must be 0 to 0.5, training "
                "needs the rest"
            )


class Walks:
    """Batches, held-out walks and leak baselines of one `HopsConfig`.

    A hash of the whole walk decides whether it is held out, so every process and batch size agree.
    Nothing is held out for one hop (a relation that was never shown cannot be known) and for hop
    counts with fewer than 1,000 walks: those are evaluated on training walks.

    Attributes:
        relations: The entity that each relation leads to from each entity.
    """

    def __init__(self, config: HopsConfig) -> None:
        self.config = config
        shape = (config.num_relations, config.num_entities)
        if config.shifts:
            entities = np.arange(config.num_entities)
            # 0 is no summand: a hop that stays would make a walk shorter than it looks.
            summands = 1 + permutation(config.num_entities - 1, config.seed, _RELATIONS)
            summands = np.sort(summands[: config.num_relations]).astype(np.int64)
            self.relations: Int[np.ndarray, "R E"] = (
                entities + summands[:, None]
            ) % config.num_entities
        elif config.permutations:
            rows = [
                permutation(config.num_entities, config.seed, _RELATIONS, r)
                for r in range(config.num_relations)
            ]
            self.relations = np.stack(rows).astype(np.int64)
        else:
            draws = _draw(np.arange(shape[0] * shape[1]), config.seed, _RELATIONS).reshape(shape)
            self.relations = (draws % np.uint64(config.num_entities)).astype(np.int64)

    @property
    def vocab_size(self) -> int:
        """Number of entities plus number of relations."""
        return self.config.num_entities + self.config.num_relations

    def num_walks(self, num_hops: int) -> int:
        """Number of different walks of `num_hops` hops."""
        return self.config.num_entities * int(self.config.num_relations) ** num_hops

    def holds_out(self, num_hops: int) -> bool:
        """Whether some walks of `num_hops` hops are held out."""
        enough = num_hops > 1 and self.num_walks(num_hops) >= _MIN_WALKS_TO_HOLD_OUT
        return enough and self.config.held_out_fraction > 0

    def entities_along(self, walks: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Entity at each token: the start, then the one reached by each hop; the last answers."""
        reached = np.empty_like(walks)
        reached[:, 0] = walks[:, 0]
        for hop in range(1, walks.shape[1]):
            relation = walks[:, hop] - self.config.num_entities
            reached[:, hop] = self.relations[relation, reached[:, hop - 1]]
        return reached

    def is_held_out(self, walks: Int[np.ndarray, "B T"]) -> Bool[np.ndarray, " B"]:
        """Which walks are held out from training."""
        if not self.holds_out(walks.shape[1] - 1):
            return np.zeros(len(walks), dtype=bool)
        return self._keys(walks, _HELD_OUT) < threshold(self.config.held_out_fraction)

    def sample_batch(
        self, step: int, num_hops: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Batch:
        """Rows `rank::world_size` of the global training batch of `step`: a pure function of it.

        Walks are drawn uniformly from those that are not held out; any positive `num_hops` will do.

        Raises:
            ValueError: A number is out of range.
        """
        _check_sizes(num_hops, batch_size)
        if step < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"step={step}, rank={rank} of world_size={world_size}: give step >= 0 and "
                f"0 <= rank < world_size"
            )
        rows = np.arange(rank, batch_size, world_size, dtype=np.int64)
        walks = self._draw_walks(rows, num_hops, 0, _TRAIN, step)
        attempt = 0
        while (rejected := self.is_held_out(walks)).any():
            attempt += 1
            walks[rejected] = self._draw_walks(rows[rejected], num_hops, attempt, _TRAIN, step)
        return self._to_batch(walks)

    def held_out_batch(self, num_hops: int, size: int, seed: int = 0) -> Batch:
        """`size` held-out walks, with replacement; training walks if none is held out.

        Raises:
            ValueError: A number is out of range.
        """
        _check_sizes(num_hops, size)
        rows = np.arange(size, dtype=np.int64)
        walks = self._draw_walks(rows, num_hops, 0, _EVAL, seed)
        attempt = 0
        while self.holds_out(num_hops) and (rejected := ~self.is_held_out(walks)).any():
            attempt += 1
            walks[rejected] = self._draw_walks(rows[rejected], num_hops, attempt, _EVAL, seed)
        return self._to_batch(walks)

    def positions(self, walks: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The tokens' positions, a function of the walk.

        Source: randomised positions of Ruoss et al. 2023 (arXiv 2305.16843), section 3.

        Raises:
            ValueError: There are more tokens than positions.
        """
        length, most = walks.shape[1], self.config.position_range
        if most is None:
            return np.tile(np.arange(length), (len(walks), 1))
        if length > most:
            raise ValueError(f"{length} tokens need a position_range of as many; it is {most}")
        keys = self._keys(walks, _POSITIONS)
        order = np.argsort(mix(keys[:, None] ^ np.arange(most, dtype=np.uint64), _POSITIONS))
        return np.sort(order[:, :length], axis=1)

    def with_passed_targets(self, batch: Batch) -> Batch:
        """The same walks with a target at every token: the entity that the walk has reached."""
        passed = torch.from_numpy(self.entities_along(batch.tokens.numpy()))
        return replace(batch, targets=passed)

    def _keys(self, walks: Int[np.ndarray, "B T"], stream: int) -> UInt64[np.ndarray, " B"]:
        """A hash of each walk."""
        keys = _draw(walks[:, 0], self.config.seed, stream)
        for column in walks[:, 1:].T:
            keys = mix(keys ^ column.astype(np.uint64), stream)
        return keys

    def leak_baselines(self, num_hops: int) -> dict[str, float]:
        """Accuracy, on walks of `num_hops` hops, of guessers that do not follow the walk.

        chance: a uniform guess. majority: the most frequent answer. last_token: the most frequent
        answer given the last relation. suffix_only: the most frequent answer given all relations
        but not the start. With permutations all four are exactly 1 / E; a task where one is higher
        does not test depth. All values are exact, except that suffix_only averages 4,096 sampled
        sequences of relations where there are more.

        Raises:
            ValueError: `num_hops` is below 1.
        """
        _check_sizes(num_hops, 1)
        num_entities, num_relations = self.config.num_entities, self.config.num_relations
        reached = np.full(num_entities, 1.0 / num_entities)
        for _ in range(num_hops):
            # by_relation[r, y]: probability of being at entity y after a hop along relation r
            by_relation = np.stack(
                [np.bincount(f, weights=reached, minlength=num_entities) for f in self.relations]
            )
            reached = by_relation.mean(axis=0)
        words = self._relation_words(num_hops)
        ends = np.tile(np.arange(num_entities), (len(words), 1))
        for column in words.T:
            ends = self.relations[column[:, None], ends]
        cells = (np.arange(len(words))[:, None] * num_entities + ends).ravel()
        counts = np.bincount(cells, minlength=len(words) * num_entities)
        commonest = counts.reshape(len(words), num_entities).max(axis=1)
        return {
            "chance": 1.0 / num_entities,
            "majority": float(reached.max()),
            "last_token": float(by_relation.max(axis=1).sum() / num_relations),
            "suffix_only": float(commonest.mean() / num_entities),
        }

    def _relation_words(self, num_hops: int) -> Int[np.ndarray, "W L"]:
        num_relations = self.config.num_relations
        if num_relations**num_hops <= _MAX_ENUMERATED_WORDS:
            return np.indices((num_relations,) * num_hops).reshape(num_hops, -1).T
        cells = np.arange(_MAX_ENUMERATED_WORDS * num_hops).reshape(-1, num_hops)
        draws = _draw(cells, self.config.seed, _WORDS)
        return (draws % np.uint64(num_relations)).astype(np.int64)

    def _draw_walks(
        self, rows: Int[np.ndarray, " B"], num_hops: int, attempt: int, stream: int, step: int
    ) -> Int[np.ndarray, "B T"]:
        columns = np.arange(num_hops + 1)
        cells = rows[:, None] * (num_hops + 1) + columns
        draws = _draw(cells, self.config.seed, stream, step, num_hops, attempt)
        start = draws[:, :1] % np.uint64(self.config.num_entities)
        relations = draws[:, 1:] % np.uint64(self.config.num_relations)
        relations = relations + np.uint64(self.config.num_entities)
        return np.concatenate([start, relations], axis=1).astype(np.int64)

    def _to_batch(self, walks: Int[np.ndarray, "B T"]) -> Batch:
        passed = self.entities_along(walks)[:, 1:]
        passed = passed if self.config.written_out else passed[:, -1:]
        tokens = torch.from_numpy(np.concatenate([walks, passed[:, :-1]], axis=1))
        targets = torch.full_like(tokens, IGNORED_TARGET)
        targets[:, walks.shape[1] - 1 :] = torch.from_numpy(passed)
        positions = self.positions(walks)
        positions = np.concatenate([positions, positions[:, 1 : passed.shape[1]]], axis=1)
        return Batch(
            tokens=tokens,
            targets=targets,
            documents=torch.zeros_like(tokens),
            positions=torch.from_numpy(positions),
            num_bytes=0,
        )

    def save(self, folder: Path) -> None:
        """Write the settings into a checkpoint's folder; ``read_walks`` reads them."""
        write_json(folder / WALKS_FILE, to_dict(self.config))


def read_walks(folder: Path) -> Walks | None:
    """The walks that a checkpoint was trained on, as its folder says; None if it does not say.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / WALKS_FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        require(isinstance(stored, dict), "the content", type(stored).__name__, "an object")
        return Walks(from_dict(HopsConfig, stored))
    except ValueError as error:  # of JSON, of UTF-8 or of a field
        raise ValueError(f"{path} does not describe walks: {error}") from None


@dataclass
class Curriculum:
    """Trains up to `stage` hops; one hop more when held-out accuracy reaches the threshold.

    Attributes:
        max_stage: The last stage, `HopsConfig.max_train_hops`.
        stage: The most hops that are trained now.
        threshold: Held-out accuracy on walks of `stage` hops at which the next stage begins.
        mixed: Whether shorter walks than those of `stage` hops are trained, too.
    """

    max_stage: int
    stage: int = 1
    threshold: float = 0.95
    mixed: bool = True

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        if not 1 <= self.stage <= self.max_stage:
            raise ValueError(
                f"stage={self.stage}, max_stage={self.max_stage}: give 1 <= stage <= max_stage"
            )

    def choose_hops(self, seed: int, step: int) -> int:
        """Hops of the batch of `step`: `stage`, or in a third of the mixed steps an earlier one."""
        choice, earlier = _draw(np.arange(2), seed, _CHOICE, step).tolist()
        num_earlier = self.stage - 1
        if num_earlier == 0 or not self.mixed or choice % 3 < 2:
            return self.stage
        return 1 + int(earlier % num_earlier)

    def observe(self, accuracy: float) -> bool:
        """Report the held-out accuracy at `stage`; returns whether the next stage begins."""
        passed = accuracy >= self.threshold and self.stage < self.max_stage
        self.stage += passed
        return passed

    def state_dict(self) -> dict[str, Any]:
        """The JSON-ready state that a checkpoint keeps."""
        return {"stage": self.stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: The stage is outside this curriculum.
        """
        stage = state.get("stage")
        if not isinstance(stage, int) or not 1 <= stage <= self.max_stage:
            raise ValueError(
                f"stage={stage} is not in this curriculum: stages go from 1 to {self.max_stage}"
            )
        self.stage = stage


def _check_sizes(num_hops: int, size: int) -> None:
    if num_hops < 1 or size < 1:
        raise ValueError(f"num_hops={num_hops}, size={size}: give at least 1 of each")


def _draw(values: Int[np.ndarray, "..."], *seeds: int) -> UInt64[np.ndarray, "..."]:
    draws = values.astype(np.uint64)
    for seed in seeds:
        draws = mix(draws, seed)
    return draws
