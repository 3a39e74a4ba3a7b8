"""Batching as a library: run many calls of one diffusers pipeline together, like `asyncio.gather`.

from diffusers import DiffusionPipeline
import sfumato, torch

pipe = DiffusionPipeline.from_pretrained("...")
outputs = sfumato.gather(pipe, [
    {"prompt": "a cat", "num_inference_steps": 20, "generator": torch.Generator().manual_seed(1)},
    {"prompt": "a dog", "num_inference_steps": 50, "guidance_scale": 3.0},
])
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sfumato.batching import offload, proof_store
from sfumato.batching.batcher import Batcher, Task
from sfumato.batching.counts import Counts
from sfumato.batching.proof_store import Proofs
from sfumato.batching.verification import Verification
from sfumato.batching.views import forget, view
from sfumato.pipelines import modular, scheduler_owners


class GatherStopped(BaseException):
    """Raised in the calls that are still running when another one has failed."""


def gather(
    pipe: Any,
    calls: Sequence[Mapping[str, Any]],
    max_batch: int = 8,
    return_exceptions: bool = False,
    stats: dict[str, dict[str, Any]] | None = None,
) -> list[Any]:
    """Run `pipe(**call)` for each of `calls` at the same time and return the outputs in order.

    Every call returns what it would return alone (up to rounding: about 1e-6 in fp32), whatever the others do;
    they share the forward passes of the modules wherever shapes allow. Give each its own `generator` to make it
    repeatable. `"scheduler"` in a call replaces the pipeline's scheduler for that call; in a combined pipeline it
    replaces the scheduler that draws the picture, not the prior's.

    `max_batch`: maximum rows of a forward pass, at least 1; with guidance most pipelines use two rows per picture.
    `return_exceptions`: put the exception of a failed call into the list; otherwise the first one ends all calls.
    `stats`: filled with module name → `{"calls", "forwards", "mean_batch", "proving", "unbatched"}`. "proving" counts
    the additional forward passes of proofs, made once per kind of call; "unbatched" counts the calls that could not
    be batched, by reason (`sfumato.batching.reasons`).

    `pipe` is not changed and can be used as before, its scheduler included.
    """
    pipe = modular.adapted(pipe)
    _check(pipe, calls, max_batch)
    forget(pipe)
    verification = Verification(proofs=Proofs(proof_store.of_user()))
    batcher = Batcher(max_rows=max_batch, max_active=max(2, 2 * max_batch), verification=verification)
    tasks = [batcher.submit(_Run(pipe, call)) for call in calls]
    try:
        with torch.no_grad():
            while batcher.step():
                if not return_exceptions:
                    _raise_first(tasks)
    finally:
        with torch.no_grad():
            batcher.close(GatherStopped())
            offload.offload_all(pipe)
        if stats is not None:
            stats |= _stats(batcher.counts)
    if not return_exceptions:
        _raise_first(tasks)
    return [task.outcome.error or task.outcome.value for task in tasks if task.outcome is not None]


def _stats(counts: Counts) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "calls": count.calls,
            "forwards": count.forwards,
            "mean_batch": count.calls / max(1, count.forwards),
            "proving": count.proving,
            "unbatched": {str(why): calls for (of, why), calls in counts.unbatched.items() if of == name},
        }
        for name, count in counts.items()
    }


class _Run:
    """One call, on a view that is created when its turn comes."""

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        self._pipe = pipe
        self._call = dict(call)

    def __call__(self) -> Any:
        pipe = view(self._pipe, foreign=True)
        if "scheduler" in self._call and not _takes_scheduler(pipe):
            scheduler_owners.replace_scheduler(pipe, copy.deepcopy(self._call.pop("scheduler")))
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)  # several bars at once are unreadable
        return pipe(**self._call)


def _takes_scheduler(pipe: Any) -> bool:
    return "scheduler" in inspect.signature(type(pipe).__call__).parameters


def _check(pipe: Any, calls: Sequence[Mapping[str, Any]], max_batch: int) -> None:
    if max_batch < 1:
        raise ValueError(f"max_batch={max_batch}: must be at least 1")
    for at, call in enumerate(calls):
        if (
            "scheduler" in call
            and not _takes_scheduler(pipe)
            and (reason := scheduler_owners.why_not_replaceable(pipe))
        ):
            raise ValueError(f"call {at}: {reason}")
    owners: dict[int, int] = {}
    for at, call in enumerate(calls):
        generators = call.get("generator")
        for generator in generators if isinstance(generators, list | tuple) else [generators]:
            if generator is not None and owners.setdefault(id(generator), at) != at:
                raise ValueError(
                    f"calls {owners[id(generator)]} and {at} share one generator, so their results would depend on "
                    "timing. Give each its own: torch.Generator().manual_seed(seed)"
                )


def _raise_first(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if task.outcome is not None and task.outcome.error is not None:
            raise task.outcome.error
