"""A server as the teacher: a real one (llama-cpp-python's own), and for failures a small one that speaks the wire format."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from conftest import Gatt

from pipeline.data.dialogues import load_dialogues
from pipeline.errors import GattError
from pipeline.files import read_jsonl
from pipeline.inference.openai_client import OpenAIClient, _within
from pipeline.records import Completion, Message, Request, Task


def _request(text: str = "Say something.", **more: Any) -> Request:
    return Request(({"role": "user", "content": text},), 1, **{"max_tokens": 16, **more})


def _ask(server: OpenAIClient, *requests: Request) -> list[Completion]:
    got: list[Completion] = []

    def once(request: Request) -> Task:
        got.append((yield request))

    server.run(once(request) for request in requests)
    return got


Answer = Callable[["_Handler", dict[str, Any]], None]


class _Handler(BaseHTTPRequestHandler):
    """Gives the answers of `Wire.plan` one after another, and the last of them for ever."""

    server: Wire

    def do_GET(self) -> None:
        self.server.models(self, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        plan = self.server.plan
        self.server.bodies.append(body)
        (plan.pop(0) if len(plan) > 1 else plan[0])(self, body)

    def send(
        self, status: int, kind: str, content: str, length: int | None = None, **headers: str
    ) -> None:
        """`length` above the content's own: the connection breaks in the middle."""
        self.send_response(status)
        for name, value in {"content-type": kind, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        if length:
            self.send_header("content-length", str(length))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


class Wire(ThreadingHTTPServer):
    """A server on loopback; `bodies` are the requests that came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models: Answer = _json(200, {"data": [{"id": "first"}, {"id": "second"}]})
        self.plan: list[Answer] = []
        self.bodies: list[dict[str, Any]] = []

    def handle_error(self, *_: object) -> None:
        """A client that leaves in mid-answer is what some tests are about."""


@pytest.fixture
def wire() -> Iterator[Wire]:
    server = Wire()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _json(status: int, content: object) -> Answer:
    # The client takes the time to wait from this header, where it is there: the tests need no seconds of back-off.
    return lambda handler, _: handler.send(
        status, "application/json", json.dumps(content), retry_after_ms="10"
    )


def _error(status: int, message: str, code: str | None = None) -> Answer:
    return _json(status, {"error": {"message": message, "code": code}})


def _html(handler: _Handler, _: object) -> None:
    handler.send(200, "text/html", "<html><body>Welcome!</body></html>")


def _events(*pieces: str, reason: str | None = "stop", usage: bool = True) -> str:
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces
    ]
    if reason:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    if usage:
        chunks.append(
            {
                "choices": [],
                "usage": {"completion_tokens": 70, "prompt_tokens": 9, "total_tokens": 79},
            }
        )
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + (
        "data: [DONE]\n\n" if reason else ""
    )


def _stream(*pieces: str, **how: Any) -> Answer:
    return lambda handler, _: handler.send(200, "text/event-stream", _events(*pieces, **how))


def _whole(text: str, reason: str = "stop") -> Answer:
    message = {"role": "assistant", "content": text}
    usage = {"completion_tokens": 7, "prompt_tokens": 9, "total_tokens": 16}
    return _json(
        200,
        {"choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": usage},
    )


@contextmanager
def _serve(base: Path, log: Path, **options: object) -> Iterator[str]:
    """llama-cpp-python's own server; on one thread, because more of them wait for each other where the machine is busy."""
    port = _free_port()
    options |= {
        "model": base,
        "model_alias": "smol",
        "n_ctx": 1024,
        "n_threads": 1,
        "n_threads_batch": 1,
        "port": port,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with (
        log.open("w") as stream,
        subprocess.Popen(
            [sys.executable, "-u", "-m", "llama_cpp.server", *words], stdout=stream, stderr=stream
        ) as process,
    ):
        try:
            _wait_for(f"http://127.0.0.1:{port}/v1/models", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urlopen(url).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def real(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the embedded model, set up as `pipeline.inference.openai_client` asks for."""
    with _serve(base, tmp_path_factory.mktemp("server") / "log", interrupt_requests=False) as url:
        yield url


def test_dialogues_with_a_real_server(real: str) -> None:
    got: dict[tuple[str, int], Completion] = {}
    running: list[str] = []
    most = 0

    def talk(name: str, turns: tuple[str, ...]) -> Task:
        nonlocal most
        running.append(name)
        most = max(most, len(running))
        messages: list[Message] = []
        for turn, user in enumerate(turns[:3]):
            messages.append({"role": "user", "content": user})
            got[name, turn] = yield Request(tuple(messages), turn, 16)
            messages.append({"role": "assistant", "content": got[name, turn].text})
        running.remove(name)

    with OpenAIClient(real, concurrency=3) as server:
        server.run(talk(d.id, d.turns) for d in load_dialogues("seed")[:5])
    assert len(got) == 15
    assert most == 3
    for said in got.values():
        assert said.text.strip()
        assert said.finish in ("stop", "length")
        assert 0 < said.tokens <= 16
    assert len({said.text for said in got.values()}) > 10


def test_the_command_line_takes_a_server_as_the_teacher(
    real: str, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    words = ["--run", tmp_path, *tiny, "--set", f"synthesize.teacher='{real}'"]
    for stage in ("instructions", "synthesize"):
        done = gatt(stage, *words)
        assert done.returncode == 0, done.stderr
    examples = [row for _, row in read_jsonl(tmp_path / "synthesize" / "dialogues.jsonl")]
    assert examples
    assert all(
        row["teacher"] == "smol" and row["messages"][-1]["role"] == "assistant" for row in examples
    )
    import datasets

    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "synthesize" / "dialogues.jsonl"), split="train"
    )
    assert len(loaded) == len(examples)


def test_a_real_server_is_left_as_soon_as_it_is_enough(real: str) -> None:
    long = _request(
        "Tell me a long story about a whale.", max_tokens=800, stop_when=lambda text: len(text) > 40
    )
    start = time.monotonic()
    first, second = _ask(OpenAIClient(real, concurrency=1), long, _request("What is a whale?"))
    assert (first.finish, second.finish) == ("enough", "length")
    assert 40 < len(first.text) < 80
    assert first.tokens < 40
    assert (
        time.monotonic() - start < 8
    )  # 800 tokens would take longer, and the server answers one request at a time


def test_a_real_server_says_that_its_context_is_full(real: str) -> None:
    full, after = _ask(OpenAIClient(real, concurrency=1), _request("word " * 1200), _request())
    assert full == Completion("", 0, 0, "context")
    assert after.text


def test_a_real_server_says_what_its_library_says(real: str, base: Path) -> None:
    """Not what `Llama` says: the server applies a repeat penalty of 1.1 to a greedy draw too, and `Llama` none."""
    import llama_cpp

    questions = [
        _request(text, temperature=0, max_tokens=24)
        for text in ("Why is the sky blue?", "Say hello.", "What is 2 + 2?")
    ]
    library = llama_cpp.Llama(str(base), n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
    for request, said in zip(
        questions, _ask(OpenAIClient(real, concurrency=1), *questions), strict=True
    ):
        messages: Any = list(request.messages)
        expected = library.create_chat_completion(
            messages, temperature=0, repeat_penalty=1.1, max_tokens=24
        )
        assert said.text == expected["choices"][0]["message"]["content"]
        assert said.finish == expected["choices"][0]["finish_reason"]
    library.close()


def test_a_real_server_that_breaks_streams_off_for_the_next_request(
    base: Path, tmp_path: Path
) -> None:
    with _serve(base, tmp_path / "log", interrupt_requests=True) as url:
        answers = _ask(
            OpenAIClient(url, concurrency=4),
            *[_request(text, max_tokens=24) for text in ("Why?", "Who?", "Where?", "How?")],
        )
    assert "Disconnected from client" in (tmp_path / "log").read_text()
    assert [bool(said.text.strip()) and said.finish in ("stop", "length") for said in answers] == [
        True
    ] * 4


def test_a_request_and_its_answer_on_the_wire(wire: Wire) -> None:
    wire.plan = [_stream("Hark! ", "Yes.")]
    assert _ask(OpenAIClient(wire.url), _request(temperature=0.5)) == [
        Completion("Hark! Yes.", 70, 9, "stop")
    ]
    assert wire.bodies == [
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


def test_tokens_are_counted_where_the_server_does_not_say(wire: Wire) -> None:
    wire.plan = [_stream("", "One ", "two", reason="length", usage=False)]
    assert _ask(OpenAIClient(wire.url, "second"), _request()) == [
        Completion("One two", 2, 0, "length")
    ]


def test_a_server_without_stream_options(wire: Wire) -> None:
    def strict(handler: _Handler, body: dict[str, Any]) -> None:
        refusal = _error(422, "Extra inputs are not permitted: stream_options")
        (refusal if "stream_options" in body else _stream("Yes.", usage=False))(handler, body)

    wire.plan = [strict]
    assert [
        said.text for said in _ask(OpenAIClient(wire.url, concurrency=3), *[_request()] * 6)
    ] == ["Yes."] * 6
    assert (
        sum("stream_options" in body for body in wire.bodies) <= 3
    )  # it is not asked again by those that follow


def test_enough_closes_the_stream(wire: Wire) -> None:
    sent: list[int] = []
    closed = threading.Event()

    def endless(handler: _Handler, _: object) -> None:
        handler.send(200, "text/event-stream", "")
        try:
            for n in range(2000):
                handler.wfile.write(_events("word ", reason=None, usage=False).encode())
                sent.append(n)
                time.sleep(0.005)
        except OSError:
            closed.set()

    wire.plan = [endless]
    said = _ask(OpenAIClient(wire.url), _request(stop_when=lambda text: text.count("word") == 3))
    assert said == [Completion("word word word ", 3, 0, "enough")]
    assert closed.wait(5)
    assert len(sent) < 1000


def test_busy_twice_and_then_well(wire: Wire) -> None:
    wire.plan = [_error(429, "Slow down"), _error(503, "Loading"), _stream("Yes.")]
    assert _ask(OpenAIClient(wire.url), _request())[0].text == "Yes."
    assert len(wire.bodies) == 3


@pytest.mark.parametrize(
    "break_off",
    [
        _stream("Ha", reason=None, usage=False),
        lambda handler, _: handler.send(
            200, "text/event-stream", _events("Ha", reason=None), length=10_000
        ),
        lambda handler, _: handler.send(
            200, "text/event-stream", 'data: {"error": {"message": "out of memory"}}\n\n'
        ),
        lambda handler, _: handler.send(200, "text/event-stream", 'data: {"choices": [{"del\n\n'),
    ],
    ids=["ended", "cut", "error", "garbled"],
)
def test_a_broken_stream_is_asked_for_as_a_whole(break_off: Answer, wire: Wire) -> None:
    wire.plan = [break_off, _whole("Hark! Yes.")]
    assert _ask(OpenAIClient(wire.url), _request()) == [Completion("Hark! Yes.", 7, 9, "stop")]
    wire.plan = [break_off, _whole("Hark! Yes.")]
    assert (
        _ask(OpenAIClient(wire.url), _request(stop_when=lambda text: "!" in text))[0].finish
        == "enough"
    )
    assert "stream" not in wire.bodies[-1]


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
            "request (600 tokens) exceeds the available context size (512 tokens), try increasing it",
        ),
    ],
)
def test_a_full_context_is_said(overflow: Answer, wire: Wire) -> None:
    wire.plan = [overflow]
    assert _ask(OpenAIClient(wire.url), _request()) == [Completion("", 0, 0, "context")]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (
            [_error(401, "Invalid API key")],
            ["a request without a key", "Invalid API key", "OPENAI_API_KEY"],
        ),
        ([_error(404, "model `other` does not exist")], ["no model 'other'", "first, second"]),
        (
            [_error(400, "Invalid model name", "model_not_found")],
            ["no model 'other'", "first, second"],
        ),
        ([_error(429, "Slow down")], ["no room (429: Slow down)", "Lower the concurrency (24)"]),
        ([_error(500, "CUDA error")], ["fails again and again (500: CUDA error)", "run again"]),
        (
            [_error(400, "seed is not supported")],
            ["refuses the request (400: seed is not supported)"],
        ),
        ([_html], ["no OpenAI-compatible server", "Welcome!", "/v1"]),
        ([_stream("Ha", reason=None), _error(500, "out of memory")], ["out of memory"]),
    ],
)
def test_failures_that_a_user_can_act_upon(plan: list[Answer], said: list[str], wire: Wire) -> None:
    wire.plan = plan
    with pytest.raises(GattError) as error:
        _ask(OpenAIClient(wire.url, "other"), _request())
    for words in said:
        assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (_html, "no OpenAI-compatible server"),
        (_json(200, {"models": []}), "no OpenAI-compatible server"),
        (
            lambda handler, _: handler.send(200, "application/json", '{"data": ['),
            "no OpenAI-compatible server",
        ),
        (_json(200, {"data": []}), "offers no model"),
        (_json(404, {"detail": "Not Found"}), "Nothing to chat with"),
        (_error(503, "Loading model"), "fails again and again (503: Loading model)"),
    ],
)
def test_no_model_to_be_had(models: Answer, said: str, wire: Wire) -> None:
    wire.models = models
    with pytest.raises(GattError, match=said.replace("(", r"\(").replace(")", r"\)")):
        _ask(OpenAIClient(wire.url), _request())
    assert not wire.bodies


def test_a_named_model_needs_no_list(wire: Wire) -> None:
    wire.models, wire.plan = _error(403, "Not for you"), [_stream("Yes.")]
    assert _ask(OpenAIClient(wire.url, "mine"), _request())[0].text == "Yes."


def test_the_key_is_sent(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    def guarded(handler: _Handler, body: dict[str, Any]) -> None:
        known = handler.headers["authorization"] == "Bearer sesame"
        (_stream("Yes.") if known else _error(401, "Who are you?"))(handler, body)

    wire.plan = [guarded]
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    assert _ask(OpenAIClient(wire.url), _request())[0].text == "Yes."
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(GattError, match="refuses the key in OPENAI_API_KEY"):
        _ask(OpenAIClient(wire.url), _request())


def test_nobody_listens() -> None:
    with pytest.raises(
        GattError,
        match=r"No server answers at http://127.0.0.1:\d+/v1 \(.*\)\. Start it or correct",
    ):
        _ask(OpenAIClient(f"http://127.0.0.1:{_free_port()}/v1"), _request())


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/v1", "localhost:8000", "http://", "http://host:port/v1", ""]
)
def test_no_address(url: str) -> None:
    with pytest.raises(GattError, match="not the address of a server"):
        OpenAIClient(url)


def test_a_server_that_hangs(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    wire.plan = [
        lambda handler, body: _stream("Late.")(handler, body) if release.wait(20) else None
    ]
    monkeypatch.setattr("pipeline.inference.openai_client._SECONDS", 0.3)
    try:
        with pytest.raises(GattError, match=r"more than 0\.3 s for one answer"):
            _ask(OpenAIClient(wire.url), _request())
    finally:
        release.set()


def test_an_exception_stops_the_others_and_closes_them(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    wire.plan = [
        _stream("Yes."),
        lambda handler, body: _stream("Late.")(handler, body) if release.wait(20) else None,
    ]
    kept: list[str] = []
    closed: list[int] = []

    def talk(n: int) -> Task:
        try:
            kept.append((yield _request()).text)
            raise ZeroDivisionError
        finally:
            closed.append(n)

    started: list[int] = []
    start = time.monotonic()
    try:
        with pytest.raises(ZeroDivisionError):
            OpenAIClient(wire.url, concurrency=3).run(
                started.append(n) or talk(n) for n in range(9)
            )  # type: ignore[func-returns-value]
    finally:
        release.set()
    assert time.monotonic() - start < 10
    assert kept == ["Yes."]
    assert started == [0, 1, 2]
    assert sorted(closed) == started
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize("turns", range(6))
def test_a_cancellation_is_not_lost_where_the_answer_comes_at_that_moment(turns: int) -> None:
    said = Completion("Yes.", 1, 1, "stop")

    async def race() -> tuple[bool, bool]:
        reply: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()

        async def answer() -> Completion:
            return await reply

        waiting = asyncio.ensure_future(_within(9, answer()))
        await asyncio.sleep(0.01)
        reply.set_result(said)
        for _ in range(turns):
            await asyncio.sleep(0)
        asked = waiting.cancel()
        await asyncio.wait([waiting])
        return asked, waiting.cancelled()

    asked, cancelled = asyncio.run(race())
    assert asked == cancelled


INTERRUPTED = """
import sys
from pipeline.inference.openai_client import Server
from pipeline.records import Request

def talk():
    try:
        yield Request(({"role": "user", "content": "Go on."},), 1, 16, enough=lambda text: print("said", flush=True))
    finally:
        print("closed", flush=True)

Server(sys.argv[1], concurrency=4).run(talk() for _ in range(8))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are of POSIX")
def test_an_interrupt_stops_at_once(wire: Wire) -> None:
    def endless(handler: _Handler, _: object) -> None:
        handler.send(200, "text/event-stream", "")
        for _n in range(400):
            handler.wfile.write(_events("word ", reason=None, usage=False).encode())
            time.sleep(0.05)

    wire.plan = [endless]
    command = [sys.executable, "-X", "dev", "-c", INTERRUPTED, wire.url]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as talking:
        assert talking.stdout and talking.stdout.readline() == "said\n"
        start = time.monotonic()
        talking.send_signal(signal.SIGINT)
        out, err = talking.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert talking.returncode == -signal.SIGINT
    assert out.count("closed") == 4
    assert err.strip().endswith("KeyboardInterrupt")
    assert "destroyed" not in err and "never awaited" not in err and "Warning" not in err


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
