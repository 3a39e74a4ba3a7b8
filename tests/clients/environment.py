"""A virtual environment with clients of other people's making, apart from the server's own.

They bring many packages and pins of theirs, Node.js among them. Made once, and again when the lists here change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
FOLDER = HERE.parent.parent / ".venv-clients"
BIN = FOLDER / "bin"
NODE = FOLDER / "node"
"""The JavaScript ones, with their packages: a copy of `node/` here."""


def make() -> None:
    """Make what is not there or out of date: a minute or two at first, then nothing. One process does, others wait."""
    with FileLock(f"{FOLDER}.lock"):
        _make()


def _make() -> None:
    if _changed("requirements.txt", FOLDER):
        venv.create(FOLDER, clear=True, with_pip=True)
        install = [str(BIN / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "-r", "requirements.txt"]
        subprocess.run(install, cwd=HERE, check=True)
        _note("requirements.txt", FOLDER)
    shutil.copytree(HERE / "node", NODE, dirs_exist_ok=True)
    if _changed("node/package-lock.json", NODE):
        installed = run("npm", "ci", "--ignore-scripts", cwd=NODE)
        assert installed.returncode == 0, installed.stderr
        _note("node/package-lock.json", NODE)


def _changed(list: str, folder: Path) -> bool:
    stamp = folder / ".made-of"
    return not stamp.exists() or stamp.read_text() != _digest(list)


def _note(list: str, folder: Path) -> None:
    (folder / ".made-of").write_text(_digest(list))


def _digest(list: str) -> str:
    return hashlib.sha256(f"{sys.version}\n{(HERE / list).read_text()}".encode()).hexdigest()


def run(*command: str, cwd: Path = HERE, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of the environment, with `variables` in its own; what it printed is in the answer."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **variables}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
