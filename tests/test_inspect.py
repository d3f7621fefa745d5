"""The exam as a task of Inspect: the verdicts and numbers of `gatt exam` on the same server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.scripted_model import write_scripted_gguf
from support.servers import MODEL, FakeOpenAIServer, gatt_server, in_thread, send_json
from support.shared import make_once

from pipeline.errors import GattError
from pipeline.exam.inspect_eval.logs import read_log
from pipeline.exam.machine import local_machine
from pipeline.exam.result import ExamResult, read_result
from pipeline.exam.tasks import EXAM_NAME
from pipeline.records import Completion
from pipeline.stages.compare import compare
from pipeline.stages.exam import ExamOptions, run

inspect_ai = pytest.importorskip("inspect_ai")

from pipeline.exam.inspect_eval.answers import completion_of  # noqa: E402

_WORDS = ("Let", " me", " see:", " yes", ".")
"""The scripted model answers "Let me see: yes.", as the first dialogue wants."""
_OPTIONS: dict[str, Any] = {
    "turns": "3",
    "arms": ("once", "every"),
    "regimes": ("first", "attributes"),
    "dialogues": 2,
    "sampler": "greedy",
    "window": "drop",
    "max_tokens": 16,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the scripted model, whose context has 512 tokens; yield the URL."""
    folder = make_once(
        tmp_path_factory, "inspect-model", lambda folder: write_scripted_gguf(folder, _WORDS)
    )
    log = tmp_path_factory.mktemp("server")
    with gatt_server(log, folder / "scripted.gguf", "--context", 512) as server:
        yield f"{server.url}/v1"


def _inspect(
    url: str,
    folder: Path,
    model: str = "scripted",
    epochs: int | None = None,
    provider: str = "openai-api/local",
    **parameters: Any,
) -> Any:
    """Run `inspect eval gatt/exam` in this process; return the log."""
    (log,) = inspect_ai.eval(
        "gatt/exam",
        model=f"{provider}/{model}",
        model_base_url=url,
        model_args={"api_key": "any"},
        task_args=parameters,
        log_dir=str(folder),
        display="none",
        max_connections=8,
        epochs=epochs,
    )
    return log


def _file(log: Any) -> Path:
    return Path(log.location.removeprefix("file://"))


def _exam(url: str, folder: Path, name: str = "scripted", **options: Any) -> ExamResult:
    """Run `gatt exam` on a server."""
    common = {"context": 0, "training_minutes": None, "max_parallel": 8, "seed": 1, "quick": False}
    run([f"{url}#{name}"], ExamOptions(**{**common, **options}), folder)
    return read_result(folder / f"{name}.json")


def _marks(result: ExamResult) -> dict[tuple[str, str, str], str]:
    return {(arm.name, d.id, d.attribute): d.marks for arm in result.arms for d in arm.dialogues}


def _numbers(log: Any) -> dict[str, float]:
    (score,) = log.results.scores
    return {name: metric.value for name, metric in score.metrics.items()}


def test_verdicts_and_numbers_are_those_of_gatt_exam(served: str, tmp_path: Path) -> None:
    expected = _exam(served, tmp_path / "exam", **_OPTIONS)
    log = _inspect(served, tmp_path / "logs", **_OPTIONS)
    assert (log.status, log.eval.task) == ("success", "gatt/exam")
    result = read_log(_file(log))
    assert _marks(result) == _marks(expected)
    # One dialogue wants "Let me see:", the other one French; the model does not know its name.
    assert _marks(result)["once", "first-01", ""] == "111"
    assert _marks(result)["every", "first-02", ""] == "000"
    assert len(_marks(result)) == 2 * (2 + 2 * 3)
    numbers = _numbers(log)
    for arm in expected.arms:
        assert numbers[f"{arm.name}: kept"] == arm.adherence.value
        assert numbers[f"{arm.name}: low"] == arm.adherence.low
        assert numbers[f"{arm.name}: words"] == arm.words
        assert numbers[f"{arm.name}, first"] == 0.5
    assert log.samples[0].scores["verdicts"].value in (0, 0.5, 1)


def test_a_log_is_a_result_that_is_compared(
    served: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**_OPTIONS, "arms": "once,every", "regimes": "first"}
    log = _inspect(served, tmp_path / "logs", **options)
    file = _file(log)
    _exam(served, tmp_path, **{**_OPTIONS, "regimes": ("first",)})
    result, expected = read_log(file), read_result(tmp_path / "scripted.json")
    assert result.exam == expected.exam
    assert result.settings == expected.settings
    assert result.sampler == expected.sampler == {"temperature": 0.0}
    assert result.model.server == "openai-api/local/scripted"
    assert result.machine == expected.machine == f"server 127.0.0.1 on {local_machine()}"
    assert result.arms[1].prompt_tokens == expected.arms[1].prompt_tokens
    assert result.arms[1].reminder_tokens == expected.arms[1].reminder_tokens > 0
    assert result.arms[0].seconds > 0
    compare([tmp_path / "scripted.json", file], tmp_path / "out")
    assert "+0 (+0 to +0)" in capsys.readouterr().out


def test_what_another_provider_makes_of_the_sampler_is_not_known(
    served: str, tmp_path: Path
) -> None:
    parameters = {**_OPTIONS, "arms": "once", "regimes": "first", "dialogues": 1}
    result = read_log(_file(_inspect(served, tmp_path, provider="ollama", **parameters)))
    assert (result.settings.sampler, result.sampler) == ("greedy", {})
    assert result.notes == {"sampler": "what ollama takes of it is not known"}


@pytest.mark.slow
def test_a_full_context_is_told_from_forgetting(served: str, tmp_path: Path) -> None:
    options = {**_OPTIONS, "turns": "12", "regimes": ("first",), "dialogues": 1, "arms": ("once",)}
    for window in ("drop", "refuse"):
        options["window"] = window
        expected = _exam(served, tmp_path / window, **options)
        log = _inspect(served, tmp_path / "logs", **options)
        (marks,) = _marks(expected).values()
        assert ("+" if window == "drop" else ".") in marks
        assert log.samples[0].scores["verdicts"].answer == marks


def test_a_request_is_that_of_gatt_exam(tmp_path: Path) -> None:
    """The same fields reach the server: greedy or not, the seed, and each message."""

    def answer(handler: Any, body: dict[str, Any]) -> None:
        if body.get("stream"):
            send_json(400, {"error": {"message": "stream is not supported", "param": "stream"}})(
                handler, body
            )
            return
        choice = {"message": {"role": "assistant", "content": "Oui."}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
        row = {"id": "1", "object": "chat.completion", "created": 1, "model": "first"}
        send_json(200, {**row, "choices": [{"index": 0, **choice}], "usage": usage})(handler, body)

    for sampler in ("greedy", "plain"):
        options = {**_OPTIONS, "arms": ("depth-2",), "dialogues": 1, "sampler": sampler}
        sent = []
        for program in (_exam, _inspect):
            with in_thread(FakeOpenAIServer()) as server:
                server.responses = [answer]
                program(server.url, tmp_path / sampler / program.__name__, "first", **options)
                sent.append(server.bodies)
        others, ours = (
            {json.dumps(_essence(b), sort_keys=True) for b in bodies} for bodies in sent
        )
        assert ours <= others and len(ours) == 3 + 3 + 3 * 3
        assert len(others - ours) == 1  # whether the model thinks is asked first


def _essence(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if not name.startswith("stream")}


def test_thoughts_are_no_part_of_an_answer(tmp_path: Path) -> None:
    def answer(handler: Any, body: dict[str, Any]) -> None:
        fits = body["max_tokens"] > 16
        text = "<think>\nIn French?\n</think>\n\nLet me see: yes." if fits else "<think>\nIn"
        message = {"role": "assistant", "content": text}
        choice = {"message": message, "finish_reason": "stop" if fits else "length"}
        usage = {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}
        row = {"id": "1", "object": "chat.completion", "created": 1, "model": "first"}
        send_json(200, {**row, "choices": [{"index": 0, **choice}], "usage": usage})(handler, body)

    options = {**_OPTIONS, "regimes": "first", "dialogues": 1, "arms": "once"}
    with in_thread(FakeOpenAIServer()) as server:
        server.responses = [answer]
        log = _inspect(server.url, tmp_path, "first", **options)
        limits = [body["max_tokens"] for body in server.bodies]
        history = server.bodies[-1]["messages"]
    assert limits == [16, 16 + 2048, 16 + 2048, 16 + 2048]
    assert log.samples[0].scores["verdicts"].answer == "111"
    assert [m["content"] for m in history if m["role"] == "assistant"] == ["Let me see: yes."] * 2


def _output(text: str, reason: Any, *, tokens: int | None = 7, **fields: Any) -> Any:
    from inspect_ai.model import ModelOutput, ModelUsage

    output = ModelOutput.from_content("m", text, stop_reason=reason, **fields)
    if tokens is not None:
        output.usage = ModelUsage(input_tokens=3, output_tokens=tokens, input_tokens_cache_read=5)
    return output


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (_output("Yes.", "stop"), Completion("Yes.", 7, 8, "stop")),
        (_output("Yes.", "unknown", tokens=None), Completion("Yes.", 0, 0, "stop")),
        (_output("Ye", "max_tokens"), Completion("Ye", 7, 8, "length")),
        (_output("Ye", "max_tokens", tokens=None), Completion("Ye", 0, 0, "length")),
        (_output("Ye", "model_length"), Completion("Ye", 7, 8, "length")),
        (_output("Too long.", "model_length", tokens=None), Completion("", 0, 0, "context")),
        (_output("Ye", "content_filter"), Completion("Ye", 7, 8, "length")),
        (_output("Blocked.", "content_filter", tokens=None), Completion("", 0, 0, "length")),
        (_output("x", "stop", error="Blocked."), Completion("", 0, 0, "length")),
        (_output("<think>\nA\n</think>\n\nB", "stop"), Completion("B", 7, 8, "stop", "A")),
        (_output("<think>\nA", "max_tokens"), Completion("", 7, 8, "thinking", "A")),
    ],
)
def test_an_answer_of_any_provider(output: Any, expected: Completion) -> None:
    assert completion_of(output) == expected


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"turns": "many"}, "--turns many: expected a number"),
        ({"arms": "sometimes"}, "No arm 'sometimes'"),
        ({"regimes": "frist"}, "Did you mean 'first'?"),
        ({"sampler": "hot"}, "-T sampler=hot: expected one of plain"),
        ({"window": "open"}, "-T window=open: expected one of drop"),
        ({"dialogues": -1}, "-T dialogues=-1"),
        ({"max_tokens": 1}, "-T max_tokens=1"),
    ],
)
def test_a_wrong_parameter_is_refused(
    parameters: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=expected) as raised:
        _inspect("http://127.0.0.1:9/v1", tmp_path, **parameters)
    assert type(raised.value).__name__ == "PrerequisiteError"


@pytest.mark.slow
def test_epochs_that_would_repeat_the_answers_are_refused(served: str, tmp_path: Path) -> None:
    log = _inspect(served, tmp_path, epochs=2, **{**_OPTIONS, "dialogues": 1})
    assert log.status == "error"
    assert "with -T seed=2 for other answers" in log.error.message
    with pytest.raises(GattError, match="has not finished"):
        read_log(_file(log))


@pytest.mark.slow
def test_a_log_of_another_task_is_no_result(tmp_path: Path) -> None:
    sample = inspect_ai.dataset.Sample(input="Hello.")
    (log,) = inspect_ai.eval(
        inspect_ai.Task(dataset=[sample]),
        model="mockllm/model",
        log_dir=str(tmp_path),
        display="none",
    )
    with pytest.raises(GattError, match="Name one of `inspect eval gatt/exam`"):
        read_log(_file(log))
    with pytest.raises(GattError, match="No file at"):
        read_log(tmp_path / "x.eval")
    (tmp_path / "broken.eval").write_text("no log")
    with pytest.raises(GattError, match="no log of Inspect"):
        read_log(tmp_path / "broken.eval")


@pytest.mark.slow
def test_settings_of_another_version_are_refused(served: str, tmp_path: Path) -> None:
    file = _file(_inspect(served, tmp_path, **{**_OPTIONS, "dialogues": 1}))
    log = inspect_ai.log.read_eval_log(file)
    log.eval.metadata[EXAM_NAME]["settings"]["temperature"] = 1
    inspect_ai.log.write_eval_log(log, file)
    with pytest.raises(GattError, match=r"settings of gatt .*'temperature'"):
        read_log(file)


@pytest.mark.slow
def test_the_embedded_model_gets_the_same_verdicts_from_the_command_line(tmp_path: Path) -> None:
    options = {**_OPTIONS, "turns": "5", "regimes": (), "dialogues": 1, "arms": ("once",)}
    options["max_tokens"] = 48
    with gatt_server(tmp_path, MODEL) as server:
        url = f"{server.url}/v1"
        expected = _exam(url, tmp_path / "exam", MODEL, **options)
        parameters = ("turns=5", "dialogues=1", "max_tokens=48", "sampler=greedy", "arms=once,")
        words = [word for parameter in parameters for word in ("-T", parameter)]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "inspect_ai", "eval", "gatt/exam", "--display", "none"),
                *("--model", f"openai-api/local/{MODEL}", "--model-base-url", url),
                *("-M", "api_key=any", "--log-dir", str(tmp_path / "logs"), *words),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "logs").glob("*.eval")
    ours, others = _marks(expected), _marks(read_log(file))
    assert ours.keys() == others.keys()
    pairs = [pair for key in ours for pair in zip(ours[key], others[key], strict=True)]
    assert len(pairs) > 40
    assert sum(a == b for a, b in pairs) >= 0.99 * len(pairs)
