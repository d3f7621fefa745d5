"""The address of a server: whether it is one, and whether a proxy stands before it."""

from __future__ import annotations

import os
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.errors import GattError

if TYPE_CHECKING:
    from openai import DefaultAsyncHttpxClient

_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def is_server_url(name: str) -> bool:
    """Return whether `name` is meant as the address of a server, not as the name of a model."""
    return name.lower().startswith(("http://", "https://"))


def is_valid_url(url: str) -> bool:
    """Return whether `url` is an address of HTTP with a host."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def is_this_machine(url: str) -> bool:
    """Return whether a server runs on this machine: localhost, 127.0.0.0/8, ::1, 0.0.0.0, ::."""
    host = (urlsplit(url).hostname or "").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


def http_client(url: str) -> DefaultAsyncHttpxClient:
    """Return a client that takes the proxy of the environment, but never to this machine.

    Raises:
        GattError: a proxy that cannot be used.
    """
    import openai

    try:
        return openai.DefaultAsyncHttpxClient(trust_env=not is_this_machine(url))
    except (ImportError, ValueError) as error:
        raise GattError(
            f"The proxy in {' or '.join(proxy_variables()) or 'the environment'} cannot be used "
            f"({error}). Correct it, or put the server's host in NO_PROXY."
        ) from error


def proxy_variables() -> list[str]:
    """Return the names of the environment variables that set a proxy."""
    names = (*_PROXY_VARIABLES, *map(str.lower, _PROXY_VARIABLES))
    return [name for name in names if os.environ.get(name)]
