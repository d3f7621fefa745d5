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

from pipeline.evaluation.scores import scores
from pipeline.evaluation.suites import suites
from pipeline.files import write_json, write_jsonl
from pipeline.gatt.assignment import read_split, read_splits
from pipeline.recipe import Evaluate, Recipe
from pipeline.records import Constraint, Dialogue, Reply
from pipeline.report.figures import adherence_curve, change_curve
from pipeline.report.tables import Table, markdown, sort_key
from pipeline.run_dir import RunDir
from pipeline.stages.instructions import written
from pipeline.stages.report import headline, run

_POOL = (
    Constraint("opening", "Ahoy!"),
    Constraint("closing", "So it goes."),
    Constraint("persona", "Captain Nemo"),
)
_NASTY = '<script>document.title = "broken"</script> & "שלום" ' + "x" * 400
_CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
browser = pytest.mark.skipif(not _CHROMIUM, reason="no Chromium here to open the page with")


def _replies(arm: str, pairs: list[Any], good: float) -> list[Reply]:
    """Made up: the first `good` of the turns of every dialogue obey, and what was asked for is known as long."""
    found = []
    for n, pair in enumerate(pairs):
        turns = len(pair.dialogue.turns)
        for turn in range(1, turns + 1):
            held = turn <= good * (turns - n % 3)
            flaw = "" if held or turn % 4 else "loop"
            found.append(
                Reply(arm, pair.dialogue.id, turn, f"Ahoy! {_NASTY}", 9, 9, "stop", held, flaw)
            )
            found += [
                Reply(arm, pair.dialogue.id, turn, "Me.", 9, 9, "stop", held, "", ask.attribute)
                for ask in pair.recall_questions
                if turn in (2, 4, 6, 20)
            ]
    return found


def _run(folder: Path, full: bool) -> tuple[Recipe, RunDir]:
    """A finished run, its replies made up and its scores those of the replies."""
    run_dir = RunDir(folder)
    model = folder / "my-model.gguf"
    model.write_bytes(b"GGUF")
    recipe = Recipe(model=str(model), evaluate=Evaluate(dialogues=4))
    dialogues = [
        Dialogue(f"d{n}", "sea", tuple(f"What of {n}.{t}, <b>sir</b>?" for t in range(20)))
        for n in range(4)
    ]
    made, further = suites(
        dialogues, _POOL, (Constraint("uppercase"), Constraint("opening", "Well, well!")), 10, 20
    )
    main = [(d, p) for d, (_, p) in zip(dialogues, further["change"], strict=True)]
    write_json(run_dir.pairs, written(made, {"train": [], "evaluate": main}))
    write_json(run_dir.suites, written(made, further))
    found = {
        "evaluate": read_split(run_dir.pairs, "evaluate"),
        **(read_splits(run_dir.suites) if full else {}),
    }
    rivals = ["rival"] if full else [f"rival {n}" for n in range(1, 6)]
    shares = {"base": 0.2, "tuned": 0.8, **dict.fromkeys(rivals, 0.5)}
    replies = [
        r
        for arm, good in shares.items()
        for pairs in found.values()
        for r in _replies(arm, pairs, good)
    ]
    replies += _replies("ceiling", found["evaluate"], 0.9)
    write_jsonl(run_dir.replies, replies)
    numbers = scores(replies, found, _POOL)
    if full:
        judge = {
            "model": "big",
            "agreement": {"hits": 7, "n": 10, "value": 0.7, "low": 0.4, "high": 0.9},
            "reliable": False,
        }
        damage = {
            "tokens": 90,
            "perplexity": {"base": 3.0, "tuned": 3.3},
            "kl": {"base": 0.0, "tuned": 0.1},
        }
        numbers |= {"primary": "recall", "degradation": damage, "judge": {**judge, "scores": []}}
        row = {"at": 1, "old": 0.0, "new": 0.0}
        assert row.keys() < numbers["change"]["tuned"]["by_turn"][0].keys()
        share = {
            "strongest": [[0.5, 1.0], [0.2, 0.4]],
            "turns": [1, 2],
            "instruction": [0, 1],
            "share": [0.5, 0.1],
        }
        write_json(run_dir.attention, {"base": share, "tuned": share})
        write_json(run_dir.losses, [2.0, 1.5, 1.2])
    write_json(run_dir.scores, numbers)
    write_jsonl(run_dir.examples, [{"teacher": "itself"}])
    drawn = {
        "way": "edited",
        "drawn": 9,
        "accepted": 7,
        "words": 21,
        "rejected": {"loop": 2},
        "example": f"Ahoy! {_NASTY}",
    }
    write_json(
        run_dir.acceptance,
        {"answers": [{"instruction": "opening: Ahoy!", **drawn}], "too_common": 0},
    )
    formats = {"Q8_0": {"bytes": 145_000_000, "retained": {"attn_q": 0.85}, "kl_trained": 0.3}}
    write_json(run_dir.exported, {"merge_base": "fp16", "merges": {}, "formats": formats})
    run_dir.tuned("Q8_0").write_bytes(b"GGUF")
    run(recipe, run_dir)
    return recipe, run_dir


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return _run(tmp_path_factory.mktemp("full"), True)[1]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Without the further suites, but with many models."""
    return _run(tmp_path_factory.mktemp("bare"), False)[1]


def test_it_opens_with_the_figure_that_the_recipe_named(full: RunDir, bare: RunDir) -> None:
    assert "<h1>The tuned model still knows what it was told, asked in turn 20, in 0% of" in _page(
        full
    )
    assert "<h1>In turns 16 to 20, the tuned model keeps" in _page(bare)


def test_a_figure_that_was_not_measured_is_not_told(bare: RunDir) -> None:
    numbers = json.loads(bare.scores.read_text(encoding="utf-8"))
    assert headline({**numbers, "primary": "recall"}).startswith(
        "What the report was to open with (recall) was not measured. In turns 16 to 20"
    )
    nothing = [
        {"arm": arm, "at": "turns 1 to 2", "hits": 0, "n": 0, "value": float("nan")}
        for arm in ("base", "tuned")
    ]
    assert "keeps its instruction in an unknown share of the answers" in headline(
        {"last_five": nothing}
    )


def _page(run_dir: RunDir) -> str:
    return (run_dir.report / "report.html").read_text(encoding="utf-8")


def test_every_part_is_there_and_what_was_not_measured_is_left_out(
    full: RunDir, bare: RunDir
) -> None:
    titles = re.findall("<h2>(.*?)</h2>", _page(full))
    always = [
        "Over several turns",
        "How long until the first broken answer",
        "By instruction",
        "Side by side",
        "Training data",
        "Export",
        "The run",
    ]
    assert set(titles) == {
        *always,
        "Recall",
        "Instructions that were not trained",
        "When the instruction changes",
        "Leakage and damage",
        "One question, one instruction",
        "The judge",
        "What the answers attend to",
        "Training",
    }
    assert re.findall("<h2>(.*?)</h2>", _page(bare)) == always
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
    for name in (
        "by_turn",
        "by_instruction",
        "generalization",
        "leakage",
        "single_by_kind",
        "recall_by_attribute",
    ):
        with (full.report / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
            rows = {next(iter(row.values())): row for row in csv.DictReader(file)}
        for expected in numbers[name]:
            row = rows[str(expected["at"])]
            assert float(row[expected["arm"]]) == expected["value"]
            assert (int(row[f"{expected['arm']} hits"]), int(row[f"{expected['arm']} n"])) == (
                expected["hits"],
                expected["n"],
            )


def test_figures_are_files_too(full: RunDir) -> None:
    for name in ("adherence", "survival", "change", "attention", "loss"):
        assert (full.report / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        picture = (full.report / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert (
            re.match(r'<svg [^>]*>\s*<rect [^>]*fill="#fff"', picture)
            and "currentColor" not in picture
        )  # dark text on white
    curve = (full.report / "figures" / "adherence.svg").read_text(encoding="utf-8")
    assert all(name in curve for name in ("GAtt-tuned", "base, told", "rival"))


def test_curves_show_seven_models_and_tables_all(bare: RunDir) -> None:
    for figure in ("adherence", "survival"):
        curve = (bare.report / "figures" / f"{figure}.svg").read_text(encoding="utf-8")
        assert [
            name in curve for name in ("base", "GAtt-tuned", "rival 1", "rival 4", "rival 5")
        ] == [True] * 4 + [False]
    assert "Curves show 7 of 8 models, tables all." in _page(bare)
    with (bare.report / "tables" / "by_instruction.csv").open(encoding="utf-8") as file:
        assert {"rival 5", "rival 5 hits", "ceiling"} <= next(csv.DictReader(file)).keys()


def test_the_numbers_behind_curves_are_files(full: RunDir) -> None:
    numbers = json.loads(full.scores.read_text(encoding="utf-8"))
    found = {}
    for name in ("survival_by_turn", "change_by_turn", "loss"):
        with (full.report / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
            found[name] = list(csv.DictReader(file))
    steps = [step["value"] for arm in numbers["survival"].values() for step in arm["steps"]]
    assert [float(row["value"]) for row in found["survival_by_turn"]] == steps
    new = [row["new"] for arm in numbers["change"].values() for row in arm["by_turn"]]
    assert [float(row["new"]) for row in found["change_by_turn"]] == new
    assert [(row["step"], row["loss"]) for row in found["loss"]] == [
        ("1", "2.0"),
        ("2", "1.5"),
        ("3", "1.2"),
    ]


def test_a_shared_report_does_not_tell_where_the_model_lies(full: RunDir, bare: RunDir) -> None:
    for run_dir in (full, bare):
        for name in ("report.html", "report.md", "report.json"):
            text = (run_dir.report / name).read_text(encoding="utf-8")
            assert "my-model.gguf" in text and str(run_dir.path) not in text


def test_the_markdown_has_the_tables_of_a_model_card(full: RunDir) -> None:
    text = (full.report / "report.md").read_text(encoding="utf-8")
    assert "| turn | base | tuned | rival | paper, without GAtt | paper, with GAtt |" in text
    assert "| tuned | 3.3 | +10.0% | 0.1 |" in text
    assert "### The run" in text and "| teacher | itself |" in text


def test_replies_are_shown_as_text(full: RunDir) -> None:
    page = _page(full)
    assert _NASTY not in page
    assert page.count("<script>") == 1
    assert "What of 0.0, &lt;b&gt;sir&lt;/b&gt;?" in page


def _open(page: str, folder: Path, script: str, *more: str) -> str:
    """What `script` has written into the title of the page in a browser that may ask nobody for anything."""
    listening = (
        "<script>window.problems = []; for (const name of ['error', 'securitypolicyviolation'])"
        "addEventListener(name, e => problems.push(e.message || e.blockedURI), true)</script>"
    )
    changed = page.replace("<title>", f"{listening}<title>", 1)
    file = folder / "page.html"
    file.write_text(
        changed.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8"
    )
    assert _CHROMIUM
    command = [
        _CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1100,900",
        "--virtual-time-budget=2000",
        *more,
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title
    return unescape(title[1])


@browser
def test_the_page_draws_its_charts_and_asks_nobody(full: RunDir, tmp_path: Path) -> None:
    script = (
        "const asked = performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length;"
        "document.title = JSON.stringify({problems, asked,"
        "charts: [...document.querySelectorAll('svg')].filter(s => s.checkVisibility())"
        ".map(s => s.parentElement.className + (s.getBoundingClientRect().height > 100))})"
    )
    found = json.loads(_open(_page(full), tmp_path, script))
    assert found == {"problems": [], "asked": 0, "charts": ["desktrue"] * 5}


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
def test_names_are_sorted_from_a_to_z_first(full: RunDir, tmp_path: Path) -> None:
    script = (
        "const t = document.querySelector('#single_by_kind'); t.querySelectorAll('th button')[0].click();"
        "document.title = JSON.stringify([...t.tBodies[0].rows].map(r => r.cells[0].textContent))"
    )
    names = json.loads(_open(_page(full), tmp_path, script))
    assert names == sorted(names) and len(names) > 20


@browser
def test_a_phone_shows_the_page_without_scrolling_sideways(full: RunDir, tmp_path: Path) -> None:
    # A window cannot be narrower than 500 pixels: the page is put into a frame of a phone's width.
    frame = "<title></title><body><iframe width=360 height=800></iframe></body>"
    inner = json.dumps(_page(full)).replace("</", "<\\/")
    script = (
        "const f = document.querySelector('iframe'); f.onload = () => { const d = f.contentDocument.documentElement;"
        "const charts = [...d.querySelectorAll('svg')].filter(s => s.checkVisibility());"
        "const letters = [...d.querySelectorAll('.phone text')].map(t => t.getBoundingClientRect().height);"
        "document.title = JSON.stringify([d.scrollWidth, d.scrollHeight, charts.map(s => s.parentElement.className),"
        "Math.min(...letters)]) };"
        f"f.srcdoc = {inner}"
    )
    width, height, charts, letters = json.loads(_open(frame, tmp_path, script))
    assert width <= 360 and height > 2000
    assert charts == ["phone"] * 5 and letters > 9  # pixels: drawn for a phone, not shrunk


@browser
def test_page_and_charts_are_dark_for_a_reader_who_wants_it(full: RunDir, tmp_path: Path) -> None:
    script = (
        "const look = getComputedStyle(document.body), text = [...document.querySelectorAll('.desk svg text')];"
        "document.title = JSON.stringify([look.color, look.backgroundColor,"
        "text.filter(t => getComputedStyle(t).fill === look.color).length])"
    )
    light = json.loads(_open(_page(full), tmp_path, script))
    dark = json.loads(
        _open(_page(full), tmp_path, script, "--blink-settings=preferredColorScheme=0")
    )
    assert light[:2] == ["rgb(27, 30, 35)", "rgb(255, 255, 255)"] and dark[:2] == [
        "rgb(228, 230, 234)",
        "rgb(21, 23, 27)",
    ]
    assert light[2] == dark[2] > 40


@browser
def test_everything_is_open_on_paper_and_closed_again(full: RunDir, tmp_path: Path) -> None:
    script = (
        "const all = [...document.querySelectorAll('details')], open = () => all.filter(d => d.open).length, found = [open()];"
        "for (const name of ['beforeprint', 'afterprint']) { dispatchEvent(new Event(name)); found.push(open()) }"
        "document.title = JSON.stringify([...found, all.length])"
    )
    before, paper, after, everything = json.loads(_open(_page(full), tmp_path, script))
    assert before == after == 1 and paper == everything > 4


@browser
def test_a_header_is_reached_by_the_keyboard(full: RunDir, tmp_path: Path) -> None:
    script = (
        "const b = document.querySelector('#by_instruction th button'); b.focus();"
        "document.title = JSON.stringify([document.activeElement === b, b.tabIndex, getComputedStyle(b).outlineStyle])"
    )
    assert json.loads(_open(_page(full), tmp_path, script)) == [True, 0, "solid"]


def test_names_of_parts_are_unique_in_the_page(full: RunDir) -> None:
    names = re.findall(r'\sid="([^"]+)"', _page(full))
    assert len(names) == len(set(names)) > 40


def test_an_arm_has_one_color_in_all_curves() -> None:
    """`change` lacks the other formats of the tuned model, which come before other models."""
    row = {"hits": 1, "n": 2, "value": 0.5, "low": 0.1, "high": 0.9}
    arms = ["base", "tuned", "tuned, Q4_K_M", "rival"]
    curve = adherence_curve([{"arm": arm, "at": turn, **row} for arm in arms for turn in (1, 2)], 2)
    turn = {"at": 1, "old": 0.5, "new": 0.5, "n": 2}
    change = change_curve(
        {arm: {"at": 1, "by_turn": [turn]} for arm in arms if "," not in arm}, arms
    )
    colors = [re.search(r"fill: (#\w+)[^>]*>rival<", picture.svg) for picture in (curve, change)]
    assert all(colors) and len({found[1] for found in colors if found}) == 1


def test_a_rate_and_a_number_share_a_column_of_the_csv(full: RunDir) -> None:
    with (full.report / "tables" / "overview.csv").open(encoding="utf-8") as file:
        strict, *_, distinct = csv.DictReader(file)
    numbers = json.loads(full.scores.read_text(encoding="utf-8"))
    assert [float(strict[row["arm"]]) for row in numbers["last_five"]] == [
        row["value"] for row in numbers["last_five"]
    ]
    assert float(distinct["tuned"]) == numbers["distinct_2"]["tuned"] and distinct["tuned n"] == ""


def test_markdown_keeps_a_row_in_a_line() -> None:
    rate = {"hits": 1, "n": 2, "value": 0.5, "low": 0.1, "high": 0.9}
    table = Table("t", ["a|b", "c"], [["x\ny", None], ["p | q", rate]])
    assert (
        markdown(table) == "| a\\|b | c |\n| --- | --- |\n| x y |  |\n| p \\| q | 50% (1 of 2) |\n"
    )


def test_shares_are_sorted_as_numbers_and_what_is_missing_as_nothing() -> None:
    nothing = {"hits": 0, "n": 0, "value": None, "low": 0.0, "high": 1.0}
    cells = ("+10.0%", "9%", nothing, None, float("nan"), "99% up", 3)
    assert [sort_key(cell) for cell in cells] == [10.0, 9.0, "", "", "", "99% up", 3]


def test_the_scores_of_the_test_are_those_of_real_replies(full: RunDir) -> None:
    """The made-up replies go through the real scoring, so that the page is tested with its real keys."""
    reply = Reply(**json.loads(full.replies.read_text(encoding="utf-8").splitlines()[0]))
    assert asdict(reply)["arm"] == "base"
