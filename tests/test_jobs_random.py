"""Kills at random moments under mixed load. `python -m support.killing 1000` does as many as there is time for."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from support import killing

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SFUMATO_TEST_KILLS", "20"))


@pytest.mark.parametrize(("engine", "kills"), [("seeded", KILLS), ("embedded", max(3, KILLS // 4))])
def test_nothing_accepted_is_lost(tmp_path: Path, engine: str, kills: int) -> None:
    done = killing.main(kills, engine, tmp_path)
    assert done.killed.total() == kills
    answered = Counter(each.kind for each in done.wanted if each.answers)
    assert {"keyed", "streamed", "later", "later, keyed"} <= set(answered)
