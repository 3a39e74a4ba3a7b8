"""A server's start to its first picture from a cold disk, with weights read ahead over without.

    python -m benchmarks.read_ahead [--repeats 3]

Stable Diffusion 1.5 at full size (2 GB in bf16, random weights). Before each start the system is asked to forget the
files (POSIX_FADV_DONTNEED). The request is there before the worker has imported its libraries; one step of 64 pixels,
which needs all weights. Variants alternate; seconds, as waiting for a disk is no CPU time. Five minutes.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import fastest
from benchmarks.figures import arguments, figure, table, write
from sfumato.commands.bench.server import PROGRAM, running
from sfumato.engine import environment

WITHOUT = "import sys; from sfumato.checkpoints import read_ahead; read_ahead.begin = print; " + (
    "from sfumato.cli import main; sys.exit(main())"
)
BODY = {"prompt": "a red ball", "size": "64x64", "steps": 1, "guidance_scale": 1.0, "response_format": "b64_json"}


def make_cold(folder: Path) -> int:
    """The bytes of the files in `folder`, which are no longer in memory."""
    total = 0
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        total += file.stat().st_size
    return total


def first_picture(models: Path, program: tuple[str, ...]) -> float:
    """Seconds from the server's start."""
    began = time.perf_counter()
    with running(models, program) as server:
        while (answer := server.client.post("/v1/images/generations", json=BODY)).status_code == 503:
            time.sleep(0.01)
        answer.raise_for_status()
        return time.perf_counter() - began


def measure(repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sfumato-read-ahead-") as name:
        folder, models = Path(name), Path(name) / "models"
        fastest.built(folder)
        models.mkdir()
        (models / "sd15.yaml").write_text(f"name: sd15\nparameters: {{model: {folder / 'weights'}}}\ndtype: bf16\n")
        programs = {"read ahead": PROGRAM, "without": ("-c", WITHOUT), "warm": PROGRAM}
        rounds: list[dict[str, float]] = []
        first_picture(models, PROGRAM)
        for at in range(repeats):
            rounds.append({})
            for variant in sorted(programs, reverse=bool(at % 2)):
                size = 0 if variant == "warm" else make_cold(folder / "weights")
                rounds[-1][variant] = first_picture(models, programs[variant])
                print(f"{variant}: {rounds[-1][variant]:.1f} s ({size} bytes cold)", flush=True)
    return {
        "seconds": {variant: figure([each[variant] for each in rounds]) for variant in programs},
        "read ahead over without": figure([each["read ahead"] / each["without"] for each in rounds]),
    }


if __name__ == "__main__":
    environment.prepare()
    options = arguments(__doc__).parse_args()
    found = measure(options.repeats)
    print(table(("", "start to first picture, s"), [*found["seconds"].items()]))
    print("read ahead over without:", found["read ahead over without"])
    print(write("read-ahead", "cpu", found))
