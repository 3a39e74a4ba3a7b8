"""All figures: `python -m benchmarks [--device cuda]`. About a quarter of an hour on two cores.

Each benchmark is a process of its own: what one leaves behind in memory or in torch's settings is not the next one's.
"""

from __future__ import annotations

import subprocess
import sys

NAMES = ("overhead", "latency", "throughput", "previews")

if __name__ == "__main__":
    codes = [subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]).returncode for name in NAMES]
    sys.exit(max(codes))
