"""`sfumato models`: a table of the models that requests can name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence

from sfumato.checkpoints import static_capabilities, stored
from sfumato.config import ModelConfig
from sfumato.runners.measured import Measurements
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings
from sfumato.status import RunnerState

COLUMNS = ("name", "class", "source", "runner", "on disk", "downloaded")


def table(catalog: Catalog, settings: Settings) -> Iterator[str]:
    """Its lines, with columns as wide as their longest entry."""
    measured = Measurements(settings.runners_folder)
    rows = [COLUMNS, *(_row(config, settings.accelerate, measured) for config in catalog.all())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _runner(chosen: str, states: Sequence[RunnerState]) -> str:
    """`states`: what was measured of the model on this machine."""
    if chosen == "openvino" and importlib.util.find_spec("openvino") is None:
        return "eager (openvino is not installed)"
    if chosen != "auto":
        return chosen
    told = "; ".join(f"{state.module} {state.runner}: {state.detail}" for state in states)
    return f"auto ({told or 'nothing was measured yet'})"


def _row(config: ModelConfig, accelerate: str, measured: Measurements) -> tuple[str, ...]:
    found = stored.of(config)
    pipeline = static_capabilities.static_capabilities(config).pipeline or config.pipeline_type
    names = ", ".join((config.name, *config.aliases))
    size = stored.readable(found.size) if found.files else "-"
    here = "yes" if found.complete else "in part" if found.files else "no"
    runner = _runner(config.accelerate or accelerate, measured.states(config.name))
    return names, pipeline or "told at first use", config.label, runner, size, here
