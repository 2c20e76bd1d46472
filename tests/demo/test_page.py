import json
import re
import sys
from pathlib import Path

import pytest

from openmythos.demo.page import render_page, write_report
from openmythos.report.page import Sample
from tests.demo.examples import ACCURACY, demo_results, text_result
from tests.report.parser import Page


@pytest.fixture(scope="module")
def page_text() -> str:
    return render_page(demo_results())


def test_report_writes_its_files(tmp_path: Path) -> None:
    page = write_report(demo_results(), tmp_path / "run")
    assert page == tmp_path / "run" / "report.html"
    names = {path.name for path in page.parent.iterdir()}
    assert names == {"report.html", "depth_curve.png", "hops_grid.png", "results.json"}
    record = json.loads((page.parent / "results.json").read_text(encoding="utf-8"))
    assert record["hops"]["accuracy"] == ACCURACY
    assert record["hops"]["accuracy_stderr"][0][0] == pytest.approx((0.9 * 0.1 / 99) ** 0.5)
    assert record["text"]["differences"]["1"]["value"] == pytest.approx(0.5)
    assert record["takeaways"]["Reading"][0]["holds"] is True


def test_page_is_well_formed_and_alone(page_text: str) -> None:
    page = Page(page_text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "http" not in page_text
    assert "url(" not in page_text.replace("url(#", "")
    assert "@import" not in page_text
    assert all(reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page_text)) <= set(page.ids)


def test_pictures_have_words_and_follow_the_page(page_text: str) -> None:
    page = Page(page_text)
    assert len(page.labels) == 7
    assert all(len(label) > 40 for label in page.labels)
    assert "2.000 at 4" in page.labels[0]
    assert "#1f2733" not in page_text.split("</style>", 1)[1]
    assert "var(--ink)" in page_text
    assert "prefers-color-scheme: dark" in page_text


def test_text_is_escaped(page_text: str) -> None:
    assert "<script>alert" not in page_text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page_text
    assert "<b>upon" not in page_text
    assert "2 &lt;fast&gt; cores" in page_text
    assert "\x1b" not in page_text


def test_page_says_what_it_must(page_text: str) -> None:
    said = " ".join(" ".join(Page(page_text).words).split())
    assert "it has nothing to do with Anthropic" in said
    assert "openmythos demo --out 'a & b'" in said
    assert "takes 1.1 loops whatever the length of the walk" in said
    assert "$" not in said


def test_page_without_the_original_and_without_samples() -> None:
    text = text_result(samples=[Sample("alone", [])])
    page = Page(render_page(demo_results(text=text, original_halting=None)))
    said = " ".join(page.words)
    assert len(page.labels) == 6
    assert "original's halting" not in said
    assert "nothing generated" in said


def test_numbers_survive_a_missing_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pictures need matplotlib"):
        write_report(demo_results(), tmp_path)
    assert (tmp_path / "results.json").exists()
