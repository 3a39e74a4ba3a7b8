"""Which server carries out a job, and whether that one still lives."""

from __future__ import annotations

import functools
import secrets
import socket
from pathlib import Path

import psutil  # type: ignore[import-untyped]


def new_name() -> str:
    """Names this server: its machine, its process, and a random part, as a process may have several servers."""
    pid = psutil.Process().pid
    return f"{_machine()}/{pid}/{_started(pid)}/{secrets.token_hex(4)}"


def has_died(name: str) -> bool:
    """Whether the process of a server of this machine is certainly gone; False for those of other machines."""
    machine, pid, started, _ = name.split("/")
    return machine == _machine() and _started(int(pid)) != started


@functools.cache
def _machine() -> str:
    """One start of one machine, as far as its process ids reach: containers have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return socket.gethostname().replace("/", "-")


def _started(pid: int) -> str:
    """When a living process began; empty if there is none. Ids of processes are used again."""
    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return ""
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists():  # in ticks since the machine's start: no clock that is set can move it
            return stat.read_text().rpartition(")")[2].split()[19]
        return str(int(psutil.Process(pid).create_time()))
    except (psutil.Error, OSError):
        return ""
