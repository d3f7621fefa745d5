"""Files that survive an interruption, and the hashes by which stages know their inputs."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import GattError
from pipeline.files import (
    JsonlLog,
    json_line,
    read_jsonl,
    sha256,
    whole_file,
    write_json,
    write_jsonl,
)


@dataclass(frozen=True)
class _Record:
    name: str
    count: int


def test_a_record_is_one_line_of_readable_json() -> None:
    assert json_line(_Record("Grüße\n", 2)) == '{"name": "Grüße\\n", "count": 2}\n'
    assert json_line({"name": None}) == '{"name": null}\n'


def test_an_incomplete_last_line_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "log" / "records.jsonl"
    with JsonlLog(file) as log:
        log.append(_Record("first", 1))
        log.append(_Record("second", 2))
    with file.open("ab") as stream:
        stream.write(b'{"name": "thi')
    with JsonlLog(file) as log:
        assert [record["name"] for record in log.records] == ["first", "second"]
        log.append(_Record("third", 3))
    assert [value["name"] for _, value in read_jsonl(file)] == ["first", "second", "third"]


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"a": 1}\n\n{"a": \n', encoding="utf-8")
    rows = read_jsonl(file)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(GattError, match=r"records\.jsonl, line 3: not a line of JSON"):
        next(rows)


def test_an_error_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    write_json(file, {"n": 1})
    with pytest.raises(ZeroDivisionError), whole_file(file) as draft:
        draft.write_text("half")
        raise ZeroDivisionError
    assert json.loads(file.read_text()) == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="access modes are of POSIX")
def test_a_file_is_flushed_with_write_access_as_windows_demands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []

    def fsync(descriptor: int) -> None:
        import fcntl

        flushed.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", [1])
    assert flushed == [os.O_RDWR]
    assert (tmp_path / "a.json").read_text() == "[\n  1\n]\n"


def test_nan_becomes_null(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    write_json(file, {"rates": [0.5, math.nan], "pair": (math.nan, 1)})
    assert json.loads(file.read_text()) == {"rates": [0.5, None], "pair": [None, 1]}


def test_a_hash_follows_contents_and_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / name / "rows.jsonl", [{"n": 1}])
    first, second = tmp_path / "a", tmp_path / "b"
    assert sha256(first / "rows.jsonl") == (
        "372f279dec24e545b8b362b351ad1e131e55611f5caf789e7fb5e92dfdb5a79c"
    )
    assert sha256(first) == sha256(second)
    (second / ".DS_Store").write_text("left by a file manager")
    (second / ".cache").mkdir()
    (second / ".cache" / "rows.lock").touch()
    assert sha256(first) == sha256(second)
    (second / "rows.jsonl").rename(second / "records.jsonl")
    assert sha256(first) != sha256(second)
    before = sha256(first / "rows.jsonl")
    write_jsonl(first / "rows.jsonl", [{"n": 2}])
    assert sha256(first / "rows.jsonl") != before


def test_halves_of_surrogate_pairs_do_not_stop_a_file(tmp_path: Path) -> None:
    assert json_line({"text": "a \ud83d b"}) == '{"text": "a \ufffd b"}\n'
    write_json(tmp_path / "a.json", {"text": "\ud83d\ude00 😀"})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"text": "\ufffd\ufffd 😀"}


def test_a_damaged_line_in_a_log_is_named(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"a": 1}\n\0\0\0\n{"a": 2}\n')
    with pytest.raises(GattError, match=r"log\.jsonl, line 2: not a line of JSON"):
        JsonlLog(file)
