"""Commands under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launched(processes: int, script: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ATOM_LENS_CACHE": str(folder / f"cache-{processes}")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
