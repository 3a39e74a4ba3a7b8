"""Make the shipped model from scratch: ``python -m training`` runs every stage in order.

It begins with an empty ``training/.runs``. Every stage is one process with one thread: on few cores
that is far faster than letting threads compete.
"""

import os
import shutil
import subprocess
import sys

from training.data import fetch
from training.paths import REPOSITORY, RUNS
from training.shards import GENERAL

STAGES: tuple[tuple[str, ...], ...] = (
    ("training.vae",),
    ("training.shards", "pictures", "0", str(GENERAL + 1)),
    ("training.shards", "latents", "0", str(GENERAL + 1)),
    ("training.denoiser",),
    ("training.refine",),
    ("training.export",),
    ("training.judge",),
    ("training.evaluate",),
    ("training.grid",),
)


def main() -> None:
    """Fetch the data and run the stages."""
    fetch()
    shutil.rmtree(RUNS, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for stage in STAGES:
        print("==>", " ".join(stage), flush=True)
        subprocess.run([sys.executable, "-m", *stage], check=True, cwd=REPOSITORY, env=environment)


if __name__ == "__main__":
    main()
