"""The import layers: the contracts in pyproject.toml hold, and each of them is able to fail."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINT_IMPORTS = Path(sys.executable).parent / "lint-imports"


def lint(folder: Path) -> tuple[int, str]:
    command = [str(LINT_IMPORTS), "--no-cache", "--no-logo"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


def broken_contracts(output: str) -> set[str]:
    return set(re.findall(r"^(.+?) BROKEN", output, re.MULTILINE))


def small_package(folder: Path, modules: dict[str, str]) -> Path:
    """A package named openmythos under this repository's contracts."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, text in {"__init__.py": "", **modules}.items():
        path = folder / "openmythos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text, encoding="utf-8")
    return folder


def test_contracts_hold() -> None:
    code, output = lint(ROOT)
    assert code == 0, output


LAYERS = "Imports point down"
PICTURES = "matplotlib only in modules called picture"
TRANSFORMERS = "transformers only in the sources that an export carries"


@pytest.mark.parametrize(
    ("contract", "modules"),
    [
        (LAYERS, {"config.py": "import openmythos.model", "model/block.py": ""}),
        (LAYERS, {"model/block.py": "import openmythos.data.loader", "data/loader.py": ""}),
        (LAYERS, {"train/loop.py": "import openmythos.analysis.trace", "analysis/trace.py": ""}),
        (LAYERS, {"tokenizer.py": "def f():\n    import openmythos.plan", "plan.py": ""}),
        (LAYERS, {"demo/text.py": "import openmythos.command.train", "command/train.py": ""}),
        (LAYERS, {"demo/text.py": "import openmythos.serve.app", "serve/app.py": ""}),
        (LAYERS, {"unplaced.py": ""}),
        (
            "The engine reaches no tokenizer, text, checkpoint, interop or data",
            {"engine/runner.py": "import openmythos.tokenizer", "tokenizer.py": ""},
        ),
        (
            "The engine reaches no tokenizer, text, checkpoint, interop or data",
            {"engine/runner.py": "import openmythos.text_stream", "text_stream.py": ""},
        ),
        (
            "matplotlib only in modules called picture",
            {"analysis/lenses.py": "import matplotlib.pyplot"},
        ),
        ("typer only in commands", {"demo/text.py": "def f():\n    import typer"}),
        ("Web libraries only in serve", {"engine/runner.py": "from fastapi import FastAPI"}),
        (TRANSFORMERS, {"interop/export.py": "def f():\n    import transformers"}),
        (
            "The package imports no experiment, benchmark or test",
            {"model/block.py": "from experiments.depth import run"},
        ),
    ],
)
def test_contract_can_fail(tmp_path: Path, contract: str, modules: dict[str, str]) -> None:
    code, output = lint(small_package(tmp_path, modules))
    assert code != 0
    assert contract in broken_contracts(output), output


def test_contracts_allow_what_they_should(tmp_path: Path) -> None:
    modules = {
        "cli.py": "import typer\nimport openmythos.serve.app\nimport openmythos.command.train",
        "command/train.py": "import typer\nimport openmythos.train.loop",
        "serve/app.py": "import fastapi\nimport openmythos.engine.runner",
        "train/loop.py": "import openmythos.model.block",
        "engine/runner.py": "import openmythos.model.block",
        "interop/hf/layers.py": "import transformers",
        "interop/hf/modeling.py": "from .layers import x\nfrom transformers.utils import y",
        "analysis/picture.py": "import matplotlib.pyplot",
        "model/block.py": "import openmythos.config",
        "config.py": "import openmythos.folder",
        "folder.py": "",
    }
    code, output = lint(small_package(tmp_path, modules))
    assert code == 0, output


# --- torch.distributed: import-linter does not look inside an external package -------------------


def uses_of_torch_distributed(root: Path) -> list[str]:
    """Imports and attribute uses of ``torch.distributed`` outside train/ and checkpoint/."""
    complaints = []
    for path in sorted((root / "openmythos").rglob("*.py")):
        inside = path.relative_to(root / "openmythos")
        if inside.parts[0] in {"train", "checkpoint"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            else:
                continue
            if any(re.match(r"torch\.distributed\b", name) for name in names):
                complaints.append(f"openmythos/{inside}:{node.lineno}")
    return complaints


def test_torch_distributed_only_in_train_and_checkpoint() -> None:
    found = uses_of_torch_distributed(ROOT)
    assert not found, f"torch.distributed belongs in train/ and checkpoint/, found in {found}"


@pytest.mark.parametrize(
    "text",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.checkpoint import save",
        "import torch\nx = torch.distributed.is_initialized()",
    ],
)
def test_use_of_torch_distributed_is_seen(tmp_path: Path, text: str) -> None:
    for name in ("train/parallel.py", "checkpoint/save.py"):
        small_package(tmp_path, {name: text})
    assert uses_of_torch_distributed(tmp_path) == []
    small_package(tmp_path, {"model/block.py": text})
    assert uses_of_torch_distributed(tmp_path) != []
