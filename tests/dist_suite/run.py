"""The wheel as a stranger gets it: ``make test-dist``.

The wheel of ``dist/`` is installed with what it asks for into an environment of its own, in which
there is nothing else, and the first page of the guide is run there: with the system's compiler,
with a compiler that fails, and with none. It downloads torch and takes some minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from docs.page_code import GUIDE, ROOT
from docs.run_guide import run_page

EXTRAS = "plot"  # the page draws a picture
PROGRAMS = ("bash", "uname")  # all that is on the PATH where there is no compiler
ASK = "import openmythos as om; print(om.__version__, om.__file__)"
KERNELS = "import openmythos.ops.cpu.build as build; print(build.find_compiler())"


def install(wheel: Path, environment: Path) -> None:
    """Make the environment if there is none, and put this wheel into it."""
    python = environment / "bin/python"
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pinned = str(ROOT / "constraints/cpu.txt")
        subprocess.run([*pip, "-c", pinned, f"{wheel}[{EXTRAS}]"], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)


def bare_path(folder: Path) -> str:
    """A PATH on which there is no compiler."""
    folder.mkdir(parents=True)
    for name in PROGRAMS:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return str(folder)


def said(python: Path, code: str, folder: Path) -> str:
    """What a line of Python prints, run where nothing of the checkout can be found."""
    ran = subprocess.run(
        [str(python), "-c", code], cwd=folder, check=True, capture_output=True, text=True
    )
    return ran.stdout.strip()


def check(program: Path, folder: Path, name: str, compiled: bool) -> None:
    """Run the first page in a folder and say how long it took.

    Raises:
        SystemExit: A compiler was found where none is, or the other way round.
    """
    place = folder / name
    place.mkdir(parents=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(place / "kernels")
    found = said(program / "python", KERNELS, place)
    if compiled != (found != "None"):
        sys.exit(f"error: {name}: the compiler is {found}")
    start = time.monotonic()
    run_page(GUIDE[0], place, program, place / "log.txt")
    print(f"{name}: {GUIDE[0]} ran in {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Install and check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, default=ROOT / ".dist-environment")
    options = parser.parse_args()
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"error: dist/ holds {len(wheels)} wheels; run: make dist")
    environment, folder = options.environment.resolve(), ROOT / "build/dist-suite"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    install(wheels[0], environment)
    program = environment / "bin"
    version, place = said(program / "python", ASK, folder).split(maxsplit=1)
    print(f"openmythos {version}, from {wheels[0].name}", flush=True)
    if version not in wheels[0].name or not Path(place).is_relative_to(environment):
        sys.exit(f"error: version {version} is imported from {place}")
    os.environ.pop("CXX", None)
    os.environ.pop("PYTHONPATH", None)
    if shutil.which("c++") or shutil.which("g++"):
        check(program, folder, "with the system's compiler", compiled=True)
    os.environ |= {"CC": "/bin/false", "CXX": "/bin/false"}
    check(program, folder, "with a compiler that fails", compiled=True)
    os.environ.pop("CXX")
    os.environ["PATH"] = bare_path(folder / "path")
    check(program, folder, "without a compiler", compiled=False)


if __name__ == "__main__":
    main()
