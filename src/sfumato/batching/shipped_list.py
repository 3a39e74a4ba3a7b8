"""The list that comes with Sfumato of what may be batched, and for which source text of which classes it was made.

A signature on it counts for a module that consists of classes of diffusers and transformers whose source is what it was
when `benchmarks/parity.py` drew with them, whatever the packages' versions are now. What other packages put into a
module (a LoRA's layers) is not looked at.
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
    """Path of each class → digest of its source then."""
    signatures: frozenset[str]

    @functools.cached_property
    def _digests(self) -> frozenset[str]:
        return frozenset(self.sources.values())

    def unproven(self, module: Any) -> tuple[str, ...]:
        """Paths of the classes in `module` that the list says nothing of: other ones, or changed since."""
        digests = digests_of(module).items()  # a class that was moved is known by its digest still
        return tuple(path for path, digest in digests if digest not in self._digests)

    def changed(self) -> tuple[str, ...]:
        """Paths of the classes on the list that the installed packages have with another source, or not at all."""
        return tuple(path for path, digest in self.sources.items() if installed(path) != digest)


@functools.cache
def shipped() -> ShippedList:
    content = json.loads(resources.files("sfumato.batching").joinpath(FILE).read_text())
    calls = content["calls"].items()
    signatures = frozenset(f"{kind}.{call}" for kind, each in calls for call in each)
    return ShippedList(content["sources"], signatures)


def digests_of(module: Any) -> dict[str, str]:
    """Path of each class of PACKAGES in `module` → digest of its source."""
    return {path: digest for path, digest in source_digest.class_digests(module).items() if path.startswith(PACKAGES)}


def installed(path: str) -> str:
    """The digest of the class of this path as it is installed; empty where there is none."""
    parts = path.split(".")
    for at in range(len(parts) - 1, 0, -1):  # a class may stand inside another one
        try:
            module = importlib.import_module(".".join(parts[:at]))
            return source_digest.class_digest(attrgetter(".".join(parts[at:]))(module))
        except (ImportError, AttributeError):
            continue
    return ""
