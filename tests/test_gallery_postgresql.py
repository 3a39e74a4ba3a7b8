"""The gallery's index in a real PostgreSQL, which several servers may share."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfumato.pictures.gallery import Gallery, GalleryQuery
from sfumato.pictures.store import Store
from support.gallery import MADE, keep, names, png

pytestmark = pytest.mark.slow

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def run(*command: str, folder: Path) -> None:
    """As the user postgres where we are root: its programs refuse to run as root."""
    prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    done = subprocess.run([*prefix, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if not PROGRAMS:
        assert not os.environ.get("CI"), "PostgreSQL is missing; .ci/run installs it"
        pytest.skip("PostgreSQL is missing: apt-get install postgresql")
    folder = Path("/tmp") / f"sfumato-postgresql-{os.getpid()}"  # its user cannot enter pytest's folders
    folder.mkdir()
    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    control = str(PROGRAMS[-1] / "pg_ctl")
    data = str(folder / "data")
    run(str(PROGRAMS[-1] / "initdb"), "-D", data, "-U", "sfumato", "--auth=trust", "-E", "UTF8", folder=folder)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run(control, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start", folder=folder)
    try:
        yield f"postgresql+psycopg://sfumato@127.0.0.1:{port}/postgres"
    finally:
        run(control, "-D", data, "-m", "immediate", "-w", "stop", folder=folder)
        shutil.rmtree(folder)


def test_what_is_kept_is_listed_found_starred_and_made_again(url: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "generated-images")
    shelf = Gallery(store, url, ("alice", "bob"))
    first = keep(shelf, "A Cat in GRÖSSE 100%", caller="alice", created=1.0)
    second = keep(shelf, "a_dog", caller="bob", created=2.0)
    third = keep(shelf, "a cat", caller="alice", created=3.0, model="other")
    assert names(shelf) == [third, second, first]
    assert names(shelf, words="cat größe 100%") == [first]
    assert names(shelf, words="a_d") == [second]
    assert names(shelf, caller="alice", model="other") == [third]
    page, more = shelf.page(GalleryQuery(), limit=2)
    assert more
    rest, more = shelf.page(GalleryQuery(), before=(page[-1].created, page[-1].name), limit=2)
    assert ([each.name for each in rest], more) == ([first], False)

    shelf.star(first, True, "alice")
    shelf.star(second, True, "alice")  # not hers
    store.delete(third)
    unlisted = store.put(png(MADE), "png", owner="bob")
    other = Gallery(store, url, ("alice", "bob"))  # another server on the same index
    assert other.reconcile() == (1, 1)
    assert names(other, caller="bob") == [unlisted, second]
    assert names(other, starred=True) == [first]
    assert other.rebuild() == 3
    assert names(shelf, starred=True) == [first]
    shelf.delete(first)
    assert other.get(first) is None
    shelf.close()
    other.close()
