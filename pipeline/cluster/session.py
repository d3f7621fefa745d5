"""The connection to a Ray cluster, on which engines are opened while it lasts."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.cluster.engine import ClusterEngine
from pipeline.cluster.nodes import Cluster
from pipeline.errors import GattError
from pipeline.inference.generator import EngineOptions, engines_opened_by

_CONNECT_SECONDS = 10.0
_connected: list[Cluster] = []


def current_cluster() -> Cluster | None:
    """Return the cluster that this process is connected with, if any."""
    return _connected[-1] if _connected else None


@contextmanager
def connect(address: str, storage: str = "") -> Iterator[Cluster]:
    """Generate on the Ray cluster at `address` until the block ends.

    Args:
        address: "auto" for the cluster that this machine is a node of, or "ray://host:10001".
        storage: as for `Cluster`.

    Raises:
        GattError: there is no cluster at that address, or one of another version.
    """
    import ray

    _init(address)
    cluster = Cluster(storage=storage)

    def open_remote(gguf: Path, options: EngineOptions) -> ClusterEngine:
        return ClusterEngine(cluster, gguf, options)

    _connected.append(cluster)
    try:
        with engines_opened_by(open_remote):
            yield cluster
    finally:
        _connected.pop()
        ray.shutdown()


def _init(address: str) -> None:
    import ray

    try:
        _require_listener(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says the same
            # The remarks of the workers come with the name of their node (`engine`).
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="gatt"
            )
    except (OSError, RuntimeError, ValueError) as error:
        text = getattr(error, "strerror", None) or str(error)
        reason = next(iter(text.splitlines()), type(error).__name__).rstrip(".")
        raise GattError(
            f"--ray {address}: no Ray cluster to connect with ({reason}). Start one with `ray "
            "start --head` and `ray start --address=HOST:6379` on the other machines, and pass "
            "`auto` on one of them, or ray://HOST:10001."
        ) from error


def _require_listener(address: str) -> None:
    """Check that somebody listens at an address, for which Ray would wait long.

    Raises:
        OSError: nobody does.
        ValueError: not an address of Ray's.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()) or "/" in host:
        raise ValueError("not an address of Ray's")
    socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
