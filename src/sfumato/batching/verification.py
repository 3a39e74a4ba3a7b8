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
from sfumato.batching.calls import Call, original_module
from sfumato.batching.proof import Evidence
from sfumato.batching.proof_store import Proofs
from sfumato.batching.reasons import Reason

log = logging.getLogger(__name__)

Verify: TypeAlias = Literal["unlisted", "always"]
"""Which signatures need a proof: those missing from list and file, or all."""

Permitted: TypeAlias = frozenset[str] | None
"""Permitted differences of a call (see `calls.DIFFERENCES`) from those it may be batched with; None: runs alone."""

MAX_PERMITTED = 4096
"""Maximum keys with cached permitted differences; each picture size and text length has its own key."""


class Verification:
    """Verdicts about signatures, per module: `proved` and `refused`."""

    def __init__(
        self, verify: Verify = "unlisted", shipped: frozenset[str] | None = None, proofs: Proofs | None = None
    ) -> None:
        """`shipped`: trusted signatures, whatever the source, instead of the shipped list.

        `proofs`: stores verdicts, if given.
        """
        self._verify = verify
        self._trusted = shipped
        self._unproven: dict[int, tuple[str, ...]] = {}
        self._proofs = proofs
        self._kinds: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._verdicts: dict[tuple[int, str], str] = {}
        self._permitted: dict[Hashable, tuple[weakref.ref[Any], Permitted]] = {}
        """Key of a call → its permitted differences; cleared by every new verdict."""
        self.proved: dict[str, float] = {}
        """Signature proved in this process → largest relative error."""
        self.refused: dict[str, str] = {}
        """Signature → why it runs alone."""
        self._labels: dict[str, Reason] = {}
        self.known: dict[str, str] = {}
        """Signature whose verdict was known before → from where."""

    def signature(self, call: Call, differences: frozenset[str] = frozenset()) -> str:
        return f"{self.kind(call.module)}.{call.signature(differences)}"

    def key(self, call: Call) -> Hashable:
        """Calls with equal keys may share a forward pass, by the verdicts so far; None: this one runs alone."""
        if call.key is None:
            return None
        entry = self._permitted.get(call.key)
        if entry is None or entry[0]() is not call.module:
            permitted = self.permitted(call)  # may add a verdict
            if len(self._permitted) >= MAX_PERMITTED:
                self._permitted.clear()
            entry = self._permitted[call.key] = (weakref.ref(call.module), permitted)
        return None if entry[1] is None else call.key_within(entry[1])

    def permitted(self, call: Call) -> Permitted:
        if self._refuses(call, frozenset()):
            return None
        subsets = [
            frozenset(subset) for n in range(1, 5) for subset in itertools.combinations(sorted(call.differences), n)
        ]
        refused = [subset for subset in subsets if self._refuses(call, subset)]
        allowed = [subset for subset in subsets if not any(refused_subset <= subset for refused_subset in refused)]
        return max(allowed, key=len, default=frozenset())

    def _refuses(self, call: Call, differences: frozenset[str]) -> bool:
        return self.decision(call, self.signature(call, differences)) == "no"

    def decision(self, call: Call, signature: str) -> Literal["yes", "try", "no"]:
        """Whether calls with this signature may be batched, with or without a trial."""
        verdict = self._verdicts.get((id(call.module), signature))
        if verdict is None:
            verdict = self._first_decision(call, signature)
            self._verdicts[id(call.module), signature] = verdict
        return verdict  # type: ignore[return-value]

    def verdicts_of(self, module: Any) -> dict[str, str]:
        """Signature → "yes", "no" or "try" (not proved yet), of the calls of this module so far."""
        return {signature: verdict for (of, signature), verdict in self._verdicts.items() if of == id(module)}

    def settle(self, call: Call, signature: str, evidence: Evidence, errors: Sequence[float]) -> None:
        """End a proof; `errors`: how much each member differed from its part."""
        reason = evidence.judge(errors)
        if self._proofs and not call.module.training and not self._is_listed(call, signature):
            self._proofs.put(call.module, signature, reason)
        if reason:
            self.refuse(call, signature, reason)
            return
        self.proved[signature] = max(*errors, self.proved.get(signature, 0.0))
        self._verdicts[id(call.module), signature] = "yes"
        self._permitted.clear()

    def refuse(self, call: Call, signature: str, reason: str, label: Reason = Reason.REFUSED) -> None:
        """Run calls with this signature alone from now on. Logs one line, however many calls follow."""
        if signature not in self.refused:
            log.warning("%s is not batched: %s", signature, reason)
        self.refused[signature] = reason
        self._labels[signature] = label
        self._verdicts[id(call.module), signature] = "no"
        self._permitted.clear()

    def label(self, call: Call) -> Reason:
        """Why calls with this refused signature run alone."""
        return self._labels.get(self.signature(call), Reason.REFUSED)

    def kind(self, module: Any) -> str:
        """Class of a module, plus what else changes its computation: attention processors, quantisation."""
        entry = self._kinds.get(id(module))
        if entry and entry[0]() is module:
            return entry[1]
        # Another module had this id before: its entries are void.
        self._verdicts = {key: verdict for key, verdict in self._verdicts.items() if key[0] != id(module)}
        self._unproven.pop(id(module), None)
        kind = kind_of(module)
        self._kinds[id(module)] = (weakref.ref(module), kind)
        return kind

    def _is_listed(self, call: Call, signature: str) -> bool:
        """Whether the shipped list has it, for the source that the module's classes have now."""
        if self._trusted is not None:
            return signature in self._trusted
        shipped = shipped_list.shipped()
        if signature not in shipped.signatures:
            return False
        unproven = self._unproven.get(id(call.module))
        if unproven is None:
            unproven = self._unproven[id(call.module)] = shipped.unproven(original_module(call.module))
            if unproven:
                log.info(
                    "%s is proved at first use: the list of what may be batched was not made with the source of %s",
                    self.kind(call.module), ", ".join(unproven),
                )  # fmt: skip
        return not unproven

    def _first_decision(self, call: Call, signature: str) -> str:
        # Shipped and stored verdicts are for modules without dropout. Some pipelines leave a module without dropout
        # in training mode; with dropout, a row's numbers depend on its place.
        if call.module.training or self._verify == "always":
            return "try"
        if self._is_listed(call, signature):
            self.known[signature] = "on the shipped list"
            return "yes"
        verdict = self._proofs.get(call.module, signature) if self._proofs else None
        if verdict is None:
            return "try"
        self.known[signature] = f"proved on {verdict.shown}"
        if verdict.refused:
            self.refuse(call, signature, f"{verdict.refused} (shown on {verdict.shown})")
            return "no"
        return "yes"


def kind_of(module: Any) -> str:
    """Class of a module, with what else changes how it computes."""
    compiled = original_module(module) is not module
    module = original_module(module)
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
