"""Servers on the loopback interface: fakes for a client's tests, and real ones as processes."""

from __future__ import annotations

import base64
import json
import os
import re
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
from typing import Any, TypeVar
from urllib.request import urlopen

import httpx
import openai

from pipeline.records import Message

MODEL = "smollm2-135m"
"""The embedded model, which `gatt serve` serves by this name."""
_START_SECONDS = 60
_POLL_SECONDS = 0.05

Server = TypeVar("Server", bound=ThreadingHTTPServer)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def in_thread(server: Server) -> Iterator[Server]:
    """Run `server` in a thread of this process and stop it at the end."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request to a fake server, as `Response` functions get it."""

    def send(
        self,
        status: int,
        content_type: str,
        content: str,
        length: int | None = None,
        **headers: str,
    ) -> None:
        """Send a response.

        A `length` above that of `content` makes the connection break in the middle.
        """
        self.send_response(status)
        for name, value in {"content-type": content_type, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        if length:
            self.send_header("content-length", str(length))
        self.end_headers()
        self.wfile.write(content.encode())

    def body(self) -> bytes:
        """Return the body of the request."""
        return self.rfile.read(int(self.headers["content-length"] or 0))

    def log_message(self, *_: object) -> None:
        """Print nothing."""


Response = Callable[[Handler, dict[str, Any]], None]
"""Answers a request, given the handler and the JSON of its body."""


def send_json(status: int, content: object) -> Response:
    """Return a response with `content` as JSON."""
    # The client waits before a retry as long as this header says; its default takes seconds.
    return lambda handler, _: handler.send(
        status, "application/json", json.dumps(content), retry_after_ms="10"
    )


class _OpenAIHandler(Handler):
    server: FakeOpenAIServer

    def do_GET(self) -> None:
        self.server.models(self, {})

    def do_POST(self) -> None:
        body = json.loads(self.body())
        self.server.bodies.append(body)
        self.server.next_response()(self, body)


class FakeOpenAIServer(ThreadingHTTPServer):
    """A server with OpenAI's endpoints and scripted responses.

    It gives the `responses` in turn, and repeats the last one; `models` answers GET requests.
    `bodies` are the POST requests so far.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _OpenAIHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models: Response = send_json(200, {"data": [{"id": "first"}, {"id": "second"}]})
        self.responses: list[Response] = []
        self.bodies: list[dict[str, Any]] = []

    def next_response(self) -> Response:
        """Return the response to the next request."""
        return self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]

    def handle_error(self, *_: object) -> None:
        """Print nothing: tests disconnect in the middle of a response."""


class _HubHandler(Handler):
    server: FakeHub

    def do_POST(self) -> None:
        rows = [json.loads(line) for line in self.body().splitlines() if line]
        self.server.received[self.path] = rows
        folder = "datasets/" if rows[0].get("type") == "dataset" else ""
        content: dict[str, object] = {
            "url": f"{self.server.url}/{folder}me/mine",
            "name": "me/mine",
        }
        if "/preupload/" in self.path:
            content = {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in rows[0]["files"]
                ]
            }
        elif "/commit/" in self.path:
            content = {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"{self.server.url}/me/mine/commit/{'0' * 40}",
            }
        text = json.dumps(content)
        self.send(200, "application/json", text, len(text))


class FakeHub(ThreadingHTTPServer):
    """A Hugging Face Hub that accepts the new repository me/mine and a commit to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.received: dict[str, list[dict[str, Any]]] = {}

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a process for which this is the Hub."""
        inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        return inherited | {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_x", "HF_HOME": str(home)}

    def committed(self, repo_type: str) -> dict[str, bytes]:
        """Return the files of the commit by path; the repository must be a private one."""
        created = self.received["/api/repos/create"][0]
        assert (created["visibility"], created.get("type", "model")) == ("private", repo_type)
        return {
            row["value"]["path"]: base64.b64decode(row["value"]["content"])
            for row in self.received[f"/api/{repo_type}s/me/mine/commit/main"]
            if row["key"] == "file"
        }


@contextmanager
def llama_cpp_server(model: Path, log: Path, **options: object) -> Iterator[str]:
    """Run llama-cpp-python's own server and yield its URL.

    It has one thread, because several wait for each other on a busy machine.
    """
    port = free_port()
    settings = {
        "model": model,
        "model_alias": "smol",
        "n_ctx": 1024,
        "n_threads": 1,
        "n_threads_batch": 1,
        "port": port,
        **options,
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-u", "-m", "llama_cpp.server", *words]
    with (
        log.open("w") as stream,
        subprocess.Popen(command, stdout=stream, stderr=stream) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}/v1"
            _wait_until(lambda: _responds(f"{url}/models"), process, log)
            yield url
        finally:
            process.terminate()


def _responds(url: str) -> bool:
    try:
        urlopen(url).close()
    except OSError:
        return False
    return True


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while not ready():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(_POLL_SECONDS)


class GattServer:
    """A running `gatt serve`: its process, URL, log, and OpenAI's own client for it."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self._log = process, url, log
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120)

    def chat(self, text: str | list[Message], **options: Any) -> Any:
        """Return one chat completion, a greedy one of 12 tokens if `options` do not say else."""
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        defaults = {"model": MODEL, "messages": messages, "max_tokens": 12, "temperature": 0}
        return self.client.chat.completions.create(**{**defaults, **options})

    def post(
        self, body: object, path: str = "/v1/chat/completions", **headers: str
    ) -> httpx.Response:
        """Send a request with `body`: bytes unchanged, anything else as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        fields = {"content-type": "application/json"} | fields
        return httpx.post(self.url + path, content=content, headers=fields, timeout=60)

    def metric(self, name: str) -> float:
        """Return the value of a metric of the model."""
        text = httpx.get(f"{self.url}/metrics").text
        match = re.search(rf'^gatt_{name}{{model="{MODEL}"}} (\S+)$', text, re.M)
        assert match, name
        return float(match[1])

    @property
    def log_records(self) -> list[dict[str, Any]]:
        """The lines of the log that are JSON, one for each request."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    @property
    def log(self) -> str:
        """The text of the log so far."""
        return self._log.read_text()


@contextmanager
def gatt_server(folder: Path, *words: object) -> Iterator[GattServer]:
    """Run `gatt serve` with `words` on a free port; at the end, Ctrl-C stops it."""
    log = folder / "log"
    command = [sys.executable, "-m", "pipeline", "serve", *map(str, words), "--port", "0"]
    with (
        log.open("wb") as stream,
        subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL
        ) as process,
    ):
        _wait_until(lambda: bool(_served_url(log)), process, log)
        try:
            yield GattServer(process, _served_url(log), log)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(20)


def _served_url(log: Path) -> str:
    """Return the URL in the line that `gatt serve` logs once it listens, or ""."""
    match = re.search(r"at (http://\S+)/v1\.", log.read_text())
    return match[1] if match else ""
