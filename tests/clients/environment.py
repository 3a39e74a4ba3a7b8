"""A virtual environment with clients of other people's making, apart from the server's own.

They bring many packages and pins of theirs. Made once, and again when `requirements.txt` changes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parent.parent / ".venv-clients"
BIN = FOLDER / "bin"


def make() -> None:
    """Make the environment if it is not there or out of date: 1 to 2 minutes, then nothing."""
    wanted = (HERE / "requirements.txt").read_text()
    stamp = FOLDER / ".made-of"
    digest = hashlib.sha256(f"{sys.version}\n{wanted}".encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    venv.create(FOLDER, clear=True, with_pip=True)
    install = [str(BIN / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "-r", "requirements.txt"]
    subprocess.run(install, cwd=HERE, check=True)
    stamp.write_text(digest)


def run(*command: str, cwd: Path = HERE, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of the environment, with `variables` in its own; what it printed is in the answer."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **variables}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
