"""A virtual environment with Ray, and what its tests need, which finds all else in the server's own, pip too.

Ray brings many packages and pins of its own. Made once, and again when the list here changes. What moto's server
does not need for S3 is left out.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from filelock import FileLock

LIST = Path(__file__).parent / "requirements.txt"
FOLDER = LIST.parent.parent.parent / ".venv-ray"
PYTHON = str(FOLDER / "bin/python")


def make() -> None:
    """Make what is not there or out of date: half a minute at first, then nothing. One process does, others wait.

    Skips the test where the packages cannot be had, except in CI.
    """
    stamp = FOLDER / ".made-of"
    made_of = hashlib.sha256(f"{sys.version}\n{LIST.read_text()}".encode()).hexdigest()
    with FileLock(f"{FOLDER}.lock"):
        if stamp.exists() and stamp.read_text() == made_of:
            return
        venv.create(FOLDER, clear=True)
        first = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.run([PYTHON, "-c", first], check=True, capture_output=True, text=True).stdout.strip()
        Path(own, "first.pth").write_text(sysconfig.get_path("purelib"))
        install = [PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(LIST)]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            missing = (
                f"{LIST} cannot be installed into {FOLDER}; it takes pip, a package index and 400 MB: {done.stderr}"
            )
            assert not os.environ.get("CI"), missing
            pytest.skip(missing[-400:])
        stamp.write_text(made_of)
