"""`gatt serve`: an OpenAI-compatible API for GGUF models, and a page to chat with them."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.hub.convert import runnable_gguf
from pipeline.hub.models import find_model
from pipeline.inference.async_engine import AsyncEngine, ModelSource
from pipeline.inference.llama.model import Adapter
from pipeline.inference.scheduler import Limits
from pipeline.server.app import make_app
from pipeline.server.middleware import LOG, AccessSettings
from pipeline.server.web.app import mount

_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class Access:
    """Where the server listens, the key that clients send ("": none), and the allowed origins."""

    host: str
    port: int
    key: str
    cors: Sequence[str] = ()


class _Server(uvicorn.Server):
    """Ends the answers that are generated when it stops, instead of waiting for them."""

    engine: AsyncEngine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.stop()
        await super().shutdown(sockets)


def run(
    models: Sequence[str],
    adapters: Sequence[Path],
    access: Access,
    context: int,
    runs: Path | None,
    *,
    batch_invariant: bool,
) -> None:
    """Serve until Ctrl-C or SIGTERM; the log goes to stderr, a line of JSON for each request.

    The page lists the finished runs of the folder `runs` (None: "runs", if it exists).

    Raises:
        GattError: the address, a model or the folder cannot be used.
    """
    if runs and not runs.is_dir():
        raise GattError(f"No folder {runs}. --runs takes the folder that contains the run folders.")
    listener = _bind(access)
    sources = _find_sources(models, adapters)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _log_to_stderr()
    engine = AsyncEngine(sources, Limits(context, batch_invariant=batch_invariant))
    try:
        hosts = () if access.key else (*_LOOPBACK_HOSTS, access.host.lower())
        app = make_app(engine, AccessSettings(access.key, tuple(access.cors), hosts))
        port = listener.getsockname()[1]
        mount(app, engine, access.key, runs or Path("runs"), port)
        server = _Server(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
        )
        server.engine = engine
        listener.listen()  # before the address is printed: whoever reads it may connect at once
        page = f"http://{f'[{access.host}]' if ':' in access.host else access.host}:{port}/"
        log(f"Serving {', '.join(engine.names)} at {page}v1. Chat page: {page} Ctrl-C stops it.")
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        engine.close()


def _bind(access: Access) -> socket.socket:
    """Return a socket bound to the address, before a model is loaded.

    Raises:
        GattError: the address is taken or unknown, or other machines reach it without a key.
    """
    host, port = access.host, access.port
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise GattError(
            f"Unknown host {host!r}. Expected 127.0.0.1, or another address of this machine."
        ) from error
    if not access.key and not ipaddress.ip_address(address[0]).is_loopback:
        raise GattError(
            f"Other machines can reach {host}, and no key was given. Set --api-key (or "
            "GATT_API_KEY), or omit --host."
        )
    listener = socket.socket(family, kind)
    try:
        if sys.platform != "win32":  # there it would let a second server take the same port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise GattError(
            f"Cannot listen on port {port} of {host} ({error.strerror}). Choose another: "
            "--port 8081."
        ) from error
    return listener


def _find_sources(models: Sequence[str], adapters: Sequence[Path]) -> dict[str, ModelSource]:
    """Return what is served by name: each model, and MODEL+ADAPTER for each adapter.

    Raises:
        GattError: an unknown model, equal names, or adapters with several models.
    """
    if adapters and len(models) > 1:
        raise GattError(
            f"--adapter needs one MODEL, but there are {len(models)}. Serve the others with "
            "another `gatt serve`."
        )
    sources: dict[str, ModelSource] = {}
    for model_name in models:
        model = find_model(model_name)
        path = runnable_gguf(model)
        for name, source in (
            (model.name, ModelSource(path)),
            *((f"{model.name}+{a.stem}", ModelSource(path, Adapter(a))) for a in adapters),
        ):
            if name in sources:
                raise GattError(f"Two models would be served as {name!r}. Rename one of the files.")
            sources[name] = source
    return sources


def _log_to_stderr() -> None:
    """Write the requests' lines unchanged, and warnings of libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger().addHandler(handler)
    LOG.setLevel(logging.INFO)
