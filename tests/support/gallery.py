"""A gallery in a folder, and pictures to keep in it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.core import Recipe
from sfumato.pictures import recipe
from sfumato.pictures.gallery import Gallery, GalleryQuery
from sfumato.pictures.store import Store
from sfumato.sampling import NAMED, Sampling

MADE = Recipe(
    model="m", source="some/one", pipeline="StableDiffusionPipeline", prompt="a cat", seed=1,
    sampling=Sampling(width=8, height=8, steps=2, guidance_scale=3.0, scheduler="euler"), image_sha256=(),
    mask_sha256=None, device="cpu", dtype="fp32",
)  # fmt: skip


def png(made: Recipe = MADE) -> bytes:
    return recipe.encode(Image.new("RGB", (8, 8), "orange"), made)


def gallery(folder: Path, callers: tuple[str, ...] = (), **more: Any) -> Gallery:
    return Gallery(Store(folder / "generated-images"), f"sqlite:///{folder / 'gallery.db'}", callers, **more)


def keep(gallery: Gallery, prompt: str = "a cat", caller: str = "", created: float | None = None, **more: Any) -> str:
    sampling = {name: more.pop(name) for name in NAMED.keys() & more.keys()}
    made = replace(MADE, prompt=prompt, sampling=replace(MADE.sampling, **sampling), **more)
    return gallery.keep(png(made), "png", caller, made, time.time() if created is None else created)


def names(gallery: Gallery, **wanted: Any) -> list[str]:
    return [kept.name for kept in gallery.page(GalleryQuery(**wanted))[0]]
