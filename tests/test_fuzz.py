"""A small version of `make fuzz`: two thousand requests made at random, each answered as it should be."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from support import fuzz
from support.inside import Inside

CASES = 2000


def test_nothing_made_at_random_breaks_it(tmp_path: Path) -> None:
    report = asyncio.run(fuzz.run(tmp_path, first=1_000_000, cases=CASES))
    assert not report.problems, str(report)
    assert report.statuses.total() == CASES
    assert report.statuses[200] > CASES // 20  # it gets through to the pictures
    assert {400, 403, 404, 405, 415} <= set(report.statuses)


def test_a_case_is_made_from_its_number_alone() -> None:
    maker, other = fuzz.Maker("x.png"), fuzz.Maker("x.png")
    assert [str(maker.case(number)) for number in range(50)] == [
        str(other.case(number)) for number in range(49, -1, -1)
    ][::-1]


@pytest.mark.parametrize("fault", ["raises", "500", "spins", "shapeless"])
def test_it_finds_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(fuzz, "MOST_CPU_S", 0.2)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if fault == "raises":
            raise RuntimeError
        if fault == "spins":
            sum(range(20_000_000))
        status = {"500": 500, "shapeless": 400}.get(fault, 200)
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-request-id", b"x")]})
        await send({"type": "http.response.body", "body": b"{}"})

    class Faulty(Inside):
        def __init__(self, *args: object, **settings: object) -> None:
            super().__init__(tmp_path)
            app.router, app.state = self.app.router, self.app.state  # type: ignore[attr-defined]
            self.app = app  # type: ignore[assignment]

    monkeypatch.setattr(fuzz, "Inside", Faulty)
    report = asyncio.run(fuzz.run(tmp_path, first=0, cases=3))
    assert report.problems
