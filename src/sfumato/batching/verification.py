"""What may be joined: only what was shown to give the same numbers.

The shapes of a call's arguments do not prove that its rows are independent. Signatures (a call's key without
sizes and contents) on the shipped list are trusted: each was shown in fp32 by `benchmarks/parity.py` for the
versions of diffusers and transformers that the list names. Of any other the first batch is a proof (`proof`),
in whatever precision: a few forwards more, and what they show holds from then on, also for the next
process (`proofs`). A signature whose rows turn out to depend on one another runs alone.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import weakref
from collections.abc import Hashable, Sequence
from importlib import resources
from typing import Any, Literal, TypeAlias

import diffusers
import transformers

from sfumato.batching.calls import Call, plain
from sfumato.batching.proof import Evidence
from sfumato.batching.proof_store import Proofs
from sfumato.batching.reasons import Reason

log = logging.getLogger(__name__)

Verify: TypeAlias = Literal["unlisted", "always"]
"""Which signatures are proved at first: those that neither list nor file has, or all."""

Width: TypeAlias = frozenset[str] | None
"""With whom a call may be joined: those that differ from it in no more than this (see `calls.LOOSE`); None: nobody."""

FILE = "mergeable.json"

MAX_WIDTHS = 4096
"""Keys whose width is remembered; each size of picture and length of text has its own."""


@functools.cache
def listed() -> frozenset[str]:
    """Signatures shown in fp32 for the installed packages; those of another version's classes are left out."""
    shipped = json.loads(resources.files("sfumato.batching").joinpath(FILE).read_text())
    found: set[str] = set()
    for package in (diffusers, transformers):
        part = shipped[package.__name__]
        if part["version"] == package.__version__:
            found |= {f"{kind}.{call}" for kind, calls in part["calls"].items() for call in calls}
        else:
            log.warning(
                "the list of what may be batched is for %s %s; %s is installed: its modules are proved at first use",
                package.__name__, part["version"], package.__version__,
            )  # fmt: skip
    return frozenset(found)


class Verification:
    """What is known about signatures, per module. `shown` and `refused` say how it came out."""

    def __init__(
        self, verify: Verify = "unlisted", shipped: frozenset[str] | None = None, proofs: Proofs | None = None
    ) -> None:
        """`shipped`: instead of the list that comes with Sfumato. `proofs`: where verdicts are kept, if anywhere."""
        self._verify = verify
        self._shipped = listed() if shipped is None else shipped
        self._proofs = proofs
        self._kinds: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._verdicts: dict[tuple[int, str], str] = {}
        self._widths: dict[Hashable, tuple[weakref.ref[Any], Width]] = {}
        """Key of a call → with whom it may be joined; void with every new verdict."""
        self.shown: dict[str, float] = {}
        """Signature → largest relative error of those proved here."""
        self.refused: dict[str, str] = {}
        """Signature → why it runs alone."""
        self._labels: dict[str, Reason] = {}

    def signature(self, call: Call, loose: frozenset[str] = frozenset()) -> str:
        return f"{self.kind(call.module)}.{call.signature(loose)}"

    def key(self, call: Call) -> Hashable:
        """Calls with equal keys may share a forward, by all that is known now; None: this one runs alone."""
        if call.key is None:
            return None
        known = self._widths.get(call.key)
        if known is None or known[0]() is not call.module:
            width = self.width(call)  # may come to a verdict
            if len(self._widths) >= MAX_WIDTHS:
                self._widths.clear()
            known = self._widths[call.key] = (weakref.ref(call.module), width)
        return None if known[1] is None else call.narrowed(known[1])

    def width(self, call: Call) -> Width:
        if self._refuses(call, frozenset()):
            return None
        subsets = [frozenset(some) for n in range(1, 4) for some in itertools.combinations(sorted(call.loose), n)]
        wrong = [some for some in subsets if self._refuses(call, some)]
        right = [some for some in subsets if not any(each <= some for each in wrong)]
        return max(right, key=len, default=frozenset())

    def _refuses(self, call: Call, loose: frozenset[str]) -> bool:
        return self.ruling(call, self.signature(call, loose)) == "no"

    def ruling(self, call: Call, signature: str) -> Literal["yes", "try", "no"]:
        """Whether calls with this signature may be joined, with or without a trial."""
        verdict = self._verdicts.get((id(call.module), signature))
        if verdict is None:
            verdict = self._first_ruling(call, signature)
            self._verdicts[id(call.module), signature] = verdict
        return verdict  # type: ignore[return-value]

    def settle(self, call: Call, signature: str, evidence: Evidence, errors: Sequence[float]) -> None:
        """The end of a proof: by how much each member differed from its part."""
        reason = evidence.judge(errors)
        if self._proofs and not call.module.training and signature not in self._shipped:
            self._proofs.put(call.module, signature, reason)
        if reason:
            self.refuse(call, signature, reason)
            return
        self.shown[signature] = max(*errors, self.shown.get(signature, 0.0))
        self._verdicts[id(call.module), signature] = "yes"
        self._widths.clear()

    def refuse(self, call: Call, signature: str, reason: str, label: Reason = Reason.REFUSED) -> None:
        """From now on calls with this signature run alone. One line in the log, however many calls there will be."""
        if signature not in self.refused:
            log.warning("%s is not batched: %s", signature, reason)
        self.refused[signature] = reason
        self._labels[signature] = label
        self._verdicts[id(call.module), signature] = "no"
        self._widths.clear()

    def label(self, call: Call) -> Reason:
        """Why calls like this one run alone, of those that were refused."""
        return self._labels.get(self.signature(call), Reason.REFUSED)

    def kind(self, module: Any) -> str:
        """Class of a module, with what else changes how it computes: attention processors, quantisation."""
        known = self._kinds.get(id(module))
        if known and known[0]() is module:
            return known[1]
        # Another module had this id before: what was known about that one is void.
        self._verdicts = {key: verdict for key, verdict in self._verdicts.items() if key[0] != id(module)}
        kind = _kind(module)
        self._kinds[id(module)] = (weakref.ref(module), kind)
        return kind

    def _first_ruling(self, call: Call, signature: str) -> str:
        # Lists and kept verdicts are of modules without dropout. Some pipelines leave a module in training mode that
        # has none; where there is some, a row's numbers depend on its place.
        if call.module.training or self._verify == "always":
            return "try"
        if signature in self._shipped:
            return "yes"
        verdict = self._proofs.get(call.module, signature) if self._proofs else None
        if verdict is None:
            return "try"
        if verdict.refused:
            self.refuse(call, signature, f"{verdict.refused} (shown on {verdict.shown})")
            return "no"
        return "yes"


def _kind(module: Any) -> str:
    compiled = plain(module) is not module
    module = plain(module)
    package = type(module).__module__.partition(".")[0]
    parts = [type(module).__name__ if package in ("diffusers", "transformers") else _path(type(module))]
    processors = getattr(module, "attn_processors", None)
    if isinstance(processors, dict):
        parts += sorted({type(processor).__name__ for processor in processors.values()})
    quantised = getattr(module, "hf_quantizer", None) or getattr(
        getattr(module, "config", None), "quantization_config", None
    )
    if quantised:
        parts.append("quantised")
    if compiled:
        parts.append("compiled")
    return "+".join(parts)


def _path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
