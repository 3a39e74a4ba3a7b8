"""The same batch with some of its optional arguments left out or added: everything else a pipeline may pass.

Whether a pipeline passes an argument depends on its own arguments and the model's config: residuals of a ControlNet,
masks, pooled text, the scale of a LoRA. Each family passes one combination; these are the others.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from sfumato.batching import outputs
from sfumato.batching.calls import TIME, Call, describe, differences_between
from sfumato.batching.concatenation import ConcatenationCache, join
from sfumato.batching.fingerprints import Fingerprints
from sfumato.batching.proof import TOLERANCE, examine
from sfumato.batching.verification import Verification

SCALED = "attention_kwargs"
"""Suffix of the argument names with which pipelines pass the scale of a LoRA."""

MOST = 6
"""Up to this many optional arguments every combination is tried; with more, those with one or two left out."""


def variations(
    batches: Iterable[Sequence[Call]], verification: Verification
) -> tuple[dict[str, float], dict[str, str]]:
    """For diffusers' modules: proved signatures → relative error, and refused signatures → why."""
    shown: dict[str, float] = {}
    wrong: dict[str, str] = {}
    for calls in batches:
        if len(calls) < 2 or not type(calls[0].module).__module__.startswith("diffusers."):
            continue
        for arguments in _combinations(calls):
            described = [
                describe(call.module, call.method, (), given, Fingerprints(), call.name)
                for call, given in zip(calls, arguments, strict=True)
            ]
            _try(described, verification, shown, wrong)
    return shown, wrong


def _try(calls: Sequence[Call], verification: Verification, shown: dict[str, float], wrong: dict[str, str]) -> None:
    first = calls[0]
    if first.key is None or any(call.key != first.key for call in calls):
        return
    signature = verification.signature(first, differences_between(calls))
    if (
        signature in shown
        or signature in wrong
        or signature in verification.proved
        or signature in verification.refused
    ):
        return
    try:
        with torch.no_grad():
            alone = [call.run() for call in calls]
    except Exception:  # the module requires the argument
        return
    try:
        with torch.no_grad():
            evidence = examine(calls, _joined)
    except Exception as raised:  # the batch fails although its members do not
        wrong[signature] = f"together: {raised}"
        return
    errors = [outputs.difference(part, one) for part, one in zip(evidence.parts, alone, strict=True)]
    error, reason = max(errors), evidence.judge(errors)
    if error <= TOLERANCE and not reason:
        shown[signature] = error
    else:
        wrong[signature] = reason or f"differs by {error:.1e}"


def _joined(calls: Sequence[Call]) -> dict[str, Any]:
    return join(calls, ConcatenationCache())


def _combinations(calls: Sequence[Call]) -> Iterator[list[dict[str, Any]]]:
    bound = [_bound(call) for call in calls]
    parameters = _parameters(calls[0])
    optional = [
        name
        for name, parameter in parameters.items()
        if parameter.default is None and all(arguments.get(name) is not None for arguments in bound)
    ]
    scales = [name for name in parameters if name.endswith(SCALED) and name not in optional]
    most = len(optional) if len(optional) <= MOST else 2
    for count in range(most + 1):
        for absent in itertools.combinations(optional, count):
            for scale in [None, *scales]:
                extra = {} if scale is None else {scale: {"scale": 1.0}}
                made = [{n: v for n, v in given.items() if n not in absent} | extra for given in bound]
                yield made
                if recast := _recast(made[0]):
                    yield [recast, *made[1:]]


def _recast(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with float32 time steps, as other schedulers use; empty if they are float32 already."""
    whole = {
        name: value
        for name, value in arguments.items()
        if name in TIME and (isinstance(value, int) or (isinstance(value, torch.Tensor) and value.dtype == torch.int64))
    }
    return arguments | {n: torch.as_tensor(v, dtype=torch.float32) for n, v in whole.items()} if whole else {}


def _parameters(call: Call) -> dict[str, inspect.Parameter]:
    function = getattr(type(call.module), "forward" if call.method == "__call__" else call.method)
    return {name: each for name, each in inspect.signature(function).parameters.items() if name != "self"}


def _bound(call: Call) -> dict[str, Any]:
    """The arguments by name."""
    names = [name for name, each in _parameters(call).items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    return dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
