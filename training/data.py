"""Pictures: Fluent Emoji sprites composited on coloured backgrounds, with real variety.

A picture varies in place, scale, rotation, mirror image, light, shadow, and in the shade and the
gradient of its background, so that one caption describes many pictures.
"""

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from training.paths import DATA
from training.vocabulary import COLOURS, OBJECTS

SIZE = 128
SPRITE = 112
PACKAGES = ("@lobehub/fluent-emoji-3d", "emojibase-data")

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """One training picture: ``pixels`` (128, 128, 3) uint8, and what it shows."""

    pixels: Pixels
    name: str | None
    colour: str
    size: float
    mirrored: bool


def fetch() -> None:
    """Install the two npm packages into ``training/.data`` unless they are there."""
    if not all((DATA / "node_modules" / package).exists() for package in PACKAGES):
        DATA.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--prefix", str(DATA), *PACKAGES], check=True)


def load_sprites(labels: Sequence[str]) -> list[Floats]:
    """Sprites (112, 112, 4), premultiplied RGBA in 0..1, cropped and centred, one per label."""
    modules = DATA / "node_modules"
    listing = json.loads((modules / "emojibase-data" / "en" / "data.json").read_text())
    codes = {entry["label"]: entry["hexcode"].lower() for entry in listing}
    assets = modules / "@lobehub" / "fluent-emoji-3d" / "assets"
    return [_load_sprite(assets, codes[label]) for label in labels]


def _load_sprite(assets: Path, code: str) -> Floats:
    path = assets / f"{code}.webp"
    if not path.exists():
        path = assets / f"{code}-fe0f.webp"
    image = Image.open(path).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    ratio = SPRITE / max(image.size)
    image = image.resize(
        (max(1, round(image.width * ratio)), max(1, round(image.height * ratio))),
        Image.Resampling.LANCZOS,
    )
    square = Image.new("RGBA", (SPRITE, SPRITE))
    square.paste(image, ((SPRITE - image.width) // 2, (SPRITE - image.height) // 2))
    rgba: Floats = np.array(square, np.float32) / np.float32(255)
    rgba[..., :3] *= rgba[..., 3:]
    return rgba


def all_labels() -> list[str]:
    """Labels of every emoji the autoencoder learns from: the objects first, then the rest
    of the faces, animals, foods, places, activities and things that have a picture."""
    modules = DATA / "node_modules"
    listing = json.loads((modules / "emojibase-data" / "en" / "data.json").read_text())
    assets = modules / "@lobehub" / "fluent-emoji-3d" / "assets"
    rest = [
        entry["label"]
        for entry in listing
        if entry.get("group") in (0, 3, 4, 5, 6, 7)
        and entry["label"] not in OBJECTS.values()
        and any((assets / f"{entry['hexcode'].lower()}{end}.webp").exists() for end in ("", "-fe0f"))
    ]
    return [*OBJECTS.values(), *rest]


class Compositor:
    """Draws random pictures; equal seeds draw equal pictures."""

    def __init__(self, seed: int) -> None:
        self.chance = np.random.default_rng(seed)
        y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / (SIZE - 1) * 2 - 1
        self._x, self._y = x, y

    def background(self, colour: str) -> Floats:
        """A background (128, 128, 3) in 0..1: a shade of ``colour`` with a soft gradient."""
        uniform = self.chance.uniform
        base = np.array(COLOURS[colour], np.float32) / 255
        base = base * uniform(0.9, 1.06) + uniform(-0.02, 0.02, 3)
        angle = uniform(0, 2 * np.pi)
        slope = np.cos(angle) * self._x + np.sin(angle) * self._y
        if self.chance.random() < 0.4:  # a vignette around a random centre
            cx, cy = uniform(-0.5, 0.5, 2)
            slope = 0.7 - np.hypot(self._x - cx, self._y - cy)
        light = 1 + uniform(0, 0.13) * slope
        lift = uniform(0, 0.03) * slope if colour == "black" else 0 * slope
        shaded = base * light[..., None] + lift[..., None]
        clipped: Floats = np.clip(shaded, 0, 1).astype(np.float32)
        return clipped

    def picture(self, sprite: Floats, name: str | None, colour: str) -> Picture:
        """A sprite somewhere on a background; ``name`` is what the caption will call it."""
        uniform = self.chance.uniform
        size = float(uniform(0.7, 1.05))
        angle = np.deg2rad(np.clip(self.chance.normal(0, 6), -12, 12))
        room = max(4.0, (SIZE - SPRITE * size) * 0.4)
        dx, dy = uniform(-room, room, 2)
        mirror = -1.0 if self.chance.random() < 0.5 else 1.0
        layer = _place(sprite, size, float(angle), float(dx), float(dy), mirror)
        light = uniform(0.9, 1.08)
        canvas: NDArray[np.floating] = self.background(colour)
        shadow = Image.fromarray((layer[..., 3] * 255).astype(np.uint8)).resize((32, 32))
        shadow = shadow.filter(ImageFilter.GaussianBlur(1.5)).resize((SIZE, SIZE), 2)
        sx, sy = int(uniform(-7, 8)), int(uniform(3, 10))
        dark = np.roll(np.asarray(shadow, np.float32) / 255, (sy, sx), (0, 1))
        dark[:sy] = 0
        canvas = canvas * (1 - uniform(0.1, 0.35) * dark[..., None])
        canvas = canvas * (1 - layer[..., 3:]) + layer[..., :3] * light
        pixels = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
        return Picture(pixels, name, colour, size, mirror < 0)

    def empty(self, colour: str) -> Picture:
        """A picture of nothing but a background."""
        pixels = (self.background(colour) * 255 + 0.5).astype(np.uint8)
        return Picture(pixels, None, colour, 0.0, False)


def _place(sprite: Floats, size: float, angle: float, dx: float, dy: float, mirror: float) -> Floats:
    """The sprite scaled, rotated, mirrored and shifted onto a transparent (128, 128, 4) layer."""
    cos, sin = np.cos(angle) / size, np.sin(angle) / size
    centre, middle = SIZE / 2, SPRITE / 2
    matrix = np.array([[mirror * cos, mirror * sin], [-sin, cos]])
    offset = np.array([middle, middle]) - matrix @ np.array([centre + dx, centre + dy])
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    channels = [
        np.asarray(
            Image.fromarray(sprite[..., i]).transform(
                (SIZE, SIZE),
                Image.Transform.AFFINE,
                coefficients,
                Image.Resampling.BICUBIC,
            )
        )
        for i in range(4)
    ]
    layer: Floats = np.clip(np.stack(channels, -1), 0, 1)
    return layer


def random_pictures(sprites: Sequence[Floats], seed: int) -> Iterator[Picture]:
    """Endless pictures of random sprites on random backgrounds, for the autoencoder."""
    compositor = Compositor(seed)
    colours = list(COLOURS)
    while True:
        sprite = sprites[int(compositor.chance.integers(len(sprites)))]
        yield compositor.picture(sprite, None, colours[int(compositor.chance.integers(len(colours)))])
