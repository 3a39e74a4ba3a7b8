"""The gallery's index in a real PostgreSQL, which several servers may share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sfumato.pictures.gallery import Gallery, GalleryQuery
from sfumato.pictures.store import Store
from support import postgresql
from support.gallery import MADE, keep, names, png

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgresql.running("gallery") as database:
        yield database.url


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
