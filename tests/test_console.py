"""What is printed where: plain text off a terminal, bars and fitted tables on one."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import console


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Replace the clock by a list of one item: the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    yield now


def test_progress_off_a_terminal_is_a_line_every_ten_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress("train: steps", 50, 10) as bar:
        for _ in range(40):
            clock[0] += 4
            bar.advance(log="loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: steps: 13 of 50, 2:28 left loss 1.5"
    assert lines[-1] == "train: steps: 50 of 50, 0:00 left loss 1.5"
    assert len(lines) == 14


def test_what_exceeds_an_estimated_total_is_a_line_every_ten_seconds_too(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress("exam: replies", 2) as bar:
        for _ in range(7):
            clock[0] += 2
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["exam: replies: 2 of 2, 0:00 left", "exam: replies: 7 of 2, 0:00 left"]


def test_the_time_left_follows_the_pace_after_a_burst_of_reused_results(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress("evaluate: replies", 4000) as bar:
        for _ in range(2000):
            clock[0] += 0.01
            bar.advance()
        for _ in range(40):
            clock[0] += 10
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluate: replies: 1000 of 4000, 0:30 left"
    assert lines[-1] == "evaluate: replies: 2040 of 4000, 326:40 left"


def test_progress_keeps_its_stream_while_output_is_captured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "folder" / "log"
    with console.progress("steps", 1) as bar, console.capture_output(log):
        print("from a library")
        bar.advance()
    assert capsys.readouterr().err == "steps: 1 of 1, 0:00 left\n"
    assert log.read_text(encoding="utf-8") == "from a library\n"


def test_progress_on_a_terminal_is_a_bar_with_remarks_above_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress("steps", 2) as bar:
        bar.advance(2, log="[b]")
        console.log("a remark")
    text = terminal.getvalue()
    assert "2/2" in text
    assert "[b]" in text
    assert "a remark\n" in text
    assert text.rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown again


def test_tables_off_a_terminal_are_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("small [x]", 9, "8 GB", None), ("large", 1234, "16 GB", "-")]
    console.print_table(("model", "tokens", "GPU", "note"), rows)
    assert capsys.readouterr().out.splitlines() == [
        "model      tokens    GPU  note",
        "small [x]       9   8 GB",
        "large        1234  16 GB     -",
    ]


def test_long_cells_are_not_wrapped_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(("text",), [("word " * 100,)])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_tables_fit_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    console.print_table(("name", "text"), [("a", "word " * 20)])
    lines = terminal.getvalue().splitlines()
    assert len(lines) > 4
    assert max(map(len, lines[1:])) <= 40


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", b"Gr??e ? ?\n"), ("cp1252", b"Gr\xfc\xdfe ? ?\n"), ("utf-8", None)],
)
def test_characters_that_the_terminal_lacks_are_replaced(
    encoding: str, printed: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(output, encoding))
    monkeypatch.setattr(sys, "stdin", None)
    console.tolerate_encodings()
    console.print_result("Grüße 漢 \udce9")
    assert output.getvalue() == (printed or "Grüße 漢 ?\n".encode())
    console.log("漢 \udce9")
    assert b"\\udce9" in output.getvalue()


@pytest.mark.parametrize(
    ("content", "encoding", "text"),
    [
        ("Grüße, 漢".encode(), "utf-8", "Grüße, 漢"),
        ("Grüße, 漢".encode("utf-8-sig"), "utf-8", "Grüße, 漢"),
        ("Grüße, 漢".encode(), "ascii", "Grüße, 漢"),
        ("Grüße".encode("latin-1"), "utf-8", "Grüße"),
        ("привет".encode("koi8-r"), "koi8-r", "привет"),
    ],
)
def test_input_in_other_encodings(
    content: bytes,
    encoding: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    console._log_latin_1.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding))
    console.tolerate_encodings()
    assert sys.stdin.read() == text
    assert ("read as Latin-1" in capsys.readouterr().err) == (content == "Grüße".encode("latin-1"))
