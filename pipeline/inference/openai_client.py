"""Any OpenAI-compatible server as the teacher: vLLM, llama-server, Ollama, LM Studio, llama-cpp-python's own.

The way to scale out: the server batches, this file only keeps enough dialogues in flight. What the server decides: its chat
template, its sampling beyond temperature and seed, and whether an answer depends on what runs beside it.

Two servers to set up with care. Ollama drops old messages in silence where its context is full: start it with
OLLAMA_CONTEXT_LENGTH large enough. llama-cpp-python's breaks a stream off when the next request arrives: start it with
`--interrupt_requests False`, or most answers are asked for twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import GattError
from pipeline.records import Completion, Request, Task

_EXAMPLE = "http://127.0.0.1:8000/v1"
_RETRIES = 6
"""Of a request that the server had no room for or failed at; the waits between them add up to about 25 s."""
_FIRST_RETRIES = 2
"""The same at the first contact, where a wrong address is likelier than a server that comes back."""
_SECONDS = 1200
"""For one answer. It spans the wait in the server's own queue, which is long where a CPU answers one at a time."""
_OVERFLOW = re.compile(r"context.?(length|size|window)|maximum model length", re.IGNORECASE)
_CUT = ("length", "content_filter", "abort")


class OpenAIClient:
    """The model `model` behind `url`, with `concurrency` dialogues in flight; "" is the first model that it offers.

    `name` is that of the model in use, once a run has begun. The key is taken from the environment variable OPENAI_API_KEY.

    Raises:
        GattError: `url` is no address.
    """

    def __init__(self, url: str, model: str = "", concurrency: int = 24) -> None:
        if not _is_address(url):
            raise GattError(
                f"{url!r} is not the address of a server. Expected one such as {_EXAMPLE}."
            )
        self._url, self.name, self._concurrency = url, model, concurrency
        self._offered: list[str] = []
        self._options: dict[str, Any] = {"stream_options": {"include_usage": True}}

    def __enter__(self) -> OpenAIClient:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to give back: connections are closed at the end of each run."""

    def run(self, tasks: Iterable[Task]) -> None:
        """Drive all `tasks` to their end; they are advanced in this thread, one at a time.

        Raises:
            GattError: nobody answers, the key or the model is refused, or the server fails again and again.
        """
        asyncio.run(self._run(tasks))

    async def _run(self, tasks: Iterable[Task]) -> None:
        import openai

        key = os.environ.get("OPENAI_API_KEY") or "none"
        # Only connecting has a limit of its own: how long the first token may take depends on the queue (see _SECONDS).
        timeout = openai.Timeout(None, connect=10)
        async with openai.AsyncOpenAI(
            base_url=self._url, api_key=key, timeout=timeout, max_retries=_RETRIES
        ) as client:
            try:
                await self._meet(client)
                waiting = iter(tasks)
                await _together([self._work(client, waiting) for _ in range(self._concurrency)])
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                raise GattError(self._reason(error)) from error

    async def _meet(self, client: Any) -> None:
        """Ask for the list of models: a wrong address shows here at once, and the first model is the default."""
        import openai

        try:
            answer = await client.with_options(max_retries=_FIRST_RETRIES).get(
                "/models", cast_to=object
            )
        except json.JSONDecodeError as error:
            raise self._stranger("broken JSON") from error
        except openai.APIStatusError:
            if self.name:
                return  # Some gateways have no list, or keep it from a key that may chat.
            raise
        try:
            self._offered = [str(model["id"]) for model in answer["data"]]
        except (TypeError, KeyError) as error:
            raise self._stranger(answer) from error
        if not self.name and not self._offered:
            raise GattError(
                f"The server at {self._url} offers no model. Load one there, and run again."
            )
        self.name = self.name or self._offered[0]

    async def _work(self, client: Any, waiting: Iterator[Task]) -> None:
        """One place in flight: start the next dialogue whenever the last one has ended."""
        for task in waiting:
            with closing(task):
                await self._converse(client, task)

    async def _converse(self, client: Any, task: Task) -> None:
        completion: Completion | None = None
        while True:
            try:
                request = task.send(completion) if completion else next(task)
            except StopIteration:
                return
            completion = await _within(_SECONDS, self._complete(client, request))
            if completion is None:
                raise GattError(
                    f"The server at {self._url} took more than {_SECONDS} s for one answer. See whether it hangs; "
                    f"if it is only slow, lower the concurrency ({self._concurrency}). Then run again."
                )

    async def _complete(self, client: Any, request: Request) -> Completion:
        """One answer; a stream that broke off is asked for again as a whole, where an error has a status to name it."""
        import openai

        try:
            return await self._streamed(client, request) or await self._whole(client, request)
        except openai.APIStatusError as error:
            told = f"{error.code} {_said(error)}"
            if error.status_code in (400, 413, 422) and _OVERFLOW.search(told):
                return Completion("", 0, 0, "context")
            raise

    async def _streamed(self, client: Any, request: Request) -> Completion | None:
        """The answer, cut off as soon as it is enough; None where the stream ended before the answer did.

        Tokens are counted in pieces of the stream where the server does not say, and then `prompt_tokens` is 0.
        """
        import openai

        text, tokens, prompt_tokens, reason = "", 0, 0, ""
        async with await self._open(client, request) as stream:
            try:
                async for chunk in stream:
                    for choice in chunk.choices or ():
                        piece = (choice.delta and choice.delta.content) or ""
                        text, tokens = text + piece, tokens + bool(piece)
                        reason = choice.finish_reason or reason
                        if piece and request.stop_when and request.stop_when(text):
                            return Completion(text, tokens, prompt_tokens, "enough")
                    if chunk.usage:
                        tokens, prompt_tokens = (
                            chunk.usage.completion_tokens,
                            chunk.usage.prompt_tokens,
                        )
            except (openai.APIError, json.JSONDecodeError):
                return None
        return Completion(text, tokens, prompt_tokens, _finish(reason)) if reason else None

    async def _open(self, client: Any, request: Request) -> Any:
        import openai

        options = self._options
        try:
            return await self._create(client, request, stream=True, **options)
        except openai.APIStatusError as error:
            if not options or "stream_options" not in _said(error):
                raise
        self._options = {}
        return await self._create(client, request, stream=True)

    async def _whole(self, client: Any, request: Request) -> Completion:
        try:
            answer = await self._create(client, request)
        except json.JSONDecodeError as error:
            raise self._stranger("broken JSON") from error
        choices = getattr(answer, "choices", None)
        if not choices:
            raise self._stranger(answer)
        text = choices[0].message.content or ""
        tokens, prompt_tokens = (
            (answer.usage.completion_tokens, answer.usage.prompt_tokens) if answer.usage else (0, 0)
        )
        enough = request.stop_when and request.stop_when(text)
        return Completion(
            text, tokens, prompt_tokens, "enough" if enough else _finish(choices[0].finish_reason)
        )

    async def _create(self, client: Any, request: Request, **how: Any) -> Any:
        return await client.chat.completions.create(
            model=self.name,
            messages=list(request.messages),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            **how,
        )

    def _stranger(self, found: object) -> GattError:
        return GattError(
            f"What answers at {self._url} is no OpenAI-compatible server (found {_short(found)!r}). "
            f"Correct the address; it mostly ends in /v1, as in {_EXAMPLE}."
        )

    def _reason(self, error: Any) -> str:
        """What a refusal or a failure means, and what to do next."""
        status = getattr(error, "status_code", 0)
        said = f"({status}: {_said(error)})"
        if not status:
            cause = _short(error.__cause__ or error)
            return f"No server answers at {self._url} ({cause}). Start it or correct the address ({_EXAMPLE}), and run again."
        if status in (401, 403):
            key = (
                "the key in OPENAI_API_KEY"
                if os.environ.get("OPENAI_API_KEY")
                else "a request without a key"
            )
            return f"The server at {self._url} refuses {key} {said}. Set OPENAI_API_KEY to one that it knows."
        if (status == 404 or error.code == "model_not_found") and self.name not in self._offered:
            if self._offered:
                return f"The server at {self._url} has no model {self.name!r}. Take one of: {', '.join(self._offered)}."
            return f"Nothing to chat with at {self._url} {said}. Correct the address (it mostly ends in /v1) or the model's name."
        if status == 429:
            return f"The server at {self._url} has no room {said}. Lower the concurrency ({self._concurrency}) and run again."
        if status >= 500:
            return f"The server at {self._url} fails again and again {said}. See its log, then run again."
        return f"The server at {self._url} refuses the request {said}. Correct the recipe, or take another server."


async def _together(workers: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run `workers` to their end; where one fails, the others are stopped before its exception goes on."""
    running = [asyncio.ensure_future(worker) for worker in workers]
    try:
        await asyncio.gather(*running)
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _within(seconds: float, answer: Coroutine[Any, Any, Completion]) -> Completion | None:
    """The answer, or None where it takes longer.

    Not `asyncio.wait_for`: before Python 3.12 that can lose a cancellation, and its dialogue would go on to the end.
    """
    running = asyncio.ensure_future(answer)
    try:
        await asyncio.wait([running], timeout=seconds)
        return running.result() if running.done() else None
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _finish(reason: str) -> str:
    return "length" if reason in _CUT else "stop"


def _said(error: Any) -> str:
    """The server's own words."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body
    return _short(body or error.message)


def _short(words: object) -> str:
    return " ".join(str(words).split())[:200]
