"""Parts of the page that need no browser: HTML, and the reports of finished runs."""

from __future__ import annotations

import os
from pathlib import Path

from support.chat import conversation

from pipeline.chat.conversation import Verdict
from pipeline.files import write_json
from pipeline.server.web.app import find_reports
from pipeline.server.web.markdown import badge, describe, strip, to_html


def test_markdown_has_no_html_images_or_scripts() -> None:
    html = to_html(
        '<img src=x onerror="x"> <script>x</script> [a](javascript:x) ![b](http://x/b.png)\n\n'
        "<iframe srcdoc='x'></iframe>"
    )
    for forbidden in ("<img", "<script", "<iframe", 'href="javascript'):
        assert forbidden not in html
    assert to_html("**a** `b`\n\n| c |\n|---|\n| d |").count("<td>") == 1


def test_a_strip_has_a_cell_for_each_turn_and_escapes_texts() -> None:
    chat = conversation(("<b>One</b>\n", "Ahoy! 1."), ("word " * 40, "2."))
    html = strip("<i>model</i>", chat, [chat.verdict(0, 1), chat.verdict(0, 2)])
    assert html.count('class="cell ') == 2
    assert "&lt;i&gt;model&lt;/i&gt;" in html
    assert "Turn 1 follows the instruction: &lt;b&gt;One&lt;/b&gt;" in html
    assert f"Turn 2 does not follow the instruction: {('word ' * 16)[:80]}…" in html
    assert "<small>followed 1 of 2</small>" in html
    unchecked = strip("m", conversation(("a", "b")), [Verdict(None)])
    assert "not checked" in unchecked
    assert "<small></small>" in unchecked


def test_a_badge_says_what_its_mark_means() -> None:
    assert badge(Verdict(None)) == ""
    assert "follows the instruction" in badge(Verdict("✓"))
    assert describe(Verdict("~", "loop")).endswith("not a valid answer (loop)")
    assert describe(Verdict("✗", "loop")) == "does not follow the instruction"


def test_reports_are_those_of_finished_runs_the_newest_first(tmp_path: Path) -> None:
    assert find_reports(tmp_path / "none") == {}
    for name, seconds in (("old", 1), ("new", 2), ("begun", 3)):
        report = tmp_path / name / "report"
        report.mkdir(parents=True)
        (report / "report.html").write_text("x")
        os.utime(report / "report.html", (seconds, seconds))
        if name != "begun":
            write_json(report / "manifest.json", {})
    (tmp_path / "half" / "report").mkdir(parents=True)
    write_json(tmp_path / "half" / "report" / "manifest.json", {})
    (tmp_path / "a file").write_text("x")
    reports = find_reports(tmp_path)
    assert list(reports) == ["new", "old"]
    assert reports["old"] == tmp_path / "old" / "report" / "report.html"
