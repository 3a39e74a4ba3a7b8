"""What may be joined: only what was shown to give the same numbers.

The shapes of a call's arguments do not prove that its rows are independent. So the first batch of each
signature (the call's key without sizes) is computed twice, together and member by member, and a difference
means that this signature runs alone from then on. In half precision rounding hides what that would find;
there only signatures on the shipped list are joined, each shown in fp32 by `benchmarks/parity.py` for the
versions of diffusers and transformers that the list names. The list also spares fp32 the second computation.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import weakref
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any, Literal, TypeAlias

import diffusers
import torch
import transformers

from sfumato.engine import outputs
from sfumato.engine.calls import Call, plain

log = logging.getLogger(__name__)

Verify: TypeAlias = Literal["unlisted", "always"]
"""Which signatures are computed twice at first: those that are not on the list, or all."""

Width: TypeAlias = frozenset[str] | None
"""With whom a call may be joined: those that differ from it in no more than this (see `calls.LOOSE`); None: nobody."""

TOLERANCE = 1e-3
"""Relative to the largest number of the output, in fp32. Rounding gives 1e-6; a mixed-up row 1e-2 and more."""

HALF_TOLERANCE = 5e-2
"""The same in bf16 and fp16."""

HALVES = frozenset({torch.float16, torch.bfloat16})

FILE = "mergeable.json"


@functools.cache
def listed() -> frozenset[str]:
    """Signatures shown in fp32 for the installed packages; those of another version's classes are left out."""
    shipped = json.loads(resources.files("sfumato.engine").joinpath(FILE).read_text())
    found: set[str] = set()
    for package in (diffusers, transformers):
        part = shipped[package.__name__]
        if part["version"] == package.__version__:
            found |= {f"{kind}.{call}" for kind, calls in part["calls"].items() for call in calls}
        else:
            log.warning(
                "the list of what may be batched is for %s %s; %s is installed: half precision batches none of its "
                "modules, and fp32 checks each first",
                package.__name__, part["version"], package.__version__,
            )  # fmt: skip
    return frozenset(found)


class Trust:
    """What is known about signatures, per module. `shown` and `refused` say how it came out."""

    def __init__(self, verify: Verify = "unlisted", shipped: frozenset[str] | None = None) -> None:
        self._verify = verify
        self._shipped = listed() if shipped is None else shipped
        self._kinds: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._verdicts: dict[tuple[int, str], str] = {}
        self.changes = 0
        """Grows with every verdict."""
        self.shown: dict[str, float] = {}
        """Signature → largest relative error of those computed twice."""
        self.refused: dict[str, str] = {}
        """Signature → why it runs alone."""

    def signature(self, call: Call, loose: frozenset[str] = frozenset()) -> str:
        return f"{self.kind(call.module)}.{call.signature(loose)}"

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

    def settle(self, call: Call, signature: str, error: float, reason: str = "") -> None:
        """The end of a trial: `error` relative, inf with a `reason` where the batch could not be computed at all."""
        limit = HALF_TOLERANCE if _is_half(call) else TOLERANCE
        if error <= limit:
            self.shown[signature] = max(error, self.shown.get(signature, 0.0))
            self._verdicts[id(call.module), signature] = "yes"
            self.changes += 1
            return
        self.refuse(call, signature, reason or f"differs from solo runs by {error:.1e} (allowed {limit:g})")

    def refuse(self, call: Call, signature: str, reason: str) -> None:
        log.info("%s runs alone: %s", signature, reason)
        self.refused[signature] = reason
        self._verdicts[id(call.module), signature] = "no"
        self.changes += 1

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
        on_list = signature in self._shipped
        if _is_half(call) and not on_list:
            self.refused[signature] = "not shown in fp32, and half precision would hide a difference"
            return "no"
        # The list was made without dropout.
        return "yes" if on_list and self._verify == "unlisted" and not call.module.training else "try"


class Trial:
    """One batch whose members also run alone: compares each with its part, and settles when all are in."""

    def __init__(self, parts: list[Any], settle: Callable[[float], None]) -> None:
        self._parts: Mapping[int, Any] = dict(enumerate(parts))
        self._open = set(self._parts)
        self._settle = settle
        self._worst = 0.0
        self._sound = True

    def report(self, member: int, alone: Any) -> None:
        self._worst = max(self._worst, outputs.difference(self._parts[member], alone))
        self._close(member)

    def give_up(self, member: int) -> None:
        """This member failed on its own: nothing is settled, the next batch tries again."""
        self._sound = False
        self._close(member)

    def _close(self, member: int) -> None:
        self._open.discard(member)
        if not self._open and self._sound:
            self._settle(self._worst)


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


def _is_half(call: Call) -> bool:
    for leaf in call.leaves:
        value = leaf.value[0] if leaf.kind == "list" else leaf.value
        if isinstance(value, torch.Tensor) and value.dtype in HALVES:
            return True
    parameter = next(call.module.parameters(), None)
    # Anything that is not full precision: int8 and fp8 weights round as well.
    return parameter is not None and parameter.dtype not in (torch.float32, torch.float64)
