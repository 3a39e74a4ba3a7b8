"""A real PostgreSQL of our own, on a free port of localhost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.ports import free_port

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


class PostgreSQL:
    """`url` is SQLAlchemy's. It may be stopped, as a crash does, and started again."""

    def __init__(self, folder: Path, port: int) -> None:
        self.url = f"postgresql+psycopg://sfumato@127.0.0.1:{port}/postgres"
        self._folder, self._port = folder, port

    def start(self) -> None:
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder}"
        self._control("-o", f"{options} -c fsync=off", "-l", str(self._folder / "log"), "-w", "start")

    def stop(self) -> None:
        self._control("-m", "immediate", "-w", "stop")

    def _control(self, *command: str) -> None:
        run(str(PROGRAMS[-1] / "pg_ctl"), "-D", str(self._folder / "data"), *command, folder=self._folder)


def run(*command: str, folder: Path) -> None:
    """As the user postgres where we are root: its programs refuse to run as root."""
    prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    done = subprocess.run([*prefix, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def running(name: str) -> Iterator[PostgreSQL]:
    """`name`: of whoever asks, so that two may run at once. Skips the test where it is not installed, except in CI."""
    if not PROGRAMS:
        assert not os.environ.get("CI"), "PostgreSQL is missing; .ci/run installs it"
        pytest.skip("PostgreSQL is missing: apt-get install postgresql")
    folder = Path("/tmp") / f"sfumato-postgresql-{os.getpid()}-{name}"  # its user cannot enter pytest's folders
    folder.mkdir()
    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    data = str(folder / "data")
    run(str(PROGRAMS[-1] / "initdb"), "-D", data, "-U", "sfumato", "--auth=trust", "-E", "UTF8", folder=folder)
    database = PostgreSQL(folder, free_port())
    database.start()
    try:
        yield database
    finally:
        database.stop()
        shutil.rmtree(folder)
