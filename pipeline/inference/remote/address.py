"""Addresses of servers: which there are in a name, and whether a proxy stands before one."""

from __future__ import annotations

import os
import re
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from pipeline.errors import GattError

if TYPE_CHECKING:
    from openai import DefaultAsyncHttpxClient

EXAMPLE_URL = "http://127.0.0.1:8000/v1"
_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_SEPARATOR = re.compile(r"\s*,\s*(?=https?:)", re.IGNORECASE)
"""Between two addresses; a comma elsewhere is part of an address."""


class Servers(NamedTuple):
    """The addresses of servers that run the same model; "" is the first that they list."""

    urls: tuple[str, ...]
    model: str


def is_server_url(name: str) -> bool:
    """Return whether `name` is meant as the address of a server, not as the name of a model."""
    return name.lower().startswith(("http://", "https://"))


def parse_servers(name: str) -> Servers:
    """Return the servers that `name` lists, separated by commas, and the model after a "#".

    It is enough to name the model once.

    Raises:
        GattError: not a valid address, or more than one model.
    """
    parts = [part.partition("#") for part in _SEPARATOR.split(name)]
    urls, models = [url for url, _, _ in parts], {model for _, _, model in parts if model}
    for url in urls:
        if not is_valid_url(url):
            raise GattError(
                f"{url!r} is not the address of a server. Expected one such as {EXAMPLE_URL}; "
                "commas separate several."
            )
    if len(models) > 1:
        raise GattError(
            f"{name}: the servers run different models ({', '.join(sorted(models))}), and one "
            "answers in place of another. Name servers of the same model only."
        )
    return Servers(tuple(dict.fromkeys(urls)), next(iter(models), ""))


def served_name(name: str) -> str:
    """Return the model that `name` gives after a "#", or all of `name`."""
    return parse_servers(name).model or name


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
