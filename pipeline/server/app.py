"""OpenAI's interface as a FastAPI application: chat completions, completions, models; and health and metrics beside it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import pipeline
from pipeline.errors import GattError
from pipeline.inference.async_engine import AnswerStream, AsyncEngine
from pipeline.inference.scheduler import GenerationRequest
from pipeline.server.errors import ApiError, of_engine, of_validation
from pipeline.server.metrics import Metrics
from pipeline.server.middleware import (
    CLIENT_CLOSED_REQUEST,
    AccessMiddleware,
    AccessSettings,
    RequestLog,
)
from pipeline.server.protocol import Body, ChatBody, ResponseBuilder, TextBody

_MISTAKES: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request is wrong, or does not fit in the context."},
    401: {"description": "The API key is missing or wrong."},
    404: {"description": "No such model."},
    413: {"description": "The body is too large."},
    429: {"description": "Too many requests wait already."},
    503: {"description": "The server is stopping."},
}


def make_app(engine: AsyncEngine, settings: AccessSettings) -> FastAPI:
    """The application over `engine`, which stays the caller's to close. It watches every answer (`engine.observe`)."""
    metrics, interface = Metrics(), _Interface(engine)
    engine.observe = metrics.outcome
    app = FastAPI(
        title="gatt",
        version=pipeline.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_MISTAKES,
        generate_unique_id_function=lambda route: route.name,
    )
    app.add_middleware(AccessMiddleware, settings=settings, metrics=metrics)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.add_exception_handler(ApiError, _as_it_is)
    app.add_exception_handler(RequestValidationError, _as_validation)
    app.add_exception_handler(HTTPException, _as_http)
    app.add_exception_handler(Exception, _as_bug)
    app.add_api_route("/v1/chat/completions", interface.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", interface.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", interface.models)
    app.add_api_route("/v1/models/{model:path}", interface.model)
    app.add_api_route("/health", interface.health)
    app.add_api_route(
        "/metrics",
        lambda: PlainTextResponse(metrics.text(engine)),
        response_model=None,
        name="metrics",
    )
    _describe(app, engine.names)
    return app


class _Interface:
    """The requests that an engine answers."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._models = {name: _model(name) for name in engine.names}

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """The next message of a chat, whole or (`stream`) as server-sent events."""
        messages = tuple(message.plain for message in body.messages)
        self._check(body)
        try:
            tokens = await run_in_threadpool(self._engine.chat_tokens, body.model, messages)
            left = self._engine.context(body.model) - len(tokens)
            answer = self._engine.ask(
                body.model, GenerationRequest(tokens, body.request(messages, left), body.stops)
            )
        except GattError as error:
            raise of_engine(error, "messages") from error
        return await _respond(request, body, answer, ResponseBuilder(True, body.model))

    async def complete(self, body: TextBody, request: Request) -> Response:
        """What follows a text that is no chat, whole or (`stream`) as server-sent events."""
        self._check(body)
        tokens = await run_in_threadpool(self._engine.text_tokens, body.model, body.prompt)
        if not tokens:
            raise ApiError(400, "The prompt is empty. Begin a text.", "prompt", "invalid_value")
        left = self._engine.context(body.model) - len(tokens)
        try:
            answer = self._engine.ask(
                body.model, GenerationRequest(tokens, body.request((), left), body.stops)
            )
        except GattError as error:
            raise of_engine(error, "prompt") from error
        return await _respond(request, body, answer, ResponseBuilder(False, body.model))

    async def models(self) -> dict[str, Any]:
        """The models that are served."""
        return {"object": "list", "data": list(self._models.values())}

    async def model(self, model: str) -> dict[str, Any]:
        """One of them."""
        if model not in self._models:
            raise self._unknown()
        return self._models[model]

    async def health(self) -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    def _check(self, body: Body) -> None:
        if body.model not in self._models:
            raise self._unknown()
        body.check()

    def _unknown(self) -> ApiError:
        return ApiError(
            404,
            f"No such model here. Served: {', '.join(self._models)}.",
            "model",
            "model_not_found",
        )


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "gatt"}


async def _respond(
    request: Request, body: Body, answer: AnswerStream, form: ResponseBuilder
) -> Response:
    """The answer in the way that is wanted; the guard ends it if the client leaves."""
    note: RequestLog = request.scope["gatt"]
    note.model, note.answer = body.model, answer
    if body.stream:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(
            _events(answer, form, body.wants_usage), media_type="text/event-stream", headers=headers
        )
    text = asyncio.create_task(_whole(answer))
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({text, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not text.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        said = await text
    except (GattError, RuntimeError) as error:
        raise of_engine(error, "") from error
    finally:
        gone.cancel()
        text.cancel()
    assert answer.outcome is not None
    return JSONResponse(form.whole(said, answer.outcome))


async def _whole(answer: AnswerStream) -> str:
    return "".join([piece async for piece in answer])


async def _gone(request: Request) -> None:
    """Wait until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    answer: AnswerStream, form: ResponseBuilder, wants_usage: bool
) -> AsyncIterator[str]:
    opening = form.opening()
    if opening:
        yield _event(opening)
    try:
        async for piece in answer:
            yield _event(form.piece(piece))
    except (GattError, RuntimeError) as error:
        yield _event(of_engine(error, "").body)
        return
    assert answer.outcome is not None
    yield _event(form.closing(answer.outcome))
    if wants_usage:
        yield _event(form.bill(answer.outcome))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _describe(app: FastAPI, names: list[str]) -> None:
    """Name the models in /openapi.json, and none of the statuses that FastAPI has by itself and we do not."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = make()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("ChatBody", "TextBody"):
                schema["components"]["schemas"][name]["properties"]["model"] = {
                    "type": "string",
                    "enum": names,
                }
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


async def _as_it_is(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _as_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return of_validation(error).response()


async def _as_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {
        404: "No such address. This server has /v1/chat/completions, /v1/completions and /v1/models.",
        405: "This address does not take that method.",
    }
    return ApiError(
        error.status_code, known.get(error.status_code, str(error.detail)), headers=error.headers
    ).response()


async def _as_bug(request: Request, error: Exception) -> Response:
    return of_engine(error, "").response()
