from openmythos.config.weights import Weights, matrix, table, vector


def test_the_pieces():
    assert matrix(3, 5) == Weights(params=15, active=15, macs=15)
    assert vector(5) == Weights(params=5, active=5, macs=0)
    assert table(7, 5) == Weights(params=35, active=5, macs=0)


def test_they_add_and_multiply():
    assert matrix(2, 3) + table(4, 5) == Weights(params=26, active=11, macs=6)
    assert table(4, 5) * 3 == Weights(params=60, active=15, macs=0)
    assert sum([vector(2), vector(3)], Weights()) == vector(5)
