"""The OpenAI client: with llama-cpp-python's server, and with a fake that fails in many ways."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.cli import Gatt
from support.servers import (
    FakeOpenAIServer,
    Handler,
    Response,
    free_port,
    in_thread,
    llama_cpp_server,
    send_json,
)

from pipeline.data.dialogues import load_dialogues
from pipeline.errors import GattError
from pipeline.files import read_jsonl
from pipeline.inference.openai_client import OpenAIClient
from pipeline.inference.remote import server
from pipeline.records import Completion, Message, Request, Task


def _request(text: str = "Say something.", **options: Any) -> Request:
    return Request(
        messages=({"role": "user", "content": text},), seed=1, **{"max_tokens": 16, **options}
    )


def _complete(client: OpenAIClient, *requests: Request) -> list[Completion]:
    """Return the completions of `requests`, each the only one of its task."""
    completions: list[Completion] = []

    def task(request: Request) -> Task:
        completions.append((yield request))

    client.run(task(request) for request in requests)
    return completions


@pytest.fixture
def fake() -> Iterator[FakeOpenAIServer]:
    with in_thread(FakeOpenAIServer()) as server:
        yield server


@pytest.fixture(scope="module")
def real(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a server with the embedded model, with the option that the client needs."""
    log = tmp_path_factory.mktemp("server") / "log"
    with llama_cpp_server(base, log, interrupt_requests=False) as url:
        yield url


def _error(status: int, message: str, code: str | None = None) -> Response:
    return send_json(status, {"error": {"message": message, "code": code}})


def _html(handler: Handler, _: object) -> None:
    handler.send(200, "text/html", "<html><body>Welcome!</body></html>")


def _events(*pieces: str, reason: str | None = "stop", usage: bool = True) -> str:
    """Return the body of a stream; without `reason` it ends before the answer does."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces
    ]
    if reason:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    if usage:
        counts = {"completion_tokens": 70, "prompt_tokens": 9, "total_tokens": 79}
        chunks.append({"choices": [], "usage": counts})
    end = "data: [DONE]\n\n" if reason else ""
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def _send_events(content: str, length: int | None = None) -> Response:
    return lambda handler, _: handler.send(200, "text/event-stream", content, length)


def _stream(*pieces: str, reason: str | None = "stop", usage: bool = True) -> Response:
    return _send_events(_events(*pieces, reason=reason, usage=usage))


def _not_streamed(text: str) -> Response:
    message = {"role": "assistant", "content": text}
    usage = {"completion_tokens": 7, "prompt_tokens": 9, "total_tokens": 16}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return send_json(200, {"choices": choices, "usage": usage})


def _late(release: threading.Event) -> Response:
    """Return a response that waits for `release`."""

    def respond(handler: Handler, body: dict[str, Any]) -> None:
        if release.wait(20):
            _stream("Late.")(handler, body)

    return respond


class _EndlessStream:
    """A response that sends a word every 5 ms until the client disconnects, for 10 s at most."""

    def __init__(self) -> None:
        self.sent = 0
        self.disconnected = threading.Event()

    def __call__(self, handler: Handler, _: object) -> None:
        handler.send(200, "text/event-stream", "")
        try:
            for _ in range(2000):
                handler.wfile.write(_events("word ", reason=None, usage=False).encode())
                self.sent += 1
                time.sleep(0.005)
        except OSError:
            self.disconnected.set()


def test_dialogues_with_a_real_server(real: str) -> None:
    completions: dict[tuple[str, int], Completion] = {}
    running: set[str] = set()
    counts: list[int] = []

    def task(name: str, turns: tuple[str, ...]) -> Task:
        running.add(name)
        counts.append(len(running))
        messages: list[Message] = []
        for turn, user in enumerate(turns[:3]):
            messages.append({"role": "user", "content": user})
            completion = completions[name, turn] = yield Request(
                messages=tuple(messages), seed=turn, max_tokens=8
            )
            messages.append({"role": "assistant", "content": completion.text})
        running.remove(name)

    with OpenAIClient(real, max_parallel=3) as client:
        client.run(task(d.id, d.turns) for d in load_dialogues("seed")[:4])
    assert len(completions) == 12
    assert max(counts) == 3
    for completion in completions.values():
        assert completion.text.strip()
        assert completion.finish in ("stop", "length")
        assert 0 < completion.tokens <= 8
    assert len({completion.text for completion in completions.values()}) > 8


@pytest.mark.slow
def test_the_command_line_takes_a_server_as_the_teacher(
    real: str, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    options = ["--run", tmp_path, *tiny, "--set", f"synthesize.teacher='{real}'"]
    for stage in ("instructions", "synthesize"):
        done = gatt(stage, *options)
        assert done.returncode == 0, done.stderr
    file = tmp_path / "synthesize" / "dialogues.jsonl"
    examples = [row for _, row in read_jsonl(file)]
    assert examples
    assert all(row["teacher"] == "smol" for row in examples)
    assert all(row["messages"][-1]["role"] == "assistant" for row in examples)
    import datasets

    loaded = datasets.load_dataset("json", data_files=str(file), split="train")
    assert len(loaded) == len(examples)


def test_a_stream_from_a_real_server_is_closed_once_stop_when_holds(real: str) -> None:
    long = _request(
        "Tell me a long story about a whale.", max_tokens=800, stop_when=lambda text: len(text) > 40
    )
    start = time.monotonic()
    client = OpenAIClient(real, max_parallel=1)
    first, second = _complete(client, long, _request("What is a whale?"))
    assert (first.finish, second.finish) == ("stop_when", "length")
    assert 40 < len(first.text) < 80
    assert first.tokens < 40
    # 800 tokens would take longer, and the server answers one request at a time.
    assert time.monotonic() - start < 8


def test_a_full_context_of_a_real_server(real: str) -> None:
    client = OpenAIClient(real, max_parallel=1)
    full, after = _complete(client, _request("word " * 1200), _request())
    assert full == Completion("", 0, 0, "context")
    assert after.text


def test_answers_of_a_real_server_are_those_of_the_library(real: str, base: Path) -> None:
    """The server applies a repeat penalty of 1.1 to greedy decoding too; the library has none."""
    import llama_cpp

    questions = ("Why is the sky blue?", "Say hello.", "What is 2 + 2?")
    requests = [_request(text, temperature=0, max_tokens=24) for text in questions]
    completions = _complete(OpenAIClient(real, max_parallel=1), *requests)
    library = llama_cpp.Llama(str(base), n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
    for request, completion in zip(requests, completions, strict=True):
        expected = library.create_chat_completion(
            list(request.messages), temperature=0, repeat_penalty=1.1, max_tokens=24
        )["choices"][0]
        assert completion.text == expected["message"]["content"]
        assert completion.finish == expected["finish_reason"]
    library.close()


def test_a_real_server_that_aborts_streams_for_the_next_request(base: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    requests = [_request(text, max_tokens=24) for text in ("Why?", "Who?", "Where?", "How?")]
    with llama_cpp_server(base, log, interrupt_requests=True) as url:
        completions = _complete(OpenAIClient(url, max_parallel=4), *requests)
    assert "Disconnected from client" in log.read_text()
    assert len(completions) == 4
    for completion in completions:
        assert completion.text.strip()
        assert completion.finish in ("stop", "length")


def test_the_body_of_a_request(fake: FakeOpenAIServer) -> None:
    fake.responses = [_stream("Hark! ", "Yes.")]
    completions = _complete(OpenAIClient(fake.url), _request(temperature=0.5))
    assert completions == [Completion("Hark! Yes.", 70, 9, "stop")]
    assert fake.bodies == [
        {
            "model": "first",
            "messages": [{"role": "user", "content": "Say something."}],
            "max_tokens": 16,
            "temperature": 0.5,
            "seed": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_without_usage_the_chunks_are_counted(fake: FakeOpenAIServer) -> None:
    fake.responses = [_stream("", "One ", "two", reason="length", usage=False)]
    completions = _complete(OpenAIClient(fake.url, "second"), _request())
    assert completions == [Completion("One two", 2, 0, "length")]


def test_a_server_without_stream_options(fake: FakeOpenAIServer) -> None:
    def strict(handler: Handler, body: dict[str, Any]) -> None:
        refusal = _error(422, "Extra inputs are not permitted: stream_options")
        (refusal if "stream_options" in body else _stream("Yes.", usage=False))(handler, body)

    fake.responses = [strict]
    completions = _complete(OpenAIClient(fake.url, max_parallel=3), *[_request()] * 6)
    assert [completion.text for completion in completions] == ["Yes."] * 6
    # The first requests of the three workers have the option, and none after a refusal.
    assert sum("stream_options" in body for body in fake.bodies) <= 3


def test_stop_when_closes_the_stream(fake: FakeOpenAIServer) -> None:
    endless = _EndlessStream()
    fake.responses = [endless]
    request = _request(stop_when=lambda text: text.count("word") == 3)
    completions = _complete(OpenAIClient(fake.url), request)
    assert completions == [Completion("word word word ", 3, 0, "stop_when")]
    assert endless.disconnected.wait(5)
    assert endless.sent < 1000


def test_status_429_and_503_are_retried(fake: FakeOpenAIServer) -> None:
    fake.responses = [_error(429, "Slow down"), _error(503, "Loading"), _stream("Yes.")]
    assert _complete(OpenAIClient(fake.url), _request())[0].text == "Yes."
    assert len(fake.bodies) == 3


@pytest.mark.parametrize(
    "broken",
    [
        _stream("Ha", reason=None, usage=False),
        _send_events(_events("Ha", reason=None), length=10_000),
        _send_events('data: {"error": {"message": "out of memory"}}\n\n'),
        _send_events('data: {"choices": [{"del\n\n'),
    ],
    ids=["ended", "cut", "error", "garbled"],
)
def test_a_broken_stream_is_requested_again_without_streaming(
    broken: Response, fake: FakeOpenAIServer
) -> None:
    fake.responses = [broken, _not_streamed("Hark! Yes.")]
    completions = _complete(OpenAIClient(fake.url), _request())
    assert completions == [Completion("Hark! Yes.", 7, 9, "stop")]
    fake.responses = [broken, _not_streamed("Hark! Yes.")]
    completions = _complete(OpenAIClient(fake.url), _request(stop_when=lambda text: "!" in text))
    assert completions == [Completion("Hark! Yes.", 7, 9, "stop_when")]
    assert "stream" not in fake.bodies[-1]


@pytest.mark.parametrize(
    "overflow",
    [
        _error(400, "Please reduce the length.", "context_length_exceeded"),
        _error(
            400,
            "This model's maximum context length is 512 tokens. However, you requested 600 tokens.",
        ),
        _error(
            400,
            "request (600 tokens) exceeds the available context size (512 tokens), try increasing "
            "it",
        ),
    ],
    ids=["OpenAI", "vLLM", "llama-server"],
)
def test_a_full_context_is_a_completion(overflow: Response, fake: FakeOpenAIServer) -> None:
    fake.responses = [overflow]
    assert _complete(OpenAIClient(fake.url), _request()) == [Completion("", 0, 0, "context")]


@pytest.mark.parametrize("code", ["content_filter", "content_policy_violation"])
def test_a_filtered_prompt_has_no_answer_and_others_go_on(
    code: str, fake: FakeOpenAIServer
) -> None:
    refusal = _error(400, "The prompt triggered the content policy.", code)
    fake.responses = [refusal, _stream("Yes.")]
    filtered, after = _complete(OpenAIClient(fake.url, max_parallel=1), _request(), _request())
    assert filtered == Completion("", 0, 0, "length")
    assert after.text == "Yes."


class _Failure(NamedTuple):
    """Responses to chat requests, and what the error message has to contain."""

    responses: list[Response]
    parts: list[str]


@pytest.mark.parametrize(
    "failure",
    [
        _Failure(
            [_error(401, "Invalid API key")],
            ["a request without a key", "Invalid API key", "OPENAI_API_KEY"],
        ),
        _Failure(
            [_error(404, "model `other` does not exist")],
            ["has no model 'other'", "first, second"],
        ),
        _Failure(
            [_error(400, "Invalid model name", "model_not_found")],
            ["has no model 'other'", "first, second"],
        ),
        _Failure(
            [_error(429, "Slow down")],
            ["too many requests (429: Slow down)", "Lower max_parallel (24)"],
        ),
        _Failure([_error(500, "CUDA error")], ["keeps failing (500: CUDA error)", "run again"]),
        _Failure(
            [_error(400, "seed is not supported")],
            ["refuses the request (400: seed is not supported)"],
        ),
        _Failure([_html], ["is not OpenAI-compatible", "Welcome!", "/v1"]),
        _Failure([_stream("Ha", reason=None), _error(500, "out of memory")], ["out of memory"]),
    ],
    ids=["401", "404", "model_not_found", "429", "500", "400", "html", "broken stream"],
)
def test_failures_that_a_user_can_act_upon(failure: _Failure, fake: FakeOpenAIServer) -> None:
    fake.responses = failure.responses
    with pytest.raises(GattError) as error:
        _complete(OpenAIClient(fake.url, "other"), _request())
    for part in failure.parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (_html, "is not OpenAI-compatible"),
        (send_json(200, {"models": []}), "is not OpenAI-compatible"),
        (
            lambda handler, _: handler.send(200, "application/json", '{"data": ['),
            "is not OpenAI-compatible",
        ),
        (send_json(200, {"data": []}), "offers no model"),
        (send_json(404, {"detail": "Not Found"}), "No chat completions at"),
        (_error(503, "Loading model"), r"keeps failing \(503: Loading model\)"),
    ],
    ids=["html", "other JSON", "broken JSON", "no model", "404", "503"],
)
def test_no_list_of_models(models: Response, message: str, fake: FakeOpenAIServer) -> None:
    fake.models = models
    with pytest.raises(GattError, match=message):
        _complete(OpenAIClient(fake.url), _request())
    assert not fake.bodies


def test_a_named_model_needs_no_list(fake: FakeOpenAIServer) -> None:
    fake.models, fake.responses = _error(403, "Not for you"), [_stream("Yes.")]
    assert _complete(OpenAIClient(fake.url, "mine"), _request())[0].text == "Yes."


def test_the_key_is_sent(fake: FakeOpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def guarded(handler: Handler, body: dict[str, Any]) -> None:
        authorized = handler.headers["authorization"] == "Bearer sesame"
        (_stream("Yes.") if authorized else _error(401, "Who are you?"))(handler, body)

    fake.responses = [guarded]
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    assert _complete(OpenAIClient(fake.url), _request())[0].text == "Yes."
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(GattError, match="refuses the key in OPENAI_API_KEY"):
        _complete(OpenAIClient(fake.url), _request())


def test_no_server_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FEW_RETRIES", 0)
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(
        GattError, match=rf"No server answers at {url} \(.*\)\. Start it or correct"
    ):
        _complete(OpenAIClient(url), _request())


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/v1", "localhost:8000", "http://", "http://host:port/v1", ""]
)
def test_not_an_address(url: str) -> None:
    with pytest.raises(GattError, match="not the address of a server"):
        OpenAIClient(url)


def test_an_answer_that_takes_too_long(
    fake: FakeOpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    fake.responses = [_late(release)]
    monkeypatch.setattr(server, "_ANSWER_SECONDS", 0.3)
    try:
        with pytest.raises(GattError, match=r"more than 0\.3 s for one answer"):
            _complete(OpenAIClient(fake.url), _request())
    finally:
        release.set()


def test_an_exception_in_a_task_stops_and_closes_the_rest(
    fake: FakeOpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    fake.responses = [_stream("Yes."), _late(release)]
    started: list[int] = []
    closed: list[int] = []
    texts: list[str] = []

    def task(number: int) -> Task:
        try:
            texts.append((yield _request()).text)
            raise ZeroDivisionError
        finally:
            closed.append(number)

    def tasks() -> Iterator[Task]:
        for number in range(9):
            started.append(number)
            yield task(number)

    start = time.monotonic()
    try:
        with pytest.raises(ZeroDivisionError):
            OpenAIClient(fake.url, max_parallel=3).run(tasks())
    finally:
        release.set()
    assert time.monotonic() - start < 10
    assert texts == ["Yes."]
    assert started == [0, 1, 2]
    assert sorted(closed) == started
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize("steps", range(6))
def test_a_cancellation_at_the_moment_of_the_answer_is_not_lost(steps: int) -> None:
    """The event loop takes `steps` steps between the answer and the cancellation."""

    async def race() -> tuple[bool, bool]:
        reply: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()

        async def answer() -> Completion:
            return await reply

        waiting = asyncio.ensure_future(server._wait_at_most(9, answer()))
        await asyncio.sleep(0.01)
        reply.set_result(Completion("Yes.", 1, 1, "stop"))
        for _ in range(steps):
            await asyncio.sleep(0)
        accepted = waiting.cancel()
        await asyncio.wait([waiting])
        return accepted, waiting.cancelled()

    accepted, cancelled = asyncio.run(race())
    assert accepted == cancelled


_INTERRUPTED = """
import signal
import sys
from pipeline.inference.openai_client import OpenAIClient
from pipeline.records import Request

# A background job of a shell ignores interrupts, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

def task():
    messages = ({"role": "user", "content": "Go on."},)
    show = lambda text: print("text", flush=True)
    try:
        yield Request(messages=messages, seed=1, max_tokens=16, stop_when=show)
    finally:
        print("closed", flush=True)

OpenAIClient(sys.argv[1], max_parallel=4).run(task() for _ in range(8))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_stops_at_once(fake: FakeOpenAIServer) -> None:
    fake.responses = [_EndlessStream()]
    command = [sys.executable, "-X", "dev", "-c", _INTERRUPTED, fake.url]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "text\n"
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert process.returncode == -signal.SIGINT
    assert out.count("closed") == 4
    assert err.strip().endswith("KeyboardInterrupt")
    assert "destroyed" not in err and "never awaited" not in err and "Warning" not in err
