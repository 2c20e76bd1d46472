import pytest

from openmythos.command.table import human_bytes, human_count, human_flops


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00K"),
        (9_996, "10.0K"),
        (99_960, "100K"),
        (999_600, "1.00M"),
        (1_064_028_034, "1.06B"),
        (3 * 10**15, "3000T"),
    ],
)
def test_human_count(number: int, text: str) -> None:
    assert human_count(number) == text


def test_human_flops_and_bytes() -> None:
    assert human_flops(12_340_000_000) == "12.3 GFLOP"
    assert human_flops(12) == "12 FLOP"
    assert human_bytes(1229) == "1.20 KiB"
    assert human_bytes(512) == "512 B"
    assert human_bytes(3 * 2**40) == "3.00 TiB"
