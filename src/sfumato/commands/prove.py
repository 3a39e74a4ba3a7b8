"""`sfumato prove`: find out beforehand what of a model batches, so that its first requests already do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from sfumato.engine import environment
from sfumato.serving.catalog import Catalog
from sfumato.serving.planning import size_of
from sfumato.settings import Settings
from sfumato.status import ModelStatus

if TYPE_CHECKING:
    from sfumato.engine.proving import Result

MIN_ROWS = 8
"""Rows of a forward pass in which proofs are made, at least: two pictures with guidance must fit."""

ALONE = 3
"""Exit code: the proofs were made, and some module runs alone."""


def prove(name: str, size: str | None, settings: Settings, report: Callable[[str], None]) -> int:
    """Load a model, prove what of it batches, and `report` it in lines of text; returns the exit code.

    `size`: WIDTHxHEIGHT of the pictures that are drawn for it, in pixels; None: the model's own. Verdicts are for all.
    0: everything batches; 1: a task could not be drawn; 3: a module runs alone. Raises what loading raises.
    """
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    environment.prepare()
    from sfumato.batching import proof_store
    from sfumato.batching.verification import Verification
    from sfumato.engine import proving
    from sfumato.models import load

    config = Catalog.of(settings, open=True).get(name)
    model = load.load(config, settings.device, lambda status: _on_status(status, report))
    file = proof_store.of_server(settings.proofs, settings.data)
    report(f"{config.name}: {type(model.pipeline).__name__} on {model.device} in {model.dtype}")
    verification = Verification(proofs=proof_store.Proofs(file))
    rows = max(MIN_ROWS, settings.max_batch)
    pixels = size_of(size) if size else (None, None)
    result = proving.prove(model, verification, rows, pixels, lambda task: report(f"drawing: {task}"))
    for line in _table(result):
        report(line)
    report(f"{result.proved} kinds of calls were proved now; verdicts are kept in {file}")
    if result.failures or not result.findings:
        return 1
    return ALONE if any(finding.batches == "no" for finding in result.findings) else 0


def _on_status(status: ModelStatus, report: Callable[[str], None]) -> None:
    if status.progress is None:
        report(f"{status.state} {status.detail}".strip())


def _table(result: Result) -> list[str]:
    rows = [("module", "batches", "calls", "forwards", "why")]
    rows += [(each.module, each.batches, str(each.calls), str(each.forwards), each.why) for each in result.findings]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    return lines + [f"could not be drawn: {failure}" for failure in result.failures]
