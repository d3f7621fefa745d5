"""Ray clusters on this machine: several nodes at one address, or each in a network of its own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

# Ray neither reports to its makers nor takes long to notice that a node has died.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
_FAST = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
_HEAD, _PORT, _CLIENT_PORT = "10.213.0.1", 6379, 10001


@contextmanager
def local_cluster(*names: str) -> Iterator[Cluster]:
    """Run nodes of one core each at this machine's loopback address, and a head without cores."""
    from ray.cluster_utils import Cluster

    with mock.patch.dict(os.environ, _ENVIRONMENT):
        head = {"num_cpus": 0, "_system_config": _FAST}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for name in names:
                add_node(cluster, name)
            yield cluster
        finally:
            cluster.shutdown()


def add_node(cluster: Cluster, name: str) -> None:
    """Add a node of one core."""
    cluster.add_node(num_cpus=1, node_name=name)


def kill_raylet(cluster: Cluster, name: str) -> None:
    """End the raylet of a node with SIGKILL, as if the machine had lost power."""
    (node,) = (n for n in cluster.worker_nodes if n._ray_params.node_name == name)
    (raylet,) = node.all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGKILL)


def can_make_networks() -> bool:
    """Return whether this process may make network namespaces."""
    if not (sys.platform == "linux" and shutil.which("ip") and os.geteuid() == 0):
        return False
    made = subprocess.run(["ip", "netns", "add", "gatt-try"], check=False, capture_output=True)
    subprocess.run(["ip", "netns", "del", "gatt-try"], check=False, capture_output=True)
    return made.returncode == 0


@contextmanager
def networked_cluster(
    folder: Path, nodes: int, hidden: Sequence[Path] = ()
) -> Iterator[Mapping[str, str]]:
    """Run `nodes` of one core, each in a network namespace with an address of its own.

    Yields the environment of a driver that finds the cluster by "auto". The nodes have an empty
    cache of gatt, and do not see the folders `hidden`. The head, without cores, is outside.
    """
    ray = Path(sys.executable).with_name("ray")
    environment = {**os.environ, **_ENVIRONMENT, "RAY_ADDRESS": f"{_HEAD}:{_PORT}"}
    start = [str(ray), "start", "--disable-usage-stats", "--block"]
    with ExitStack() as stack:
        stack.enter_context(_bridge(nodes))
        head = [
            *("--head", f"--node-ip-address={_HEAD}", f"--port={_PORT}", "--num-cpus=0"),
            *(f"--ray-client-server-port={_CLIENT_PORT}", "--include-dashboard=false"),
            *(f"--temp-dir={_short(stack)}", f"--system-config={json.dumps(_FAST)}"),
        ]
        stack.enter_context(_running([*start, *head], environment, folder / "head.log"))
        for number in range(1, nodes + 1):
            cache = folder / f"cache-{number}"
            words = [
                *start,
                *(f"--address={_HEAD}:{_PORT}", f"--node-ip-address={_address(number)}"),
                *(f"--node-name=node-{number}", "--num-cpus=1"),
            ]
            mounts = "".join(f"mount -t tmpfs none {shlex.quote(str(path))}; " for path in hidden)
            shell = f"ip link set lo up; {mounts}exec {shlex.join(words)}"
            command = ["unshare", "--mount", "sh", "-c", shell]
            stack.enter_context(
                _running(
                    ["ip", "netns", "exec", _namespace(number), *command],
                    {**environment, "XDG_CACHE_HOME": str(cache)},
                    folder / f"node-{number}.log",
                )
            )
        yield environment


def client_address() -> str:
    """Return the address of the networked cluster for Ray's client."""
    return f"ray://{_HEAD}:{_CLIENT_PORT}"


def _namespace(number: int) -> str:
    return f"gatt-{number}"


def _address(number: int) -> str:
    return f"10.213.0.{number + 1}"


def _short(stack: ExitStack) -> str:
    """Return a folder whose path is short enough for the sockets in it."""
    import tempfile

    return stack.enter_context(tempfile.TemporaryDirectory(prefix="gr", dir="/tmp"))


@contextmanager
def _bridge(nodes: int) -> Iterator[None]:
    """Connect the namespaces with a bridge that has the head's address."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("link", "add", "gatt-br", "type", "bridge")
        ip("addr", "add", f"{_HEAD}/24", "dev", "gatt-br")
        ip("link", "set", "gatt-br", "up")
        for number in range(1, nodes + 1):
            name, outside, inside = _namespace(number), f"gatt-o{number}", f"gatt-i{number}"
            ip("netns", "add", name)
            ip("link", "add", outside, "type", "veth", "peer", "name", inside)
            ip("link", "set", inside, "netns", name)
            ip("link", "set", outside, "master", "gatt-br")
            ip("link", "set", outside, "up")
            ip("-n", name, "addr", "add", f"{_address(number)}/24", "dev", inside)
            ip("-n", name, "link", "set", inside, "up")
        yield
    finally:
        for number in range(1, nodes + 1):
            subprocess.run(["ip", "netns", "del", _namespace(number)], check=False)
        subprocess.run(["ip", "link", "del", "gatt-br"], check=False)


@contextmanager
def _running(command: list[str], env: Mapping[str, str], log: Path) -> Iterator[None]:
    """Run a node until the block ends, and all processes that it has started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=dict(env), stdout=output, stderr=output, start_new_session=True
        )
        try:
            _wait_for(process, log)
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_for(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the node says that it has started."""
    import time

    for _ in range(600):
        if "Ray runtime started" in log.read_text(errors="replace"):
            return
        assert process.poll() is None, log.read_text(errors="replace")
        time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace"))
