from tests.stress.ranks import table_of


def test_the_table_has_a_line_per_arm() -> None:
    found = {"dense": {"loss": 1e-15, "grad_norm": 2e-15, "weights": 3e-16, "rho": 0.0}}
    assert table_of((found, None)) == [
        "| arm | loss | gradient norm | weights |",
        "|---|---|---|---|",
        "| dense | 1e-15 | 2e-15 | 3e-16 |",
        "",
    ]
    assert table_of(()) == []
