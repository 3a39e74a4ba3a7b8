"""One run: start a server, measure, and show what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sfumato.commands.bench import measure, plain, report
from sfumato.commands.bench import runners as beside
from sfumato.commands.bench.server import running
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings

AT_ONCE = (1, 2, 4, 8)


def bench(
    name: str,
    settings: Settings,
    tell: Callable[[str], None],
    *,
    clients: Sequence[int],
    pictures: int,
    repeats: int,
    sizes: Sequence[str],
    steps: int | None,
    against_plain: bool,
    runners: Sequence[str] = (),
    output: Path,
) -> measure.Report:
    """Measure a model; `tell` gets lines of text. Raises SfumatoError if the server, or a request, fails.

    `sizes`: WIDTHxHEIGHT in pixels, the first for the pictures under load; empty: the model's own.
    `runners`: names of `bench.runners.NAMES` to compare; empty: none.
    """
    config = Catalog.of(settings).get(name)
    with running(settings.models) as server:
        made = measure.Bench(server, name, sizes[0] if sizes else None, steps, tell)
        made.steps(sizes or [made.report.picture["size"]], AT_ONCE, repeats)
        made.under_load(clients, pictures)
        if against_plain:
            made.against(plain.drawer(config, settings.device, measure.PROMPT, made.report.picture), repeats)
        made.memory()
    if runners:
        made.report.compared = beside.compared(
            config, settings.device, runners, measure.PROMPT, made.report.picture, repeats, tell
        )
    for line in report.tables(made.report):
        tell(line)
    for path in report.write(made.report, output):
        tell(str(path))
    return made.report
