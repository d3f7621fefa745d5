"""What every request passes before the API: host, key, size of the body, and a line of log.

The log contains no text of a request or an answer.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.inference.async_engine import AnswerStream
from pipeline.server.errors import ApiError
from pipeline.server.metrics import Metrics

LOG = logging.getLogger("gatt.serve")
CLIENT_CLOSED_REQUEST = 499
"""The status, in log and metrics, of a request whose client has disconnected (nginx's code)."""
_BODY_TIMEOUT_SECONDS = 30
_MAX_BODY_BYTES = 1 << 20
_KEY_PATHS = ("/metrics", "/openapi.json")
"""Paths outside /v1 that require the key, too."""


@dataclass(frozen=True, slots=True)
class AccessSettings:
    """Who may use the server.

    `key` is the API key ("" for none). `cors` are the origins of web pages that may read answers.
    `hosts` are the names under which the server may be addressed (none: any). They keep web pages
    from reaching it under a name of their own (DNS rebinding).
    """

    key: str = ""
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


@dataclass(slots=True)
class RequestLog:
    """What the log will say about a request; the API fills in `model` and `answers`."""

    model: str = ""
    answers: Sequence[AnswerStream] = ()
    status: int = CLIENT_CLOSED_REQUEST
    start: float = field(default_factory=time.monotonic)

    def write(self) -> None:
        """Write the line."""
        results = [answer.result for answer in self.answers if answer.result]
        first = results[0] if results else None
        first_token = first.first_token_seconds if first else None
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "model": self.model or None,
            "prompt_tokens": first.prompt_tokens if first else 0,
            "cached_tokens": first.cached_tokens if first else 0,
            "tokens": sum(result.tokens for result in results),
            "first_token_seconds": None if first_token is None else round(first_token, 4),
            "seconds": round(time.monotonic() - self.start, 4),
            "status": self.status,
        }
        LOG.info(json.dumps(line))


class AccessMiddleware:
    """Wraps the application, which finds the `RequestLog` of an API request in `scope["gatt"]`.

    Starlette's TrustedHostMiddleware is not used for the host, because it answers in plain text.
    """

    def __init__(self, app: ASGIApp, settings: AccessSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
        elif not self._is_host_allowed(scope):
            message = "Unknown host name. Use this server's own."
            await _refuse(ApiError(403, message, code="unknown_host"), scope, send)
        elif scope["path"] in _KEY_PATHS and not self._has_key(scope):
            await _refuse(_invalid_key(), scope, send)
        elif scope["type"] == "http" and scope["path"].startswith("/v1"):
            await self._handle_logged(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _handle_logged(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle an API request; in any case its answer is ended and its line is written."""
        log = scope["gatt"] = RequestLog()

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                log.status = message["status"]
            await send(message)

        try:
            if self._has_key(scope):
                await self._handle_body(scope, receive, send_and_note)
            else:
                await _refuse(_invalid_key(), scope, send_and_note)
        except Exception:
            log.status = 500
            raise
        finally:
            if not all(answer.result for answer in log.answers):
                log.status = CLIENT_CLOSED_REQUEST
            for answer in log.answers:
                answer.cancel()
            for answer in log.answers:
                await answer.wait()
            self._metrics.count_request(log.model, log.status)
            log.write()

    async def _handle_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, within its limits, before the application sees the request."""
        try:
            body = await asyncio.wait_for(_read_body(receive), _BODY_TIMEOUT_SECONDS)
        except asyncio.TimeoutError:
            message = f"The body has not arrived within {_BODY_TIMEOUT_SECONDS} seconds."
            await _refuse(ApiError(408, message), scope, send)
            return
        except ApiError as error:
            await _refuse(error, scope, send)
            return
        if body is None:
            return
        bodies = [body]

        async def receive_body() -> Message:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            return await receive()

        await self._app(scope, receive_body, send)

    def _is_host_allowed(self, scope: Scope) -> bool:
        host = Headers(scope=scope).get("host", "")
        address, bracket, _ = host.rpartition("]")  # [::1]:8080
        name = address + bracket if bracket else host.partition(":")[0]
        return not self._settings.hosts or name.lower() in ("", *self._settings.hosts)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, credentials = Headers(scope=scope).get("authorization", "").partition(" ")
        key, expected = credentials.strip().encode(), self._settings.key.encode()
        return not expected or (scheme.lower() == "bearer" and hmac.compare_digest(key, expected))


async def _read_body(receive: Receive) -> bytes | None:
    """Return the body, or None if the client has disconnected.

    Raises:
        ApiError: the body is too large.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > _MAX_BODY_BYTES:
            text = f"The body has more than {_MAX_BODY_BYTES} bytes, the maximum."
            raise ApiError(413, text, code="body_too_large")
        if not message.get("more_body", False):
            return bytes(body)


async def _refuse(error: ApiError, scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await error.response()(scope, _receive_nothing, send)


def _invalid_key() -> ApiError:
    message = (
        "The API key is missing or wrong. Send the header 'Authorization: Bearer KEY' with the "
        "server's key."
    )
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


async def _receive_nothing() -> Message:
    return {"type": "http.disconnect"}
