"""Fixtures of many test files: models, a finished run, and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cli import Gatt, override_flags, run_gatt
from support.golden import Golden, check_golden, write_golden
from support.models import save_tiny_adapter, save_tiny_llama
from support.shared import make_once

from pipeline.run_dir import RunDir


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-golden`."""
    parser.addoption("--update-golden", action="store_true", help="Write tests/golden/ anew.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put one of the two files that use the finished run first, and the other one last.

    With pytest-xdist the run is then made once by one worker, while the other has work to do.
    """
    order = {"test_resume.py": -1, "test_run.py": 1}
    items.sort(key=lambda item: order.get(item.path.name, 0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List every skipped test by name with its reason, so that none is skipped silently."""
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.write_line(f"skipped: {report.nodeid}: {reason}")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare a text with a golden file, or write that file with `--update-golden`."""
    return write_golden if request.config.getoption("--update-golden") else check_golden


@pytest.fixture(scope="session")
def gatt() -> Gatt:
    """Return a function that runs `python -m pipeline` with the given words."""
    return run_gatt


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Return the flags of a run that takes a minute."""
    return override_flags()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Return a run made by `gatt run` with `tiny`; tests that change it work on a copy."""

    def make(folder: Path) -> None:
        done = run_gatt("run", "--run", folder, *override_flags())
        assert done.returncode == 0, done.stderr

    return RunDir(make_once(tmp_path_factory, "finished", make))


@pytest.fixture(scope="session")
def base() -> Path:
    """Return the embedded model's file."""
    from pipeline.hub.models import find_model

    return find_model("smollm2-135m").path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random Llama 3 in miniature."""
    return make_once(tmp_path_factory, "tiny-llama", save_tiny_llama)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random LoRA for `tiny_llama`."""
    return make_once(
        tmp_path_factory, "tiny-adapter", lambda folder: save_tiny_adapter(tiny_llama, folder)
    )
