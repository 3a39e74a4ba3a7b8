"""The shipped list of signatures that may be batched, and the class sources for which it was made.

A signature on the list is valid for a module whose diffusers and transformers classes have the same source as in the
run of `benchmarks/parity.py`, whatever the packages' versions are. Classes of other packages in a module (a LoRA's
layers) are not checked.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from operator import attrgetter
from typing import Any

from sfumato.pipelines import source_digest

FILE = "mergeable.json"

PACKAGES = ("diffusers.", "transformers.")


@dataclass(frozen=True)
class ShippedList:
    sources: Mapping[str, str]
    """Path of each class → digest of its source in that run."""
    signatures: frozenset[str]

    @functools.cached_property
    def _digests(self) -> frozenset[str]:
        return frozenset(self.sources.values())

    def unproven(self, module: Any) -> tuple[str, ...]:
        """Paths of the classes in `module` that are not on the list, or have changed since."""
        digests = digests_of(module).items()  # found by digest, so a class may have moved
        return tuple(path for path, digest in digests if digest not in self._digests)

    def changed(self) -> tuple[str, ...]:
        """Paths of the classes on the list whose installed source differs or is missing."""
        return tuple(path for path, digest in self.sources.items() if installed(path) != digest)


@functools.cache
def shipped() -> ShippedList:
    content = json.loads(resources.files("sfumato.batching").joinpath(FILE).read_text())
    calls = content["calls"].items()
    signatures = frozenset(f"{kind}.{call}" for kind, kind_calls in calls for call in kind_calls)
    return ShippedList(content["sources"], signatures)


def digests_of(module: Any) -> dict[str, str]:
    """Path of each class in `module` from PACKAGES → digest of its source."""
    return {path: digest for path, digest in source_digest.class_digests(module).items() if path.startswith(PACKAGES)}


def installed(path: str) -> str:
    """Digest of the installed class at `path`; empty if there is none."""
    parts = path.split(".")
    for at in range(len(parts) - 1, 0, -1):  # a class may be nested in another one
        try:
            module = importlib.import_module(".".join(parts[:at]))
            return source_digest.class_digest(attrgetter(".".join(parts[at:]))(module))
        except (ImportError, AttributeError):
            continue
    return ""
