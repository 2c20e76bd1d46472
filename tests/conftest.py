"""What every test shares: checked shapes, one thread, fixed seeds, the golden folders."""

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where transformers copies the code of exports. One folder for all tests of a process, because
# Python looks for code where it found the first; its own, because each process writes there.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="openmythos-modules-")
os.environ["OPENMYTHOS_KERNELS"] = "ours"  # which product is faster here must not decide a test

import hypothesis
import numpy as np
import pytest
import torch

from tests.checked import check

# Must come before the first import of the package: every annotation in it, shapes included, is then
# checked at every call, arguments and results. Keep this module free of `import openmythos`.
check("openmythos")

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
torch.set_num_threads(1)

hypothesis.settings.register_profile("openmythos", deadline=None, derandomize=True)
# Random examples, and more of them: make test ARGS="--hypothesis-profile=explore"
hypothesis.settings.register_profile("explore", deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("openmythos")

GOLDEN_ROOT = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that at the end no process waits long for another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Tests pass explicit generators; this makes one that forgets fail the same way every time."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture
def compiler() -> None:
    """For tests of what is compiled here; where a compiler exists, it must do its work."""
    names = (os.environ.get("CXX"), "c++", "g++")
    if not any(shutil.which(name) for name in names if name):
        pytest.skip("no C++ compiler here: install g++ or set CXX")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What other tests compiled, or torch gave up to compile, decides nothing here."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def repo_root() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture
def golden_dir() -> Callable[[str], Path]:
    """``golden_dir("openmythos-mla")``: config.json, model.safetensors and io.safetensors.

    A family that has no copy in tests/golden is looked for under $OPENMYTHOS_GOLDENS.
    """

    def find(name: str) -> Path:
        if (GOLDEN_ROOT / name).is_dir():
            return GOLDEN_ROOT / name
        elsewhere = os.environ.get("OPENMYTHOS_GOLDENS")
        if elsewhere is None:
            pytest.skip(
                f"no golden folder {name!r} in tests/golden; set OPENMYTHOS_GOLDENS to its parent"
            )
        if not (Path(elsewhere) / name).is_dir():
            pytest.fail(f"OPENMYTHOS_GOLDENS={elsewhere} holds no folder {name!r}")
        return Path(elsewhere) / name

    return find
