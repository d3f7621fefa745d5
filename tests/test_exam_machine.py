"""The names by which the exam tells apart what took its times."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from pipeline import system
from pipeline.exam import machine
from pipeline.exam.machine import is_one_machine, local_machine, server_machine
from pipeline.inference.llama.gpu import GpuDevice


@pytest.fixture
def zeta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a machine with another processor."""
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Zeta 9000: fast\n", encoding="utf-8")
    monkeypatch.setattr(system, "_CPU_INFO", file)
    monkeypatch.setattr(machine, "gpu_devices", list)
    monkeypatch.setattr(machine, "core_count", lambda: 3)
    return f"{platform.system()} {platform.machine()}, Zeta 9000: fast, 3 cores"


def test_a_machine_has_the_name_of_its_processor(
    zeta: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_machine() == zeta
    monkeypatch.setattr(machine, "gpu_devices", lambda: [GpuDevice("Card", 1)])
    assert local_machine() == f"Card, {zeta}"
    monkeypatch.setattr(system, "_CPU_INFO", Path("none"))
    monkeypatch.setattr(platform, "processor", lambda: "Eta")
    assert ", Eta, 3 cores" in local_machine()


def test_a_server_is_its_host(zeta: str) -> None:
    several = "https://b.example/v1,http://me:secret@a.example:81/v1#m"
    assert server_machine(several) == "server a.example + b.example"
    assert server_machine("http://[2001:db8::1]/v1") == "server 2001:db8::1"
    # Every machine has such an address; two models have a port each.
    name = f"server 127.0.0.1 on {zeta}"
    assert server_machine("http://127.0.0.1:8080/v1") == name
    assert server_machine("http://127.0.0.1:8081/v1") == name


def test_one_machine_is_the_same_one_throughout() -> None:
    assert is_one_machine("A", "A")
    assert not is_one_machine("A", "B")
    assert not is_one_machine("A; B", "A; B")
