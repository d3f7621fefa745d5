"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from pipeline.errors import GattError
from pipeline.inference.request import (
    ContextLengthError,
    EngineClosedError,
    OptionError,
    QueueFullError,
)

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
        case OptionError():
            return ApiError(400, message, error.option, "invalid_value")
        case GattError():
            return ApiError(400, message, param, "invalid_prompt")
        case _:
            return ApiError(500, "The server failed; its log has the error.", code="internal_error")


def from_validation(error: RequestValidationError) -> ApiError:
    """Return the first error of a request body; the invalid value is not repeated."""
    details = error.errors()
    if details[0]["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON (at character {details[0]['loc'][-1]}).")
    # A value that may have several forms has an error for each: those that reach deepest count.
    paths = [_path(detail, error.body) for detail in details]
    first = next((path[0] for path in paths if path), None)
    of_first = [(p, d) for p, d in zip(paths, details, strict=True) if p[:1] == [first]]
    if first is None or not of_first:
        return ApiError(
            400, "The body is not a JSON object. Send one, with content-type application/json."
        )
    path = max((path for path, _ in of_first), key=len)
    detail = next(detail for other, detail in of_first if other == path)
    param = ".".join(path)
    if detail["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return ApiError(400, message, param, "missing_required_parameter")
    if detail["type"] == "extra_forbidden":
        message = f"Unknown parameter: '{param}'. Omit it."
        return ApiError(400, message, param, "unknown_parameter")
    if detail["type"] == "value_error":
        message = f"Invalid value for '{param}': {detail['ctx']['error']}."
        return ApiError(400, message, param, "invalid_value")
    expected = dict.fromkeys(_expectation(d) for other, d in of_first if other == path)
    message = f"Invalid value for '{param}': expected {' or '.join(expected)}."
    return ApiError(400, message, param, "invalid_value")


def _path(detail: Mapping[str, Any], body: object) -> list[str]:
    """Return where in the body an error is, without the names of types that pydantic adds."""
    path: list[str] = []
    value: Any = body
    for part in detail["loc"]:
        if part == "body":
            continue
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_index or (isinstance(value, dict) and part in value):
            value = value[part]
        elif part != detail["loc"][-1] or detail["type"] != "missing":
            continue
        path.append(str(part))
    return path


_EXPECTATIONS = {
    "string_type": "a string",
    "string_too_short": "a string that is not empty",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "literal_error": "{expected}",
}
"""What pydantic's errors mean, by their types."""


def _expectation(detail: Mapping[str, Any]) -> str:
    """Return what was expected in the place of an invalid value."""
    return _EXPECTATIONS.get(detail["type"], "another value").format(**detail.get("ctx") or {})
