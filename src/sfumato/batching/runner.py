"""One forward pass for several calls: join the arguments, run the module, split the output, and handle errors.

Each member gets the output that it would get alone. If that is not proved yet, or the batch raised, each member
computes its own call, and a trial (`trial`) draws the conclusion.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.batching import outputs, proof
from sfumato.batching.calls import Call, compute, differences_between, lead, target
from sfumato.batching.concatenation import ConcatenationCache, join
from sfumato.batching.counts import Counts
from sfumato.batching.interruption import BeforePart, interruptible, part_by_part
from sfumato.batching.outcomes import Compute, Reply, Result, is_out_of_memory
from sfumato.batching.outputs import Unsplittable
from sfumato.batching.proof import Evidence
from sfumato.batching.reasons import Reason
from sfumato.batching.trial import Blame, Comparison, Trial
from sfumato.batching.verification import Verification
from sfumato.core import EAGER

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs forward passes for calls with equal keys."""

    verification: Verification
    concatenations: ConcatenationCache
    counts: Counts

    def run(self, calls: Sequence[Call], before_part: BeforePart | None = None) -> Sequence[Reply] | None:
        """One forward pass for `calls`, at least two: a reply for each, or None if it ran out of memory.

        `before_part`: called before each part of the module, if the calls are long.
        """
        first = lead(calls)
        signature = self.verification.signature(first, differences_between(calls))
        decision = self.verification.decision(first, signature)
        try:
            proving = decision == "try"
            output, by = _forward(calls, join(calls, self.concatenations), proving, None if proving else before_part)
            parts = outputs.split(output, [call.rows for call in calls], listed=first.listed)
        except Unsplittable as reason:
            self.counts.add(first.name, 0, 1)
            self.verification.refuse(first, signature, str(reason))
            return _each_alone(calls)
        except Exception as error:  # whatever a module raises: a trial finds the cause
            self.counts.add(first.name, 0, 1)
            if is_out_of_memory(error):
                return None
            log.info("a batch of %d calls of %s failed: %r", len(calls), first.name, error)
            why = "the batch raised, each member alone did not"
            return _each_alone(
                calls, Blame(len(calls), functools.partial(self.verification.refuse, first, signature, why))
            )
        if decision == "try":
            return self._prove(calls, signature, parts)
        self.counts.add(first.name, len(calls), 1)
        return [Result(part, by) for part in parts]

    def _prove(self, calls: Sequence[Call], signature: str, parts: list[Any]) -> Sequence[Reply] | None:
        """Prove the first batch of its kind. Every member computes its own call, whatever the result."""
        first = lead(calls)
        try:
            evidence = proof.examine(calls, lambda some: join(some, ConcatenationCache()))
        except Exception as error:  # the batch ran, but not with other contents
            if is_out_of_memory(error):
                self.counts.add(first.name, 0, 1)
                return None
            log.info("a batch of %s is compared without other contents beside it: %r", first.name, error)
            if proof.is_half(first):
                why = f"raised {type(error).__name__} when the rows beside it were changed"
                self.verification.refuse(first, signature, why, Reason.UNPROVEN)
            evidence = Evidence(parts, rounding=[proof.TOLERANCE] * len(calls))
        self.counts.add(first.name, 0, 1, proving=evidence.forwards)
        if self.verification.decision(first, signature) == "no":
            return _each_alone(calls)
        if evidence.refused:
            self.verification.settle(first, signature, evidence, [])
            return _each_alone(calls)
        settle = functools.partial(self.verification.settle, first, signature, evidence)
        return _each_alone(calls, Comparison(evidence.parts, settle))


def _forward(
    calls: Sequence[Call], arguments: dict[str, Any], proving: bool, before_part: BeforePart | None
) -> tuple[Any, str]:
    """The output of one forward pass, and what computed it. Proofs are about the module itself."""
    first = lead(calls)
    runner = None if proving else first.runner
    if runner and runner.serves(first.method, (), arguments):
        return runner.run(first.method, (), arguments)
    by = EAGER if runner else ""
    if before_part is None or first.is_adapted or not interruptible(first.module, first.method):
        return compute(calls, (), arguments), by
    with part_by_part(first.module, before_part) as module:
        return target(module, first.method)(**arguments), by


def _each_alone(calls: Sequence[Call], trial: Trial | None = None) -> Sequence[Compute]:
    return [Compute(trial, member) for member in range(len(calls))]
