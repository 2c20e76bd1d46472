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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt64

from openmythos.config.schema import as_seed, to_dict
from openmythos.data.hashing import mix, permutation, threshold
from openmythos.data.packing import IGNORED_TARGET, Batch
from openmythos.data.puzzle import (
    ALONE,
    CHOICE,
    GUESS,
    POSITIONS,
    TABLE,
    Puzzle,
    below,
    draw,
    last_only,
)

_MAX_ENUMERATED_WORDS = 4096


@dataclass(frozen=True, kw_only=True)
class HopsConfig:
    """Settings of the hops task.

    Attributes:
        num_entities: Entities E; chance is 1 / E.
        num_relations: Relations R.
        max_train_hops: Most hops in training.
        held_out_fraction: Fraction of the walks of each hop count that training never samples.
        held_out_facts: Fraction of the facts (where a relation leads from an entity) that training
            shows alone only, as walks of one hop. Longer walks over such facts only are held out;
            those over facts of both kinds do not occur.
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

    kind: ClassVar[str] = "hops"
    num_entities: int = 16
    num_relations: int = 4
    max_train_hops: int = 8
    held_out_fraction: float = 0.1
    held_out_facts: float = 0.0
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
        for name in ("held_out_fraction", "held_out_facts"):
            share = getattr(self, name)
            if not 0.0 <= share <= 0.5:
                raise ValueError(f"{name} is {share}; it must be 0 to 0.5, training needs the rest")


class Walks(Puzzle):
    """Batches, held-out walks and leak baselines of one `HopsConfig`; a size is a number of hops.

    Nothing is held out for one hop: a relation that was never shown cannot be known.

    Attributes:
        config: The settings.
        relations: The entity that each relation leads to from each entity.
        alone: Which of these facts training shows alone only.
    """

    kind, noun, size_word = "hops", "walk", "hops"

    def __init__(self, config: HopsConfig) -> None:
        super().__init__(config.held_out_fraction, config.seed)
        self.config = config
        shape = (config.num_relations, config.num_entities)
        if config.shifts:
            entities = np.arange(config.num_entities)
            # 0 is no summand: a hop that stays would make a walk shorter than it looks.
            summands = 1 + permutation(config.num_entities - 1, config.seed, TABLE)
            summands = np.sort(summands[: config.num_relations]).astype(np.int64)
            self.relations: Int[np.ndarray, "R E"] = (
                entities + summands[:, None]
            ) % config.num_entities
        elif config.permutations:
            rows = [
                permutation(config.num_entities, config.seed, TABLE, r)
                for r in range(config.num_relations)
            ]
            self.relations = np.stack(rows).astype(np.int64)
        else:
            draws = draw(np.arange(shape[0] * shape[1]), config.seed, TABLE).reshape(shape)
            self.relations = below(draws, config.num_entities)
        facts = draw(np.arange(shape[0] * shape[1]), config.seed, ALONE).reshape(shape)
        self.alone: Bool[np.ndarray, "R E"] = facts < threshold(config.held_out_facts)

    @property
    def settings(self) -> dict[str, Any]:
        """See ``Puzzle``."""
        return to_dict(self.config)

    @property
    def words(self) -> Sequence[str]:
        """See ``Puzzle``."""
        entities = [f"e{number}" for number in range(self.config.num_entities)]
        return [*entities, *(f"r{number}" for number in range(self.config.num_relations))]

    @property
    def form(self) -> str:
        """See ``Puzzle``."""
        entities, relations = self.config.num_entities, self.config.num_relations
        return (
            f"a walk is a start, e0 to e{entities - 1}, and relations, r0 to r{relations - 1}, "
            f"such as e{min(3, entities - 1)} r{min(1, relations - 1)} r0"
        )

    @property
    def explained(self) -> str:
        """See ``Puzzle``."""
        return (
            "A walk names where it starts and which relations to follow from there; the answer is "
            "where it ends."
        )

    def places(self, size: int) -> Sequence[str | None]:
        """See ``Puzzle``."""
        return ["start", *(f"relation {hop}" for hop in range(1, size + 1))]

    @property
    def kinds(self) -> Sequence[int]:
        """Entities and relations."""
        return self.config.num_entities, self.config.num_relations

    @property
    def max_train_size(self) -> int:
        """See ``Puzzle``."""
        return self.config.max_train_hops

    def question_len(self, size: int) -> int:
        """The start and the relations."""
        return size + 1

    def answer_len(self, question_len: int) -> int:
        """One, or all entities that are passed if walks are written out."""
        return question_len - 1 if self.config.written_out else 1

    def num_examples(self, size: int) -> int:
        """Number of different walks of `size` hops."""
        return self.config.num_entities * int(self.config.num_relations) ** size

    def holds_out(self, size: int) -> bool:
        """See ``Puzzle``."""
        return size > 1 and super().holds_out(size)

    def is_held_out(self, questions: Int[np.ndarray, "B T"], size: int) -> Bool[np.ndarray, " B"]:
        """See ``Puzzle``."""
        held_out = super().is_held_out(questions, size)
        if size > 1 and self.alone.any():
            held_out |= self.num_alone(questions) == size
        return held_out

    def possible(self, tokens: Int[np.ndarray, "B T"]) -> Bool[np.ndarray, " B"]:
        """Walks over facts of one kind."""
        walks = self._walks(tokens)
        hops = walks.shape[1] - 1
        if hops < 2 or not self.alone.any():
            return super().possible(tokens)
        return np.isin(self.num_alone(walks), (0, hops))

    def num_alone(self, walks: Int[np.ndarray, "B T"]) -> Int[np.ndarray, " B"]:
        """How many of a walk's facts training shows alone only."""
        passed = self.entities_along(walks)[:, :-1]
        return self.alone[walks[:, 1:] - self.config.num_entities, passed].sum(axis=1)

    def num_draws(self, size: int) -> int:
        """See ``Puzzle``."""
        return size + 1

    def write(self, draws: UInt64[np.ndarray, "B N"], size: int) -> Int[np.ndarray, "B T"]:
        """See ``Puzzle``."""
        start = below(draws[:, :1], self.config.num_entities)
        relations = below(draws[:, 1:], self.config.num_relations) + self.config.num_entities
        walks = np.concatenate([start, relations], axis=1)
        said = self.entities_along(walks)[:, 1:-1] if self.config.written_out else walks[:, :0]
        return np.concatenate([walks, said], axis=1)

    def targets(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """See ``Puzzle``."""
        reached = self.entities_along(self._walks(tokens))
        if not self.config.written_out:
            return last_only(tokens, reached[:, -1])
        targets = np.full_like(tokens, IGNORED_TARGET)
        targets[:, reached.shape[1] - 1 :] = reached[:, 1:]
        return targets

    def entities_along(self, walks: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Entity at each token: the start, then the one reached by each hop; the last answers."""
        reached = np.empty_like(walks)
        reached[:, 0] = walks[:, 0]
        for hop in range(1, walks.shape[1]):
            relation = walks[:, hop] - self.config.num_entities
            reached[:, hop] = self.relations[relation, reached[:, hop - 1]]
        return reached

    def on_the_way(self, questions: Int[np.ndarray, "B T"]) -> dict[str, Int[np.ndarray, " B"]]:
        """The entities that a walk passes."""
        along = self.entities_along(questions).T
        return {f"entity after hop {hop}": along[hop] for hop in range(1, len(along) - 1)}

    def positions(self, walks: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The positions of the tokens of walks that are not written out, a function of the walk.

        Source: randomised positions of Ruoss et al. 2023 (arXiv 2305.16843), section 3.

        Raises:
            ValueError: There are more tokens than positions.
        """
        length, most = walks.shape[1], self.config.position_range
        if most is None:
            return np.tile(np.arange(length), (len(walks), 1))
        if length > most:
            raise ValueError(f"{length} tokens need a position_range of as many; it is {most}")
        keys = self.hashes(walks, POSITIONS)
        order = np.argsort(mix(keys[:, None] ^ np.arange(most, dtype=np.uint64), POSITIONS))
        return np.sort(order[:, :length], axis=1)

    def token_positions(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """See ``Puzzle``; an entity that is written out has the position of its relation."""
        walks = self._walks(tokens)
        positions, written = self.positions(walks), tokens.shape[1] - walks.shape[1]
        return np.concatenate([positions, positions[:, 1 : 1 + written]], axis=1)

    def with_passed_targets(self, batch: Batch) -> Batch:
        """The same walks with a target at every token: the entity that the walk has reached."""
        passed = torch.from_numpy(self.entities_along(batch.tokens.numpy()))
        return replace(batch, targets=passed)

    def _walks(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B W"]:
        """The questions, without what is written out after them."""
        return tokens[:, : tokens.shape[1] // 2 + 1] if self.config.written_out else tokens

    def leak_baselines(self, size: int) -> dict[str, float]:
        """See ``Puzzle``; suffix_only sees all relations but not the start.

        With permutations all four are exactly 1 / E. All values are exact, except that suffix_only
        averages 4,096 sampled sequences of relations where there are more.
        """
        self.check(size)
        num_entities, num_relations = self.config.num_entities, self.config.num_relations
        reached = np.full(num_entities, 1.0 / num_entities)
        for _ in range(size):
            # by_relation[r, y]: probability of being at entity y after a hop along relation r
            by_relation = np.stack(
                [np.bincount(f, weights=reached, minlength=num_entities) for f in self.relations]
            )
            reached = by_relation.mean(axis=0)
        words = self._relation_words(size)
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
        return below(draw(cells, self.config.seed, GUESS), num_relations)


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
        choice, earlier = draw(np.arange(2), seed, CHOICE, step).tolist()
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
