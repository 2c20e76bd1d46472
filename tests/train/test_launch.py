"""The launcher of ranks: a failure is reported, and what hangs is killed."""

import time

import torch
import torch.distributed as dist

from tests.train.launch import launch, name_of


def adds() -> float:
    number = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(number)
    return float(number)


def one_rank_raises() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("the odd one")
    dist.barrier()


def hangs() -> None:
    time.sleep(60)


def test_the_first_failure_is_reported() -> None:
    found = launch(2, [adds, one_rank_raises], seconds=60)
    assert found[name_of(adds)].results == (3.0, 3.0)
    assert "the odd one" in (found[name_of(one_rank_raises)].error or "")


def test_a_case_that_hangs_is_killed() -> None:
    error = launch(1, [hangs], seconds=3)[name_of(hangs)].error
    assert error is not None and "no end within 3 s" in error
