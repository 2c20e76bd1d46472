"""Whether every page is what the committed results say, and every rule older than its results.

``openmythos reproduce --check`` runs this module.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.board import (
    FRONT,
    SCOREBOARD,
    Finding,
    digest_in,
    first_screen,
    scoreboard,
    section,
    studies,
    with_section,
    write_pages,
    write_scoreboard,
)
from experiments.own_process import ROOT
from experiments.study import Study


def complaints(found: Sequence[Study], root: Path) -> list[str]:
    """What differs, a line each; nothing if all is as it should be."""
    findings, said = [], []
    for study in found:
        try:
            findings.append(Finding(study))
            said += page_complaints(findings[-1])
            said += history_complaints(study)
        except (ValueError, OSError) as error:
            said.append(f"{study.name}: {error}")
    if len(findings) == len(found):
        front = _read(root / FRONT)
        pages = {
            SCOREBOARD: _read(root / SCOREBOARD) == scoreboard(findings),
            FRONT: front == with_section(front, first_screen(findings)),
        }
        said += [
            f"{page} is not what the results say; {AGAIN}" for page in pages if not pages[page]
        ]
    return said


AGAIN = "run `python -m experiments.check --write`"


def page_complaints(finding: Finding) -> list[str]:
    """The study's page, figures and stored files that do not follow from its results."""
    study = finding.study
    said = [
        f"{path} belongs to no run of {study.name}; delete it"
        for path in study.store(study.page_scale).strangers(finding.runs)
    ]
    if study.fresh_seeds:
        runs, _ = study.current("fresh")
        said += [
            f"{path} belongs to no fresh run of {study.name}; delete it"
            for path in study.store("fresh").strangers(runs)
        ]
    page = _read(study.folder / "README.md")
    if page != with_section(page, section(finding)):
        said.append(f"{study.name}/README.md is not what the results say; {AGAIN}")
    for name, digest in finding.figures.items():
        carried = digest_in(finding.picture(name))
        if carried != digest:
            said.append(
                f"{study.name}: the figure {name} shows the data {carried}, the results give "
                f"{digest}; {AGAIN}"
            )
    return said


def history_complaints(study: Study) -> list[str]:
    """Rules that were changed after the first result was committed; none without git history."""
    folder = study.folder
    shallow = _git(folder, "rev-parse", "--is-shallow-repository")
    if shallow != "false":  # true, or None: no checkout
        return []
    results = folder / "results" / study.page_scale
    present = {path.name for path in results.glob("*.json")}
    if not present:
        return []
    if _git(folder, "status", "--porcelain", "--", "expected.json"):
        return [f"{study.name}/expected.json has changes that are not committed, after its results"]
    log = _git(folder, "log", "--diff-filter=A", "--format=:%H", "--name-only", "--", str(results))
    first, commit = {}, ""
    for line in (log or "").splitlines():  # newest first: the last time that a file was added
        if line.startswith(":"):
            commit = line[1:]
        elif (name := Path(line).name) in present:
            first.setdefault(name, commit)

    def late(rule: str) -> list[str]:
        """The results that were committed before the rule, or with it."""
        is_older = ("merge-base", "--is-ancestor", rule)
        return [
            n for n, c in sorted(first.items()) if c == rule or _git(folder, *is_older, c) is None
        ]

    changed, added = _rules_by_commit(folder)
    said = [
        f"{study.name}/expected.json was changed in {changed[:10]}, which is not before {name} was "
        f"committed ({first[name][:10]})"
        for name in late(changed)[:1]
    ]
    for claim, commit in added.items():
        arms = {name.rsplit("-", 2)[0] for name in present}
        if arms == {name.rsplit("-", 2)[0] for name in late(commit)}:
            said.append(
                f"{study.name}: the claim {claim} was added in {commit[:10]}, after results of "
                "every arm; it needs an arm of its own that ran later"
            )
    return said


def _rules_by_commit(folder: Path) -> tuple[str, dict[str, str]]:
    """The commit that changed a claim last, or wrote the first ones; and those that added others.

    A claim may be added with an arm that no one has run: the others' rules are as they were.
    """
    log = _git(folder, "log", "--reverse", "--format=%H", "--", "expected.json") or ""
    known: dict[str, object] = {}
    changed, added = "", {}
    for commit in log.split():
        text = _git(folder, "show", f"{commit}:./expected.json")
        claims = {} if text is None else {c["name"]: c for c in json.loads(text)["claims"]}
        if not known or any(claims.get(name) != claim for name, claim in known.items()):
            changed, added = commit, {}
        else:
            added |= {name: commit for name in claims if name not in known}
        known = claims
    return changed, added


def _git(folder: Path, *words: str) -> str | None:
    """What git prints; None if it fails or is not there."""
    try:
        ran = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def main() -> None:
    """Print what differs and exit with 1, or write the pages with ``--write``."""
    found = studies(ROOT / "experiments")
    if sys.argv[1:] == ["--write"]:
        for study in found:
            write_pages(study)
        write_scoreboard(ROOT)
        return
    said = complaints(found, ROOT)
    for line in said:
        print(line)
    verdicts = sum(len(study.claims) for study in found)
    if not said:
        print(f"{len(found)} experiments, {verdicts} claims: every page is what the results say")
    sys.exit(1 if said else 0)


if __name__ == "__main__":
    main()
