"""Stage 2: the training set, in shards of pictures and of the latents encoded from them.

A shard shows every seen pair ten times and every bare background a dozen times. Pictures live in
``.runs/pictures`` (uint8) and also feed the decoder's refinement and the judge; latents live in
``.runs/latents`` (float16).

One more shard, GENERAL, shows every kind of emoji; it keeps the decoder's refinement general.

``python -m training.shards pictures 0 13`` makes the pictures of shards 0 to 12,
``python -m training.shards latents 0 13`` their latents.
"""

import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from training.data import Compositor, Pixels, all_labels, fetch, load_sprites, random_pictures
from training.paths import RUNS
from training.vae import SCALING, to_tensor
from training.vocabulary import COLOURS, OBJECTS, seen_pairs

SHARDS = 12
GENERAL = SHARDS
PER_PAIR = 10
PER_BACKGROUND = 12
NOTHING = -1


@dataclass(frozen=True)
class Labels:
    """What each picture of a shard shows: indices into OBJECTS (or NOTHING) and COLOURS, its scale,
    and whether it is mirrored."""

    objects: NDArray[np.int64]
    colours: NDArray[np.int64]
    sizes: NDArray[np.float32]
    mirrored: NDArray[np.bool_]


def _pictures_file(shard: int) -> Path:
    return RUNS / "pictures" / f"{shard:02}.npy"


def _labels_file(shard: int) -> Path:
    return RUNS / "pictures" / f"{shard:02}.npz"


def latents_file(shard: int) -> Path:
    """Where the latents (n, 4, 16, 16) float16 of a shard are."""
    return RUNS / "latents" / f"{shard:02}.npy"


def make_pictures(shard: int) -> None:
    """Draw a shard's pictures; its number is the seed."""
    _pictures_file(shard).parent.mkdir(parents=True, exist_ok=True)
    if shard == GENERAL:
        endless = random_pictures(load_sprites(all_labels()), 1000 + shard)
        _write(_pictures_file(shard), np.stack([p.pixels for p in islice(endless, 5000)]))
        return
    compositor = Compositor(1000 + shard)
    sprites = dict(zip(OBJECTS, load_sprites(list(OBJECTS.values())), strict=True))
    pictures = [
        compositor.picture(sprites[name], name, colour) for name, colour in seen_pairs() for _ in range(PER_PAIR)
    ]
    pictures += [compositor.empty(colour) for colour in COLOURS for _ in range(PER_BACKGROUND)]
    names, colours = list(OBJECTS), list(COLOURS)
    np.savez(
        _labels_file(shard),
        objects=np.array([NOTHING if p.name is None else names.index(p.name) for p in pictures]),
        colours=np.array([colours.index(p.colour) for p in pictures]),
        sizes=np.array([p.size for p in pictures], np.float32),
        mirrored=np.array([p.mirrored for p in pictures]),
    )
    _write(_pictures_file(shard), np.stack([p.pixels for p in pictures]))


def load_pictures(shard: int) -> Pixels:
    """The pictures (n, 128, 128, 3) of a shard, mapped from disk."""
    pixels: Pixels = np.load(_pictures_file(shard), mmap_mode="r")
    return pixels


def load_labels(shard: int) -> Labels:
    """What the pictures of a shard show."""
    with np.load(_labels_file(shard)) as saved:
        return Labels(saved["objects"], saved["colours"], saved["sizes"], saved["mirrored"])


@torch.no_grad()
def make_latents(shard: int, vae: AutoencoderKL) -> None:
    """Encode a shard: latents times ``SCALING``, so of about unit variance."""
    pixels = load_pictures(shard)
    encoded: list[Tensor] = []
    for start in range(0, len(pixels), 32):
        batch = to_tensor(torch.from_numpy(np.array(pixels[start : start + 32])))
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encode(batch).latent_dist
        encoded.append((moments.mean.float() * SCALING).half())
    latents_file(shard).parent.mkdir(parents=True, exist_ok=True)
    _write(latents_file(shard), torch.cat(encoded).contiguous().numpy())


def _write(path: Path, array: NDArray[np.generic]) -> None:
    """Write in one piece: a reader sees the whole file or none."""
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    partial.rename(path)


def make(kind: str, first: int, end: int) -> None:
    """Make the pictures or the latents of shards ``first`` to ``end - 1`` that are not there."""
    vae = AutoencoderKL.from_pretrained(RUNS / "vae") if kind == "latents" else None
    for shard in range(first, end):
        start = time.time()
        if vae is None and not _pictures_file(shard).exists():
            make_pictures(shard)
        elif vae is not None and not latents_file(shard).exists():
            make_latents(shard, vae.to(memory_format=torch.channels_last))
        print(f"{kind} of shard {shard}: {time.time() - start:.0f}s", flush=True)


def main() -> None:
    """Entry point."""
    torch.set_num_threads(1)
    fetch()
    make(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))


if __name__ == "__main__":
    main()
