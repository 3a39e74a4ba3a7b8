"""Shared by all benchmarks: medians with their spread, a table, and a JSON file with machine and versions."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Figure:
    """Median of several measurements, with the least and the largest."""

    median: float
    least: float
    most: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def figure(values: Sequence[float]) -> Figure:
    return Figure(round(statistics.median(values), 4), round(min(values), 4), round(max(values), 4), len(values))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 .. 1) of `values` do not exceed: nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per variant, alternating")
    return parser


def write(name: str, device: str, figures: Any) -> Path:
    """`results/NAME-DEVICE.json`: the figures, with machine, commit and versions."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device.partition(':')[0]}.json"
    about = {"benchmark": name, "when": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()), "commit": _commit()}
    plain = json.loads(json.dumps(figures, default=asdict))
    path.write_text(json.dumps({**about, "machine": _machine(device), "figures": plain}, indent=1) + "\n")
    return path


def _commit() -> str:
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here, capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _machine(device: str) -> dict[str, Any]:
    import diffusers
    import torch
    import transformers

    models = [
        line.partition(":")[2].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "torch threads": torch.get_num_threads(),
        "load over the last minute": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {module.__name__: str(module.__version__) for module in (torch, diffusers, transformers)},
    }
