"""`sfumato pull`: download what a model needs before its first use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sfumato.checkpoints.weight_file import OnProgress
from sfumato.engine import environment
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings
from sfumato.status import ModelStatus


def pull(name: str, settings: Settings) -> str:
    """Download all that a model file (or a hub id) names; returns the path of its weights."""
    environment.prepare()
    from sfumato.models import device, estimators, fetch, ip_adapters, parts

    config = Catalog.of(settings, open=True).get(name)
    with _files() as report:

        def on_status(status: ModelStatus) -> None:
            if status.progress is not None:
                report(status.progress, status.detail)

        dtype = device.choose_dtype(config, device.choose_device(config, settings.device))
        fetched = fetch.fetch(config, dtype, on_status, on_file=report)
        fetch.fetch_prior(config, dtype, on_status)
        parts.fetch(config, fetched.description or fetched.path, report)
        ip_adapters.fetch(config)
        estimators.fetch(config)
        return str(fetched.path)


@contextmanager
def _files() -> Iterator[OnProgress]:
    """What to call with each file's progress: a bar for each on a terminal, else a line at its start and at its end."""
    console = Console(stderr=True)
    told: dict[str, float] = {}

    def as_lines(fraction: float | None, name: str) -> None:
        part = fraction or 0.0
        if name not in told:
            console.print(f"downloading {name}", highlight=False, soft_wrap=True)
        if part >= 1.0 and told.get(name, 0.0) < 1.0:
            console.print(f"have {name}", highlight=False, soft_wrap=True)
        told[name] = max(part, told.get(name, 0.0))

    if not console.is_terminal:
        yield as_lines
        return
    tasks: dict[str, TaskID] = {}
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console) as progress:

        def as_bars(fraction: float | None, name: str) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=1.0)
            progress.update(tasks[name], completed=fraction, total=None if fraction is None else 1.0)

        yield as_bars
