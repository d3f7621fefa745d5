"""Generate with an OpenAI-compatible server: vLLM, llama-server, Ollama, LM Studio, and others.

This is the way to scale out: the server batches, and this client keeps enough requests in flight.
The server decides on its chat template and on sampling parameters other than temperature and seed.
It also decides whether an answer depends on the other requests in its batch.

Two servers need an option. Ollama drops old messages silently when its context is full: set
OLLAMA_CONTEXT_LENGTH large enough. The server of llama-cpp-python aborts a stream when the next
request arrives: start it with `--interrupt_requests False`, or most answers are requested twice.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.inference.remote.address import (
    http_client,
    is_this_machine,
    is_valid_url,
    proxy_variables,
)
from pipeline.inference.remote.answer import StreamedAnswer, complete_answer
from pipeline.inference.remote.parameters import Parameters, is_overflow
from pipeline.inference.thoughts import lost_marker
from pipeline.records import Completion, Request, Task

if TYPE_CHECKING:
    from openai import APIConnectionError, APIStatusError, AsyncOpenAI, AsyncStream
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

DEFAULT_MAX_PARALLEL = 24
"""Requests in flight."""
_EXAMPLE_URL = "http://127.0.0.1:8000/v1"
_MAX_RETRIES = 6
"""Retries after status 429, 5xx or a lost connection, with waits of about 25 s in all."""
_MAX_RETRIES_FIRST_REQUEST = 2
"""Fewer, because a wrong address is likelier there than a server that is restarting."""
_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 1200
"""Timeout of one answer. It includes the server's queue, which is long for a server on a CPU."""
_MESSAGE_CHARACTERS = 200
_PROBE = Request(
    messages=({"role": "user", "content": "What is 2 + 3? Answer with the number."},),
    seed=0xFFFFFFFF,  # some servers take 31 bits only
    max_tokens=1024,
    max_thought_tokens=0,
)
"""Shows whether a model thinks, and whether its server sends the beginning of the thoughts."""
_MIN_THOUGHT_TOKENS = 64


class OpenAIClient:
    """The model `model` behind `url`; "" takes the first model that the server lists.

    `name` is the name of that model, known once a run has begun. `changes` are the parameters that
    the server has refused, with what became of them. The API key is read from the environment
    variable OPENAI_API_KEY. With `probe`, a run begins with a question that shows whether the model
    thinks.

    Raises:
        GattError: `url` is not a valid address.
    """

    def __init__(
        self,
        url: str,
        model: str = "",
        max_parallel: int = DEFAULT_MAX_PARALLEL,
        *,
        probe: bool = False,
    ) -> None:
        if not is_valid_url(url):
            raise GattError(
                f"{url!r} is not the address of a server. Expected one such as {_EXAMPLE_URL}."
            )
        self._url, self.name, self._max_parallel = url, model, max_parallel
        self._listed_models: list[str] = []
        self._parameters = Parameters(f"The server at {url}")
        self.changes = self._parameters.changes
        self._probes = probe
        self._thinks, self._opened = False, ""

    def __enter__(self) -> OpenAIClient:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: the connections are closed at the end of each run."""

    def run(self, tasks: Iterable[Task]) -> None:
        """Drive all `tasks` to their end; they are advanced in this thread, one at a time.

        Raises:
            GattError: no server answers, it refuses the key or the model, or it keeps failing.
        """
        asyncio.run(self._run(tasks))

    async def _run(self, tasks: Iterable[Task]) -> None:
        import openai

        async with openai.AsyncOpenAI(
            base_url=self._url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=openai.Timeout(None, connect=_CONNECT_SECONDS),  # see _ANSWER_SECONDS
            max_retries=_MAX_RETRIES,
            http_client=http_client(self._url),
        ) as client:
            try:
                await self._choose_model(client)
                if self._probes:
                    self._probes = False
                    await self._answer(client, _PROBE)
                waiting = iter(tasks)
                await _run_all([self._work(client, waiting) for _ in range(self._max_parallel)])
            except openai.APIConnectionError as error:
                raise GattError(self._connection_message(error)) from error
            except openai.APIStatusError as error:
                raise GattError(self._status_message(error)) from error

    async def _choose_model(self, client: AsyncOpenAI) -> None:
        """List the server's models: the first is the default, and a wrong address shows here."""
        import openai

        first_request = client.with_options(max_retries=_MAX_RETRIES_FIRST_REQUEST)
        try:
            response = await first_request.get("/models", cast_to=object)
        except json.JSONDecodeError as error:
            raise self._incompatible("broken JSON") from error
        except openai.APIStatusError:
            if self.name:
                return  # some gateways have no list, or refuse it to a key that may chat
            raise
        try:
            self._listed_models = [str(model["id"]) for model in response["data"]]
        except (TypeError, KeyError) as error:
            raise self._incompatible(response) from error
        if not self.name and not self._listed_models:
            raise GattError(
                f"The server at {self._url} offers no model. Load one there, and run again."
            )
        self.name = self.name or self._listed_models[0]

    async def _work(self, client: AsyncOpenAI, waiting: Iterator[Task]) -> None:
        """Drive one task after another, until none is waiting."""
        for task in waiting:
            with closing(task):
                await self._drive(client, task)

    async def _drive(self, client: AsyncOpenAI, task: Task) -> None:
        completion: Completion | None = None
        while True:
            try:
                request = task.send(completion) if completion else next(task)
            except StopIteration:
                return
            completion = await self._answer(client, request)

    async def _answer(self, client: AsyncOpenAI, request: Request) -> Completion:
        completion = await _wait_at_most(_ANSWER_SECONDS, self._complete(client, request))
        if completion is None:
            raise GattError(
                f"The server at {self._url} took more than {_ANSWER_SECONDS} s for one "
                "answer. Check its log. If it is only slow, lower max_parallel "
                f"({self._max_parallel}) and run again."
            )
        return completion

    async def _complete(self, client: AsyncOpenAI, request: Request) -> Completion:
        """Return one answer, with tokens for thoughts if the model thinks.

        Where prompt, answer and thoughts do not fit in the context, the thoughts get less.
        """
        import openai

        thought_tokens = request.max_thought_tokens if self._thinks else 0
        has_had_tokens = bool(thought_tokens) or not request.max_thought_tokens
        while True:
            try:
                completion = await self._complete_once(client, request, thought_tokens)
            except openai.APIStatusError as error:
                if not is_overflow(error):
                    raise
                if not thought_tokens:
                    return Completion("", 0, 0, "context")
                thought_tokens //= 2
                if thought_tokens < _MIN_THOUGHT_TOKENS:
                    thought_tokens = 0
                continue
            self._learn_thinking(completion)
            if completion.finish != "thinking" or has_had_tokens:
                return completion
            thought_tokens, has_had_tokens = request.max_thought_tokens, True

    def _learn_thinking(self, completion: Completion) -> None:
        """Remember, and log once, that the model thinks."""
        if self._thinks or not (completion.thoughts or completion.finish == "thinking"):
            return
        self._thinks = True
        log(f"{self.name} thinks before it answers: its thoughts are logged, but not used.")

    async def _complete_once(
        self, client: AsyncOpenAI, request: Request, thought_tokens: int
    ) -> Completion:
        """Return one answer, requested again without streaming if the stream broke off.

        An error in a stream has no HTTP status; the second response shows it.
        """
        completion: Completion | None = None
        if self._parameters.streams:
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

        while True:
            body = self._parameters.body(
                self.name, request, thought_tokens=thought_tokens, stream=stream
            )
            try:
                return await client.chat.completions.create(**body)
            except openai.APIStatusError as error:
                if not self._parameters.learn(error, body):
                    raise

    def _incompatible(self, response: object) -> GattError:
        return GattError(
            f"The server at {self._url} is not OpenAI-compatible (it sent {_one_line(response)!r})."
            f" Correct the address; it usually ends in /v1, as in {_EXAMPLE_URL}."
        )

    def _connection_message(self, error: APIConnectionError) -> str:
        reason = _one_line(error.__cause__ or error)
        if not is_this_machine(self._url) and (variables := proxy_variables()):
            reason += f", with the proxy of {' and '.join(variables)}"
        return (
            f"No server answers at {self._url} ({reason}). Start it or correct the address "
            f"({_EXAMPLE_URL}), and run again."
        )

    def _status_message(self, error: APIStatusError) -> str:
        """Return what a 4xx or 5xx response means for the user, and what to do next."""
        import openai

        server = f"The server at {self._url}"
        details = f"({error.status_code}: {_error_text(error)})"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            has_key = os.environ.get("OPENAI_API_KEY")
            key = "the key in OPENAI_API_KEY" if has_key else "a request without a key"
            return f"{server} refuses {key} {details}. Set OPENAI_API_KEY to a valid key."
        unknown_model = isinstance(error, openai.NotFoundError) or error.code == "model_not_found"
        if unknown_model and self.name not in self._listed_models:
            if self._listed_models:
                known = ", ".join(self._listed_models)
                return f"{server} has no model {self.name!r}. Take one of: {known}."
            return (
                f"No chat completions at {self._url} {details}. Correct the address (it usually "
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


async def _run_all(workers: Iterable[Coroutine[object, object, None]]) -> None:
    """Run `workers` to their end; if one fails, cancel the rest before raising its exception."""
    running = [asyncio.ensure_future(worker) for worker in workers]
    try:
        await asyncio.gather(*running)
    finally:
        for worker in running:
            worker.cancel()
        await asyncio.gather(*running, return_exceptions=True)


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
