import re
from dataclasses import replace

import pytest
import torch

from openmythos.analysis.block_state import BlockStates
from openmythos.analysis.depth import DepthCurve
from openmythos.analysis.difference import LoopDifference, loop_difference
from openmythos.analysis.dynamics import Dynamics
from openmythos.analysis.example import CONTROL
from openmythos.analysis.expert import ExpertOverlap
from openmythos.analysis.lens import ANSWER, CHOICE, LensRanks
from openmythos.analysis.operator_difference import OperatorDifference
from openmythos.analysis.reading import ReadingMap
from openmythos.analysis.record import Analysis, Interventions
from openmythos.report.analysis import headline, render_analysis, short_columns
from tests.demo.examples import loop_trace
from tests.report.parser import Page

COLUMNS = ("start", "relation 1", "relation 2")


def reading_of(shares: list[list[float]]) -> ReadingMap:
    """A map with these shares in every one of 20 examples, and a column that nobody reads."""
    generator = torch.Generator().manual_seed(0)
    base = torch.tensor(shares)[..., None].expand(-1, -1, 20) * 4.0
    loss = base + 0.01 * torch.randn(base.shape, generator=generator)
    always = torch.tensor([4.0, 4.0, 0.0])[:, None] + torch.randn(3, 20, generator=generator) * 0.1
    return ReadingMap(
        columns=COLUMNS,
        corrupted_at=loss.double(),
        clean_at=4.0 - loss.double(),
        always=always.double(),
        whole=always.double(),
        counted=torch.ones(3, 20, dtype=torch.bool),
        correct=torch.ones(20, dtype=torch.bool),
    )


def interventions(shares: list[list[float]], shift: float = 0.0) -> Interventions:
    reading, loops = reading_of(shares), len(shares)
    relative = tuple(tuple(shift * (a != b) for b in range(loops)) for a in range(loops))
    return Interventions(
        num_loops=loops,
        reading=reading,
        difference=loop_difference(reading, num_samples=50, num_shuffles=20),
        operators=OperatorDifference(relative=relative),
        novelty=None,
        left_out={"novelty": "it did not <fit>"},
    )


def analysis(*at: Interventions, blocks: int = 2) -> Analysis:
    places = ("input", *(f"block {number + 1}" for number in range(blocks)))
    size = len(places)
    apart = tuple(tuple(0.5 * (a != b) for b in range(size)) for a in range(size))
    rank = tuple(((9.0, 4.0, 1.0),) for _ in range(4))
    return Analysis(
        model="runs/<mine>",
        facts={"parameters": 1_200_000, "layers": [0, blocks, 0], "num_loops": at[-1].num_loops},
        examples="walks of 3 hops",
        depth=DepthCurve(
            trained=at[-1].num_loops,
            of_text=False,
            num_positions=20,
            accuracy=(0.1, *(0.99 for _ in range(3))),
            log_prob=(-2.0, *(-0.1 for _ in range(3))),
        ),
        at=at,
        dynamics=Dynamics(
            trace=loop_trace(4),
            blocks=BlockStates(
                places=places,
                norm=((1.0,) * 4,) * size,
                relative_step=((None, 0.5, 0.2, 0.1),) * size,
                distance=(apart,) * 4,
                net_movement=(None, 0.4, 0.2, 0.1),
            ),
            experts=[
                ExpertOverlap(
                    layer=0,
                    overlap=((1.0, 0.4), (0.4, 1.0)),
                    other_token=((0.3, 0.3), (0.3, 0.3)),
                    chance=0.25,
                )
            ],
        ),
        lenses=[
            LensRanks(
                lens=lens,
                places=("state",),
                targets=(CHOICE, ANSWER, "entity after hop 1", CONTROL),
                rank=rank,
                first=rank,
                num_positions=20,
                vocab_size=16,
            )
            for lens in ("logit", "coda")
        ],
        settings={"num_rows": 20, "seed": 0},
    )


RELAY = interventions([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
EQUAL = interventions([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], shift=0.2)


def test_the_page_is_whole_and_the_map_comes_first() -> None:
    text = render_analysis(analysis(RELAY, EQUAL))
    page = Page(text)
    assert {each for each in page.references if not each.startswith("#")} == {"analysis.json"}
    assert {each[1:] for each in page.references if each.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)) and all(page.labels)
    assert page.labels[0].startswith("Heat map, needed at this loop")
    assert "loop 1 most start (0.99); loop 2 most relation 1 (1.00)" in page.labels[0]
    words = re.sub(r"\s+", " ", " ".join(page.words))
    for said in (
        "At 2 loops, the fewest that are enough (T*)",
        "At 3 loops, the model's own (T)",
        "surplus loops can repair",
        "Novelty was left out: it did not <fit>",
        "no verdict rests on them",
        "independent choices would share 0.25",
        "The map is exactly the same at every loop",
    ):
        assert said in words
    assert "<mine>" not in text and "exactly the same at every loop" in words
    assert "-0.00" not in words and "nan" not in words


def test_a_core_of_one_block_and_one_loop() -> None:
    one = interventions([[1.0, 1.0, 0.0]])
    words = " ".join(Page(render_analysis(analysis(one, blocks=1))).words)
    assert "The core has one block" in words
    assert "One loop is enough" in words


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "Neighbours read different tokens: 1.00 bits"),
        (
            {"mean_bits": 0.06, "mean_interval": (0.05, 0.07), "null": (0.0, 0.01)},
            "Neighbours read slightly different tokens: 0.06 bits",
        ),
        (
            {"mean_bits": 0.2, "mean_interval": (0.1, 0.3), "null": (0.05, 0.2)},
            "show no difference",
        ),
        ({"mean_bits": 0.0, "mean_interval": (0.0, 0.01)}, "read the same tokens: 0.00 bits"),
        ({"mean_bits": None, "mean_interval": None}, "nothing to compare"),
    ],
)
def test_the_headline_says_what_the_interval_allows(changes: dict[str, object], said: str) -> None:
    gap: LoopDifference = replace(RELAY.difference, **changes)
    assert said in headline(analysis(replace(RELAY, difference=gap)))


def test_columns_lose_the_word_that_they_share() -> None:
    assert short_columns(COLUMNS) == (["start", "1", "2"], "the start, then each relation")
    assert short_columns(("factor 1", "factor 2")) == (["1", "2"], "each factor")
    assert short_columns(("hops", "letter 1"))[1] == "the hops, then each letter"
    assert short_columns(("subject",)) == (["subject"], "each word before the last one")
    assert short_columns(("1", "2-3")) == (["1", "2-3"], "tokens before the last one")
