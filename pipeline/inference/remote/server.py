"""One OpenAI-compatible server: ask it, and say what a failure means for the user."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.inference.remote.address import (
    EXAMPLE_URL,
    http_client,
    is_this_machine,
    proxy_variables,
)
from pipeline.inference.remote.answer import StreamedAnswer, complete_answer
from pipeline.inference.remote.parameters import Parameters, is_filtered, is_overflow
from pipeline.inference.thoughts import lost_marker
from pipeline.records import Completion, Request

if TYPE_CHECKING:
    from openai import APIConnectionError, APIStatusError, AsyncOpenAI, AsyncStream
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

MAX_RETRIES = 6
"""Retries after status 429, 5xx or a lost connection, with waits of about 25 s in all."""
FEW_RETRIES = 2
"""Fewer for the first request, because a wrong address is likelier there than a server that is
restarting; and where another server can answer."""
_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 1200
"""Timeout of one answer. It includes the server's queue, which is long for a server on a CPU."""
_MESSAGE_CHARACTERS = 200
_MIN_THOUGHT_TOKENS = 64


@dataclass(slots=True)
class ServedModel:
    """What is known of a model, whichever server answers: its name, and whether it thinks.

    `is_named` if the user has named it; else it is the first that a server lists, and "" before.
    """

    name: str
    is_named: bool
    thinks: bool = False
    parameters: Parameters = field(default_factory=Parameters)

    def learn_thinking(self, completion: Completion) -> None:
        """Remember, and log once, that the model thinks."""
        if self.thinks or not (completion.thoughts or completion.finish == "thinking"):
            return
        self.thinks = True
        log(f"{self.name} thinks before it answers: its thoughts are logged, but not used.")


class Server:
    """The server at `url`, connected between `connect` and the end of the client it returns.

    `max_parallel` is what the user may lower. `running` counts the requests that wait for it or are
    in flight; `problem` is why it is left out, or "". `listed_models` may be empty.
    """

    def __init__(self, url: str, model: ServedModel, max_parallel: int) -> None:
        self.url, self.running, self.problem = url, 0, ""
        self._model, self._max_parallel = model, max_parallel
        self.listed_models: list[str] = []
        self._opened = ""

    def connect(self) -> AsyncOpenAI:
        """Return a client of the server; no request is sent yet.

        Raises:
            GattError: a proxy that cannot be used.
        """
        import openai

        self._client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=openai.Timeout(None, connect=_CONNECT_SECONDS),  # see _ANSWER_SECONDS
            max_retries=MAX_RETRIES,
            http_client=http_client(self.url),
        )
        return self._client

    async def list_models(self) -> None:
        """List the models of the server; a wrong address shows here.

        Some gateways have no list, or refuse it to a key that may chat: then the user has to name
        the model. A list of before counts if there is none now.

        Raises:
            GattError: nobody answers there, or the server has no model.
        """
        import openai

        first_request = self._client.with_options(max_retries=FEW_RETRIES)
        with self._explained():
            try:
                response = await first_request.get("/models", cast_to=object)
            except json.JSONDecodeError as error:
                raise self._incompatible("broken JSON") from error
            except openai.APIStatusError:
                if self._model.is_named or self.listed_models:
                    return
                raise
        try:
            self.listed_models = [str(model["id"]) for model in response["data"]]
        except (TypeError, KeyError) as error:
            raise self._incompatible(response) from error
        if not self._model.is_named and not self.listed_models:
            raise GattError(
                f"The server at {self.url} offers no model. Load one there, and run again."
            )

    async def answer(self, request: Request, max_retries: int = MAX_RETRIES) -> Completion:
        """Return one answer.

        Raises:
            GattError: the server refuses the key, the model or the request, it keeps failing, or
                it takes too long.
        """
        client = self._client.with_options(max_retries=max_retries)
        with self._explained():
            completion = await _wait_at_most(_ANSWER_SECONDS, self._complete(client, request))
        if completion is None:
            raise GattError(
                f"The server at {self.url} took more than {_ANSWER_SECONDS} s for one "
                "answer. Check its log. If it is only slow, lower max_parallel "
                f"({self._max_parallel}) and run again."
            )
        return completion

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn a library's error into one that a user can act upon."""
        import openai

        try:
            yield
        except openai.APIConnectionError as error:
            raise GattError(self._connection_message(error)) from error
        except openai.APIStatusError as error:
            raise GattError(self._status_message(error)) from error

    async def _complete(self, client: AsyncOpenAI, request: Request) -> Completion:
        """Return one answer, with tokens for thoughts if the model thinks.

        Where prompt, answer and thoughts do not fit in the context, the thoughts get less.
        """
        import openai

        thought_tokens = request.max_thought_tokens if self._model.thinks else 0
        has_had_tokens = bool(thought_tokens) or not request.max_thought_tokens
        while True:
            try:
                completion = await self._complete_once(client, request, thought_tokens)
            except openai.APIStatusError as error:
                if is_filtered(error):
                    log(f"The server at {self.url} filtered a prompt: its answer is empty.")
                    return Completion("", 0, 0, "length")
                if not is_overflow(error):
                    raise
                if not thought_tokens:
                    return Completion("", 0, 0, "context")
                thought_tokens //= 2
                if thought_tokens < _MIN_THOUGHT_TOKENS:
                    thought_tokens = 0
                continue
            self._model.learn_thinking(completion)
            if completion.finish != "thinking" or has_had_tokens:
                return completion
            thought_tokens, has_had_tokens = request.max_thought_tokens, True

    async def _complete_once(
        self, client: AsyncOpenAI, request: Request, thought_tokens: int
    ) -> Completion:
        """Return one answer, requested again without streaming if the stream broke off.

        An error in a stream has no HTTP status; the second response shows it.
        """
        completion: Completion | None = None
        if self._model.parameters.streams:
            completion = await self._complete_streaming(client, request, thought_tokens)
        return completion or await self._complete_at_once(client, request, thought_tokens)

    async def _complete_streaming(
        self, client: AsyncOpenAI, request: Request, thought_tokens: int
    ) -> Completion | None:
        """Return the answer, closing the stream once it is enough; None if it broke off."""
        import openai

        response = await self._create(client, request, thought_tokens, stream=True)
        if not isinstance(response, openai.AsyncStream):
            return None  # the server has refused to stream
        answer = StreamedAnswer(request, self._opened, thought_tokens=thought_tokens)
        async with response as stream:
            try:
                async for chunk in stream:
                    if answer.add(chunk):
                        break
            except (openai.APIError, json.JSONDecodeError):
                return None
        if not self._opened:
            self._opened = lost_marker(answer.text)
        return answer.completion()

    async def _complete_at_once(
        self, client: AsyncOpenAI, request: Request, thought_tokens: int
    ) -> Completion:
        try:
            response = await self._create(client, request, thought_tokens, stream=False)
        except json.JSONDecodeError as error:
            raise self._incompatible("broken JSON") from error
        if not getattr(response, "choices", None):
            raise self._incompatible(response)
        return complete_answer(response, request, self._opened)

    async def _create(
        self, client: AsyncOpenAI, request: Request, thought_tokens: int, *, stream: bool
    ) -> AsyncStream[ChatCompletionChunk] | ChatCompletion:
        """Send a request, again without or with other parameters if the server refuses some."""
        import openai

        parameters = self._model.parameters
        while True:
            body = parameters.body(
                self._model.name, request, thought_tokens=thought_tokens, stream=stream
            )
            try:
                return await client.chat.completions.create(**body)
            except openai.APIStatusError as error:
                if not parameters.learn(error, body, self.url):
                    raise

    def _incompatible(self, response: object) -> GattError:
        return GattError(
            f"The server at {self.url} is not OpenAI-compatible (it sent {_one_line(response)!r})."
            f" Correct the address; it usually ends in /v1, as in {EXAMPLE_URL}."
        )

    def _connection_message(self, error: APIConnectionError) -> str:
        reason = _one_line(error.__cause__ or error)
        if not is_this_machine(self.url) and (variables := proxy_variables()):
            reason += f", with the proxy of {' and '.join(variables)}"
        return (
            f"No server answers at {self.url} ({reason}). Start it or correct the address "
            f"({EXAMPLE_URL}), and run again."
        )

    def _status_message(self, error: APIStatusError) -> str:
        """Return what a 4xx or 5xx response means for the user, and what to do next."""
        import openai

        server = f"The server at {self.url}"
        details = f"({error.status_code}: {_error_text(error)})"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            has_key = os.environ.get("OPENAI_API_KEY")
            key = "the key in OPENAI_API_KEY" if has_key else "a request without a key"
            return f"{server} refuses {key} {details}. Set OPENAI_API_KEY to a valid key."
        unknown_model = isinstance(error, openai.NotFoundError) or error.code == "model_not_found"
        if unknown_model and self._model.name not in self.listed_models:
            if self.listed_models:
                known = ", ".join(self.listed_models)
                return f"{server} has no model {self._model.name!r}. Take one of: {known}."
            return (
                f"No chat completions at {self.url} {details}. Correct the address (it usually "
                "ends in /v1) or the model's name."
            )
        if isinstance(error, openai.RateLimitError):
            return (
                f"{server} has too many requests {details}. Lower max_parallel "
                f"({self._max_parallel}) and run again."
            )
        if isinstance(error, openai.InternalServerError):
            return f"{server} keeps failing {details}. Check its log, then run again."
        return f"{server} refuses the request {details}. Correct the recipe, or use another server."


async def _wait_at_most(
    seconds: float, answer: Coroutine[object, object, Completion]
) -> Completion | None:
    """Return the answer, or None after `seconds`.

    `asyncio.wait_for` would not do: before Python 3.12 it can lose a cancellation, and the task
    would run on to its end.
    """
    running = asyncio.ensure_future(answer)
    try:
        await asyncio.wait([running], timeout=seconds)
        return running.result() if running.done() else None
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _error_text(error: APIStatusError) -> str:
    """Return the message in the body of an error response."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body
    return _one_line(body or error.message)


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:_MESSAGE_CHARACTERS]
