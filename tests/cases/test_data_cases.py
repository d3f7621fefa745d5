"""Dialogues and chats as people have them: shared ids, every published form, other encodings."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from support.cli import call_gatt, override_flags

from pipeline.data.dialogues import load_chats, load_dialogues
from pipeline.errors import GattError
from pipeline.gatt.assignment import read_splits
from pipeline.gatt.synthesis import Synthesis
from pipeline.recipe import Recipe, Synthesize
from pipeline.records import Completion, Dialogue, Task
from pipeline.run_dir import RunDir

_SMALL = override_flags(
    (
        "dialogues.train=4",
        "dialogues.turns=2",
        "dialogues.validation=0",
        "evaluate.dialogues=1",
        "evaluate.turns=1",
        "evaluate.suite_dialogues=1",
        "evaluate.suite_turns=2",
        "synthesize.edited_ratio=1",
    )
)
_QUESTIONS = [(f"Question {n} about rivers?", f"And lake {n}?") for n in range(4)]


def _sharegpt(user: str = "human", assistant: str = "gpt", **further: object) -> list[object]:
    return [
        {
            "conversations": [
                {"from": user, "value": first},
                {"from": assistant, "value": "Yes."},
                {"from": user, "value": second},
                {"from": assistant, "value": "No."},
            ],
            **further,
        }
        for first, second in _QUESTIONS
    ]


def _chats(make: Callable[[str, str], object]) -> list[object]:
    """Return a row for each dialogue, whose `conversations` `make` writes."""
    return [{"conversations": make(first, second)} for first, second in _QUESTIONS]


def _jsonl(rows: Sequence[object], end: str = "\n") -> str:
    return "".join(json.dumps(row) + end for row in rows)


def _turns(source: Path, run: Path) -> set[tuple[str, ...]]:
    """Return the user turns of all splits after `gatt instructions`."""
    done = call_gatt("instructions", "--run", run, *_SMALL, "--set", f"dialogues.source='{source}'")
    assert done.returncode == 0, done.stderr
    splits = read_splits(RunDir(run).assignments)
    return {assigned.dialogue.turns for split in splits.values() for assigned in split}


def _answer_all(tasks: Iterable[Task]) -> None:
    """Answer every request with the words of its question, so that each answer is on its topic."""
    for task in tasks:
        try:
            request = next(task)
            while True:
                text = f"Here is {request.messages[-1]['content'].strip('?')} for you."
                request = task.send(Completion(text, 9, 9, "stop"))
        except StopIteration:
            continue


# --- ids ---


@pytest.mark.parametrize(
    "ids",
    [
        ["identity_0"] * 3 + ["identity_1"] * 3,
        [None] * 6,
        [""] * 6,
        [1, "1", 1.0, "1.0", True, "True"],
        ["a", "a", "a#2", "a", "a#2", "b"],
        ["3", None, None, "2", "", "6"],
        ["a", "a~unseen", "a~plain", "a~recall", "a~change", "a~single"],
        [{"n": 1}] * 6,
    ],
)
def test_dialogues_that_share_an_id_keep_their_own_answers(
    ids: list[object], tmp_path: Path
) -> None:
    words = ("astronomy", "cooking", "sailing", "chess", "gardening", "music")
    turns = [(f"What about {word} then?", f"Why does {word} matter?") for word in words]
    rows = [{"id": name, "turns": pair} for name, pair in zip(ids, turns, strict=True)]
    source = tmp_path / "d.jsonl"
    source.write_text(_jsonl(rows), encoding="utf-8")
    dialogues = load_dialogues(str(source))
    assert [d.turns for d in dialogues] == turns
    assert len({d.id for d in dialogues}) == 6

    run_dir = RunDir(tmp_path / "run")
    flags = (*_SMALL, "--set", f"dialogues.source='{source}'", "--set", "dialogues.train=5")
    assert call_gatt("instructions", "--run", run_dir.path, *flags).returncode == 0
    splits = read_splits(run_dir.assignments)
    assert [len(splits[name]) for name in ("train", "evaluation")] == [5, 1]  # no row vanished
    suites = {**splits, **read_splits(run_dir.suites)}
    assigned_ids = [assigned.dialogue.id for split in suites.values() for assigned in split]
    assert len(set(assigned_ids)) == len(assigned_ids)

    recipe = Recipe(synthesize=Synthesize(edited_ratio=1))
    synthesis = Synthesis(recipe, lambda _answer: None)
    synthesis.run(_answer_all, splits["train"])
    for assigned in splits["train"]:
        (topic,) = (word for word in words if word in assigned.dialogue.turns[0])
        answers = synthesis.accepted(assigned)
        assert answers and all(topic in answer.raw for answer in answers)


def test_ids_that_are_unique_stay_as_they_are(tmp_path: Path) -> None:
    rows = [{"id": name, "turns": ["Hi"]} for name in ("x", 7, 0, "a@0", "b~c", "1.5")]
    source = tmp_path / "d.jsonl"
    source.write_text(_jsonl(rows), encoding="utf-8")
    assert [d.id for d in load_dialogues(str(source))] == ["x", "7", "0", "a@0", "b~c", "1.5"]


def test_a_dialogue_that_a_source_has_twice_is_not_evaluated_and_trained(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text(_jsonl(_sharegpt(id="x") * 2), encoding="utf-8")
    done = call_gatt(
        *("instructions", "--run", tmp_path / "run", *_SMALL),
        *("--set", f"dialogues.source='{source}'"),
    )
    assert "1 dialogues are not trained on, because they begin as" in done.stderr
    splits = read_splits(RunDir(tmp_path / "run").assignments)
    (evaluated,) = splits["evaluation"]
    assert evaluated.dialogue.turns not in {a.dialogue.turns for a in splits["train"]}


# --- forms of a chat ---


def _messages(first: str, second: str) -> list[object]:
    return [
        {"role": "user", "content": first},
        {"role": "model", "content": None},
        {"role": "user", "content": second},
    ]


def _parts(text: str) -> list[object]:
    return [{"type": "text", "text": text}]


_FORMS: dict[str, list[object]] = {
    "roles and texts": _chats(lambda a, b: [["human", a], ["gpt", "x"], ["human", b]]),
    "pairs of user and assistant": _chats(lambda a, b: [[a, "x"], [b, None]]),
    "texts that take turns": _chats(lambda a, b: [a, "x", b, "y"]),
    "objects of user and assistant": _chats(
        lambda a, b: [{"user": a, "assistant": "x"}, {"user": b, "assistant": "y"}]
    ),
    "tools": _chats(
        lambda a, b: [
            {"from": "system", "value": "s", "tools": "[]"},
            {"from": "human", "value": a},
            {"from": "function_call", "value": "{}"},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "x"},
            {"from": "human", "value": b},
            {"from": "tool", "value": "{}"},
        ]
    ),
    **{name: _sharegpt(assistant=name) for name in ("chatgpt", "bing", "bard", "Assistant")},
    "upper case": _sharegpt(user="Human"),
    "role and content under conversations": _chats(
        lambda a, b: [
            {"role": "user", "content": a},
            {"from": "gpt", "value": "x"},
            {"role": "user", "value": b, "weight": "heavy"},
        ]
    ),
    "content parts": _chats(
        lambda a, b: [
            {"role": "developer", "content": _parts("s")},
            {"role": "user", "content": _parts(a)},
            {"role": "assistant", "content": None, "tool_calls": [{}]},
            {"role": "tool", "content": _parts("x")},
            {"role": "user", "content": [b]},
        ]
    ),
    "columns of an older datasets": _chats(
        lambda a, b: {"from": ["human", "gpt", "human"], "value": [a, "x", b]}
    ),
    "a list a line": [_messages(a, b) for a, b in _QUESTIONS],
    "turns of objects": [{"turns": _messages(a, b)} for a, b in _QUESTIONS],
    "conversation": [{"conversation": _messages(a, b)} for a, b in _QUESTIONS],
    "JSON in a text": [{"messages": json.dumps(_messages(a, b))} for a, b in _QUESTIONS],
    "Python in a text": [{"messages": str(_messages(a, b))} for a, b in _QUESTIONS],
}


@pytest.mark.parametrize("form", _FORMS)
def test_every_form_of_a_chat(form: str, tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text(_jsonl(_FORMS[form]), encoding="utf-8")
    assert [d.turns for d in load_dialogues(str(source))] == _QUESTIONS


def test_unknown_roles_and_rows_without_a_user_turn_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [{"role": "narrator", "content": "x"}, {"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ]
    source = tmp_path / "d.jsonl"
    source.write_text(_jsonl(rows), encoding="utf-8")
    assert load_dialogues(str(source)) == [Dialogue("1", "", ("Hi",))]
    remarks = capsys.readouterr().err
    assert f"skipped 2 without a user turn (the first: {source}, line 2)" in remarks
    assert f"1 with an image or another attachment (the first: {source}, line 4)" in remarks
    assert "1 messages of 'narrator', which is taken for another side" in remarks


# --- files ---


def _csv(delimiter: str, **further: str) -> str:
    lines = [delimiter.join(("id", *further, "messages"))]
    for n, row in enumerate(_sharegpt()):
        assert isinstance(row, dict)
        cell = json.dumps(row["conversations"]).replace('"', '""')
        lines.append(delimiter.join((f"{n}", *further.values(), f'"{cell}"')))
    return "\r\n".join(lines)


_LINES, _ARRAY = _jsonl(_sharegpt()), json.dumps(_sharegpt(), indent=1)
_BZIP2 = bz2.compress(_LINES.encode())
_DAMAGED_BZIP2 = _BZIP2[:60] + bytes(9) + _BZIP2[69:]
_SOURCES = [
    {**row, "from": "the web", "content": "x"} for row in _sharegpt() if isinstance(row, dict)
]
_FILES: dict[str, tuple[str, bytes]] = {
    "an array of rows with columns named as in messages": ("d.json", json.dumps(_SOURCES).encode()),
    "an array after a BOM": ("d.json", _ARRAY.encode("utf-8-sig")),
    "an array after a space": ("d.json", f"\n {_ARRAY}".encode()),
    "an array called jsonl": ("d.jsonl", _ARRAY.encode()),
    "an array in one line": ("d.json", json.dumps(_sharegpt()).encode()),
    "lines called json": ("d.json", _LINES.encode()),
    "lines after a BOM with CRLF and blanks": (
        "d.jsonl",
        ("\r\n" + _jsonl(_sharegpt(), "\r\n\r\n")).encode("utf-8-sig"),
    ),
    "UTF-16": ("d.jsonl", _LINES.encode("utf-16")),
    "data": ("d.json", json.dumps({"version": "1", "tags": ["x"], "data": _sharegpt()}).encode()),
    "conversations": ("d.json", json.dumps({"conversations": _sharegpt()}, indent=1).encode()),
    "another key": ("d.json", json.dumps({"n": 4, "chats": _sharegpt()}).encode()),
    "gzip": ("d.jsonl.gz", gzip.compress(_LINES.encode())),
    "gzip without a suffix": ("dialogues", gzip.compress(_LINES.encode())),
    "bzip2": ("d.jsonl.bz2", _BZIP2),
    "xz": ("d.jsonl.xz", lzma.compress(_LINES.encode())),
    "csv": ("d.csv", _csv(",").encode()),
    "csv of Excel": ("d.csv", _csv(";").encode("utf-8-sig")),
    "tsv": ("d.tsv", _csv("\t").encode()),
    "csv with the number of turns": ("d.csv", _csv(",", turns="2").encode()),
    "csv after a blank line": ("d.csv", f"\r\n{_csv(';')}".encode()),
    "csv in capitals": ("D.CSV", _csv(",").encode()),
    "csv in gzip": ("d.csv.gz", gzip.compress(_csv(",").encode())),
}


@pytest.mark.parametrize("name", _FILES)
def test_every_kind_of_file(name: str, tmp_path: Path) -> None:
    file, content = _FILES[name]
    folder = tmp_path / "a [b]"
    folder.mkdir()
    (folder / file).write_bytes(content)
    assert [d.turns for d in load_dialogues(str(folder / file))] == _QUESTIONS


def test_one_object_is_one_dialogue(tmp_path: Path) -> None:
    exchanges = [{"User": question, "assistant": "x"} for question in _QUESTIONS[0]]
    rows = [_sharegpt()[0], {"turns": list(_QUESTIONS[0]), "tags": ["x"]}]
    for n, row in enumerate([*rows, {"conversations": exchanges}]):
        file = tmp_path / f"{n}.json"
        file.write_text(json.dumps(row, indent=2), encoding="utf-8")
        assert load_dialogues(str(file)) == [Dialogue("1", "", _QUESTIONS[0])]


def test_parquet_and_folders(tmp_path: Path) -> None:
    import datasets

    legacy = _FORMS["columns of an older datasets"]
    folder = tmp_path / "data[1]"
    datasets.Dataset.from_list(legacy).to_parquet(folder / "legacy.parquet")
    datasets.Dataset.from_list(_sharegpt()).to_parquet(folder / "ultra" / "train_sft-0.parquet")
    datasets.Dataset.from_list(_sharegpt()[:1]).to_parquet(folder / "ultra" / "test_sft-0.parquet")
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for split in ("train_sft", "test_sft"):
        readme += f"  - split: {split}\n    path: {split}-*\n"
    (folder / "ultra" / "README.md").write_text(f"{readme}---\n", encoding="utf-8")
    datasets.DatasetDict(train=datasets.Dataset.from_list(_sharegpt())).save_to_disk(
        str(tmp_path / "saved")
    )
    for source in (folder / "legacy.parquet", folder / "ultra", tmp_path / "saved"):
        assert [d.turns for d in load_dialogues(str(source))] == _QUESTIONS, source
    readme = readme.replace("train_sft", "gen").replace("test_sft", "sft")
    plain = tmp_path / "plain"
    for split in ("gen", "sft"):
        datasets.Dataset.from_list(_sharegpt()).to_parquet(plain / f"{split}-0.parquet")
    (plain / "README.md").write_text(f"{readme}---\n", encoding="utf-8")
    with pytest.raises(GattError, match="has the splits gen, sft and none named train"):
        load_dialogues(str(plain))


def test_a_damaged_saved_dataset_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(GattError, match=f"Cannot load the dataset '{tmp_path}'"):
        load_dialogues(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "is empty"),
        ("d.json", b"[]", "is empty"),
        ("d.csv", b"id,messages\n", "is empty"),
        ("d.jsonl", '{"turns": ["a"]}\n{"turns": ["é"]}\n'.encode("latin-1"), "line 2: not UTF-8"),
        ("d.jsonl", b'{"turns": ["a"]}\n{"turns": ["b"\n{"turns": ["c"]}\n', "line 2: not a line"),
        ("d.json", b'{\n "turns": ["a",\n}', "line 3: not a line of JSON"),
        ("d.json", b"[" * 100_000, "not valid JSON"),
        ("d.json", b'{"a": [{"turns": ["x"]}], "b": [{"turns": ["y"]}]}', "which of a, b"),
        ("d.jsonl.gz", gzip.compress(b'{"turns": ["a"]}\n' * 9, mtime=0)[:-12], "damaged archive"),
        ("d.jsonl.bz2", _DAMAGED_BZIP2, r"d\.jsonl\.bz2 is a damaged archive"),
        ("d.zip", b"PK\x03\x04xxxxxxxx", "a zip archive"),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfdxxxxxxxx", "is zstd"),
        ("d.parquet", b"PAR1xxxxxxxxxxxxxPAR1", "cannot be read as Parquet"),
        ("d.csv", b"id,text\n1,Hi\n", "row 1: expected an object with `turns`.*it has id, text"),
        ("d.jsonl", b'"Hi"\n', "line 1: expected an object"),
    ],
)
def test_what_is_refused_is_one_clear_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GattError, match=message):
        load_dialogues(str(tmp_path / name))


def test_half_an_emoji_is_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    rows = "".join(
        f'{{"id": "\\udc00{n}", "conversations": [{{"from": "human", "value": "Nice {n} '
        f'\\ud83d smile"}}, {{"from": "gpt", "value": "\\ud83d\\ude00"}}]}}\n'
        for n in range(3)
    )
    source = tmp_path / "d.jsonl"
    source.write_text(rows, encoding="utf-8")
    assert _turns(source, tmp_path / "run") == {(f"Nice {n} \ufffd smile",) for n in range(3)}
    assert [d.id for d in load_dialogues(str(source))] == ["\ufffd0", "\ufffd1", "\ufffd2"]


# --- weights ---


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({}, 1.0),
        ({"weight": None, "train": None, "loss": None}, 1.0),
        ({"weight": 1}, 1.0),
        ({"train": True, "loss": 1, "weight": 0.5}, 0.5),
        ({"loss_weight": 2}, 2.0),
        *[({key: False}, 0.0) for key in ("loss", "train", "training", "train_on_turn")],
        *[({key: 0}, 0.0) for key in ("weight", "loss", "train", "loss_weight")],
        ({"weight": 1, "train": False}, 0.0),
    ],
)
def test_the_weight_of_an_answer(fields: dict[str, object], weight: float, tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "One.", **fields},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Two."},
    ]
    source = tmp_path / "c.jsonl"
    source.write_text(_jsonl([{"messages": chat}]), encoding="utf-8")
    assert load_chats(str(source))[0].answer_weights == (weight, 1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": -1}, r"line 1: weight = -1; expected a number from 0"),
        ({"weight": "heavy"}, "weight = 'heavy'; expected a number"),
        ({"train": 0.5}, r"train = 0\.5; expected true or false"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail = .* is not supported"),
    ],
)
def test_a_weight_that_is_none_is_refused(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "One.", **fields}]
    source = tmp_path / "c.jsonl"
    source.write_text(_jsonl([{"messages": chat}]), encoding="utf-8")
    with pytest.raises(GattError, match=message):
        load_chats(str(source))


def test_a_chat_ends_with_the_last_answer_that_is_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def chat(*weights: float) -> object:
        messages: list[object] = []
        for n, weight in enumerate(weights):
            messages.append({"role": "user", "content": f"Question {n}?"})
            messages.append({"role": "assistant", "content": f"Answer {n}.", "weight": weight})
        return {"messages": messages}

    source = tmp_path / "c.jsonl"
    tool = {"messages": [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "x"}]}
    source.write_text(_jsonl([chat(0, 1, 0), chat(0, 0), tool, chat(1)]), encoding="utf-8")
    chats = load_chats(str(source))
    assert [c.messages[-1]["content"] for c in chats] == ["Answer 1.", "Answer 0."]
    assert [c.answer_weights for c in chats] == [(0.0, 1.0), (1.0,)]
    remarks = capsys.readouterr().err
    assert "skipped 1 without an answer that is learned" in remarks
    assert "1 with tools or other roles" in remarks
