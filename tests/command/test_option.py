import pytest
import torch

from openmythos.command.option import check_device, parse_dtype, parse_loops


def test_parse_loops() -> None:
    assert parse_loops("1,2,16") == (1, 2, 16)
    assert parse_loops(" 3 ") == (3,)
    for text in ("", "0", "1,-2", "1,,2", "x", "1.5"):
        with pytest.raises(ValueError, match=f"--num-loops is {text!r}; give positive"):
            parse_loops(text)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("cpu") == "cpu"
    for device in ("gpu", "cuda:x", "", "meta"):
        with pytest.raises(
            ValueError, match=f"--device is {device!r}; give cpu, cuda, cuda:N or mps"
        ):
            check_device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="this machine has 0 of cuda"):
        check_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda") == "cuda"
    assert check_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="'cuda:2', but this machine has 2 of cuda"):
        check_device("cuda:2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="this machine has 0 of mps"):
        check_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert check_device("mps") == "mps"


def test_dtypes_are_torchs() -> None:
    assert parse_dtype(None) is None
    assert parse_dtype("bfloat16") is torch.bfloat16
