"""Pictures behind a URL. With S3, see tests/test_ray.py; here in fsspec's file system in memory."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import fsspec
import pytest

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


def test_the_setting_chooses_it_and_a_bad_one_is_named(tmp_path: Path, url: str) -> None:
    assert isinstance(store_of(Settings(data=tmp_path, outputs_url=url)), ObjectStore)
    assert not isinstance(store_of(Settings(data=tmp_path)), ObjectStore)
    with pytest.raises(ValueError, match=r"outputs_url='nowhere://x'.*nowhere"):
        store_of(Settings(data=tmp_path, outputs_url="nowhere://x"))


def test_what_the_file_system_raises_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(url)
    files, _ = fsspec.core.url_to_fs(url)

    def refused(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(type(files), "pipe_file", refused)
    with pytest.raises(StorageError, match=r"could not be written to memory://.*no route.*outputs_url"):
        store.put(b"a picture")
