"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from pipeline.errors import GattError
from pipeline.inference.request import ContextLengthError, EngineClosedError, QueueFullError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused: the HTTP status, and what the client reads.

    `param` names the part of the request that is wrong; `code` is for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.headers = param, code, headers

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The error as JSON data."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the error as a response."""
        return JSONResponse(self.body, self.status, dict(self.headers or {}))


def from_engine(error: Exception, param: str | None = None) -> ApiError:
    """Return the error of an engine or a chat template; `param` names the prompt's field.

    An error that is not expected is a bug, whose text the client does not see.
    """
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
            return ApiError(500, "The server failed; its log has the error.", code="internal_error")


def from_validation(error: RequestValidationError) -> ApiError:
    """Return the first error of a request body; the invalid value is not repeated."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(path)
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON (at character {path[0]}).")
    if not path:
        return ApiError(
            400, "The body is not a JSON object. Send one, with content-type application/json."
        )
    if first["type"] == "missing":
        message = f"Missing required parameter: '{path[-1]}'."
        return ApiError(400, message, param, "missing_required_parameter")
    return ApiError(400, f"Invalid value for '{param}': {first['msg']}.", param, "invalid_value")
