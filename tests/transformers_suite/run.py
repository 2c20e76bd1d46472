"""transformers' own model tests on every kind of export, one kind after the other.

    make test-transformers               or   make test-transformers ARGS="--only Dense"

The tests come with the source distribution of the installed transformers, in ``--tests``. It leaves
out three modules that they import: stand-ins are written for those, so tests of generation and of
exporters run only where the distribution holds them as well. Exits with 0 if what fails is what
``FOREIGN`` lists. Not part of the test suite: a kind takes minutes.
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
# Failures that are not ours, by kind and test, with their reason.
BY_IDS = "its value embeddings look ids up: embeddings in their place are refused"
FOREIGN: dict[str, dict[str, str]] = {
    "Parcae": {"test_inputs_embeds": BY_IDS, "test_inputs_embeds_matches_input_ids": BY_IDS},
}


def prepare(tests: Path) -> None:
    """Put the tests of an unpacked distribution where ``kinds`` finds them."""
    (unpacked,) = tests.glob("transformers-*/tests")
    package = tests / PACKAGE
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(unpacked, package)
    for name, text in STAND_INS.items():
        if not (package / name).exists():
            (package / name).parent.mkdir(exist_ok=True)
            (package / name).write_text(text, encoding="utf-8")


def run(kind: str, tests: Path, rest: list[str]) -> dict[str, str]:
    """Per test of one kind: "passed", "failed" or "skipped"."""
    report = tests / f"{kind}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", "."]
    command += [f"{HERE / 'kinds.py'}::Test{kind}", f"--junitxml={report}", *rest]
    paths = os.pathsep.join([str(tests.resolve()), "."])
    modules = str((tests / "modules").resolve())
    environment = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
    with (tests / f"{kind}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, env=os.environ | environment, stdout=log, stderr=log, check=False)
    if not report.exists():
        raise SystemExit(f"error: no result for {kind}; see {tests / kind}.log")
    outcomes: dict[str, str] = {}
    # Parts of a test have rows of their own.
    for case in ElementTree.parse(report).iter("testcase"):
        found = {child.tag for child in case}
        outcome = "failed" if found & {"failure", "error"} else "skipped" if found else "passed"
        name = case.get("name", "").split(" ")[0]
        rank = ("passed", "skipped", "failed")
        outcomes[name] = max(outcome, outcomes.get(name, "passed"), key=rank.index)
    return outcomes


def judge(kind: str, outcomes: dict[str, str]) -> list[str]:
    """A line per failure that is ours, and per entry of ``FOREIGN`` that no longer fails."""
    foreign = FOREIGN.get(kind, {})
    failed = {name for name, outcome in outcomes.items() if outcome == "failed"}
    stale = {name for name in foreign if outcomes.get(name, "failed") != "failed"}
    ours = [f"{name}: FAILED" for name in sorted(failed - foreign.keys())]
    return ours + [f"{name}: {outcomes[name]}, strike it from FOREIGN" for name in sorted(stale)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, default=Path(".transformers-tests"))
    parser.add_argument("--only", choices=KINDS, help="one of the kinds")
    arguments, rest = parser.parse_known_args()
    prepare(arguments.tests)
    print(f"{'kind':40}  passed  failed  skipped", flush=True)
    wrong = 0
    for kind in [arguments.only] if arguments.only else KINDS:
        outcomes = run(kind, arguments.tests, rest)
        found = list(outcomes.values())
        passed, failed, skipped = (found.count(x) for x in ("passed", "failed", "skipped"))
        print(f"{kind:40}  {passed:6}  {failed:6}  {skipped:7}")
        faults = judge(kind, outcomes)
        known = FOREIGN.get(kind, {}).items()
        for line in [*faults, *(f"{name}: {reason}" for name, reason in known if name in outcomes)]:
            print(f"  {line}", flush=True)
        wrong += len(faults)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
