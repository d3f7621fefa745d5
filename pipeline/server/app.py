"""The OpenAI-compatible API: chat completions, completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import pipeline
from pipeline.errors import GattError
from pipeline.inference.async_engine import AnswerStream, AsyncEngine
from pipeline.inference.request import Prompt, TextPiece
from pipeline.records import Message
from pipeline.server.errors import ApiError, from_engine, from_validation
from pipeline.server.metrics import CONTENT_TYPE, Metrics
from pipeline.server.middleware import (
    CLIENT_CLOSED_REQUEST,
    AccessMiddleware,
    AccessSettings,
    RequestLog,
)
from pipeline.server.protocol import Body, ChatBody, TextBody
from pipeline.server.responses import Answer, Json, ResponseBuilder, TextResponseBuilder

_ERROR_DESCRIPTIONS = {
    400: "The request is wrong, or does not fit in the context.",
    401: "The API key is missing or wrong.",
    404: "No such model.",
    413: "The body is too large.",
    429: "Too many requests wait already.",
    503: "The server is stopping.",
}
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def make_app(engine: AsyncEngine, settings: AccessSettings) -> FastAPI:
    """Return the application over `engine`, which the caller closes.

    The application counts every answer's result (`engine.on_result`).
    """
    metrics, api = Metrics(engine), _Api(engine)
    engine.on_result = metrics.count_result
    app = FastAPI(
        title="gatt",
        version=pipeline.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={status: {"description": text} for status, text in _ERROR_DESCRIPTIONS.items()},
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
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", api.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", api.models)
    app.add_api_route("/v1/models/{model:path}", api.model)
    app.add_api_route("/health", api.health)
    app.add_api_route(
        "/metrics",
        lambda: Response(metrics.render(), media_type=CONTENT_TYPE),
        response_model=None,
        name="metrics",
    )
    _describe_models(app, engine.names)
    return app


class _Api:
    """The handlers of requests to `engine`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        created = int(time.time())
        self._models: dict[str, Json] = {
            name: {"id": name, "object": "model", "created": created, "owned_by": "gatt"}
            for name in engine.names
        }

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Return the next message of a chat, or (`stream`) its pieces as server-sent events."""
        self._check(body, request)
        messages, options = body.to_messages(), body.prompt_options()
        try:
            prompt = await run_in_threadpool(
                self._engine.chat_prompt, body.model, messages, options
            )
            answers = await self._ask(body, prompt, messages)
        except GattError as error:
            raise from_engine(error, "messages") from error
        builder = ResponseBuilder(body.model, logprobs=body.top_count is not None)
        return await _respond(request, body, answers, builder)

    async def complete(self, body: TextBody, request: Request) -> Response:
        """Return the continuation of a text, or (`stream`) its pieces as server-sent events."""
        self._check(body, request)
        tokens = await run_in_threadpool(self._engine.text_tokens, body.model, body.prompt)
        if not tokens:
            raise ApiError(400, "The prompt is empty. Begin a text.", "prompt", "invalid_value")
        try:
            answers = await self._ask(body, Prompt(tokens), ())
        except GattError as error:
            raise from_engine(error, "prompt") from error
        builder = TextResponseBuilder(body.model, logprobs=body.top_count is not None)
        return await _respond(request, body, answers, builder)

    async def models(self) -> Json:
        """Return the models that are served."""
        return {"object": "list", "data": list(self._models.values())}

    async def model(self, model: str) -> Json:
        """Return one model."""
        if model not in self._models:
            raise self._unknown_model()
        return self._models[model]

    async def health(self) -> dict[str, str]:
        """Return that the server responds."""
        return {"status": "ok"}

    async def _ask(
        self, body: Body, prompt: Prompt, messages: tuple[Message, ...]
    ) -> list[AnswerStream]:
        """Start the `n` answers, with a seed each."""
        context = self._engine.context_length(body.model)
        request = body.generation(prompt, messages, context)
        await run_in_threadpool(self._engine.check, body.model, request.sampling.sampler)
        answers: list[AnswerStream] = []
        try:
            for number in range(body.n or 1):
                sampling = replace(request.sampling, seed=request.sampling.seed + number)
                answers.append(
                    self._engine.generate(body.model, replace(request, sampling=sampling))
                )
        except GattError:
            for answer in answers:
                answer.cancel()
            raise
        return answers

    def _check(self, body: Body, request: Request) -> None:
        if body.model not in self._models:
            raise self._unknown_model()
        request.scope["gatt"].model = body.model
        body.check()

    def _unknown_model(self) -> ApiError:
        message = f"Unknown model. Served: {', '.join(self._models)}."
        return ApiError(404, message, "model", "model_not_found")


async def _respond(
    request: Request, body: Body, answers: list[AnswerStream], builder: ResponseBuilder
) -> Response:
    """Return the answers; the middleware ends them if the client disconnects."""
    log: RequestLog = request.scope["gatt"]
    log.answers = answers
    if body.stream:
        events = _events(answers, builder, include_usage=body.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=_STREAM_HEADERS)
    readers = [asyncio.create_task(_read(answer)) for answer in answers]
    reading = asyncio.gather(*readers)
    disconnect = asyncio.create_task(_wait_for_disconnect(request))
    ends: set[asyncio.Future[Any]] = {reading, disconnect}
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(builder.completion(await reading))
    except (GattError, RuntimeError) as error:
        raise from_engine(error) from error
    finally:
        # After an error of one, `gather` does not cancel the others.
        for future in (*ends, *readers):
            future.cancel()


async def _read(answer: AnswerStream) -> Answer:
    """Return an answer at its end."""
    pieces = [piece async for piece in answer]
    assert answer.result is not None
    joined = TextPiece(
        "".join(piece.text for piece in pieces),
        "".join(piece.thoughts for piece in pieces),
        tuple(entry for piece in pieces for entry in piece.logprobs),
    )
    return Answer(joined, answer.result)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    answers: list[AnswerStream], builder: ResponseBuilder, *, include_usage: bool
) -> AsyncIterator[str]:
    """Yield the server-sent events of streamed answers, in the order in which pieces arrive."""
    for index in range(len(answers)):
        if role_chunk := builder.role_chunk(index):
            yield _event(role_chunk)
    try:
        async for index, piece in _merge(answers):
            yield _event(builder.piece_chunk(index, piece))
    except (GattError, RuntimeError) as error:
        yield _event(from_engine(error).body)
        return
    results = [await answer.wait() for answer in answers]
    for index, result in enumerate(results):
        yield _event(builder.final_chunk(index, result))
    if include_usage:
        yield _event(builder.usage_chunk(results))
    yield "data: [DONE]\n\n"


async def _merge(answers: list[AnswerStream]) -> AsyncIterator[tuple[int, TextPiece]]:
    """Yield the pieces of all answers as they arrive, each with the index of its answer."""
    if len(answers) == 1:
        async for piece in answers[0]:
            yield 0, piece
        return
    waiting = {asyncio.ensure_future(anext(answer)): n for n, answer in enumerate(answers)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(task)
                with suppress(StopAsyncIteration):
                    yield index, task.result()
                    waiting[asyncio.ensure_future(anext(answers[index]))] = index
    finally:
        for task in waiting:
            task.cancel()


def _event(body: object) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _describe_models(app: FastAPI, names: list[str]) -> None:
    """Name the models in /openapi.json, and remove FastAPI's status 422, which is not used."""
    default_openapi = app.openapi

    def openapi() -> Json:
        if not app.openapi_schema:
            schema = default_openapi()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            bodies = schema["components"]["schemas"]
            for name in ("ChatBody", "TextBody"):
                bodies[name]["properties"]["model"] = {"type": "string", "enum": names}
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_validation(error).response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: "Unknown address. The API has /v1/chat/completions, /v1/completions and /v1/models.",
        405: "This address does not support that method.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _on_bug(request: Request, error: Exception) -> Response:
    return from_engine(error).response()
