"""What goes wrong, in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from pipeline.errors import GattError
from pipeline.inference.scheduler import ContextLengthError, EngineClosedError, QueueFullError

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered: the status, and what clients are told."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = (
            status,
            message,
            param,
            code,
            headers,
        )

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = _KINDS.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }

    def response(self) -> JSONResponse:
        """As a response."""
        return JSONResponse(self.body, self.status, dict(self.headers or {}))


def of_engine(error: Exception, param: str) -> ApiError:
    """What the engine or the chat template has refused; `param` is where the prompt stands. Anything else is a bug."""
    message = " ".join(str(error).split())
    match error:
        case ContextLengthError():
            return ApiError(400, message, param, "context_length_exceeded")
        case QueueFullError():
            return ApiError(429, message, code="server_busy", headers={"retry-after": "1"})
        case EngineClosedError():
            return ApiError(503, message, code="server_stopping")
        case GattError():
            return ApiError(400, message, param, "invalid_prompt")
        case _:
            return ApiError(500, "The server failed; its log says why.", code="internal_error")


def of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body; what stood there is not repeated."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON (at character {where[0]}).")
    if not where:
        return ApiError(
            400, "The body is no JSON object. Send one, with content-type application/json."
        )
    if first["type"] == "missing":
        return ApiError(
            400,
            f"Missing required parameter: '{where[-1]}'.",
            ".".join(where),
            "missing_required_parameter",
        )
    return ApiError(
        400,
        f"Invalid value for '{'.'.join(where)}': {first['msg']}.",
        ".".join(where),
        "invalid_value",
    )
