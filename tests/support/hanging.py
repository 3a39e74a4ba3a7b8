"""A worker that stands still, found out soon; one that computes or loads has all the time it needs, on any machine."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

from sfumato.process.supervisor import Supervisor


async def replaced(supervisor: Supervisor) -> None:
    """Return when the worker, which says nothing more, has been found out: a second of silence is enough from now on
    until then."""
    patient, pid = supervisor._settings, supervisor.pid
    assert pid
    supervisor._settings = replace(patient, hang_s=1)
    async with asyncio.timeout(300):
        while supervisor.pid == pid:  # noqa: ASYNC110, there is no event of its end
            await asyncio.sleep(0.01)
    supervisor._settings = patient


async def hang(supervisor: Supervisor) -> int:
    """Stop the worker in the middle of what it does, and return its process id when it has been killed."""
    pid = supervisor.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    await replaced(supervisor)
    return pid
