"""The command `gatt exam`: models of any kind, its result files, and going on after an end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from support.cli import call_gatt
from support.exam import OPTIONS
from support.scripted_model import write_scripted_gguf
from support.servers import FakeOpenAIServer, Handler, in_thread, send_json
from support.shared import make_once

from pipeline import __version__
from pipeline.errors import GattError
from pipeline.exam.models import ExamModel, find_models
from pipeline.exam.report.rows import warnings_about
from pipeline.exam.result import ExamResult, read_result
from pipeline.exam.settings import WindowPolicy
from pipeline.stages import exam
from pipeline.stages.compare import compare
from pipeline.stages.exam import run

_WORDS = ("Let", " me", " see:", " yes", ".")
"""The scripted model answers "Let me see: yes.", as the first dialogue wants."""
_LOOP = (" one", " two", " three", " four", " five")
_NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ m.content }}\n{% endfor %}<|begin|>"
)
_OPTIONS = replace(OPTIONS, arms=("once", "every"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the GGUF of the scripted model; its context has 512 tokens."""
    folder = make_once(
        tmp_path_factory, "exam-model", lambda folder: write_scripted_gguf(folder, _WORDS)
    )
    return folder / "scripted.gguf"


def _result(folder: Path, name: str = "scripted") -> ExamResult:
    return read_result(folder / f"{name}.json")


def _rows(folder: Path, name: str = "scripted") -> list[dict[str, Any]]:
    lines = (folder / f"{name}.replies.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_a_model_is_examined(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run([str(model)], _OPTIONS, tmp_path)
    result = _result(tmp_path)
    assert [arm.name for arm in result.arms] == ["once", "every"]
    once, every = result.arms
    # One dialogue wants "Let me see:", the other one French; two turns of three count.
    assert (
        (once.adherence.hits, once.adherence.n)
        == (every.adherence.hits, every.adherence.n)
        == (2, 4)
    )
    assert once.words == 4
    assert {d.id: d.marks for d in once.dialogues} == {"first-01": "111", "first-02": "000"}
    assert once.reminder_tokens == 0
    assert every.reminder_tokens > 0
    assert every.prompt_tokens > once.prompt_tokens
    assert once.seconds > 0
    assert once.milliseconds_per_kept == pytest.approx(2 * once.milliseconds_per_answer)
    assert not result.exam.complete
    assert len(result.model.sha256) == 64
    shown = capsys.readouterr()
    assert "Answers that keep an instruction, told once: scripted 50%" in shown.out
    assert "no result to cite" in shown.err
    page = (tmp_path / "exam.html").read_text(encoding="utf-8")
    assert "scripted 50%" in page and "<svg" in page


def test_a_longer_exam_goes_on_where_the_shorter_one_ended(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run([str(model)], _OPTIONS, tmp_path)
    first = _rows(tmp_path)
    run([str(model)], replace(_OPTIONS, turns="4"), tmp_path)
    assert _rows(tmp_path)[: len(first)] == first
    assert len(_rows(tmp_path)) == len(first) + 4
    assert {d.marks for d in _result(tmp_path).arms[0].dialogues} == {"1111", "0000"}
    # What is done loads no model, and a shorter exam counts its own turns only.
    monkeypatch.setattr(ExamModel, "open", None)
    run([str(model)], _OPTIONS, tmp_path)
    assert {d.marks for d in _result(tmp_path).arms[0].dialogues} == {"111", "000"}


def test_arms_are_in_the_order_in_which_they_are_named(model: Path, tmp_path: Path) -> None:
    for arms in (("every",), ("once", "every")):
        run([str(model)], replace(_OPTIONS, arms=arms, dialogues=1, turns="2"), tmp_path)
    assert [arm.name for arm in _result(tmp_path).arms] == ["once", "every"]


def test_replies_stay_those_of_the_version_that_made_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(_OPTIONS, arms=("once",), dialogues=1)
    monkeypatch.setattr("pipeline.exam.replies.__version__", "1.0")
    run([str(model)], options, tmp_path)
    monkeypatch.setattr("pipeline.exam.replies.__version__", "2.0")
    run([str(model)], options, tmp_path)
    assert _result(tmp_path).gatt == "1.0"
    (tmp_path / "scripted.json").unlink()
    run([str(model)], replace(options, turns="2"), tmp_path)
    assert _result(tmp_path).gatt == "1.0"
    run([str(model)], replace(options, turns="4"), tmp_path)
    assert _result(tmp_path).gatt == "1.0, 2.0"
    run([str(model)], replace(options, turns="4"), tmp_path)
    assert _result(tmp_path).gatt == "1.0, 2.0"


def test_times_are_those_of_the_machines_that_took_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(_OPTIONS, arms=("once",), dialogues=1, turns="2")
    monkeypatch.setattr("pipeline.stages.exam._machine", lambda: "laptop, 2 cores")
    run([str(model)], options, tmp_path)
    monkeypatch.setattr("pipeline.stages.exam._machine", lambda: "desktop")
    (tmp_path / "scripted.json").unlink()
    run([str(model)], options, tmp_path)
    assert _result(tmp_path).machine == "laptop, 2 cores"
    run([str(model)], replace(options, turns="3"), tmp_path)
    assert _result(tmp_path).machine == "laptop, 2 cores; desktop"
    (tmp_path / "scripted.json").unlink()
    run([str(model)], options, tmp_path)  # again as long as the laptop's
    assert _result(tmp_path).machine == "laptop, 2 cores"


def test_a_run_elsewhere_that_made_no_reply_has_no_part_in_the_result(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise GattError("Too little memory.")

    options = replace(_OPTIONS, arms=("once",), dialogues=1, turns="2")
    monkeypatch.setattr("pipeline.stages.exam._machine", lambda: "laptop")
    run([str(model)], options, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.stages.exam._machine", lambda: "desktop")
        patch.setattr(ExamModel, "open", fail)
        with pytest.raises(GattError, match="Too little memory"):
            run([str(model)], replace(options, turns="3"), tmp_path)
    # Earlier versions have left a header there.
    log = tmp_path / "scripted.replies.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(lines[0].replace('"laptop"', '"desktop"'))
    run([str(model)], replace(options, turns="3"), tmp_path)
    (tmp_path / "scripted.json").unlink()
    run([str(model)], replace(options, turns="3"), tmp_path)  # as the log has it
    assert _result(tmp_path).machine == "laptop"


def test_a_log_of_another_form_is_one_line(model: Path, tmp_path: Path) -> None:
    options = replace(_OPTIONS, arms=("once",), dialogues=1, turns="2")
    run([str(model)], options, tmp_path)
    log = tmp_path / "scripted.replies.jsonl"
    before = log.read_text(encoding="utf-8")
    after = before.replace(f'"gatt": "{__version__}"', '"gatt": "9.9"')
    log.write_text(after.replace('"dropped": 0', '"dropped": 0, "mood": 1'), encoding="utf-8")
    expected = rf"scripted\.replies\.jsonl has a reply of gatt 9\.9 .*gatt {__version__} .*'mood'"
    with pytest.raises(GattError, match=expected):
        run([str(model)], options, tmp_path)


def test_questions_of_the_last_turn_of_a_shorter_exam_are_not_counted(
    model: Path, tmp_path: Path
) -> None:
    options = replace(_OPTIONS, arms=("once",), dialogues=1, regimes=("attributes",))
    run([str(model)], replace(options, turns="3"), tmp_path)
    run([str(model)], replace(options, turns="4"), tmp_path)
    run([str(model)], replace(options, turns="4"), tmp_path / "alone")
    resumed, alone = (_result(folder).arms[0] for folder in (tmp_path, tmp_path / "alone"))
    assert resumed.answers == alone.answers
    assert resumed.dialogues == alone.dialogues


def test_a_longer_exam_has_no_part_in_one_until_the_context_is_full(
    model: Path, tmp_path: Path
) -> None:
    options = replace(_OPTIONS, arms=("once",), dialogues=1, context=512, turns="context")
    run([str(model)], replace(options, turns="40"), tmp_path)
    run([str(model)], options, tmp_path)
    run([str(model)], options, tmp_path / "alone")
    resumed, alone = (_result(folder).arms[0] for folder in (tmp_path, tmp_path / "alone"))
    assert resumed.dialogues == alone.dialogues
    assert (resumed.answers, resumed.full_window.n) == (alone.answers, 10)


def test_until_the_context_is_full_is_complete_if_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = exam._questions
    with_all: Any = lambda *given: replace(questions(*given), is_complete=True)  # noqa: E731
    monkeypatch.setattr(exam, "_questions", with_all)
    options = replace(_OPTIONS, arms=("once",), dialogues=1, context=512, turns="context")
    for window in get_args(WindowPolicy):
        run([str(model)], replace(options, window=window), tmp_path / window)
        assert _result(tmp_path / window).exam.complete
    monkeypatch.setattr(exam, "most_turns", lambda *_: 3)
    run([str(model)], options, tmp_path / "short")
    assert not _result(tmp_path / "short").exam.complete


def test_a_server_with_a_large_context_is_done_when_no_turn_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exam, "most_turns", lambda *_: 3)
    options = replace(_OPTIONS, turns="context", arms=("once",), dialogues=1)
    stream = _streamed("Let me see: yes.")
    with in_thread(FakeOpenAIServer()) as server:
        server.responses = [lambda handler, _: handler.send(200, "text/event-stream", stream)]
        run([f"{server.url}#first"], options, tmp_path)
    before = _rows(tmp_path, "first")
    run([f"{server.url}#first"], options, tmp_path)  # which has gone
    assert _rows(tmp_path, "first") == before
    assert len(before) == 3


def test_replies_of_other_settings_are_not_mixed_in(model: Path, tmp_path: Path) -> None:
    run([str(model)], _OPTIONS, tmp_path)
    before = (tmp_path / "scripted.replies.jsonl").read_bytes()
    with pytest.raises(GattError, match=r"seed 1 → 2.*--out"):
        run([str(model)], replace(_OPTIONS, seed=2), tmp_path)
    assert (tmp_path / "scripted.replies.jsonl").read_bytes() == before


def test_a_run_without_a_reply_binds_no_other(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise GattError("No server answers.")

    options = replace(_OPTIONS, arms=("once",), dialogues=1)
    with monkeypatch.context() as patch:
        patch.setattr(ExamModel, "open", fail)
        with pytest.raises(GattError, match="No server answers"):
            run([str(model)], options, tmp_path)
    for _ in range(2):  # the second run reads the log of the first one
        run([str(model)], replace(options, seed=2), tmp_path)
        assert _result(tmp_path).settings.seed == 2
        assert _result(tmp_path).arms[0].answers == 3
    with pytest.raises(GattError, match="seed 2 → 1"):
        run([str(model)], options, tmp_path)


def test_the_oldest_messages_leave_a_full_context(model: Path, tmp_path: Path) -> None:
    options = replace(
        _OPTIONS, turns="context", arms=("once",), dialogues=1, context=512, window="drop"
    )
    run([str(model)], options, tmp_path)
    rows = _rows(tmp_path)
    inside = [row for row in rows if not row["dropped"]]
    full = rows[len(inside) :]
    assert len(inside) > 1
    assert len(full) == 10  # and then it ends
    dropped = [row["dropped"] for row in full]
    assert dropped == sorted(dropped) and dropped[0] >= 1
    assert all(row["reply"]["prompt_tokens"] + 16 <= 512 for row in rows)
    (arm,) = _result(tmp_path).arms
    assert arm.dialogues[0].marks == "1" * len(inside) + "+" * 10
    assert (arm.adherence.n, arm.full_window.n) == (len(inside) - 1, 10)


def test_a_pinned_message_stays_and_a_refused_one_ends_the_dialogue(
    model: Path, tmp_path: Path
) -> None:
    options = replace(_OPTIONS, turns="12", arms=("once",), dialogues=1, context=512)
    run([str(model)], replace(options, window="pin"), tmp_path / "pin")
    run([str(model)], replace(options, window="refuse"), tmp_path / "refuse")
    pinned, refused = (_result(tmp_path / name).arms[0] for name in ("pin", "refuse"))
    marks = pinned.dialogues[0].marks
    assert marks.startswith("11") and marks.endswith("+")
    # Both are the same until the context is full.
    assert refused.dialogues[0].marks == marks.replace("+", ".")
    finishes = [row["reply"]["finish"] for row in _rows(tmp_path / "refuse")]
    assert finishes[marks.index("+") :] == ["context"] * marks.count("+")
    assert (refused.adherence.n, refused.full_window.n) == (marks.count("1") - 1, 0)


def test_a_template_without_a_system_role(tmp_path: Path) -> None:
    gguf = write_scripted_gguf(tmp_path / "model", _WORDS, _NO_SYSTEM)
    options = replace(_OPTIONS, turns="2", arms=("system",), regimes=("first", "system"))
    run([str(gguf)], replace(options, dialogues=1), tmp_path / "out")
    result = _result(tmp_path / "out")
    assert not result.settings.system_role
    assert result.arms[0].answers == 4


def test_an_adapter_is_examined_on_the_model_before_it(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    options = replace(_OPTIONS, turns="2", arms=("once",), dialogues=1, max_tokens=8)
    folder = shutil.copytree(tiny_adapter, tmp_path / "tiny-1.5")
    run(
        [str(tiny_llama), str(folder)],
        replace(options, training_minutes=2.0),
        tmp_path / "out",
    )
    base = _result(tmp_path / "out", "tiny-llama")
    tuned = _result(tmp_path / "out", "tiny-llama+tiny-1.5")
    assert (base.model.training_minutes, tuned.model.training_minutes) == (None, 2.0)
    assert base.model.sha256 == tuned.model.sha256
    assert tuned.model.adapter_sha256 and not base.model.adapter_sha256
    texts = [
        [row["reply"]["text"] for row in _rows(tmp_path / "out", name)]
        for name in ("tiny-llama", "tiny-llama+tiny-1.5")
    ]
    assert texts[0] != texts[1]


def _streamed(text: str) -> str:
    """Return an answer as a server streams it."""

    def chunk(content: str, finish: str | None) -> str:
        choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
        row = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "first"}
        return f"data: {json.dumps({**row, 'choices': [choice]})}\n\n"

    return chunk(text, None) + chunk("", "stop") + "data: [DONE]\n\n"


def test_a_server_is_examined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = _streamed("Let me see: yes.")
    with in_thread(FakeOpenAIServer()) as server:
        server.responses = [lambda handler, _: handler.send(200, "text/event-stream", stream)]
        options = replace(_OPTIONS, turns="2", arms=("once",), dialogues=1, sampler="plain")
        run([f"{server.url}#first"], replace(options, context=2048), tmp_path)
        body = server.bodies[-1]
    assert "--context 2048 is not for first: a server has its own." in capsys.readouterr().err
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.8, 0.95, 16)
    result = _result(tmp_path, "first")
    assert (result.model.name, result.model.sha256) == ("first", "")
    assert (result.arms[0].adherence.hits, result.arms[0].adherence.n) == (1, 1)
    assert result.settings.context == 0
    # What the server was not asked for is not in the result.
    assert result.sampler == {"temperature": 0.8, "top_p": 0.95}


def test_what_a_server_refused_stays_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = {"error": {"message": "top_p is not supported", "param": "top_p"}}

    def answer(handler: Handler, body: dict[str, Any]) -> None:
        if "top_p" in body:
            send_json(400, refusal)(handler, body)
        else:
            handler.send(200, "text/event-stream", _streamed("Let me see: yes."))

    options = replace(_OPTIONS, turns="2", arms=("once",), dialogues=1, sampler="plain")
    with in_thread(FakeOpenAIServer()) as server:
        server.responses = [answer]
        run([server.url], options, tmp_path)
    (file,) = tmp_path.glob("*.json")
    before = read_result(file)
    assert (before.model.name, before.notes) == ("first", {"top_p": "left out"})
    assert before.sampler == {"temperature": 0.8}
    # The server has gone, all replies are there, and the day is another one.
    monkeypatch.setattr("time.strftime", lambda *_: "2099-01-01")
    run([server.url], options, tmp_path)
    assert repr(read_result(file)) == repr(before)
    assert any("top_p: left out" in text for text in warnings_about([read_result(file)]))
    file.unlink()
    run([server.url], options, tmp_path)  # all that is known is in the log
    again = read_result(file)
    assert (again.model.name, again.notes, again.sampler) == (
        before.model.name,
        before.notes,
        before.sampler,
    )


def test_replies_of_another_model_at_the_same_address_are_not_taken(tmp_path: Path) -> None:
    stream = _streamed("Let me see: yes.")
    options = replace(_OPTIONS, turns="2", arms=("once",), dialogues=1)
    with in_thread(FakeOpenAIServer()) as server:
        server.responses = [lambda handler, _: handler.send(200, "text/event-stream", stream)]
        run([server.url], options, tmp_path)
        requests = len(server.bodies)
        run([server.url], options, tmp_path)
        assert len(server.bodies) == requests  # the same model, and nothing left to ask
        server.models = send_json(200, {"data": [{"id": "second"}]})
        with pytest.raises(GattError, match=r"served_model first → second.*--out"):
            run([server.url], options, tmp_path)


def test_a_log_that_does_not_name_the_served_model_is_read(tmp_path: Path) -> None:
    """Earlier versions have written such logs."""
    stream = _streamed("Let me see: yes.")
    options = replace(_OPTIONS, turns="2", arms=("once",), dialogues=1)
    with in_thread(FakeOpenAIServer()) as server:
        server.responses = [lambda handler, _: handler.send(200, "text/event-stream", stream)]
        run([server.url], options, tmp_path)
        (file,) = tmp_path.glob("*.replies.jsonl")
        text = file.read_text(encoding="utf-8")
        assert text.count(', "served_model": "first"') == 1
        file.write_text(text.replace(', "served_model": "first"', ""), encoding="utf-8")
        requests = len(server.bodies)
        run([server.url], options, tmp_path)
        assert len(server.bodies) == requests


def test_quick_gives_way_to_what_is_named(model: Path, tmp_path: Path) -> None:
    quick = replace(_OPTIONS, quick=True, turns=None, dialogues=1, arms=("once",), max_tokens=None)
    run([str(model)], quick, tmp_path / "quick")
    result = _result(tmp_path / "quick")
    assert (result.exam.turns, result.settings.max_tokens) == (8, 64)
    run([str(model)], replace(quick, turns="9", max_tokens=72), tmp_path / "named")
    result = _result(tmp_path / "named")
    assert (result.exam.turns, result.settings.max_tokens) == (9, 72)


def test_results_are_compared(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for seed in (1, 2):
        run([str(model)], replace(_OPTIONS, seed=seed), tmp_path / str(seed))
        files.append(tmp_path / str(seed) / "scripted.json")
    capsys.readouterr()
    same = tmp_path / "same.json"
    shutil.copy(files[0], same)
    compare([files[0], same], tmp_path / "compared")
    table = capsys.readouterr().out
    assert "vs first row" in table and "+0 (+0 to +0)" in table
    assert "scripted (1)" in table and "scripted (2)" in table
    assert (tmp_path / "compared" / "compare.html").is_file()
    compare(files, tmp_path / "other")
    shown = capsys.readouterr()
    assert "seed differs (1 and 2): no differences are computed." in shown.err
    assert "vs first row" not in shown.out


def test_cut_answers_are_told(model: Path, tmp_path: Path) -> None:
    options = replace(_OPTIONS, arms=("once",), dialogues=1)
    run([str(model)], options, tmp_path / "whole")
    assert not any("cut" in text for text in warnings_about([_result(tmp_path / "whole")]))
    run([str(model)], replace(options, max_tokens=3), tmp_path / "cut")
    result = _result(tmp_path / "cut")
    assert (result.arms[0].cut.value, result.arms[0].loops.value) == (1, 0)
    assert "once: 100% of the answers were cut at 3 tokens" in " ".join(warnings_about([result]))


def test_a_loop_is_ended_at_the_same_word_by_a_file_and_a_server(tmp_path: Path) -> None:
    options = replace(_OPTIONS, arms=("once",), dialogues=1, max_tokens=64)
    file = write_scripted_gguf(tmp_path / "model", _LOOP, name="loop", loops=True)
    run([str(file)], options, tmp_path / "file")
    rest = "".join(_LOOP)
    stream = _streamed(rest * 9)
    with in_thread(FakeOpenAIServer()) as server:
        server.responses = [lambda handler, _: handler.send(200, "text/event-stream", stream)] * 3
        run([f"{server.url}#loop"], options, tmp_path / "server")
    texts = {
        row["reply"]["text"]
        for folder in ("file", "server")
        for row in _rows(tmp_path / folder, "loop")
    }
    assert texts == {(rest * 4).strip()}
    assert {row["reply"]["tokens"] for row in _rows(tmp_path / "file", "loop")} == {21}
    for folder in ("file", "server"):
        (arm,) = _result(tmp_path / folder, "loop").arms
        assert (arm.loops.value, arm.cut.value, arm.invalid.value, arm.words) == (1, 0, 1, 20)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--turns", "many"), "--turns many: expected a number"),
        (("--arm", "sometimes"), "No arm 'sometimes'. Expected once"),
        (("--arm", "ever"), "S is the strength). Did you mean 'every'?"),
        (("--regime", "frist"), "No regime 'frist'. Did you mean 'first'?"),
        (("--training-minutes", "5"), "Name both: `gatt exam BASE TUNED`"),
        (("--training-minutes", "inf"), "--training-minutes inf: expected what training took"),
        (("--training-minutes", "-5"), "--training-minutes -5: expected what training took"),
        (("--max-tokens", "128"), "may have 512 tokens, and the context of scripted has 512"),
        (("--context", "100000"), "was trained for 512 tokens"),
    ],
)
def test_a_mistake_is_one_line(
    words: tuple[str, ...], expected: str, model: Path, tmp_path: Path
) -> None:
    done = call_gatt("exam", model, *words, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.jsonl"))


def test_an_adapter_alone_or_a_name_twice_is_refused(tiny_adapter: Path, model: Path) -> None:
    with pytest.raises(GattError, match="Name the model that it was trained on before it"):
        find_models([str(tiny_adapter)])
    with pytest.raises(GattError, match="Two models have the name 'scripted'"):
        find_models([str(model), str(model)])


def test_servers_whose_models_have_one_name_are_examined_apart() -> None:
    urls = ["http://127.0.0.1:1/v1#m", "http://127.0.0.1:2/v1#m"]
    with pytest.raises(GattError, match=r"the name 'm'. Examine them one at a time.*gatt compare"):
        find_models(urls)


def test_another_file_is_no_result(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"format": 1}')
    with pytest.raises(GattError, match="is not a result of gatt-exam"):
        compare([file], tmp_path / "out")
    with pytest.raises(GattError, match="No file at"):
        compare([file.with_name("y.json"), file], tmp_path / "out")


def test_nothing_is_generated_before_all_models_are_fit(
    model: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    options = replace(_OPTIONS, context=512)
    with pytest.raises(GattError, match="tiny-llama was trained for 256 tokens"):
        run([str(model), str(tiny_llama)], options, tmp_path / "out")
    assert not list(tmp_path.rglob("*.jsonl"))
