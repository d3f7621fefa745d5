"""The tests: `python3 scripts/test.py`, with `--all` for the slow ones too. Other arguments go to pytest."""

from __future__ import annotations

import os
import subprocess
import sys

from bootstrap import ROOT, bootstrap

if __name__ == "__main__":
    python = bootstrap()
    arguments = sys.argv[1:]
    everything = "--all" in arguments
    chosen = [a for a in arguments if a != "--all"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    tools = python.parent
    for check in (
        ()
        if chosen
        else ([tools / "ruff", "check", "."], [tools / "mypy"], [tools / "lint-imports"])
    ):
        if subprocess.call(check, cwd=ROOT):
            sys.exit(f"{check[0].name} found something to correct (above).")
    marks = [] if everything else ["-m", "not slow and not gpu"]
    sys.exit(
        subprocess.call([python, "-m", "pytest", "-q", *marks, *chosen], cwd=ROOT, env=environment)
    )
