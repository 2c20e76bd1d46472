import sys

import pytest

from openmythos.analysis import picture as style


def test_missing_matplotlib_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r'pip install "openmythos\[plot\]"') as caught:
        style.require_matplotlib()
    assert "\n" not in str(caught.value)
