"""What is shown and kept of a measurement: tables, JSON, and a plot."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato.checkpoints.stored import readable
from sfumato.commands.bench.measure import Report
from sfumato.commands.bench.runners import Compared


def tables(report: Report) -> Iterator[str]:
    """Lines of text."""
    picture = ", ".join(f"{name} {value}" for name, value in report.picture.items() if value is not None)
    yield f"{report.model} on {report.machine['processor']} ({report.machine['cores']} cores): {picture}"
    yield f"start {report.start_s:.2f} s, first picture {report.first_picture_s:.2f} s"
    weights = readable(report.model_bytes) if report.model_bytes else "unknown"
    yield f"memory: weights {weights}, worker {readable(report.worker_bytes)}"
    if report.runners:
        yield f"computed by: {', '.join(f'{module} {runner}' for module, runner in report.runners.items())}"
    yield ""
    steps = [(each.size, each.pictures, each.seconds, each.seconds / each.pictures) for each in report.steps]
    yield from _table(("size", "at once", "s a step", "of each picture"), steps)
    yield ""
    load = [(each.clients, each.pictures, each.per_second, each.p50, each.p95) for each in report.load]
    yield from _table(("clients", "pictures", "pictures/s", "p50 s", "p95 s"), load)
    if report.compared:
        yield ""
        rows = [
            (each.runner, each.step_s, each.over_eager, _decibels(each), each.prepared_s, each.computed_by)
            for each in report.compared
        ]
        yield from _table(("runner", "s a step", "over eager", "dB", "prepared in s", "computed by"), rows)
    if report.over_plain:
        yield ""
        yield against(report.over_plain)


def _decibels(each: Compared) -> str:
    return "same" if each.decibels is None else f"{each.decibels:.1f}"


def against(seconds: Mapping[str, float]) -> str:
    """`Report.over_plain` as a sentence."""
    return "one picture: {sfumato:.2f} s, plain diffusers {plain:.2f} s: {ratio:.2f} times as fast".format(**seconds)


def write(report: Report, stem: Path) -> list[Path]:
    """`STEM.json`, and with matplotlib (the extra `bench`) `STEM.png` and `STEM.svg`."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_name(f"{stem.name}.json")
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")
    return [path, *_plotted(report, stem)]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    cells = [list(head), *([f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    for row in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _plotted(report: Report, stem: Path) -> list[Path]:
    if importlib.util.find_spec("matplotlib") is None:
        return []
    importlib.import_module("matplotlib").use("agg")  # not an import statement: the package is an extra
    pyplot = importlib.import_module("matplotlib.pyplot")
    plots = 3 if report.compared else 2
    figure, (rate, wait, *of_runners) = pyplot.subplots(1, plots, figsize=(4.5 * plots, 3.6), layout="constrained")
    for axes in of_runners:
        _runners(axes, report.compared)
    clients = [each.clients for each in report.load]
    rate.plot(clients, [each.per_second for each in report.load], marker="o")
    rate.set_ylabel("pictures per second")
    for share in ("p50", "p95"):
        wait.plot(clients, [getattr(each, share) for each in report.load], marker="o", label=share)
    wait.set_ylabel("seconds to a picture")
    wait.legend()
    for axes in (rate, wait):
        axes.set_xlabel("clients")
        axes.set_xticks(clients)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{report.model}, {report.picture['size']}, {report.picture['steps']} steps")
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return paths


def _runners(axes: Any, compared: Sequence[Compared]) -> None:
    bars = axes.bar([each.runner for each in compared], [each.step_s for each in compared])
    told = [f"{each.over_eager:.2f} x\n{_decibels(each)}{'' if each.decibels is None else ' dB'}" for each in compared]
    axes.bar_label(bars, told, label_type="center", color="white")
    axes.set_ylabel("seconds a step, alone")
