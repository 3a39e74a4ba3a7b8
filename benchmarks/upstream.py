"""What would change with the installed diffusers and transformers: `make test UPSTREAM=1` runs it with the newest.

It prints the versions, the classes that would be proved again at first use, the rows of the table of sources that would
be others, and the tests of what Sfumato leans on. It fails where one of these tests does.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterable
from importlib import metadata

from benchmarks import sources
from sfumato.batching import shipped_list
from sfumato.pipelines import source_table

PACKAGES = ("diffusers", "transformers", "huggingface_hub", "accelerate", "peft", "torch")

TESTS = ("tests/test_upstream_contract.py", "tests/test_compat.py")


def section(title: str, lines: Iterable[str], otherwise: str) -> None:
    listed = list(lines)
    print(f"\n## {title}: {len(listed) or otherwise}", flush=True)
    for line in listed:
        print(line)


def main() -> int:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    print(versions, flush=True)
    section("Classes that are proved again at first use", shipped_list.shipped().changed(), "none")
    section("Rows of the table of sources", sources.differences(source_table.table(), sources.made()), "all the same")
    print("\n## What Sfumato leans on", flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--tb=line", *TESTS]).returncode


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
