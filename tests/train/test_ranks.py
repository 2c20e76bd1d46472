"""The place of one process. ``test_two_ranks.py`` has the cases of several."""

import pytest
import torch
import torch.distributed as dist

from openmythos.config.parallel import ParallelConfig
from openmythos.train import ranks
from openmythos.train.ranks import Ranks, join


def test_one_process_is_alone() -> None:
    place = join(ParallelConfig())
    assert place == Ranks.alone() and place.first and place.mesh is None
    assert not dist.is_initialized()
    numbers = torch.ones(3)
    assert place.sum(numbers) is numbers
    place.wait()


def test_a_layout_needs_its_processes() -> None:
    with pytest.raises(ValueError, match="there are 1: start it with torchrun"):
        join(ParallelConfig(dp_shard=2))


def test_ranks_that_are_started_again_meet_apart_from_the_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ranks._meeting_place() == {}
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "RANK": 0}
    elastic = {"TORCHELASTIC_RESTART_COUNT": 2, "TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in {**place, **elastic, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert ranks._meeting_place() == {}  # several machines count their own attempts
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = ranks._meeting_place()
    found.pop("store").set("where", "here")
    assert found == {"rank": 0, "world_size": 2} and store.get("attempt-2/where") == b"here"
