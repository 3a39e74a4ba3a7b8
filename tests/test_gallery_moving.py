"""The gallery with clips and sounds of every format: listed from the files alone, shown small, deleted and expired."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.formats import AUDIO, FORMATS, VIDEO, of_kind
from sfumato.pictures import files
from sfumato.pictures.gallery import Gallery
from sfumato.pictures.object_store import ObjectStore
from sfumato.pictures.results import Clip, Sound
from sfumato.pictures.store import Store
from sfumato.pictures.thumbnails import thumbnail
from support.gallery import MADE, names
from support.probed import needs

CLIP = Clip(np.stack([np.full((64, 128, 3), grey, np.float32) for grey in (1.0, 0.5, 0.0)]), 8)
SOUND = Sound(np.zeros((1, 4800), np.float32), 48_000)
MOVING = [*of_kind(VIDEO), *of_kind(AUDIO)]
HOUR = 3600.0


def file_of(name: str) -> bytes:
    needs(name)
    return files.encode(CLIP if FORMATS[name].kind == VIDEO else SOUND, MADE, name)


def stores(tmp_path: Path) -> dict[str, Callable[[], Store]]:
    return {
        "folder": lambda: Store(tmp_path / "files", max_age_s=HOUR),
        "url": lambda: ObjectStore(f"memory://{tmp_path.name}", max_age_s=HOUR),
    }


@pytest.mark.parametrize("kind", ["folder", "url"])
@pytest.mark.parametrize("name", MOVING)
def test_the_files_are_enough_to_list_them_again(tmp_path: Path, name: str, kind: str) -> None:
    store = stores(tmp_path)[kind]()
    kept = Gallery(store, f"sqlite:///{tmp_path}/one.db").keep(file_of(name), name, "", MADE, 0.0)
    again = Gallery(store, f"sqlite:///{tmp_path}/two.db")
    assert again.rebuild() == 1
    assert names(again, words="cat") == [kept]
    entry = again.get(kept)
    assert entry and entry.recipe and (entry.model, entry.recipe["seed"]) == ("m", 1)
    again.delete(kept)
    assert names(again) == [] and not store.has(kept)


@pytest.mark.parametrize("name", MOVING)
def test_they_expire_unless_they_have_a_star(tmp_path: Path, name: str) -> None:
    store = stores(tmp_path)["folder"]()
    gallery = Gallery(store, f"sqlite:///{tmp_path}/gallery.db")
    kept, starred = (gallery.keep(file_of(name), name, "", MADE, created) for created in (1.0, 2.0))
    gallery.star(starred, True)
    later = max(store.names().values()) + 2 * HOUR
    assert store.expire(later, spare=gallery.starred()) == 1
    assert names(gallery) == [starred] and not store.has(kept)


@pytest.mark.parametrize("name", of_kind(VIDEO))
def test_a_clip_is_shown_by_its_first_frame(tmp_path: Path, name: str) -> None:
    small = thumbnail(file_of(name), f"x.{name}", 32)
    assert small
    with Image.open(io.BytesIO(small)) as image:
        assert (image.format, image.size, getattr(image, "n_frames", 1)) == ("WEBP", (32, 16), 1)
        assert min(low for low, _ in image.convert("RGB").getextrema()) > 240  # type: ignore[misc]


@pytest.mark.parametrize("name", [*of_kind(AUDIO)])
def test_a_sound_has_no_thumbnail(name: str) -> None:
    assert thumbnail(file_of(name), f"x.{name}", 32) is None


@pytest.mark.parametrize("name", MOVING)
def test_a_damaged_file_is_listed_without_a_recipe(tmp_path: Path, name: str) -> None:
    store = stores(tmp_path)["folder"]()
    kept = store.put(file_of(name)[:20], name)
    gallery = Gallery(store, f"sqlite:///{tmp_path}/gallery.db")
    assert gallery.rebuild() == 1
    entry = gallery.get(kept)
    assert entry and entry.recipe is None
    assert gallery.thumbnail(kept, 32) is None
