"""The middleware and the application of the API, with a scripted engine."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence

import httpx
import pytest
from fastapi.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from support.engines import CONTEXT, ScriptedAsyncEngine

from pipeline.inference.async_engine import AnswerStream
from pipeline.inference.request import GenerationRequest, Job, QueueFullError
from pipeline.inference.scheduler import ServedModel
from pipeline.server import middleware
from pipeline.server.app import make_app
from pipeline.server.metrics import Metrics
from pipeline.server.middleware import AccessMiddleware, AccessSettings, RequestLog

CHAT_PATH = "/v1/chat/completions"


def _chat_body(**fields: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hi."}], **fields}


class Exchange:
    """One request through the middleware to `app`, and what was sent back."""

    def __init__(
        self, app: ASGIApp, settings: AccessSettings, chunks: Sequence[Message] = ()
    ) -> None:
        self.sent: list[Message] = []
        self._chunks = list(chunks) or [{"type": "http.request", "body": b"{}"}]
        metrics = Metrics(ScriptedAsyncEngine())
        self._middleware = AccessMiddleware(app, settings, metrics)
        self._metrics = metrics

    def run(
        self, path: str = CHAT_PATH, kind: str = "http", headers: dict[str, str] | None = None
    ) -> int:
        """Send the request, and return the status of the response; 0: there is none."""
        pairs = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
        scope: Scope = {"type": kind, "path": path, "headers": pairs, "method": "POST"}
        asyncio.run(self._middleware(scope, self._receive, self._send))
        return int(self.sent[0].get("status", 0)) if self.sent else 0

    @property
    def error_code(self) -> object:
        """The code in the error that was sent."""
        return json.loads(self.sent[1]["body"])["error"]["code"]

    @property
    def metrics(self) -> str:
        """What was counted."""
        return self._metrics.render().decode()

    async def _receive(self) -> Message:
        if not self._chunks:
            await asyncio.sleep(60)
        return self._chunks.pop(0)

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


async def _ok(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the body of the request."""
    body = (await receive())["body"] if scope["path"].startswith("/v1") else b""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200),
        ("LOCALHOST", 200),
        ("[::1]:8080", 200),
        ("[::1]", 200),
        ("", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8080", 403),
        ("[::2]:8080", 403),
    ],
)
def test_only_the_servers_own_hosts_are_allowed(host: str, status: int) -> None:
    exchange = Exchange(_ok, AccessSettings(hosts=("localhost", "[::1]")))
    assert exchange.run(headers={"host": host}) == status
    assert Exchange(_ok, AccessSettings()).run(headers={"host": host}) == 200


@pytest.mark.parametrize(
    ("authorization", "status"),
    [("Bearer key", 200), ("bearer key ", 200), ("Bearer kex", 401), ("key", 401), ("", 401)],
)
@pytest.mark.parametrize("path", [CHAT_PATH, "/metrics", "/openapi.json"])
def test_the_key_is_required(authorization: str, status: int, path: str) -> None:
    exchange = Exchange(_ok, AccessSettings(key="key"))
    assert exchange.run(path, headers={"authorization": authorization}) == status
    if status == 401:
        assert exchange.error_code == "invalid_api_key"
    assert Exchange(_ok, AccessSettings(key="key")).run("/health") == 200


def test_a_refused_websocket_is_closed() -> None:
    exchange = Exchange(_ok, AccessSettings(hosts=("localhost",)))
    exchange.run("/_nicegui", "websocket", {"host": "evil.example"})
    assert exchange.sent == [{"type": "websocket.close", "code": 1008}]


def test_a_body_arrives_in_one_piece_and_within_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(body: bytes, *, more: bool) -> Message:
        return {"type": "http.request", "body": body, "more_body": more}

    exchange = Exchange(_ok, AccessSettings(), [chunk(b"a", more=True), chunk(b"b", more=False)])
    assert exchange.run() == 200
    assert exchange.sent[1]["body"] == b"ab"
    exchange = Exchange(_ok, AccessSettings(), [chunk(b"a" * 600_000, more=True)] * 2)
    assert exchange.run() == 413
    assert exchange.error_code == "body_too_large"
    monkeypatch.setattr(middleware, "_BODY_TIMEOUT_SECONDS", 0.01)
    assert Exchange(_ok, AccessSettings(), [chunk(b"a", more=True)]).run() == 408


def test_every_request_is_logged_and_counted_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        log: RequestLog = scope["gatt"]
        log.model = "m"
        raise RuntimeError("a bug")

    caplog.set_level(logging.INFO, "gatt.serve")
    assert Exchange(_ok, AccessSettings()).run() == 200
    disconnected = Exchange(_ok, AccessSettings(), [{"type": "http.disconnect"}])
    assert disconnected.run() == 0
    failed = Exchange(fail, AccessSettings())
    with pytest.raises(RuntimeError, match="a bug"):
        failed.run()
    assert 'gatt_requests_total{model="m",status="500"} 1.0' in failed.metrics
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [(line["status"], line["model"]) for line in lines] == [
        (200, None),
        (499, None),
        (500, "m"),
    ]


def test_an_answer_is_logged_counted_and_streamed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gatt.serve")
    engine = ScriptedAsyncEngine()
    client = TestClient(make_app(engine, AccessSettings()))
    response = client.post(CHAT_PATH, json=_chat_body(max_tokens=4)).json()
    assert response["choices"][0]["message"]["content"] == "One two."
    streamed = client.post(
        CHAT_PATH, json=_chat_body(stream=True, stream_options={"include_usage": True})
    )
    *events, done = streamed.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "One "},
        {"content": "two."},
        {},
    ]
    assert chunks[-1]["usage"] == response["usage"]
    assert engine.requests[1].sampling.max_tokens == CONTEXT - 1  # all that is left
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [(line["status"], line["tokens"]) for line in lines] == [(200, 3), (200, 3)]
    assert 'gatt_generated_tokens_total{model="m"} 6.0' in client.get("/metrics").text


def test_errors_of_the_engine_are_responses() -> None:
    full = TestClient(make_app(ScriptedAsyncEngine(error=QueueFullError("full")), AccessSettings()))
    response = full.post(CHAT_PATH, json=_chat_body())
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    client = TestClient(make_app(ScriptedAsyncEngine(), AccessSettings()))
    response = client.post(CHAT_PATH, json=_chat_body(max_tokens=CONTEXT))
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert client.post(CHAT_PATH, json=_chat_body(mirostat=2)).status_code == 400
    assert 'gatt_requests_total{model="m",status="400"} 2.0' in client.get("/metrics").text
    empty = client.post("/v1/completions", json={"model": "m", "prompt": ""})
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "prompt")


def test_an_answer_that_fails_ends_the_other_choices_of_its_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class FailingModel(ServedModel):
        """Fails in the first answer, and ends the others only when they are cancelled."""

        def __init__(self) -> None:
            self.jobs: list[Job] = []

        def submit(self, job: Job) -> None:
            self.jobs.append(job)
            if len(self.jobs) == 1:
                job.on_result(job.result("failed"))

        def cancel(self, job: Job) -> None:
            job.on_result(job.result("cancelled"))

    class FailingEngine(ScriptedAsyncEngine):
        def generate(self, name: str, request: GenerationRequest) -> AnswerStream:
            return AnswerStream(model, request, lambda result: None)

    model = FailingModel()
    caplog.set_level(logging.INFO, "gatt.serve")
    app = make_app(FailingEngine(), AccessSettings())

    async def post() -> int:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = client.post(CHAT_PATH, json=_chat_body(n=2))
            return (await asyncio.wait_for(response, 5)).status_code

    assert asyncio.run(post()) == 500
    assert json.loads(caplog.records[0].getMessage())["model"] == "m"


def test_a_client_that_disconnects_cancels_its_answer() -> None:
    async def run() -> None:
        app = make_app(engine, AccessSettings())
        body = json.dumps(_chat_body()).encode()
        messages: list[Message] = [
            {"type": "http.request", "body": body},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope: Scope = {"type": "http", "path": CHAT_PATH, "method": "POST", "headers": headers}
        await app({**scope, "query_string": b"", "root_path": ""}, receive, send)

    engine, sent = ScriptedAsyncEngine(endless=True), list[Message]()
    asyncio.run(run())
    result = engine.answers[0].result
    assert result and result.finish == "cancelled"
    assert sent[0]["status"] == middleware.CLIENT_CLOSED_REQUEST
