"""What stands before the interface: who may ask, how large a body may be, and one line of log for each request.

The log has no text of a request or an answer.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.inference.async_engine import AnswerStream
from pipeline.server.errors import ApiError
from pipeline.server.metrics import Metrics

LOG = logging.getLogger("gatt.serve")
CLIENT_CLOSED_REQUEST = 499
"""The status in log and metrics of a request whose client has left."""
_BODY_SECONDS = 30


@dataclass(frozen=True, slots=True)
class AccessSettings:
    """Who may ask, and how much at once.

    `key` is what clients must name ("" for none); `cors` are the web pages' origins that may read answers; `hosts` are the
    names under which the server may be addressed (none: any), so that no web page reaches it under a name of its own.
    """

    key: str = ""
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    body_bytes: int = 1 << 20


@dataclass(slots=True)
class RequestLog:
    """What the log will say about a request; the interface fills it in."""

    model: str = ""
    answer: AnswerStream | None = None
    status: int = CLIENT_CLOSED_REQUEST
    start: float = field(default_factory=time.monotonic)


class AccessMiddleware:
    """Wraps the application; `scope["gatt"]` of what gets through is its `RequestLog`."""

    def __init__(self, app: ASGIApp, settings: AccessSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
        elif not self._addressed(scope):
            await self._refuse(
                ApiError(403, "Unknown host name. Use this server's own.", code="unknown_host"),
                scope,
                send,
            )
        elif scope["path"] in ("/metrics", "/openapi.json") and not self._knows_key(scope):
            await self._refuse(_no_key(), scope, send)
        elif scope["type"] == "http" and scope["path"].startswith("/v1"):
            await self._noted(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _noted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whatever becomes of the request, its answer is ended and its line is written."""
        note = scope["gatt"] = RequestLog()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
            await send(message)

        try:
            if self._knows_key(scope):
                await self._with_body(scope, receive, sending)
            else:
                await self._refuse(_no_key(), scope, sending)
        except Exception:
            note.status = 500
            raise
        finally:
            if note.answer:
                if not note.answer.outcome:
                    note.status = CLIENT_CLOSED_REQUEST
                note.answer.cancel()
                await note.answer.ended()
            self._metrics.request(note.model, note.status)
            self._write(note)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take the body in before anybody works for it."""
        try:
            body = await asyncio.wait_for(self._body(receive), _BODY_SECONDS)
        except asyncio.TimeoutError:
            await self._refuse(
                ApiError(408, f"The body has not come within {_BODY_SECONDS} seconds."), scope, send
            )
            return
        except ApiError as error:
            await self._refuse(error, scope, send)
            return
        if body is None:
            return
        left = [body]

        async def again() -> Message:
            return (
                {"type": "http.request", "body": left.pop(), "more_body": False}
                if left
                else await receive()
            )

        await self._app(scope, again, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """All of it; None where the client has left."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._settings.body_bytes:
                most = self._settings.body_bytes
                raise ApiError(
                    413,
                    f"The body has more than {most} bytes, the most that is taken.",
                    code="body_too_large",
                )
        return bytes(body)

    def _addressed(self, scope: Scope) -> bool:
        hosts = self._settings.hosts
        name = _header(scope, b"host").rsplit("]", 1)
        host = f"{name[0]}]" if len(name) == 2 else name[0].split(":")[0]
        return not hosts or host.lower() in ("", *hosts)

    def _knows_key(self, scope: Scope) -> bool:
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        given, wanted = key.strip().encode(), self._settings.key.encode()
        return not wanted or (scheme.lower() == "bearer" and hmac.compare_digest(given, wanted))

    @staticmethod
    async def _refuse(error: ApiError, scope: Scope, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await error.response()(scope, _nothing, send)

    @staticmethod
    def _write(note: RequestLog) -> None:
        outcome = note.answer.outcome if note.answer else None
        first = outcome.first_seconds if outcome else None
        line: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "model": note.model or None,
            "prompt_tokens": outcome.prompt_tokens if outcome else 0,
            "cached_tokens": outcome.cached_tokens if outcome else 0,
            "tokens": outcome.tokens if outcome else 0,
            "first_token_seconds": None if first is None else round(first, 4),
            "seconds": round(time.monotonic() - note.start, 4),
            "status": note.status,
        }
        LOG.info(json.dumps(line))


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _no_key() -> ApiError:
    message = "No API key, or a wrong one. Send the header 'Authorization: Bearer KEY' with the server's key."
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
