"""The demo: `python3 scripts/demo.py` installs into `.venv` and runs every stage.

Arguments go to `gatt run`: `--quick` is the same in miniature.
"""

from __future__ import annotations

import os
import sys

from bootstrap import bootstrap, run_to_end


def main() -> int | str:
    """Run every stage; return the exit status, or what ended it."""
    python = bootstrap()
    # The embedded model needs no hub, and the demo never contacts one.
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [str(python), "-m", "pipeline", "run", *sys.argv[1:]]
    status = run_to_end(command, offline)
    if status < 0:
        return f"gatt was ended by signal {-status}. Run the same command again to resume."
    return status


if __name__ == "__main__":
    sys.exit(main())
