"""One process owns every matrix; ``ranks_expert`` has the exchange between ranks."""

import torch

from openmythos.train.owner import axes_of, by_owner
from tests.strategies import seeded


def test_alone_a_function_is_called_on_the_matrices_themselves() -> None:
    matrices = torch.randn(3, 4, 5, generator=seeded())
    assert axes_of(torch.nn.Parameter(matrices)) == ()
    assert torch.equal(by_owner(torch.neg, matrices, ()), -matrices)


def test_a_rank_without_matrices_has_nothing_to_do() -> None:
    none = torch.empty(0, 4, 5)
    assert by_owner(lambda _: torch.full((1,), 1 / 0), none, ()) is none
