"""Several servers of one model: the least busy one is asked, and one that fails is left out.

A server that was left out is asked a short question from time to time, and used again once it
answers. A request that fails is sent to another server, with the same seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.inference.remote.server import FEW_RETRIES, MAX_RETRIES, ServedModel, Server
from pipeline.records import Completion, Request

_SECONDS_LEFT_OUT = 30.0
"""How long a server that fails is left out before it is tried again."""
_PROBE = Request(
    messages=({"role": "user", "content": "What is 2 + 3? Answer with the number."},),
    seed=0xFFFFFFFF,  # some servers take 31 bits only
    max_tokens=1024,
    max_thought_tokens=0,
)
"""Shows whether a model thinks, and whether its server sends the beginning of the thoughts."""


class ServerPool:
    """The connected `servers` of `model`, for up to `max_parallel` requests in flight in all.

    With `probe`, each server is asked a question first that shows whether the model thinks.
    """

    def __init__(
        self, servers: Sequence[Server], model: ServedModel, max_parallel: int, *, probe: bool
    ) -> None:
        self._servers, self._model, self._probes = servers, model, probe
        each = -(-max_parallel // len(servers))
        self._slots = {server: asyncio.Semaphore(each) for server in servers}

    async def start(self) -> None:
        """Choose the model, if it is not named, and leave out the servers that do not answer.

        Raises:
            GattError: no server answers, or they run different models.
        """
        if not self._available():
            for server in self._servers:
                server.problem = ""
        servers = self._available()
        await asyncio.gather(*map(self._list_models, servers))
        servers = [server for server in servers if not server.problem]
        self._model.name = self._model.name or servers[0].listed_models[0]
        for server in servers:
            self._check_model(server)
        if self._probes:
            await asyncio.gather(*map(self._probe, servers))

    async def answer(self, request: Request) -> Completion:
        """Return the answer of the least busy server, or of another one if that fails.

        Raises:
            GattError: no server answers.
        """
        while True:
            server = self._least_busy()
            server.running += 1
            try:
                async with self._slots[server]:
                    if server.problem:  # it has failed in the meantime
                        continue
                    is_last = len(self._available()) == 1
                    return await server.answer(request, MAX_RETRIES if is_last else FEW_RETRIES)
            except GattError as error:
                self._leave_out(server, error)
            finally:
                server.running -= 1

    async def try_again(self) -> None:
        """Keep trying the servers that were left out, until it is canceled."""
        while True:
            await asyncio.sleep(_SECONDS_LEFT_OUT)
            await asyncio.gather(*(self._revive(s) for s in self._servers if s.problem))

    def _available(self) -> list[Server]:
        return [server for server in self._servers if not server.problem]

    def _least_busy(self) -> Server:
        if servers := self._available():
            return min(servers, key=lambda server: server.running)
        raise GattError(self._servers[0].problem)  # another request has failed the run

    async def _list_models(self, server: Server) -> None:
        try:
            await server.list_models()
        except GattError as error:
            self._leave_out(server, error)

    def _check_model(self, server: Server) -> None:
        """Check that a server runs the model of the others; where it is named, the user has."""
        if not self._model.is_named and self._model.name not in server.listed_models:
            raise GattError(
                f"The server at {server.url} runs {server.listed_models[0]}, and others run "
                f"{self._model.name}. Start all with the same model under one name, or name it, as "
                "in URL#model."
            )

    async def _probe(self, server: Server) -> None:
        try:
            await server.answer(_PROBE)
        except GattError as error:
            self._leave_out(server, error)

    async def _revive(self, server: Server) -> None:
        """Use a server again if it answers, and runs the model of the others."""
        try:
            await server.list_models()
            self._check_model(server)
            await server.answer(_PROBE, FEW_RETRIES)
        except GattError as error:
            server.problem = str(error)
            return
        except Exception as error:  # nothing that one server sends may end the trials of all
            kind = type(error).__name__
            server.problem = f"The server at {server.url} cannot be used ({kind}: {error})."
            return
        server.problem = ""
        log(f"The server at {server.url} answers again, and is used.")

    def _leave_out(self, server: Server, error: GattError) -> None:
        """Leave a server out for now.

        Raises:
            GattError: no other one is left.
        """
        if server.problem and self._available():
            return  # another request has noticed it
        server.problem = str(error)
        if self._available():
            log(
                f"{error} It is left out, and tried again every {_SECONDS_LEFT_OUT:.0f} s; "
                f"{len(self._available())} of {len(self._servers)} servers go on."
            )
            return
        if len(self._servers) == 1:
            raise error
        raise GattError(f"None of the {len(self._servers)} servers answers. {error}") from error
