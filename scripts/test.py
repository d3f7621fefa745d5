"""Check and test: `python3 scripts/test.py`, with `--all` for the slow tests too.

Other arguments go to pytest and skip the checks: `python3 scripts/test.py tests/test_masks.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys

from bootstrap import ROOT, bootstrap, run_to_end

CHECKS = ("ruff check .", "ruff format --check .", "typos", "mypy", "lint-imports")
REPORT = ("-q", "--durations=15")
# The order of the files is that of tests/conftest.py, not by their number of tests.
PARALLEL = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")


def main() -> int:
    """Run the checks and pytest; return the exit status."""
    python = bootstrap()
    arguments = [argument for argument in sys.argv[1:] if argument != "--all"]
    for check in () if arguments else CHECKS:
        name, *options = check.split()
        print(f"{check}:", flush=True)
        if subprocess.call([str(python.with_name(name)), *options], cwd=ROOT):
            print(f"{name} reports something to correct (above).", file=sys.stderr)
            return 1
    marks = [] if "--all" in sys.argv else ["-m", "not slow and not gpu"]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        # Two processes whose OpenMP threads spin while they wait slow each other down many times.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    parallel = () if arguments else PARALLEL
    command = [str(python), "-m", "pytest", *REPORT, *parallel, *marks, *arguments]
    return run_to_end(command, environment)


if __name__ == "__main__":
    sys.exit(main())
