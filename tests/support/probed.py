"""Files of clips and sounds as ffprobe reads them, and what is needed to write them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sfumato.formats import FORMATS


def needs(name: str) -> None:
    if FORMATS[name].package and not os.environ.get("CI"):
        pytest.importorskip(FORMATS[name].package, reason="PyAV is missing: pip install 'sfumato[video]'")


def probed(path: Path) -> list[dict[str, Any]]:
    """The streams of a file, as ffprobe reads them."""
    if shutil.which("ffprobe") is None:
        told = "there is no ffprobe: `apt-get install ffmpeg`"
        if os.environ.get("CI"):
            pytest.fail(told)
        pytest.skip(told)
    command = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-of", "json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr, done.stderr
    streams: list[dict[str, Any]] = json.loads(done.stdout)["streams"]
    return streams
