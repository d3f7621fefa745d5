"""Generate with OpenAI-compatible servers: vLLM, llama-server, Ollama, LM Studio, and others.

This is a way to scale out: the servers batch, and this client keeps enough requests in flight.
A server decides on its chat template and on sampling parameters other than temperature and seed.
It also decides whether an answer depends on the other requests in its batch.

Two servers need an option. Ollama drops old messages silently when its context is full: set
OLLAMA_CONTEXT_LENGTH large enough. The server of llama-cpp-python aborts a stream when the next
request arrives: start it with `--interrupt_requests False`, or most answers are requested twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, closing

from pipeline.inference.remote.address import parse_servers
from pipeline.inference.remote.pool import ServerPool
from pipeline.inference.remote.server import ServedModel, Server
from pipeline.records import Completion, Task

_MAX_PARALLEL = 24
"""Requests in flight for each server."""


class OpenAIClient:
    """The model `model` behind `address`: one server, or several with commas between them.

    A model may also stand in the address, after a "#"; "" takes the first that the server lists.
    `name` is the name of the model, known once a run has begun. `changes` are the parameters that a
    server has refused, with what became of them. `max_parallel` requests are in flight in all; 0:
    24 for each server. The API key is read from the environment variable OPENAI_API_KEY. With
    `probe`, the first run begins with a question that shows whether the model thinks.

    Raises:
        GattError: `address` is not valid.
    """

    def __init__(
        self, address: str, model: str = "", max_parallel: int = 0, *, probe: bool = False
    ) -> None:
        urls, named = parse_servers(address)
        self.name = model or named
        self._max_parallel = max_parallel or _MAX_PARALLEL * len(urls)
        self._model = ServedModel(self.name, is_named=bool(self.name))
        self._servers = [Server(url, self._model, self._max_parallel) for url in urls]
        self.changes = self._model.parameters.changes
        self._probes = probe

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
        async with AsyncExitStack() as connections:
            for server in self._servers:
                await connections.enter_async_context(server.connect())
            pool = ServerPool(self._servers, self._model, self._max_parallel, probe=self._probes)
            await pool.start()
            self.name, self._probes = self._model.name, False
            retries = asyncio.ensure_future(pool.try_again())
            try:
                waiting = iter(tasks)
                await _run_all([_work(pool, waiting) for _ in range(self._max_parallel)])
            finally:
                retries.cancel()
                await asyncio.gather(retries, return_exceptions=True)


async def _work(pool: ServerPool, waiting: Iterator[Task]) -> None:
    """Drive one task after another, until none is waiting."""
    for task in waiting:
        with closing(task):
            await _drive(pool, task)


async def _drive(pool: ServerPool, task: Task) -> None:
    completion: Completion | None = None
    while True:
        try:
            request = task.send(completion) if completion else next(task)
        except StopIteration:
            return
        completion = await pool.answer(request)


async def _run_all(workers: Iterable[Coroutine[object, object, None]]) -> None:
    """Run `workers` to their end; if one fails, cancel the rest before raising its exception."""
    running = [asyncio.ensure_future(worker) for worker in workers]
    try:
        await asyncio.gather(*running)
    finally:
        for worker in running:
            worker.cancel()
        await asyncio.gather(*running, return_exceptions=True)
