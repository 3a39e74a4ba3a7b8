"""Pictures on disk: whole or not at all, and gone when they are old."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest

from sfumato.errors import StorageError
from sfumato.pictures.store import ABANDONED_S, LOW_WATER, Store

HOUR = 3600.0
NOW = 1_000_000_000.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a" / "pictures"


def aged(store: Store, age: float, size: int = 10, extension: str = "png") -> str:
    """A picture that was put `age` seconds before NOW."""
    name = store.put(b"x" * size, extension)
    os.utime(store.folder / name, (NOW - age, NOW - age))
    return name


@pytest.mark.parametrize("extension", ["png", "webp", "jpeg"])
def test_what_is_put_is_got(folder: Path, extension: str) -> None:
    store = Store(folder)
    name = store.put(b"a picture", extension)
    assert re.fullmatch(rf"[0-9a-f]{{32}}\.{extension}", name)
    picture = store.get(name)
    assert picture is not None
    assert (picture.data, picture.media_type) == (b"a picture", f"image/{extension}")
    assert [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize(
    "name",
    ["", "x.png", "0" * 32 + ".png", "0" * 32 + ".gif", "../secret.png", "/etc/passwd", "a" * 32, "A" * 32 + ".png"],
)
def test_other_names_lead_nowhere(folder: Path, name: str) -> None:
    store = Store(folder)
    store.put(b"a picture")
    (folder.parent / "secret.png").write_text("secret")
    assert store.get(name) is None


def test_old_pictures_expire(folder: Path) -> None:
    store = Store(folder, max_age_s=HOUR)
    old, young = aged(store, HOUR + 1), aged(store, HOUR - 1, extension="webp")
    assert store.expire(NOW) == 1
    assert store.get(old) is None
    assert store.get(young) is not None
    assert store.expire(NOW) == 0
    assert store.expire(NOW + 2) == 1


def test_without_limits_nothing_expires(folder: Path) -> None:
    store = Store(folder)
    name = aged(store, 1000 * HOUR, 10_000)
    assert store.expire(NOW) == 0
    assert store.get(name) is not None


def test_the_oldest_go_when_all_are_too_large(folder: Path) -> None:
    store = Store(folder)
    names = [aged(store, age, size=30) for age in (5, 3, 4, 1, 2)]
    limited = Store(folder, max_bytes=100)
    assert limited.expire(NOW) == 2
    assert {path.name for path in folder.iterdir()} == {names[1], names[3], names[4]}


def test_the_last_picture_stays_however_large(folder: Path) -> None:
    store = Store(folder, max_bytes=100)
    first = aged(store, 1, size=1000)
    assert store.get(first) is not None
    second = store.put(b"x" * 2000)
    assert store.get(first) is None
    assert store.get(second) is not None


def test_put_keeps_the_limit(folder: Path) -> None:
    store = Store(folder, max_bytes=1000)
    for age in range(300, 0, -1):
        aged(store, age, size=30)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 1000
    assert sum(path.stat().st_size for path in folder.iterdir()) >= 1000 * LOW_WATER - 30


def test_nothing_else_is_deleted(folder: Path, tmp_path: Path) -> None:
    store = Store(folder, max_age_s=HOUR, max_bytes=100)
    folder.mkdir(parents=True)
    strangers = [
        "README.png", "0" * 31 + ".png", "0" * 32 + ".PNG", "0" * 32 + ".png.bak", "x.part", "download.part",
    ]  # fmt: skip
    for name in strangers:
        (folder / name).write_bytes(b"x" * 1000)
        os.utime(folder / name, (0, 0))
    nested = folder / ("1" * 32 + ".png")
    nested.mkdir()
    outside = tmp_path / "mine.png"
    outside.write_bytes(b"mine")
    link = folder / ("2" * 32 + ".png")
    link.symlink_to(outside)
    aged(store, 2 * HOUR)
    assert store.expire(NOW) == 1
    assert {path.name for path in folder.iterdir()} == {*strangers, nested.name, link.name}
    assert outside.read_bytes() == b"mine"


def test_unfinished_files_of_long_ago_go(folder: Path) -> None:
    store = Store(folder)
    store.put(b"a picture")
    old, young = folder / "sfumato-abc_1.part", folder / "sfumato-abc_2.part"
    for path, age in ((old, ABANDONED_S + 1), (young, ABANDONED_S - 1)):
        path.write_bytes(b"half")
        os.utime(path, (NOW - age, NOW - age))
    assert store.expire(NOW) == 0
    assert not old.exists()
    assert young.exists()


def test_a_folder_that_is_not_there_yet(folder: Path) -> None:
    assert Store(folder, max_age_s=HOUR, max_bytes=1).expire(NOW) == 0


def test_row_27_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="could not be written"):
        Store(tmp_path / "file" / "pictures").put(b"a picture")


def test_row_27_an_empty_file_is_no_picture(folder: Path) -> None:
    store = Store(folder)
    name = store.put(b"a picture")
    (folder / name).write_bytes(b"")
    assert store.get(name) is None


def test_row_27_readers_see_whole_pictures_or_none(folder: Path) -> None:
    """While pictures are put and expire in other threads."""
    store = Store(folder, max_bytes=20_000)
    whole = b"x" * 1999 + b"."
    seen: list[bytes] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            for path in folder.glob("*.png"):
                if picture := store.get(path.name):
                    seen.append(picture.data)

    def write() -> None:
        for _ in range(100):
            store.put(whole)

    store.put(whole)
    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write) for _ in range(3)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    reader.join()
    assert set(seen) == {whole}
    store.expire()
    assert len(list(folder.iterdir())) <= 10
