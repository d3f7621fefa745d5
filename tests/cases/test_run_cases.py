"""Runs as people have them: edited inputs, two at once, old folders, odd homes and encodings."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from support.cli import call_gatt, override_flags

from pipeline.cli import stages as commands
from pipeline.errors import GattError
from pipeline.files import sha256, whole_file, write_jsonl
from pipeline.folders import lock_file
from pipeline.hub import convert
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.recipe import Recipe, Train
from pipeline.recipe_file import load_recipe
from pipeline.run import _settings, open_run
from pipeline.run_dir import HubRevision, RunDir
from pipeline.system import cache_path
from pipeline.training.examples import training_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TINY = override_flags()


def _write_dialogues(file: Path, topic: str = "rivers") -> None:
    rows = [{"turns": [f"Question {n} about {topic}?", "Why?", "How?"]} for n in range(8)]
    write_jsonl(file, rows)


def _instructions(run: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    done = call_gatt("instructions", "--run", run, *_TINY, *flags)
    assert done.returncode == 0, done.stderr
    return done


# --- edited inputs ---


def test_edited_dialogues_are_used_and_the_reason_is_said(tmp_path: Path) -> None:
    source, run = tmp_path / "mine.jsonl", tmp_path / "run"
    flags = ("--set", f"dialogues.source='{source}'")
    _write_dialogues(source)
    _instructions(run, *flags)
    assert _instructions(run, *flags).stderr.endswith("instructions: done already\n")
    _write_dialogues(source, "volcanoes")
    again = _instructions(run, *flags).stderr
    assert "instructions: runs again, because this has changed: mine.jsonl\n" in again
    text = RunDir(run).assignments.read_text(encoding="utf-8")
    assert "about volcanoes" in text and "about rivers" not in text
    (moved,) = run.glob("instructions.*.old")
    assert "about rivers" in (moved / "assignments.json").read_text(encoding="utf-8")
    assert "this has changed: the recipe\n" in _instructions(run, *flags, "--set", "seed=2").stderr


_Edit = Callable[[Path], None]


def _append(name: str) -> _Edit:
    def edit(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b" ")

    return edit


@pytest.mark.parametrize(
    ("stage", "override", "name", "edit"),
    [
        ("instructions", "dialogues.source={0}/folder", "folder", _append("folder/b.jsonl")),
        ("synthesize", "synthesize.teacher={0}/model", "model", _append("model/config.json")),
        ("synthesize", "synthesize.teacher={0}/model", "model", _append("model/a.safetensors")),
        ("train", "train.replay_data={0}/chats.jsonl", "chats.jsonl", _append("chats.jsonl")),
        ("train", "train.replay_data={0}/folder", "folder", _append("folder/b.jsonl")),
        (
            *("train", "train.init_adapter={0}/adapter", "adapter_config.json"),
            _append("adapter/adapter_config.json"),
        ),
        ("evaluate", 'evaluate.extra_models=["{0}/r.gguf"]', "r.gguf", _append("r.gguf")),
        ("evaluate", "evaluate.judge={0}/model", "model", _append("model/chat_template.jinja")),
        ("evaluate", "model={0}/model", "model", _append("model/tokenizer.json")),
    ],
)
def test_a_stage_knows_when_what_it_reads_is_edited(
    stage: str, override: str, name: str, edit: _Edit, tiny_llama: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "a.safetensors").write_bytes(b"part")
    for name_of_file in ("folder/b.jsonl", "chats.jsonl", "r.gguf", "adapter/adapter_config.json"):
        (tmp_path / name_of_file).parent.mkdir(exist_ok=True)
        (tmp_path / name_of_file).write_bytes(b"{}")
    recipe = load_recipe(None, (override.format(tmp_path),))
    run_dir, module = RunDir(tmp_path / "run"), import_module(f"pipeline.stages.{stage}")
    for file in (run_dir.assignments, run_dir.suites, run_dir.examples, run_dir.tuned("Q8_0")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"{}")
    inputs = module.inputs(recipe, run_dir)
    run_dir.claim(stage, "settings", inputs)
    run_dir.finish(stage, "settings", inputs, 1.0)
    assert run_dir.changes(stage, "settings", module.inputs(recipe, run_dir)) == []
    edit(tmp_path)
    assert run_dir.changes(stage, "settings", module.inputs(recipe, run_dir)) == [name]


def test_all_parts_of_a_split_model_count(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for part in parts:
        part.write_bytes(part.name.encode())
    before = sha256(parts[0])
    assert sha256(parts[0]) == before
    parts[2].write_bytes(b"edited")
    assert sha256(parts[0]) != before


def test_a_large_file_is_hashed_again_only_after_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pipeline.files._LARGE_BYTES", 4)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    digest = sha256(file)
    (cached,) = (tmp_path / "cache" / "gatt" / "hashes").iterdir()
    assert cached.read_text() == digest
    status = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `rsync --times` leaves it
    assert sha256(file) != digest


def test_two_inputs_of_one_name_both_count(tmp_path: Path) -> None:
    files = [tmp_path / folder / "model.gguf" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(b"x")
    run_dir = RunDir(tmp_path / "run")
    run_dir.claim("evaluate", "", files)
    run_dir.finish("evaluate", "", files, 1.0)
    for file, name in zip(files, ("model.gguf", "model.gguf (2)"), strict=True):
        file.write_bytes(b"y")
        assert run_dir.changes("evaluate", "", files) == [name]
        file.write_bytes(b"x")


def test_an_input_that_is_edited_while_a_stage_reads_it_counts(tmp_path: Path) -> None:
    file, run_dir = tmp_path / "mine.jsonl", RunDir(tmp_path / "run")
    file.write_bytes(b"old")
    run_dir.claim("instructions", "", [file])
    file.write_bytes(b"new")
    run_dir.finish("instructions", "", [file], 1.0)
    assert run_dir.changes("instructions", "", [file]) == ["mine.jsonl"]


def test_the_time_of_a_stage_is_that_of_all_its_sessions(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)

    def finish() -> float:
        run_dir.finish("train", "", [], 60.0)
        manifest = run_dir.manifest("train")
        assert manifest
        return manifest["seconds"]

    run_dir.claim("train", "", [])
    run_dir.interrupt("train", 1740.0)
    run_dir.claim("train", "", [])
    assert finish() == 1800
    run_dir.restart_training()
    run_dir.claim("train", "", [])
    assert finish() == 60
    run_dir.claim("train", "", [])  # once more, after it has finished
    assert finish() == 60
    run_dir.restart_training()
    run_dir.claim("train", "", [])
    run_dir.interrupt("train", 1740.0)
    run_dir.claim("train", "other settings", [])
    assert finish() == 60


def test_a_list_of_the_run_may_have_the_name_of_a_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "lists.toml").touch()
    run_dir = RunDir(tmp_path / "run")
    run_dir.claim("instructions", "settings", [tmp_path / "lists.toml"])
    run_dir.lists.write_text("hobby = []")
    run_dir.finish("instructions", "settings", [run_dir.lists, tmp_path / "lists.toml"], 1.0)
    manifest = run_dir.manifest("instructions")
    assert manifest and len(manifest["inputs"]) == 2


@pytest.mark.parametrize(
    ("name", "is_function"),
    [("rule.py", True), ("chat.pyramids.jsonl", False), ("notes.py.txt", False)],
)
def test_an_unfinished_stage_goes_on_after_a_change_of_a_function_only(
    name: str, is_function: bool, tmp_path: Path
) -> None:
    files, run_dir = [tmp_path / name, tmp_path / "more" / name], RunDir(tmp_path / "run")
    for n, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        file.write_text(str(n))
    run_dir.claim("synthesize", "", files)
    run_dir.answers.touch()
    files[1].write_text("changed")
    run_dir.claim("synthesize", "", files)
    assert run_dir.answers.exists() is is_function


def test_a_dataset_counts_by_its_commit_where_the_hub_answers(tmp_path: Path) -> None:
    run_dir, name = RunDir(tmp_path), "owner/name"
    run_dir.claim("instructions", "", [HubRevision(name, "1")])
    run_dir.finish("instructions", "", [HubRevision(name, "1")], 1.0)
    assert run_dir.changes("instructions", "", [HubRevision(name, "1")]) == []
    assert run_dir.changes("instructions", "", [HubRevision(name, "")]) == []  # offline
    assert run_dir.changes("instructions", "", [HubRevision(name, "2")]) == [name]


def test_a_run_of_an_earlier_version_stays_done_until_an_input_is_edited(tmp_path: Path) -> None:
    source, run = tmp_path / "mine.jsonl", tmp_path / "run"
    flags = ("--set", f"dialogues.source='{source}'")
    _write_dialogues(source)
    _instructions(run, *flags)
    for name in ("manifest.json", "started.json"):
        file = run / "instructions" / name
        written = json.loads(file.read_text(encoding="utf-8"))
        del written["version"], written["inputs"]["mine.jsonl"]
        file.write_text(json.dumps(written), encoding="utf-8")
    assert "done already" in _instructions(run, *flags).stderr
    later = time.time() + 5
    os.utime(source, (later, later))
    assert "this has changed: mine.jsonl" in _instructions(run, *flags).stderr


def test_keys_that_change_no_result_do_not_count() -> None:
    stage = import_module("pipeline.stages.synthesize")
    before = _settings(stage, Recipe())
    fewer = load_recipe(None, ("synthesize.max_parallel=4",))
    assert _settings(stage, fewer) == before
    assert _settings(stage, load_recipe(None, ("synthesize.candidates=3",))) != before


def test_keys_that_came_later_count_once_they_are_set() -> None:
    stage = import_module("pipeline.stages.synthesize")
    assert "max_thought_tokens" not in _settings(stage, Recipe())
    changed = load_recipe(None, ("synthesize.max_thought_tokens=1",))
    assert '"max_thought_tokens":1' in _settings(stage, changed)


def test_the_temperature_in_the_modelfile_counts_once_it_is_set() -> None:
    stage = import_module("pipeline.stages.export")
    default, cold = Recipe(), load_recipe(None, ("evaluate.temperature=0.2",))
    sections = (section.model_dump_json() for section in (default.export, default.dialogues))
    before = " ".join((str(default.seed), default.model, *sections))
    assert _settings(stage, default) == before, "a run made before this counted stays done"
    assert _settings(stage, cold) == f"{before} evaluate.temperature=0.2"


# --- two at once ---

_HOLD = """
import sys, time
from pathlib import Path
from pipeline.run_dir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    _instructions(tmp_path)
    run_dir = RunDir(tmp_path)
    (run_dir.checkpoints / "checkpoint-1").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()}
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "locked\n"
        for words in (
            ("run", "--set", "seed=2"),
            ("instructions", "--set", "seed=2"),
            ("train", "--restart"),
        ):
            done = call_gatt(*words, "--run", tmp_path)
            assert done.returncode == 1
            line = done.stderr.splitlines()[-1]
            assert f"Another gatt (process {other.pid} on " in line and ", since 20" in line
            assert "Wait for it, or choose another folder with --run" in line
        assert (
            "Nothing was synthesized"
            in call_gatt("synthesize", "--stats", "--run", tmp_path).stderr
        )  # only reads
        assert (
            "Another gatt"
            in call_gatt("export", "--model", "smollm2-135m", "--out", tmp_path).stderr
        )
        other.kill()
    assert (run_dir.checkpoints / "checkpoint-1").is_dir()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # The lock of a killed process is free at once.
    assert "done already" in _instructions(tmp_path).stderr
    assert not (tmp_path / ".lock.json").exists()


def test_a_model_is_converted_once_by_two_at_once(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, conversions, original = find_model(str(tiny_llama)), [], convert.write_formats

    def write_formats(*arguments: object) -> None:
        conversions.append(arguments)
        time.sleep(0.3)
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "write_formats", write_formats)
    files: list[Path] = []
    threads = [
        threading.Thread(target=lambda: files.append(cached_gguf(model, "F16"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert files[0] == files[1] and files[0].read_bytes().startswith(b"GGUF")
    assert "F16.gguf; waiting for it." in capsys.readouterr().err


def test_an_interrupted_conversion_leaves_nothing_that_counts(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = find_model(str(tiny_llama))
    with (
        mock.patch.object(convert, "write_formats", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        cached_gguf(model, "F16")
    assert not list((tmp_path / "gatt").glob("*.gguf"))
    assert cached_gguf(model, "F16").is_file()


def test_the_holder_of_a_lock_is_removed_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), lock_file(tmp_path / "x"):
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]


# --- weights of replayed answers ---


def test_answers_without_weight_are_not_learned(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.training.unsloth import load_tokenizer

    tokenizer: PreTrainedTokenizerBase = load_tokenizer(tiny_llama)

    def chat(**fields: object) -> object:
        return {
            "messages": [
                {"role": "user", "content": "What is 1 plus 1?"},
                {"role": "assistant", "content": "Wrong: seven.", **fields},
                {"role": "user", "content": "Are you sure?"},
                {"role": "assistant", "content": "Sorry: two.", "weight": 0.5},
            ]
        }

    synthesized, replay = tmp_path / "dialogues.jsonl", tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    row = {"messages": messages, "asked": messages, "way": "plain"}
    write_jsonl(synthesized, [row] * 3)

    def learned(max_length: int = 1024, **fields: object) -> list[dict[float, str]]:
        write_jsonl(replay, [chat(**fields)])
        settings = Train(
            replay_data=str(replay), replay_ratio=0.25, loss="all_turns", max_length=max_length
        )
        examples = training_examples(tokenizer, Recipe(train=settings), synthesized)
        return [
            {
                weight: tokenizer.decode(
                    [
                        label
                        for label, of_label in zip(e.labels, e.weights, strict=True)
                        if of_label == weight and label >= 0
                    ]
                )
                for weight in sorted(set(e.weights))
            }
            for e in examples[3:]
        ]

    end = tokenizer.eos_token
    for fields in ({"weight": 0}, {"train": False}, {"loss": False}, {"training": False}):
        assert learned(**fields) == [{0.0: "", 0.5: f"Sorry: two.{end}"}], fields
    for present in ({}, {"weight": 1}, {"weight": None}, {"train": True}):
        (weights,) = learned(**present)
        assert weights == {0.0: "", 0.5: f"Sorry: two.{end}", 1.0: f"Wrong: seven.{end}"}
    assert learned(weight=0, max_length=64) == []  # the second answer does not fit
    assert "replayed chats left out: 1" in capsys.readouterr().err


# --- homes ---


@pytest.mark.parametrize("home", ["/dev/null", "/proc/none"])
def test_without_a_home_models_are_converted_in_the_temporary_folder(
    home: str,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    from pipeline import system

    system._fallback_cache.cache_clear()
    file = cached_gguf(find_model(str(tiny_llama)), "F16")
    (folder,) = tmp_path.iterdir()
    assert file.parent == folder and folder.name.startswith("gatt-cache-")
    assert folder.stat().st_mode & 0o077 == 0  # nobody else can plant a model there
    remark = f"The cache folder {home}/.cache/gatt cannot be written; converted models go to"
    assert capsys.readouterr().err.count(remark) == 1
    system._fallback_cache.cache_clear()


def test_a_cache_that_can_only_be_read_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("pipeline.system.is_writable", lambda _folder: False)
    (tmp_path / "gatt").mkdir()
    (tmp_path / "gatt" / "x.gguf").touch()
    assert cache_path("x.gguf") == tmp_path / "gatt" / "x.gguf"


# --- recipes, paths and disks ---


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_a_recipe_in_the_encodings_of_editors(encoding: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_bytes("# größer\n[train]\r\nrank = 8\n".encode(encoding))
    assert load_recipe(recipe).train.rank == 8


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.mkdir(), r"Cannot read .*r\.toml \(Is a directory\)"),
        (lambda path: path.write_bytes(b"# x\n# \xe9\n"), r"r\.toml, line 2: not UTF-8"),
        (lambda path: path.write_bytes(b"seed = 1\nseed = 2\n"), "is not valid TOML"),
        (lambda path: path.write_bytes(b"[a]\nb=1\n[a]\nb=2\n"), "is not valid TOML"),
        (lambda path: path.write_bytes(b"\x00\x01"), "is not valid TOML"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_line(
    write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "r.toml")
    with pytest.raises(GattError, match=message):
        load_recipe(tmp_path / "r.toml")
    done = call_gatt("instructions", tmp_path / "r.toml", "--run", tmp_path / "run")
    assert done.returncode == 1 and done.stderr.startswith("gatt: ")


@pytest.mark.parametrize(
    "words",
    [
        ("export", "--model", "smollm2-135m", "--out", "{0}"),
        ("export", "--model", "smollm2-135m", "--out", "{0}/below"),
        ("export", "--model", "smollm2-135m", "--merged-dir", "{0}/below"),
        ("instructions", "--run", "{0}"),
        ("synthesize", "--run", "{0}"),
        ("run", "--run", "{0}/below"),
        ("init", "{0}/below.toml"),
    ],
)
def test_output_that_goes_to_a_file_instead_of_a_folder(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    done = call_gatt(*(word.format(file) for word in words))
    assert done.returncode == 1
    assert done.stderr.startswith("gatt: Cannot ") and str(file) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "the disk is full (/x)"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), "the disk is full (/x)"),
        (RuntimeError("IoError: No space left on device (os error 28)"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "Cannot use /x: Permission"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "Cannot use /x: Read-only"),
        (
            ModuleNotFoundError("No module named 'unsloth'", name="unsloth"),
            "unsloth is not installed. `python3 scripts/demo.py` installs it.",
        ),
    ],
)
def test_an_error_of_the_system_is_one_line(
    error: Exception, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(commands, "execute_stage", fail)
    done = call_gatt("instructions", "--run", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith(f"gatt: {line}")


def test_an_error_that_is_a_bug_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "execute_stage", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call_gatt("instructions", "--run", tmp_path)


# --- names that are not UTF-8 ---


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe8ve"))
    folder.mkdir()
    (folder / "d\udce9but.gguf").write_bytes(b"x")
    run_dir = RunDir(folder / "run")
    run_dir.claim("evaluate", "", [folder / "d\udce9but.gguf", folder])
    run_dir.finish("evaluate", "", [folder / "d\udce9but.gguf"], 1.0)
    manifest = run_dir.manifest("evaluate")
    assert manifest and manifest["inputs"].keys() == {"d\\xe9but.gguf"}
    assert run_dir.changes("evaluate", "", [folder / "d\udce9but.gguf"]) == []
    assert "training dialogues" in _instructions(folder / "run").stderr
    with pytest.raises(GattError, match=r"bytes that are not UTF-8.*Rename the file"):
        open_run(None, tmp_path / "run", (f"dialogues.source={folder}/x.jsonl",))


def test_a_draft_of_another_process_is_not_taken_for_the_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    (tmp_path / ".model.gguf.part").write_bytes(b"half of another attempt, longer than the new")
    with whole_file(file) as draft:
        draft.write_bytes(b"all")
    assert file.read_bytes() == b"all"
