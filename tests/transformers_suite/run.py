"""transformers' own model tests on every kind of export, one kind after the other.

    make test-transformers               or   make test-transformers ARGS="--only Dense"

The tests come with the source distribution of the installed transformers, in ``--tests``. It leaves
out three modules that they import: stand-ins are written for those, so tests of generation and of
exporters run only where ``--tests`` holds them as well. Not part of the test suite: a kind takes
minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
PACKAGE = "transformers_tests"  # the name under which ``kinds`` imports them
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "distributed_testing_utils.py": (HERE / "distributed.py").read_text(encoding="utf-8"),
}
KINDS = (
    *("Dense", "Sparse", "Huginn", "Parcae", "Ouro", "Original"),
    *("ActLayerScaleWeightedQkNormNoPositions", "LatentGateWeightLoraLearnedLoops"),
    *("WeightLoraOnQkvSwigluAndSharedExperts", "WeightLoraOnADenseCore"),
)
# Failures that are not ours, by test, with their reason.
FOREIGN: dict[str, str] = {}


def prepare(tests: Path) -> None:
    """Put the tests of an unpacked distribution where ``kinds`` finds them."""
    package = tests / PACKAGE
    if not package.is_dir():
        (unpacked,) = tests.glob("transformers-*/tests")
        shutil.copytree(unpacked, package)
    for name, text in STAND_INS.items():
        if not (package / name).exists():
            (package / name).parent.mkdir(exist_ok=True)
            (package / name).write_text(text, encoding="utf-8")


def run(kind: str, tests: Path, rest: list[str]) -> tuple[dict[str, int], set[str]]:
    """The counts of one kind, and the names of what failed."""
    report = tests / f"{kind}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", "."]
    command += [str(HERE / "kinds.py"), "-k", f"Test{kind}", f"--junitxml={report}", *rest]
    paths = os.pathsep.join([str(tests.resolve()), "."])
    modules = str((tests / "modules").resolve())
    environment = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
    with (tests / f"{kind}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, env=os.environ | environment, stdout=log, stderr=log, check=False)
    if not report.exists():
        raise SystemExit(f"error: no result for {kind}; see {tests / kind}.log")
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(report).iter(
        "testcase"
    ):  # parts of a test have rows of their own
        found = {child.tag for child in case}
        outcome = "failed" if found & {"failure", "error"} else "skipped" if found else "passed"
        name = case.get("name", "").split(" ")[0]
        rank = ("passed", "skipped", "failed")
        outcomes[name] = max(outcome, outcomes.get(name, "passed"), key=rank.index)
    counts = {
        which: list(outcomes.values()).count(which) for which in ("passed", "failed", "skipped")
    }
    return counts, {name for name, outcome in outcomes.items() if outcome == "failed"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, default=Path(".transformers-tests"))
    parser.add_argument("--only", choices=KINDS, help="one of the kinds")
    arguments, rest = parser.parse_known_args()
    prepare(arguments.tests)
    print(f"{'kind':40}  passed  failed  skipped", flush=True)
    ours = 0
    for kind in [arguments.only] if arguments.only else KINDS:
        counts, failed = run(kind, arguments.tests, rest)
        print(f"{kind:40}  {counts['passed']:6}  {counts['failed']:6}  {counts['skipped']:7}")
        for name in sorted(failed):
            print(f"  {name}: {FOREIGN.get(name, 'FAILED')}", flush=True)
        ours += len(failed - FOREIGN.keys())
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
