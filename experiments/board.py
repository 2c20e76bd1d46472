"""The pages that are written from results: each study's README, its figures, docs/scoreboard.md."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.claim import DECISIONS, NOT_YET, Claim, Conclusion, Table, Verdict
from experiments.run_store import Results, Run, digest
from openmythos.folder import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.study import Study

BEGIN = "<!-- From here on written by `openmythos reproduce`. -->"
END = "<!-- To here. -->"
SCOREBOARD = Path("docs", "scoreboard.md")
FRONT = Path("README.md")
# The figures that the scoreboard begins with, by study and name, and what each shows; the first is
# on the front page, too.
LEADS = {
    (
        "what_loops_read",
        "growing_map",
    ): "What each loop reads, on walks longer than any in training: a row per loop, a column per "
    "word, blue where the answer is lost if that word is changed in that loop only. The same "
    "weights run again, and the map grows by a row. Below, a model trained at changing numbers of "
    "loops, and a plain model without loops. One seed of three.",
    (
        "depth_dial",
        "stepping_and_holding",
    ): "Accuracy by hops and loops: a diagonal is a model that "
    "steps, a plateau one that holds. Below the line, walks longer than any in training.",
    ("wins_and_losses", "wins_and_losses"): "Loops against plain stacks of equal parameters and of "
    "equal FLOPs, puzzle by puzzle.",
    (
        "bounded_state",
        "norms",
    ): "The norm of the state over 4,000 loops at fixed weights: with rho below 1 it stops "
    "growing, with plain addition it grows linearly, and near 1 the two are the same.",
}
DIGEST = "Data"  # the key of a figure's digest in its PNG file


def studies(experiments: Path) -> list[Study]:
    """Every study in the folder, by its number."""
    names = [
        path.parent.name
        for path in sorted(experiments.glob("*/run.py"))
        if re.search(r"^STUDY = ", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    found = [importlib.import_module(f"experiments.{name}.run").STUDY for name in names]
    return sorted(found, key=lambda study: study.number)


class Finding:
    """A study with what its committed results say.

    Attributes:
        runs: The known runs of its page's scale.
        results: Of those that have ended.
        conclusion: None while a run is missing.
        fresh: What seeds conclude that were not used; None while a run of theirs is missing.
        fresh_results: Their results.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.runs, self.results = study.current(study.page_scale)
        self.conclusion: Conclusion | None = None
        if self.runs and len(self.results) == len(self.runs):
            self.conclusion = study.conclude(self.results)
            require_verdicts(study, self.conclusion)
        self.fresh: Conclusion | None = None
        fresh_runs: list[Run] = []
        self.fresh_results = Results()
        if study.fresh_seeds:
            fresh_runs, self.fresh_results = study.current("fresh")
        if fresh_runs and len(self.fresh_results) == len(fresh_runs):
            self.fresh = study.conclude(self.fresh_results)

    @property
    def verdicts(self) -> list[tuple[Claim, Verdict | None]]:
        """Each claim with its verdict; None while a run is missing."""
        given = {} if self.conclusion is None else {v.claim: v for v in self.conclusion.verdicts}
        return [(claim, given.get(name)) for name, claim in self.study.claims.items()]

    @property
    def figures(self) -> dict[str, str]:
        """The digest of each figure's data."""
        found = self.conclusion
        return {} if found is None else {name: found.digest(name) for name in found.figures}

    def picture(self, figure: str) -> Path:
        """The file of a figure."""
        return self.study.folder / "results" / self.study.page_scale / f"{figure}.png"


def require_verdicts(study: Study, conclusion: Conclusion) -> None:
    """Check that a conclusion has one verdict for each claim, and names figures that it has.

    Raises:
        ValueError: It does not.
    """
    names = [verdict.claim for verdict in conclusion.verdicts]
    if sorted(names) != sorted(study.claims):
        raise ValueError(f"{study.name} concludes on {names}, its claims are {[*study.claims]}")
    for verdict in conclusion.verdicts:
        if verdict.figure is not None and verdict.figure not in conclusion.figures:
            raise ValueError(f"{study.name}: {verdict.claim} names no figure: {verdict.figure}")


# --- writing --------------------------------------------------------------------------------------


def write_pages(study: Study) -> None:
    """Draw the study's figures and write its page and the scoreboard."""
    for scale in (study.page_scale, "fresh"):
        study.store(scale).tidy()
    finding = Finding(study)
    if finding.conclusion is not None:
        for name, figure in study.draw(finding.conclusion).items():
            save_with_digest(figure, finding.picture(name), finding.conclusion.digest(name))
            print(f"{study.name}: {finding.picture(name)}")
    page = study.folder / "README.md"
    write_whole(page, with_section(page.read_text(encoding="utf-8"), section(finding)))
    print(f"{study.name}: {page}")
    write_scoreboard(study.root)


def write_scoreboard(root: Path) -> None:
    """Write docs/scoreboard.md, and what the front page says of it, from all studies' results."""
    found = [Finding(study) for study in studies(root / "experiments")]
    write_whole(root / SCOREBOARD, scoreboard(found))
    front = root / FRONT
    write_whole(front, with_section(front.read_text(encoding="utf-8"), first_screen(found)))


def try_out(study: Study, work: Path) -> None:
    """Conclude from smoke results and draw them beside the runs; nobody reads the verdicts."""
    conclusion = study.conclude(study.current("smoke", work)[1])
    require_verdicts(study, conclusion)
    for name, figure in study.draw(conclusion).items():
        save_with_digest(figure, work / study.name / f"{name}.png", conclusion.digest(name))


def save_with_digest(figure: Figure, path: Path, digest: str) -> None:
    """Write a picture with the digest of its data, in its corner and in the file's text."""
    from openmythos.analysis.picture import MUTED, save, styled  # loads torch

    with styled():
        figure.text(0.997, 0.003, f"data {digest}", ha="right", va="bottom", color=MUTED, size=5.5)
    save(figure, path, {DIGEST: digest})


def digest_in(path: Path) -> str | None:
    """The digest that a picture carries; None if there is no such picture."""
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as picture:
        return picture.info.get(DIGEST)


def with_section(page: str, text: str) -> str:
    """The page with another written part.

    Raises:
        ValueError: It has no place for it.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


# --- what is written ------------------------------------------------------------------------------


def section(finding: Finding) -> str:
    """The written part of a study's page."""
    study, parts = finding.study, ["## What was found\n"]
    if finding.conclusion is None:
        ended, known = len(finding.results), len(finding.runs)
        parts.append(f"{ended} of the {known} runs known so far are stored; no verdict yet.\n")
    else:
        rows = [
            [f"[{_title(claim)}](#{claim.name})", "" if found is None else found.decision]
            for claim, found in finding.verdicts
        ]
        parts.append(markdown(Table("Verdicts", ["claim", "verdict"], rows)))
    for name, own in finding.figures.items():
        path = finding.picture(name).relative_to(study.folder).as_posix()
        parts.append(f"![{name.replace('_', ' ')}]({path})\n\nData `{own}`.\n")
    parts.append("## Claims and rules\n")
    others = studies(study.root / "experiments")
    parts += [
        _claim(claim, verdict, _same_words(claim, study, others))
        for claim, verdict in finding.verdicts
    ]
    if finding.conclusion is not None:
        parts += [f"## {table.title}\n\n{markdown(table)}" for table in finding.conclusion.tables]
    parts += [_fresh(finding), _runs(finding.runs, finding.results)]
    return "\n".join(parts)


def _fresh(finding: Finding) -> str:
    """The verdicts of seeds that were not used, beside those of the page."""
    if finding.fresh is None:
        return ""
    given = {verdict.claim: verdict for verdict in finding.fresh.verdicts}
    rows = [
        [claim.name, own.decision, given[claim.name].decision, given[claim.name].sentence]
        for claim, own in finding.verdicts
        if own is not None
    ]
    same = sum(row[1] == row[2] for row in rows)
    seeds = ", ".join(map(str, sorted({result.run.seed for result in finding.fresh_results})))
    cpu = sum(result.cpu_seconds for result in finding.fresh_results) / 3600
    said = (
        f"The same runs with seeds {seeds}, which nothing was chosen by: {same} of {len(rows)} "
        f"verdicts are the same. {len(finding.fresh_results)} runs, {cpu:.2f} CPU hours. Results "
        f"`{digest_of(finding.fresh_results)}`.\n"
    )
    table = Table("Fresh", ["claim", "verdict", "with fresh seeds", "found with them"], rows)
    lost = _lost(finding.fresh_results)
    if lost:
        lost += "\nEach lost run was followed by one with the next seed.\n"
    return f"## Seeds that were not used\n\n{said}\n{markdown(table)}{lost}"


def _title(claim: Claim) -> str:
    """The heading of a claim; its anchor is the claim's name."""
    return claim.name.replace("-", " ").capitalize()


def _same_words(claim: Claim, own: Study, others: Iterable[Study]) -> list[Study]:
    """The other experiments that decide the same words, perhaps otherwise."""
    return [
        other
        for other in others
        if other.name != own.name
        and any(same.quote == claim.quote for same in other.claims.values())
    ]


def _claim(claim: Claim, verdict: Verdict | None, others: Sequence[Study]) -> str:
    said = f"**{NOT_YET.capitalize()}.**"
    if verdict is not None:
        said = f"**{verdict.decision.capitalize()}.** {verdict.sentence}{_number(verdict)}"
    links = [f"[{other.name}](../{other.name}/README.md)" for other in others]
    return (
        f"### {_title(claim)}\n\n"
        f"> {claim.quote}\n>\n> {claim.article}{_also(links)}\n\n{said}\n\n"
        f"Rule, written before the runs: {claim.rule_in_numbers}{_thresholds(claim)}\n\n"
        f"What would change it: {claim.would_change}\n"
    )


def _thresholds(claim: Claim) -> str:
    """The numbers that the rule only names, without backticks."""
    named = [
        f"{name} {number:g}"
        for name, number in claim.thresholds.items()
        if f"`{name}`" not in claim.rule and re.search(rf"\b{name}\b", claim.rule)
    ]
    return f" ({', '.join(named)}.)" if named else ""


def _number(verdict: Verdict) -> str:
    if verdict.number is None:
        return ""
    return f" The number that decides: {verdict.number:.3g}{_ends(verdict, ', 95 % interval ')}."


def _ends(verdict: Verdict, before: str) -> str:
    if verdict.interval is None:
        return ""
    low, high = verdict.interval
    if low == high:  # equal in every seed
        return ""
    return f"{before}{low:.3g} to {high:.3g}"


def _runs(runs: Sequence[Run], results: Results) -> str:
    """Rates, seeds, seconds and what was lost, by arm."""
    header = ["arm", "rate", "rates tried", "seeds", "lost", "longest run, CPU s", "CPU s"]
    rows = []
    for arm in results.arms:
        own = [result for result in results if result.run.arm == arm]
        final, tuning = ([r for r in own if r.run.tuning == flag] for flag in (False, True))
        rates, tried = (
            sorted({r.run.settings["rate"] for r in group if "rate" in r.run.settings})
            for group in (final, tuning)
        )
        rows.append([
            arm,
            ", ".join(f"{rate:.3g}" for rate in rates) or "none",
            ", ".join(f"{rate:.3g}" for rate in tried) or "none",
            str(len({result.run.seed for result in final})),
            str(sum(result.lost is not None for result in own)),
            f"{max(result.cpu_seconds for result in own):.0f}",
            f"{sum(result.cpu_seconds for result in own):.0f}",
        ])  # fmt: skip
    cpu = sum(result.cpu_seconds for result in results)
    where = sorted({f"{result.processor}, torch {result.torch}" for result in results})
    said = f"{len(results)} runs, {cpu / 3600:.2f} CPU hours, one thread each. {'; '.join(where)}. "
    said += f"Results `{digest_of(results)}`.\n{_lost(results)}"
    return f"## Runs\n\n{markdown(Table('Runs', header, rows))}\n{said}" if results else ""


def digest_of(results: Results) -> str:
    """Changes with any number of any stored run, also with those that no verdict reads."""
    return digest(sorted(json.dumps(asdict(result), sort_keys=True) for result in results))


def _lost(results: Results) -> str:
    """A paragraph for each run that was lost, and why."""
    return "".join(
        f"\nLost: {r.run.arm}, seed {r.run.seed}{', tuning' if r.run.tuning else ''}, "
        f"rate {r.run.settings.get('rate', 'none')}: {r.lost}.\n"
        for r in results.lost
    )


def leading(findings: Sequence[Finding]) -> list[tuple[str, str, Path]]:
    """What the scoreboard begins with: caption, the study's name and the picture of each figure.

    Raises:
        ValueError: A study that is concluded has no such figure.
    """
    by_name = {finding.study.name: finding for finding in findings}
    found = []
    for (name, figure), caption in LEADS.items():
        finding = by_name.get(name)
        if finding is None or finding.conclusion is None:
            continue
        if figure not in finding.figures:
            raise ValueError(f"{name} has no figure {figure}, which should lead the scoreboard")
        found.append((caption, name, finding.picture(figure).relative_to(finding.study.root)))
    return found


def first_screen(findings: Sequence[Finding]) -> str:
    """The written part of the front page: the figure that leads, and the way to all others."""
    board = SCOREBOARD.as_posix()
    parts = [
        f"[{image(caption, path.as_posix())}]({board})\n\n{caption}\n"
        for caption, _, path in leading(findings)[:1]
    ]
    parts.append(
        f"[The scoreboard]({board}): claims about looped models, with verdicts. To check one, run "
        "its experiment again, `openmythos reproduce NAME --scale small --again`; the scoreboard "
        "says how many seconds each takes.\n"
    )
    return "\n".join(parts)


def image(caption: str, path: str) -> str:
    """A leading figure; they are drawn for a telephone's width, and not blown up elsewhere."""
    return f'<img src="{path}" alt="{escape(caption)}" width="560">'


def scoreboard(findings: Sequence[Finding]) -> str:
    """The content of docs/scoreboard.md."""
    lines = [
        "# Scoreboard\n",
        "Claims about looped language models, and what the experiments of this repository found. "
        "Each rule was written before its run. This page is written from the stored results by "
        "`openmythos reproduce`; `openmythos reproduce --check` recomputes it.\n",
        f"{_tally(findings)} {_cost(findings)}\n",
        "Behind a claim stands where it was made: in one of five articles about OpenMythos, which "
        "are named by their files, in a paper, by its number at arXiv, or in this library. Names "
        'like `fixed_longest` are trainings, and the number after "Decided by" is the one that the '
        "rule reads; both are explained on the experiment's page.\n",
    ]
    for caption, name, path in leading(findings):
        page = f"../experiments/{name}/README.md"
        lines.append(f"{image(caption, f'../{path.as_posix()}')}\n\n{caption} [{name}]({page})\n")
    lines += [_board_part(finding, findings) for finding in findings]
    lines.append(
        "An interval is over seeds; a number links to the results. CPU seconds are those of the "
        "whole experiment, tuning included, fresh seeds not. `--again` deletes the stored results "
        "first, which git still has; without it, nothing that is stored is done again."
    )
    return "\n".join(lines) + "\n"


def _tally(findings: Sequence[Finding]) -> str:
    """How many claims there are, and how many of each verdict."""
    verdicts = [verdict for finding in findings for _, verdict in finding.verdicts]
    words = Counter(NOT_YET if verdict is None else verdict.decision for verdict in verdicts)
    counts = ", ".join(f"{words[word]} {word}" for word in (*DECISIONS, NOT_YET) if words[word])
    return f"{len(verdicts)} claims: {counts}." if verdicts else "No claims."


def _cost(findings: Sequence[Finding]) -> str:
    """What all runs took together, tuning and fresh seeds included."""
    results = [r for finding in findings for r in (*finding.results, *finding.fresh_results)]
    if not results:
        return "No run is stored."
    seconds = [result.cpu_seconds for result in results]
    lost = sum(result.lost is not None for result in results)
    return (
        f"They rest on {len(results):,} runs of one thread, {sum(seconds) / 3600:.1f} CPU hours "
        f"together, tuning and fresh seeds included; the longest took {max(seconds):,.0f} CPU "
        f"seconds. {lost} were lost, and are counted."
    )


def _board_part(finding: Finding, findings: Sequence[Finding]) -> str:
    """An experiment's part: its question, the command that does it again, and its claims."""
    study, rows = finding.study, []
    inside = f"../{study.folder.relative_to(study.root).as_posix()}"
    data = f"{inside}/results/{study.page_scale}"
    seconds = f"{sum(result.cpu_seconds for result in finding.results):,.0f}"
    command = f"`openmythos reproduce {study.name} --scale {study.page_scale} --again`"
    cost = f"{seconds} CPU seconds" if finding.conclusion else NOT_YET
    for claim, verdict in finding.verdicts:
        decision = NOT_YET if verdict is None else verdict.decision
        others = _elsewhere(claim, finding, findings)
        rows.append(f"- **{decision.capitalize()}**: “{claim.quote}” {claim.article}{others}\n")
        if verdict is not None:
            rows.append(f"\n  {verdict.sentence}{_links(verdict, finding, data)}\n")
    return (
        f"## {study.number}. {study.title}\n\n"
        f"[Set-up, rules and tables]({inside}/README.md). Again: {command} ({cost})\n\n"
        f"{''.join(rows)}"
    )


def _elsewhere(claim: Claim, finding: Finding, findings: Sequence[Finding]) -> str:
    """The verdicts of other experiments on the same words."""
    by_name = {other.study.name: other for other in findings}
    found = []
    for other in _same_words(claim, finding.study, [each.study for each in findings]):
        for same, verdict in by_name[other.name].verdicts:
            if same.quote == claim.quote:
                decision = NOT_YET if verdict is None else verdict.decision
                found.append(f"experiment {other.number} ({decision})")
    return _also(found)


def _also(places: Sequence[str]) -> str:
    return f". Also decided in {' and '.join(places)}" if places else ""


def _links(verdict: Verdict, finding: Finding, data: str) -> str:
    """A verdict's number, which leads to the results, its interval, and its figure."""
    said = ""
    if verdict.number is not None:
        said += f" Decided by [{verdict.number:.3g}]({data}){_ends(verdict, ', 95 % interval ')}."
    if verdict.figure is not None:
        picture = finding.picture(verdict.figure).name
        said += f" Figure: [{verdict.figure.replace('_', ' ')}]({data}/{picture})."
    return said


def markdown(table: Table) -> str:
    """The table in Markdown."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table.rows]
    lines = [list(table.header), ["---"] * len(table.header), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
