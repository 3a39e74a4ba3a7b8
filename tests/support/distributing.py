"""Which of the test processes gets which tests, in which order, and which tests the quick run leaves out.

`durations.json` has the seconds of every test function, of all its parameters together, as the last
`pytest --slow --record` measured them. Only their proportions matter: machines differ.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

RECORD = Path(__file__).with_name("durations.json")

SLOW_S = 2.0
"""A test function that takes longer is slow, as if it were marked so."""

APART = ("test_families.py", "test_proof.py", "test_schedulers.py", "test_foreseen.py")
"""Files whose tests share nothing that takes long to make. These come last, test by test, and fill up what is left."""


def function_of(nodeid: str) -> str:
    """File and function of a test, without its parameters."""
    return nodeid.partition("[")[0].rpartition("/")[2]


def recorded() -> dict[str, float]:
    return dict(json.loads(RECORD.read_text())) if RECORD.exists() else {}


def ordered(items: list[pytest.Item]) -> list[pytest.Item]:
    """By file: those that take longest first, since one that came last would leave the other processes idle."""
    seconds: Counter[str] = Counter()
    for function, spent in recorded().items():
        seconds[function.partition("::")[0]] += spent  # type: ignore[assignment]
    return sorted(items, key=lambda item: (item.path.name in APART, -seconds[item.path.name]))


def leave_out_slow(items: list[pytest.Item]) -> None:
    seconds = recorded()
    for item in items:
        took = seconds.get(function_of(item.nodeid), 0.0)
        if item.get_closest_marker("slow") or took > SLOW_S:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


class Recorder:
    """Adds up what the tests themselves take, without fixtures, which others need too; writes `RECORD` at the end."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._seconds[function_of(report.nodeid)] += report.duration  # type: ignore[assignment]

    def pytest_sessionfinish(self) -> None:
        rounded = {function: round(seconds, 2) for function, seconds in sorted(self._seconds.items())}
        RECORD.write_text(json.dumps(rounded, indent=0) + "\n")


class ByFile(LoadScopeScheduling):
    """The tests of a file go to one process, which keeps the fixtures of the module; those of `APART` to any."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file.rpartition("/")[2] in APART else file
