"""The worker of `sfumato serve`, which also writes down each forward pass: for `benchmarks.simulate_check`.

    python -m benchmarks.recorded_worker FOLDER FD

`FOLDER/PID.json` has them when the worker was stopped, one list each: begin and end in seconds of the monotonic clock,
kind of call, width of its latents, rows, numbers of the requests. A pass of one request ends when its pipeline calls
the next module, one of several when all are computed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfumato.engine import environment
from sfumato.process import worker

KINDS = {"decode": "decode", "unet": "denoise", "text_encoder": "encode"}
"""Methods, and names of modules called as functions."""


def record(folder: Path) -> None:
    """From now on each forward pass of this process is noted."""
    from sfumato.batching.batcher import Batcher

    compute, passes = Batcher._compute, list[list[Any]]()

    def noted(batcher: Batcher, group: Sequence[Any]) -> None:
        calls = [task.call for task in group]
        kind = KINDS.get(calls[0].method) or KINDS[calls[0].name.partition(".")[0]]
        width = 0 if kind == "encode" else next(leaf.value.shape[-1] for leaf in calls[0].leaves if leaf.kind == "rows")
        begun = time.monotonic()
        compute(batcher, group)
        rows = sum(call.rows for call in calls)
        passes.append([begun, time.monotonic(), kind, width, rows, [task.number for task in group]])

    Batcher._compute = noted  # type: ignore[method-assign, assignment]
    run = worker.main

    def main(fd: int) -> None:
        run(fd)
        (folder / f"{os.getpid()}.json").write_text(json.dumps(passes))

    worker.main = main


if __name__ == "__main__":
    environment.prepare()
    record(Path(sys.argv[1]))
    worker.main(int(sys.argv[2]))
