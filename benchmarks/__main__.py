"""All figures: `python -m benchmarks [--device cuda]`. About a quarter of an hour on two cores.

Each benchmark runs in its own process, so that memory and torch settings of one do not affect the next.
"""

from __future__ import annotations

import subprocess
import sys

NAMES = ("overhead", "latency", "throughput", "previews", "adapters")

if __name__ == "__main__":
    codes = [subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]).returncode for name in NAMES]
    sys.exit(max(codes))
