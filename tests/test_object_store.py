"""Pictures behind a URL. With S3, see tests/test_ray.py; here in fsspec's file system in memory."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sfumato.errors import StorageError
from sfumato.pictures.gallery import Gallery, GalleryQuery
from sfumato.pictures.object_store import ObjectStore
from sfumato.pictures.stores import store_of
from sfumato.settings import Settings
from support.gallery import MADE, png

HOUR = 3600.0


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/pictures"


def test_a_picture_is_stored_read_and_deleted(url: str) -> None:
    store = ObjectStore(url)
    assert store.names() == {}
    name = store.put(b"a picture", "webp")
    stored = ObjectStore(url).get(name)
    assert stored and (stored.data, stored.media_type) == (b"a picture", "image/webp")
    assert store.has(name)
    assert [*store.names()] == [name]
    assert abs(store.names()[name] - time.time()) < HOUR
    store.delete(name)
    store.delete(name)
    assert not store.has(name)
    assert store.get(name) is None


def test_other_files_there_are_left_alone_and_the_oldest_pictures_expire(url: str) -> None:
    store = ObjectStore(url, max_age_s=HOUR, max_bytes=0)
    names = [store.put(b"a picture") for _ in range(3)]
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/notes.txt", b"mine")
    assert store.expire(spare=names[:1]) == 0
    assert store.expire(time.time() + 2 * HOUR, spare=names[:1]) == 2
    assert [*store.names()] == names[:1]
    assert files.cat_file(f"{root}/notes.txt") == b"mine"


def test_the_total_is_limited(url: str) -> None:
    store = ObjectStore(url, max_bytes=25)
    names = [store.put(b"ten bytes.") for _ in range(3)]
    assert len(store.names()) == 2
    assert names[2] in store.names()


def test_the_gallery_is_rebuilt_from_it(url: str, tmp_path: Path) -> None:
    name = Gallery(ObjectStore(url), f"sqlite:///{tmp_path}/one.db").keep(png(), "png", "", MADE, 0.0)
    other = Gallery(ObjectStore(url), f"sqlite:///{tmp_path}/two.db")
    assert other.reconcile() == (1, 0)
    assert [entry.name for entry in other.page(GalleryQuery(words="cat"))[0]] == [name]


def test_a_page_of_the_gallery_asks_for_no_picture(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = Gallery(ObjectStore(url), f"sqlite:///{tmp_path}/one.db")
    name = gallery.keep(png(), "png", "", MADE, 0.0)
    gallery.store.delete(name)
    with monkeypatch.context() as unreachable:
        unreachable.setattr(MemoryFileSystem, "exists", None)
        assert [entry.name for entry in gallery.page(GalleryQuery())[0]] == [name]
    assert gallery.reconcile() == (0, 1)
    assert gallery.page(GalleryQuery())[0] == []


def test_the_setting_chooses_it_and_a_bad_one_is_named(tmp_path: Path, url: str) -> None:
    assert isinstance(store_of(Settings(data=tmp_path, outputs_url=url)), ObjectStore)
    assert not isinstance(store_of(Settings(data=tmp_path)), ObjectStore)
    with pytest.raises(ValueError, match=r"outputs_url: .*nowhere"):
        store_of(Settings(data=tmp_path, outputs_url="nowhere://x"))


def test_what_the_file_system_raises_is_logged_and_not_told(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = ObjectStore(url)
    files, _ = fsspec.core.url_to_fs(url)

    def refused(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(type(files), "pipe_file", refused)
    with pytest.raises(StorageError, match=r"could not be written \(ConnectionError; .*outputs_url") as raised:
        store.put(b"a picture")
    assert "memory" not in raised.value.message
    assert "no route" in caplog.text


def test_no_error_quotes_the_password(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    settings = Settings(data=tmp_path, outputs_url=f"ftp://me:s3cret@127.0.0.1:{port}/pictures")
    assert "s3cret" not in repr(settings)
    with pytest.raises(ValueError, match=r"outputs_url: .*refused") as raised:
        store_of(settings)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("url", ["file:///pictures", "local://pictures", "/pictures"])
def test_a_folder_is_named_by_the_other_setting(url: str) -> None:
    with pytest.raises(ValueError, match=r"outputs_url: .* the setting data"):
        ObjectStore(url)


def listed(monkeypatch: pytest.MonkeyPatch, listing: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The file system in memory lists so what it has. `listing`: of what it would list itself."""
    own = MemoryFileSystem.ls
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *args, **kw: [listing(entry) for entry in own(*args, **kw)])


def test_what_has_no_known_time_does_not_expire(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(url, max_age_s=HOUR, max_bytes=25)
    listed(monkeypatch, lambda entry: {"name": entry["name"], "size": entry["size"], "modify": "Nov 28 20:00"})

    def unknown(*_: object) -> None:
        raise NotImplementedError

    with monkeypatch.context() as no_time:
        no_time.setattr(MemoryFileSystem, "modified", unknown)
        names = [store.put(b"ten bytes.") for _ in range(3)]
        assert store.expire(time.time() + 2 * HOUR) == 0
        assert sorted(store.names()) == sorted(names)
        assert all(abs(written - time.time()) < HOUR for written in store.names().values())
    assert store.expire(time.time() + 2 * HOUR) == 3  # each is asked for its time


def test_a_time_may_be_text(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(url)
    name = store.put(b"a picture")
    listed(monkeypatch, lambda entry: {**entry, "created": None, "updated": "1970-01-01T01:00:00Z"})
    assert store.names() == {name: HOUR}


def test_a_picture_is_stored_where_nobody_may_list(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(MemoryFileSystem, "ls", refused)
    store = ObjectStore(url, max_bytes=10)
    assert store.has(store.put(b"a picture"))
    assert "the oldest pictures could not be deleted" in caplog.text
    with pytest.raises(StorageError, match="cannot be listed"):
        store.expire()


def test_a_picture_is_stored_while_others_are_deleted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(url, max_bytes=25)
    first = store.put(b"ten bytes.")
    delete, deleting, go_on = MemoryFileSystem.rm_file, threading.Event(), threading.Event()

    def slow(*args: Any) -> None:
        deleting.set()
        assert go_on.wait(60)
        delete(*args)

    monkeypatch.setattr(MemoryFileSystem, "rm_file", slow)
    thread = threading.Thread(target=lambda: [store.put(b"ten bytes.") for _ in range(2)])
    thread.start()
    assert deleting.wait(60)
    meanwhile = [store.put(b"ten bytes.") for _ in range(3)]  # beyond the limit, too: nobody waits
    go_on.set()
    thread.join()
    assert not store.has(first)
    last = store.put(b"ten bytes.")
    assert len(store.names()) == 2
    assert {last} <= store.names().keys() <= {last, *meanwhile}
