"""Kills at random moments under mixed load. `python -m support.killing 1000` does as many as there is time for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support import killing

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SFUMATO_TEST_KILLS", "20"))


@pytest.mark.parametrize(("engine", "kills"), [("seeded", KILLS), ("embedded", max(3, KILLS // 4))])
def test_nothing_accepted_is_lost(tmp_path: Path, engine: str, kills: int) -> None:
    rounds = killing.main(kills, engine, tmp_path)
    assert sum(each.killed.total() for each in rounds) == kills
    answered = {each.kind for killing in rounds for each in killing.wanted if each.answers}
    assert {"keyed", "streamed", "later, keyed", "batch"} <= answered
