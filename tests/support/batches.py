"""Small modules, called as views call theirs and run together by a `Batcher`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sfumato.batching.batcher import Batcher
from sfumato.batching.calls import Call, Fingerprints, describe
from sfumato.batching.verification import Verification
from sfumato.batching.views import View

NOTHING: frozenset[str] = frozenset()


def called(module: nn.Module, *args: Any, method: str = "__call__", **kwargs: Any) -> Call:
    return describe(module, method, args, kwargs, Fingerprints())


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def together(module: nn.Module, calls: list[Callable[[Any], Any]], **options: Any) -> tuple[list[Any], Batcher]:
    batcher = Batcher(**{"verification": Verification("unlisted", NOTHING), **options})
    stand_in = View("").stand_in(module, "module")
    tasks = [batcher.submit(lambda call=call: call(stand_in)) for call in calls]
    while batcher.step():
        pass
    return [task.outcome.error or task.outcome.value for task in tasks if task.outcome], batcher


PROOF = 5
"""Forwards of a proof besides its members alone: as it is, disturbed, twice other neighbours, other places."""


class Coupled(nn.Module):
    """Wrong to batch, and no shape tells: each row depends on the mean of all."""

    weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, sample):
        return sample - sample.mean()
