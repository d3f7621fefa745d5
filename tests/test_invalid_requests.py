"""Invalid requests to a real server: errors in OpenAI's form, and a server that continues."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from support.servers import MODEL, GattServer, gatt_server

CONTEXT = 512
_ERROR_FIELDS = ["code", "message", "param", "type"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GattServer]:
    with gatt_server(tmp_path_factory.mktemp("serve"), MODEL, "--context", CONTEXT) as running:
        yield running


class Invalid(NamedTuple):
    """A body, and the error it causes; `param` is not compared if it is None."""

    body: object
    param: str | None = None
    status: int = 400


def _chat(**fields: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "Hi."}]
    return {"model": MODEL, "messages": messages, "max_tokens": 1, "temperature": 0, **fields}


def _chat_json(fields: str) -> bytes:
    """Return a body that Python's own JSON could not express."""
    return b'{"model": "%s", "max_tokens": 1, %s}' % (MODEL.encode(), fields.encode())


def _message(content: object, role: str = "user") -> dict[str, object]:
    return _chat(messages=[{"role": role, "content": content}])


INVALID = [
    Invalid(b""),
    Invalid(b"{"),
    Invalid(b"\xff\xfe"),
    Invalid(b"[" * 100_000),
    Invalid(b"null"),
    Invalid(b"[]"),
    Invalid(b'"hi"'),
    Invalid({}, "model"),
    Invalid({"model": MODEL}, "messages"),
    Invalid(_chat(model="gpt-4o"), "model", 404),
    Invalid(_chat(model="../../etc/passwd"), "model", 404),
    Invalid(_chat(model=7), "model"),
    Invalid(_chat(messages=[]), "messages"),
    Invalid(_chat(messages="Hi."), "messages"),
    Invalid(_message(None)),
    Invalid(_message(["x"])),
    Invalid(_message([])),
    Invalid(_message([{"type": "image_url", "image_url": {"url": "x"}}])),
    Invalid(_message("x", role="tool"), "messages.0.role"),
    Invalid(_chat(max_tokens=0), "max_tokens"),
    Invalid(_chat(max_tokens=-1), "max_tokens"),
    Invalid(_chat(max_tokens=1.5), "max_tokens"),
    Invalid(_chat(max_tokens="9"), "max_tokens"),
    Invalid(_chat(max_tokens=10**30), "max_tokens"),
    Invalid(_chat(max_tokens=CONTEXT), "messages"),
    Invalid(_message("word " * 600), "messages"),
    Invalid(_chat(temperature=3), "temperature"),
    Invalid(_chat(temperature=-1), "temperature"),
    Invalid(
        _chat_json('"messages": [{"role": "user", "content": "x"}], "temperature": NaN'),
        "temperature",
    ),
    Invalid(_chat_json(r'"messages": [{"role": "user", "content": "\ud800"}]')),
    Invalid(_chat(top_p=1.1), "top_p"),
    Invalid(_chat(seed=2**70), "seed"),
    Invalid(_chat(seed="x"), "seed"),
    Invalid(_chat(n=0), "n"),
    Invalid(_chat(n=17), "n"),
    Invalid(_chat(stop=[""])),
    Invalid(_chat(stop=["a"] * 5)),
    Invalid(_chat(stream="yes"), "stream"),
    Invalid(_chat(stream_options={"include_usage": True}), "stream_options"),
    Invalid(_chat(tools=[{"type": "function"}]), "tools"),
    Invalid(_chat(response_format={"type": "xml"}), "response_format"),
    Invalid(_chat(logprobs=2), "logprobs"),
    Invalid(_chat(top_logprobs=2), "top_logprobs"),
    Invalid(_chat(presence_penalty=3), "presence_penalty"),
    Invalid(_chat(repeat_penalty=0), "repeat_penalty"),
    Invalid(_chat(grammar="root ::= [")),
    Invalid(_chat(best_of=2), "best_of"),
    Invalid(_chat(mirostat=2), "mirostat"),
    Invalid(b" " * 1_100_000, status=413),
]


def test_invalid_bodies_are_errors_in_openais_form(server: GattServer) -> None:
    for body, param, status in INVALID:
        response = server.post(body)
        case = f"{str(body)[:80]}: {response.text}"
        error = response.json()["error"]
        assert (response.status_code, sorted(error)) == (status, _ERROR_FIELDS), case
        assert error["message"], case
        assert param is None or error["param"] == param, case
    assert server.chat("Hi.").usage.completion_tokens > 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/x", 404),
    ],
)
def test_unknown_addresses(server: GattServer, method: str, path: str, status: int) -> None:
    response = httpx.request(method, server.url + path)
    assert response.status_code == status
    assert sorted(response.json()["error"]) == _ERROR_FIELDS


def test_foreign_hosts_and_several_prompts_are_refused(server: GattServer) -> None:
    assert server.post(_chat(), host="evil.example").status_code == 403
    several = {"model": MODEL, "prompt": ["a", "b"]}
    assert server.post(several, "/v1/completions").status_code == 400


def test_a_client_gets_the_code_of_an_error(server: GattServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.chat("word " * 600)
    assert caught.value.code == "context_length_exceeded"


def test_fields_that_change_nothing_are_accepted(server: GattServer) -> None:
    neutral: list[dict[str, Any]] = [
        {"user": "me"},
        {"metadata": {}},
        {"n": 1},
        {"logit_bias": {}},
        {"tools": []},
        {"frequency_penalty": 0.0},
    ]
    for fields in neutral:
        assert server.post(_chat(**fields)).status_code == 200


@pytest.mark.slow
def test_no_request_that_the_schema_allows_or_forbids_breaks_the_server(tmp_path: Path) -> None:
    """Send two thousand generated requests, all of which ask for short answers."""
    hooks = tmp_path / "hooks.py"
    hooks.write_text(
        "import schemathesis\n"
        "@schemathesis.hook\n"
        "def map_body(context, body):\n"
        "    if isinstance(body, dict) and isinstance(body.get('max_tokens', 1), int):\n"
        "        body = {**body, 'max_tokens': min(body.get('max_tokens') or 2, 2)}\n"
        "        body.pop('max_completion_tokens', None)\n"
        "    return body\n"
    )
    options = {
        "--checks": "not_a_server_error",
        "--max-examples": "400",
        "--request-timeout": "60",
        "--seed": "1",
        "--generation-database": "none",
    }
    flags = [word for option in options.items() for word in option]
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    with gatt_server(tmp_path, MODEL, "--context", 256) as server:
        schema = f"{server.url}/openapi.json"
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", schema, *flags],
            capture_output=True,
            text=True,
            env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": path},
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        match = re.search(r"(\d+) generated", done.stdout)
        assert match and int(match[1]) >= 2000, done.stdout[-2000:]
        assert server.post(_chat()).status_code == 200
    assert "Traceback" not in server.log
