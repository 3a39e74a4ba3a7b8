"""One forward for several calls: join the arguments, run the module, cut the output; and what may go wrong in that.

What comes out for each member is what it would have got alone. Where that is not sure yet, or the batch raised, each
member computes its own call, and a trial (`trial`) says afterwards what that has shown.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.batching import outputs, proof
from sfumato.batching.calls import Call, differing, target
from sfumato.batching.concatenation import ConcatenationCache, join
from sfumato.batching.counts import Counts
from sfumato.batching.outcomes import Compute, Reply, Result, is_out_of_memory
from sfumato.batching.outputs import Unsplittable
from sfumato.batching.proof import Evidence
from sfumato.batching.reasons import Reason
from sfumato.batching.trial import Blame, Comparison, Trial
from sfumato.batching.verification import Verification

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs forwards of calls whose keys are equal."""

    trust: Verification
    joins: ConcatenationCache
    counts: Counts

    def run(self, calls: Sequence[Call]) -> Sequence[Reply] | None:
        """One forward for `calls`, at least two; what each is told, or None where memory was too short."""
        first = calls[0]
        signature = self.trust.signature(first, differing(calls))
        ruling = self.trust.ruling(first, signature)
        try:
            output = target(first.module, first.method)(**join(calls, self.joins))
            parts = outputs.split(output, [call.rows for call in calls], listed=first.listed)
        except Unsplittable as reason:
            self.counts.add(first.name, 0, 1)
            self.trust.refuse(first, signature, str(reason))
            return _alone(calls)
        except Exception as error:  # whatever a module raises: find out whose fault it is
            self.counts.add(first.name, 0, 1)
            if is_out_of_memory(error):
                return None
            log.info("a batch of %d calls of %s failed: %r", len(calls), first.name, error)
            why = "the batch raised, each member alone did not"
            return _alone(calls, Blame(len(calls), functools.partial(self.trust.refuse, first, signature, why)))
        if ruling == "try":
            return self._prove(calls, signature, parts)
        self.counts.add(first.name, len(calls), 1)
        return [Result(part) for part in parts]

    def _prove(self, calls: Sequence[Call], signature: str, parts: list[Any]) -> Sequence[Reply] | None:
        """The first batch of its kind. Whatever comes out, every member gets what it computes alone."""
        first = calls[0]
        try:
            evidence = proof.examine(calls, lambda some: join(some, ConcatenationCache()))
        except Exception as error:  # the batch went well, one with other contents did not
            if is_out_of_memory(error):
                self.counts.add(first.name, 0, 1)
                return None
            if proof.is_half(first):
                why = f"raised {type(error).__name__} when the rows beside it were changed"
                self.trust.refuse(first, signature, why, Reason.UNPROVEN)
            evidence = Evidence(parts, rounding=[proof.TOLERANCE] * len(calls))
        self.counts.add(first.name, 0, 1, proving=evidence.forwards)
        if self.trust.ruling(first, signature) == "no":
            return _alone(calls)
        if evidence.refused:
            self.trust.settle(first, signature, evidence, [])
            return _alone(calls)
        settle = functools.partial(self.trust.settle, first, signature, evidence)
        return _alone(calls, Comparison(evidence.parts, settle))


def _alone(calls: Sequence[Call], trial: Trial | None = None) -> Sequence[Compute]:
    return [Compute(trial, member) for member in range(len(calls))]
