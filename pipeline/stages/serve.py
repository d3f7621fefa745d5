"""`gatt serve`: models over HTTP, to any client of OpenAI's interface."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.async_engine import AsyncEngine, ModelSource
from pipeline.inference.model import Adapter
from pipeline.inference.scheduler import Limits
from pipeline.server.app import make_app
from pipeline.server.middleware import LOG, AccessSettings
from pipeline.server.web.app import mount

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class _Server(uvicorn.Server):
    """Ends the answers that run when it is told to stop, and does not wait for them."""

    engine: AsyncEngine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.stop()
        await super().shutdown(sockets)


def run(
    models: Sequence[str],
    adapters: Sequence[Path],
    host: str,
    port: int,
    key: str,
    cors: Sequence[str],
    context: int,
    runs: Path | None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; the log goes to stderr, a line of JSON for each request.

    `runs` is the folder whose finished runs the page lists (None: "runs", if there is one).
    """
    if runs and not runs.is_dir():
        raise GattError(
            f"No folder {runs}. --runs takes the one in which the folders of runs are, such as runs."
        )
    listening = _bind(host, port, key)
    sources = _sources(models, adapters)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _log_to_stderr()
    engine = AsyncEngine(sources, Limits(context))
    try:
        hosts = () if key else (*_LOOPBACK, host.lower())
        app = make_app(engine, AccessSettings(key, tuple(cors), hosts))
        mount(app, engine, key, runs or Path("runs"), listening.getsockname()[1])
        server = _Server(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
        )
        server.engine = engine
        listening.listen()  # whoever reads the address may come at once
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
        log(
            f"Serving {', '.join(engine.names)} at {address}. A page to talk on: {address.removesuffix('v1')} Ctrl-C stops it."
        )
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        engine.close()


def _bind(host: str, port: int, key: str) -> socket.socket:
    """Take the port before a model is loaded; without a key only where nobody else's machine reaches it."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise GattError(
            f"No address of the name {host!r}. Expected 127.0.0.1, or one of this machine's."
        ) from error
    if not key and not ipaddress.ip_address(address[0]).is_loopback:
        raise GattError(
            f"{host} can be reached from other machines, and no key was given. Set --api-key (or GATT_API_KEY), "
            "or leave --host out."
        )
    listening = socket.socket(family, kind)
    try:
        if sys.platform != "win32":  # there it would let a second server take the same port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise GattError(
            f"Cannot listen on port {port} of {host} ({error.strerror}). Name another: --port 8081."
        ) from error
    return listening


def _sources(models: Sequence[str], adapters: Sequence[Path]) -> dict[str, ModelSource]:
    """What is served by which name: the models' own, and "MODEL+ADAPTER" for adapters."""
    if adapters and len(models) > 1:
        raise GattError(
            f"--adapter goes with one MODEL, but there are {len(models)}. Serve the others by another `gatt serve`."
        )
    sources: dict[str, ModelSource] = {}
    for asked in models:
        model = find_model(asked)
        path = model.path if model.is_gguf else cached_gguf(model, "Q8_0")
        for name, source in (
            (model.name, ModelSource(path)),
            *((f"{model.name}+{a.stem}", ModelSource(path, Adapter(a))) for a in adapters),
        ):
            if name in sources:
                raise GattError(
                    f"Two models would be served as {name!r}. Give one of the files another name."
                )
            sources[name] = source
    return sources


def _log_to_stderr() -> None:
    """The requests' lines as they are; of libraries only warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger().addHandler(handler)
    LOG.setLevel(logging.INFO)
