"""The report: what it shows, its tables as files, and the page in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Evaluate, Recipe
from pipeline.files import write_json, write_jsonl
from pipeline.gatt.suites import suites
from pipeline.pairs import read_pairs, read_sides
from pipeline.records import Constraint, Dialogue, Reply
from pipeline.rundir import RunDir
from pipeline.scoring import scores
from pipeline.stages.instructions import written
from pipeline.stages.report import run

_POOL = (Constraint("opening", "Ahoy!"), Constraint("closing", "So it goes."), Constraint("persona", "Captain Nemo"))
_NASTY = '<script>document.title = "broken"</script> & "שלום" ' + "x" * 400
_CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
browser = pytest.mark.skipif(not _CHROMIUM, reason="no Chromium here to open the page with")


def _replies(arm: str, pairs: list[Any], good: float) -> list[Reply]:
    """Made up: the first `good` of the turns of every dialogue obey, and what was asked for is known as long."""
    found = []
    for n, pair in enumerate(pairs):
        turns = len(pair.dialogue.turns)
        for turn in range(1, turns + 1):
            held = turn <= good * (turns - n % 3)
            flaw = "" if held or turn % 4 else "loop"
            found.append(Reply(arm, pair.dialogue.id, turn, f"Ahoy! {_NASTY}", 9, 9, "stop", held, flaw))
            found += [Reply(arm, pair.dialogue.id, turn, "Me.", 9, 9, "stop", held, "", ask.attribute)
                      for ask in pair.asks if turn in (2, 4, 6, 20)]  # fmt: skip
    return found


def _run(folder: Path, full: bool) -> tuple[Recipe, RunDir]:
    """A finished run, its replies made up and its scores those of the replies."""
    recipe, rundir = Recipe(evaluate=Evaluate(dialogues=4)), RunDir(folder)
    dialogues = [Dialogue(f"d{n}", "sea", tuple(f"What of {n}.{t}, <b>sir</b>?" for t in range(20))) for n in range(4)]
    made, further = suites(dialogues, _POOL, (Constraint("uppercase"), Constraint("opening", "Well, well!")), 10, 20)
    main = [(d, p) for d, (_, p) in zip(dialogues, further["change"], strict=True)]
    write_json(rundir.pairs, written(made, {"train": [], "evaluate": main}))
    write_json(rundir.suites, written(made, further))
    found = {"evaluate": read_pairs(rundir.pairs, "evaluate"), **(read_sides(rundir.suites) if full else {})}
    replies = [r for arm, good in (("base", 0.2), ("tuned", 0.8), ("rival", 0.5)) for pairs in found.values()
               for r in _replies(arm, pairs, good)]  # fmt: skip
    replies += _replies("ceiling", found["evaluate"], 0.9)
    write_jsonl(rundir.replies, replies)
    numbers = scores(replies, found, _POOL)
    if full:
        judge = {"model": "big", "agreement": {"hits": 7, "n": 10, "value": 0.7, "low": 0.4, "high": 0.9}, "reliable": False}
        damage = {"tokens": 90, "perplexity": {"base": 3.0, "tuned": 3.3}, "kl": {"base": 0.0, "tuned": 0.1}}
        numbers |= {"primary": "recall", "damage": damage, "judge": {**judge, "scores": []}}
        row = {"at": 1, "old": 0.0, "new": 0.0}
        assert row.keys() < numbers["change"]["tuned"]["by_turn"][0].keys()
        share = {"strongest": [[0.5, 1.0], [0.2, 0.4]], "turns": [1, 2], "instruction": [0, 1], "share": [0.5, 0.1]}
        write_json(rundir.attention, {"base": share, "tuned": share})
        write_json(rundir.losses, [2.0, 1.5, 1.2])
    write_json(rundir.scores, numbers)
    write_jsonl(rundir.examples, [{"teacher": "itself"}])
    write_json(rundir.acceptance, {"answers": [], "too_common": 0})
    formats = {"Q8_0": {"bytes": 145_000_000, "retained": {"attn_q": 0.85}, "kl_trained": 0.3}}
    write_json(rundir.exported, {"merge_onto": "16bit", "merges": {}, "formats": formats})
    rundir.tuned("Q8_0").write_bytes(b"GGUF")
    run(recipe, rundir)
    return recipe, rundir


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return _run(tmp_path_factory.mktemp("full"), True)[1]


def test_it_opens_with_the_figure_that_the_recipe_named(full: RunDir, tmp_path: Path) -> None:
    assert "<h1>The tuned model still knows what it was told, asked in turn 20, in 0% of" in _page(full)
    assert "<h1>In turns 16 to 20, the tuned model keeps" in _page(_run(tmp_path, False)[1])


def _page(rundir: RunDir) -> str:
    return (rundir.report / "report.html").read_text(encoding="utf-8")


def test_every_part_is_there_and_what_was_not_measured_is_left_out(full: RunDir, tmp_path: Path) -> None:
    titles = re.findall("<h2>(.*?)</h2>", _page(full))
    always = ["Over several turns", "How long until the first broken answer", "By instruction", "Side by side", "Training data",
              "Export", "The run"]  # fmt: skip
    assert set(titles) == {
        *always, "Recall", "Instructions that were not trained", "When the instruction changes", "Leakage and damage",
        "One question, one instruction", "The judge", "What the answers attend to", "Training",
    }  # fmt: skip
    assert re.findall("<h2>(.*?)</h2>", _page(_run(tmp_path, False)[1])) == always
    assert "its verdicts are not reliable" in _page(full)
    assert "keeps less than 90 % of the adapter&#39;s change in attn_q" in _page(full)


def test_recall_stands_beside_the_papers(full: RunDir) -> None:
    with (full.report / "tables" / "recall.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["turn"] for row in rows] == ["2", "4", "6", "20"]
    assert [row["paper, without GAtt"] for row in rows] == ["100%", "10%", "0%", "0%"]
    assert [row["paper, with GAtt"] for row in rows] == ["100%"] * 4
    assert [float(row["tuned"]) for row in rows] == [1, 1, 1, 0]


def test_the_tables_hold_the_numbers_of_the_scores(full: RunDir) -> None:
    numbers = json.loads(full.scores.read_text(encoding="utf-8"))
    for name in ("by_turn", "by_instruction", "generalisation", "leakage", "single_by_kind", "recall_by_attribute"):
        with (full.report / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
            rows = {next(iter(row.values())): row for row in csv.DictReader(file)}
        for expected in numbers[name]:
            row = rows[str(expected["at"])]
            assert float(row[expected["arm"]]) == expected["value"]
            assert (int(row[f"{expected['arm']} hits"]), int(row[f"{expected['arm']} n"])) == (expected["hits"], expected["n"])


def test_figures_are_files_too(full: RunDir) -> None:
    for name in ("adherence", "survival", "change", "attention", "loss"):
        assert (full.report / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        picture = (full.report / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert picture.startswith("<svg") and "currentColor" not in picture
    curve = (full.report / "figures" / "adherence.svg").read_text(encoding="utf-8")
    assert all(name in curve for name in ("GAtt-tuned", "base, told every turn", "rival"))


def test_the_markdown_has_the_tables_of_a_model_card(full: RunDir) -> None:
    text = (full.report / "report.md").read_text(encoding="utf-8")
    assert "| turn | base | tuned | rival | paper, without GAtt | paper, with GAtt |" in text
    assert "| tuned | 3.3 | +10.0% | 0.1 |" in text


def test_replies_are_shown_as_text(full: RunDir) -> None:
    page = _page(full)
    assert _NASTY not in page
    assert page.count("<script>") == 1
    assert "What of 0.0, &lt;b&gt;sir&lt;/b&gt;?" in page


def _open(page: str, folder: Path, script: str, width: int = 1100) -> str:
    """What `script` has written into the title of the page in a browser that may ask nobody for anything."""
    listening = (
        "<script>window.problems = []; for (const name of ['error', 'securitypolicyviolation'])"
        "addEventListener(name, e => problems.push(e.message || e.blockedURI), true)</script>"
    )
    changed = page.replace("<title>", f"{listening}<title>", 1)
    file = folder / "page.html"
    file.write_text(changed.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    assert _CHROMIUM
    command = [
        _CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title
    return unescape(title[1])


@browser
def test_the_page_draws_its_charts_and_asks_nobody(full: RunDir, tmp_path: Path) -> None:
    script = (
        "const asked = performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length;"
        "document.title = JSON.stringify({problems, asked,"
        "charts: [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height > 100)})"
    )
    found = json.loads(_open(_page(full), tmp_path, script))
    assert found == {"problems": [], "asked": 0, "charts": [True] * 5}


@browser
def test_a_click_sorts_a_table_by_its_numbers(full: RunDir, tmp_path: Path) -> None:
    script = (
        "const t = document.querySelector('#by_turn, #by_instruction'), names = [];"
        "for (let n = 0; n < 2; n++) { t.querySelectorAll('th button')[2].click();"
        "names.push([...t.tBodies[0].rows].map(r => Number(r.cells[2].dataset.key)), t.querySelectorAll('th')[2].ariaSort) }"
        "document.title = JSON.stringify(names)"
    )
    down, first, up, second = json.loads(_open(_page(full), tmp_path, script))
    assert (first, second) == ("descending", "ascending")
    assert down == sorted(down, reverse=True) and up == sorted(up) and len(set(up)) > 1


@browser
def test_a_phone_shows_the_page_without_scrolling_sideways(full: RunDir, tmp_path: Path) -> None:
    # A window cannot be narrower than 500 pixels: the page is put into a frame of a phone's width.
    frame = "<title></title><body><iframe width=360 height=800></iframe></body>"
    inner = json.dumps(_page(full)).replace("</", "<\\/")
    script = (
        "const f = document.querySelector('iframe'); f.onload = () => { const d = f.contentDocument.documentElement;"
        f"document.title = JSON.stringify([d.scrollWidth, d.scrollHeight]) }}; f.srcdoc = {inner}"
    )
    width, height = json.loads(_open(frame, tmp_path, script))
    assert width <= 360 and height > 2000


def test_the_scores_of_the_test_are_those_of_real_replies(full: RunDir) -> None:
    """The made-up replies go through the real scoring, so that the page is tested with its real keys."""
    reply = Reply(**json.loads(full.replies.read_text(encoding="utf-8").splitlines()[0]))
    assert asdict(reply)["arm"] == "base"
