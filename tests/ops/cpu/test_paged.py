import pytest
import torch
from torch import Tensor

from openmythos.ops.cpu import build, choice, paged
from openmythos.ops.paged import fill_pages, paged_attention, paged_attention_reference
from tests.strategies import seeded, unchecked


@pytest.fixture
def kernel(compiler: None) -> None:
    assert paged.load()


def case(
    lengths: list[int], heads: int, groups: int, widths: tuple[int, ...], page: int
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor, float]:
    """Scattered pages; NaN where nothing is stored, and no page's number past a row's length."""
    generator = seeded(sum(lengths))
    per_row = -(-max(lengths) // page)
    order = torch.randperm(len(lengths) * per_row, generator=generator)
    table = order.view(len(lengths), per_row)
    pools = tuple(torch.full((table.numel(), page, groups, width), torch.nan) for width in widths)
    for row, length in enumerate(lengths):
        for token in range(length):
            for pool in pools:
                values = torch.randn(pool.shape[2:], generator=generator)
                pool[table[row, token // page], token % page] = values
        table[row, -(-length // page) :] = 10**9
    q = torch.randn(len(lengths), heads, widths[0], generator=generator)
    return q, pools, table, torch.tensor(lengths), widths[0] ** -0.5


def reference(case: tuple, **options: int) -> Tensor:
    """In fp64."""
    q, pools, table, length, scale = case
    wide = tuple(pool.double() for pool in pools)
    inside = table.clamp(max=len(pools[0]) - 1)
    return paged_attention(q.double(), wide, inside, length, scale, **options).float()


@pytest.mark.parametrize("page", [1, 3, 16])
@pytest.mark.parametrize(
    ("heads", "groups", "widths"),
    [(4, 2, (32, 32)), (3, 3, (20, 17)), (10, 2, (8, 64)), (1, 1, (5, 3)), (8, 1, (40,))],
)
def test_kernel_equals_the_reference(kernel, heads, groups, widths, page) -> None:
    """Up to and across the borders of pages and vectors; latents serve as keys and values."""
    given = case([1, 2, 15, 16, 17, 50], heads, groups, widths, page)
    torch.testing.assert_close(paged_attention(*given, native=True), reference(given))


@pytest.mark.parametrize("v_dim", [1, 16, 33, 40])
def test_values_may_be_the_first_channels(kernel, v_dim: int) -> None:
    given = case([5, 20], 6, 1, (40,), 4)
    y = paged_attention(*given, native=True, v_dim=v_dim)
    assert y.shape == (2, 6, v_dim)
    torch.testing.assert_close(y, reference(given, v_dim=v_dim))


def test_large_scores_stay_finite(kernel) -> None:
    q, pools, table, length, scale = case([9, 30], 4, 2, (16, 16), 8)
    given = (300 * q, pools, table, length, scale)
    torch.testing.assert_close(paged_attention(*given, native=True), reference(given))


def test_a_row_is_bitwise_the_same_in_any_company_and_with_any_threads(kernel) -> None:
    q, pools, table, length, scale = case([17, 40, 3, 64], 8, 2, (24, 40), 16)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(paged_attention(q, pools, table, length, scale, native=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    for row in range(4):
        part = slice(row, row + 1)
        width = -(-int(length[row]) // 16)
        alone = paged_attention(
            q[part], pools, table[part, :width].contiguous(), length[part], scale, native=True
        )
        assert torch.equal(alone, found[0][part])


def test_no_rows(kernel) -> None:
    q, pools, table, length, scale = case([2], 2, 1, (8, 8), 4)
    y = paged_attention(q[:0], pools, table[:0], length[:0], scale, native=True)
    assert y.shape == (0, 2, 8)


def test_compiled_it_is_one_node(kernel) -> None:
    given = case([5, 9], 4, 2, (16, 8), 4)
    run = torch.compile(lambda *args: paged_attention(*args, native=True) + 1, fullgraph=True)
    with unchecked():
        torch.testing.assert_close(run(*given), reference(given) + 1)


def test_it_is_chosen_by_a_race_once(kernel, tmp_path, monkeypatch) -> None:
    pools = case([4], 4, 2, (16, 8), 4)[1]
    monkeypatch.setenv(choice.VARIABLE, "measure")
    monkeypatch.setattr(choice, "timings_file", lambda threads: tmp_path / "timings.json")
    races = []
    for ours, theirs in ((1.0, 2.0), (2.0, 1.0)):
        timing = choice.Timing(ours, theirs)
        monkeypatch.setattr(paged, "race", lambda *a, t=timing, **k: races.append(a) or t)
        assert paged.beats_gather(pools, 4)  # the second time it is remembered
    assert len(races) == 1
    ours, theirs, _ = races[0]
    torch.testing.assert_close(ours()[0], theirs()[0])
    assert not paged.beats_gather(pools, 8)  # another shape, another race
    (stored,) = [
        name for name in choice.read_timings(tmp_path / "timings.json") if "4 heads" in name
    ]
    assert stored == "attention to pages of 4 tokens, 4 heads on 2 of 16 and 8"


def test_other_numbers_and_devices_are_gathered(kernel, monkeypatch) -> None:
    pools = case([4], 4, 2, (16, 8), 4)[1]
    assert paged.takes(pools) and not paged.takes(tuple(pool.double() for pool in pools))
    assert not paged.beats_gather(tuple(pool.double() for pool in pools), 4)
    assert not paged.beats_gather(tuple(pool.to("meta") for pool in pools), 4)
    monkeypatch.setenv(build.OFF, "paged")
    assert not paged.beats_gather(pools, 4)
    assert paged_attention_reference(*case([4], 4, 2, (16, 8), 4)).shape == (1, 4, 8)


@pytest.mark.parametrize("layers", [1, 2])
def test_slots_are_filled_as_by_the_reference(kernel, layers: int) -> None:
    """Tokens that need no copy, one, and several; nothing else changes."""
    pages, slots, first = 3, 4, 1
    pool = torch.randn((first + slots * layers + 1) * pages, 2, 2, 5, generator=seeded())
    tokens = torch.tensor([[1, 0, 0, 3], [2, 1, 2, 3], [2, 0, 3, 3], [0, 1, 1, 2]])
    filled, wanted = pool.clone(), pool.clone()
    fill_pages(filled, tokens, first, layers, pages, native=True)
    fill_pages(wanted, tokens, first, layers, pages)
    assert torch.equal(filled, wanted)
    assert int((filled != pool).any(dim=(2, 3)).sum()) == layers * (3 + 1 + 0 + 1)
    for layer in range(layers):
        kept = wanted.view(-1, pages, 2, 2, 5)[first + layer :: layers][:slots, 1, 0]
        assert torch.equal(kept, kept[:1].expand_as(kept))


@pytest.mark.parametrize("token", [[3, 0, 0, 1], [0, 2, 0, 1], [0, 0, -1, 1], [0, 0, 0, 4]])
def test_slots_that_do_not_exist_are_not_filled(kernel, token: list[int]) -> None:
    pool = torch.zeros(12, 2, 1, 4)
    with pytest.raises(RuntimeError, match="that the pool does not have"):
        fill_pages(pool, torch.tensor([token]), 0, 1, 3, native=True)
