"""Which of the test processes gets which tests, and in which order."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

LONGEST = (
    "test_studio.py",
    "test_wheel.py",
    "test_faults.py",
    "test_jobs_random.py",
    "test_jobs_killed.py",
    "test_clients_packages.py",
    "test_schemathesis.py",
    "test_a1111.py",
    "test_hostile_bodies.py",
    "test_operations.py",
    "test_documented_statuses.py",
    "test_hostile_pictures.py",
    "test_docs.py",
)
"""Files of more than half a minute, the longest first: one that came last would leave the other processes idle."""

APART = ("test_families.py", "test_proof.py", "test_schedulers.py", "test_foreseen.py")
"""Files whose tests share nothing that takes long to make. These come last, test by test, and fill up what is left."""


def ordered(items: list[pytest.Item]) -> list[pytest.Item]:
    places = {name: place for place, name in enumerate(LONGEST)} | dict.fromkeys(APART, len(LONGEST) + 1)
    return sorted(items, key=lambda item: places.get(item.path.name, len(LONGEST)))


class ByFile(LoadScopeScheduling):
    """The tests of a file go to one process, which keeps the fixtures of the module; those of `APART` to any."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file.rpartition("/")[2] in APART else file
