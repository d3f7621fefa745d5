"""The whole job on the embedded model, from nothing: `python3 scripts/demo.py`.

Creates `.venv`, installs, and runs `gatt run`; arguments go to it (`--quick`, `--run DIR`). A second call skips what is
done.
"""

from __future__ import annotations

import os
import subprocess
import sys

from bootstrap import ROOT, bootstrap

if __name__ == "__main__":
    python = bootstrap()
    # The embedded model needs no hub, and the demo never asks one.
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    status = subprocess.call(
        [python, "-m", "pipeline", "run", *sys.argv[1:]], cwd=ROOT, env=offline
    )
    sys.exit(
        status
        if status >= 0
        else f"gatt was ended by signal {-status}. The same command goes on where it was."
    )
