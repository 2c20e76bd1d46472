from openmythos.config import CopyInitConfig, NormalInitConfig, ZerosInitConfig
from openmythos.config.schema import to_dict


def test_kinds() -> None:
    assert to_dict(NormalInitConfig(std=0.5)) == {"kind": "normal", "std": 0.5}
    assert [part.kind for part in (ZerosInitConfig, CopyInitConfig)] == ["zeros", "copy"]
    assert [part.copies_e for part in (ZerosInitConfig, CopyInitConfig)] == [False, True]
