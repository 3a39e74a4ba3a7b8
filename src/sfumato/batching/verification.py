"""What may be batched: only calls that were shown to give the same numbers.

The shapes of a call's arguments do not prove that its rows are independent. Signatures (a call's key without
sizes and contents) on the shipped list are trusted: each was shown in fp32 by `benchmarks/parity.py`, for classes whose
source has not changed since (`shipped_list`). For any other, the first batch is a proof (`proof`), in any precision: a
few additional forward passes, whose verdict holds from then on, also for the next process (`proof_store`). A signature
whose rows turn out to depend on each other runs alone.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, Literal, TypeAlias

from sfumato.batching import shipped_list
from sfumato.batching.calls import Call, plain
from sfumato.batching.proof import Evidence
from sfumato.batching.proof_store import Proofs
from sfumato.batching.reasons import Reason

log = logging.getLogger(__name__)

Verify: TypeAlias = Literal["unlisted", "always"]
"""Which signatures need a proof: those missing from list and file, or all."""

Width: TypeAlias = frozenset[str] | None
"""A call may be batched with calls that differ from it at most in this (see `calls.LOOSE`); None: with none."""

MAX_WIDTHS = 4096
"""Maximum keys whose width is remembered; each picture size and text length has its own."""


class Verification:
    """Verdicts about signatures, per module: `shown` and `refused`."""

    def __init__(
        self, verify: Verify = "unlisted", shipped: frozenset[str] | None = None, proofs: Proofs | None = None
    ) -> None:
        """`shipped`: signatures that are trusted, of whatever source, instead of the list that comes with Sfumato.

        `proofs`: where verdicts are kept, if anywhere.
        """
        self._verify = verify
        self._trusted = shipped
        self._unproven: dict[int, tuple[str, ...]] = {}
        self._proofs = proofs
        self._kinds: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._verdicts: dict[tuple[int, str], str] = {}
        self._widths: dict[Hashable, tuple[weakref.ref[Any], Width]] = {}
        """Key of a call → with what it may be batched; cleared by every new verdict."""
        self.shown: dict[str, float] = {}
        """Signature proved in this process → largest relative error."""
        self.refused: dict[str, str] = {}
        """Signature → why it runs alone."""
        self._labels: dict[str, Reason] = {}

    def signature(self, call: Call, loose: frozenset[str] = frozenset()) -> str:
        return f"{self.kind(call.module)}.{call.signature(loose)}"

    def key(self, call: Call) -> Hashable:
        """Calls with equal keys may share a forward pass, by all that is known now; None: this one runs alone."""
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
        """Whether calls with this signature may be batched, with or without a trial."""
        verdict = self._verdicts.get((id(call.module), signature))
        if verdict is None:
            verdict = self._first_ruling(call, signature)
            self._verdicts[id(call.module), signature] = verdict
        return verdict  # type: ignore[return-value]

    def settle(self, call: Call, signature: str, evidence: Evidence, errors: Sequence[float]) -> None:
        """End a proof; `errors`: how much each member differed from its part."""
        reason = evidence.judge(errors)
        if self._proofs and not call.module.training and not self._is_listed(call, signature):
            self._proofs.put(call.module, signature, reason)
        if reason:
            self.refuse(call, signature, reason)
            return
        self.shown[signature] = max(*errors, self.shown.get(signature, 0.0))
        self._verdicts[id(call.module), signature] = "yes"
        self._widths.clear()

    def refuse(self, call: Call, signature: str, reason: str, label: Reason = Reason.REFUSED) -> None:
        """Run calls with this signature alone from now on. Logs one line, however many calls follow."""
        if signature not in self.refused:
            log.warning("%s is not batched: %s", signature, reason)
        self.refused[signature] = reason
        self._labels[signature] = label
        self._verdicts[id(call.module), signature] = "no"
        self._widths.clear()

    def label(self, call: Call) -> Reason:
        """Why calls with this refused signature run alone."""
        return self._labels.get(self.signature(call), Reason.REFUSED)

    def kind(self, module: Any) -> str:
        """Class of a module, plus what else changes its computation: attention processors, quantisation."""
        known = self._kinds.get(id(module))
        if known and known[0]() is module:
            return known[1]
        # Another module had this id before: its entries are void.
        self._verdicts = {key: verdict for key, verdict in self._verdicts.items() if key[0] != id(module)}
        self._unproven.pop(id(module), None)
        kind = kind_of(module)
        self._kinds[id(module)] = (weakref.ref(module), kind)
        return kind

    def _is_listed(self, call: Call, signature: str) -> bool:
        """Whether it was shown before Sfumato was shipped, of what the module consists of today."""
        if self._trusted is not None:
            return signature in self._trusted
        shipped = shipped_list.shipped()
        if signature not in shipped.signatures:
            return False
        unproven = self._unproven.get(id(call.module))
        if unproven is None:
            unproven = self._unproven[id(call.module)] = shipped.unproven(plain(call.module))
            if unproven:
                log.info(
                    "%s is proved at first use: the list of what may be batched was not made with the source of %s",
                    self.kind(call.module), ", ".join(unproven),
                )  # fmt: skip
        return not unproven

    def _first_ruling(self, call: Call, signature: str) -> str:
        # Shipped and stored verdicts are for modules without dropout. Some pipelines leave a module without dropout
        # in training mode; with dropout, a row's numbers depend on its place.
        if call.module.training or self._verify == "always":
            return "try"
        if self._is_listed(call, signature):
            return "yes"
        verdict = self._proofs.get(call.module, signature) if self._proofs else None
        if verdict is None:
            return "try"
        if verdict.refused:
            self.refuse(call, signature, f"{verdict.refused} (shown on {verdict.shown})")
            return "no"
        return "yes"


def kind_of(module: Any) -> str:
    """Class of a module, with what else changes how it computes."""
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
