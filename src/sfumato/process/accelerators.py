"""The accelerators of this machine: `python -m sfumato.process.accelerators` prints their names as JSON.

Only torch knows them, and the API process does without it.
"""

from __future__ import annotations

import json
import subprocess
import sys

TIMEOUT_S = 120.0
"""Importing torch takes seconds, on a cold disk tens of seconds."""


def names() -> list[str]:
    """As torch names them: `cuda:0`, `cuda:1`. Takes seconds. Raises OSError or subprocess.SubprocessError."""
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=TIMEOUT_S, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


def main() -> None:
    import torch

    best = torch.accelerator.current_accelerator(check_available=True)
    if best is None:
        print("[]")
    elif best.type == "mps":
        print('["mps"]')
    else:
        print(json.dumps([f"{best.type}:{number}" for number in range(torch.accelerator.device_count())]))


if __name__ == "__main__":
    main()
