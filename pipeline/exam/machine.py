"""What takes the times of an exam, by names that tell machines apart."""

from __future__ import annotations

import platform
from urllib.parse import urlsplit

from pipeline.inference.llama.gpu import describe_gpus, gpu_devices
from pipeline.inference.remote.address import is_this_machine, parse_servers
from pipeline.system import core_count, cpu_name

_SEPARATOR = "; "


def local_machine() -> str:
    """Return the name of this machine: its graphics cards, and its processor."""
    devices = gpu_devices()
    return ", ".join([*([describe_gpus(devices)] if devices else []), _processor()])


def server_machine(address: str) -> str:
    """Return the name of what serves at an address, for a request from this machine."""
    return server_place(",".join(parse_servers(address).urls), local_machine())


def server_place(urls: str, client: str) -> str:
    """Return the hosts of some servers, without what else is in their addresses.

    One on the machine that asks is named with it, the `client`: other machines have the same
    address for theirs.
    """
    several = urls.split(",")
    hosts = sorted({urlsplit(url).hostname or "" for url in several})
    place = f"server {' + '.join(hosts)}"
    return f"{place} on {client}" if any(map(is_this_machine, several)) else place


def joined_machines(names: list[str]) -> str:
    """Return the names of all machines that took a part of the times."""
    return _SEPARATOR.join(names)


def is_one_machine(*names: str) -> bool:
    """Return whether all of some names are the same, and that of a single machine."""
    return len(set(names)) == 1 and _SEPARATOR not in names[0]


def _processor() -> str:
    """Return the processor with the cores that this process may use."""
    parts = [f"{platform.system()} {platform.machine()}", cpu_name(), f"{core_count()} cores"]
    return ", ".join(filter(None, parts))
