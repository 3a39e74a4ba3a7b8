"""The judge: reads from a picture which object it shows and which colour its background has.

The weights ship as ``training/judge.safetensors``, so that evaluation and tests need no data.

    judge = Judge.load()
    judge.object(image), judge.background(image)        # "fox", "blue"

``python -m training.judge`` trains it on the cached pictures and scores it on held-out pairs.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.paths import JUDGE
from training.vocabulary import COLOURS, OBJECTS

NOTHING = "nothing"
CLASSES = (*OBJECTS, NOTHING)
SIDE = 64
STEPS, BATCH, PEAK = 1600, 48, 3e-3
RING = 7

Pixels = NDArray[np.uint8]


class ObjectClassifier(nn.Sequential):
    """Pictures (n, 3, 64, 64) in -1..1 to scores (n, objects + 1); the last class is "nothing"."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        widths = (3, 24, 48, 96, 160)
        for i in range(len(widths) - 1):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 3, padding=1),
                nn.GroupNorm(8, widths[i + 1]),
                nn.SiLU(),
                nn.Conv2d(widths[i + 1], widths[i + 1], 3, padding=1, groups=8),
                nn.SiLU(),
                nn.MaxPool2d(2),
            ]
        layers += [nn.Conv2d(160, 192, 3), nn.SiLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(192, len(CLASSES)))


class Judge:
    """Object classifier and background reader for PIL images of any size."""

    def __init__(self, classifier: ObjectClassifier) -> None:
        self._classifier = classifier.eval()

    @classmethod
    def load(cls, path: Path = JUDGE) -> "Judge":
        """The shipped judge."""
        classifier = ObjectClassifier()
        weights = {name: value.float() for name, value in load_file(path).items()}
        classifier.load_state_dict(weights)
        return cls(classifier)

    @torch.no_grad()
    def objects(self, images: Sequence[Image.Image]) -> list[str]:
        """The object in each image, or "nothing" for a bare background or an unclear mixture."""
        scores = self._classifier(torch.cat([_prepare(image) for image in images]))
        return [CLASSES[int(best)] for best in scores.argmax(1)]

    def object(self, image: Image.Image) -> str:
        """The object in one image."""
        return self.objects([image])[0]

    def background(self, image: Image.Image) -> str:
        """The colour of most of the image's border."""
        pixels = np.asarray(image.convert("RGB").resize((128, 128)), np.uint8)
        return read_background(pixels)

    def backgrounds(self, images: Sequence[Image.Image]) -> list[str]:
        """The background colour of each image."""
        return [self.background(image) for image in images]


def read_background(pixels: Pixels) -> str:
    """The colour name that most border pixels of ``pixels`` (128, 128, 3) are nearest to.

    Hue counts more than lightness, for backgrounds are shaded.
    """
    inside = np.zeros(pixels.shape[:2], bool)
    inside[RING:-RING, RING:-RING] = True
    border = _opponent(pixels[~inside].astype(np.float32))
    known = _opponent(np.array(list(COLOURS.values()), np.float32))
    distances = np.square(border[:, None] - known[None]).sum(-1)
    votes = np.bincount(distances.argmin(1), minlength=len(known))
    return list(COLOURS)[int(votes.argmax())]


def _opponent(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lightness at half weight, red against green, yellow against blue."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    axes = ((red + green + blue) / 6, red - green, (red + green) / 2 - blue)
    return np.stack(axes, -1)


def _prepare(image: Image.Image) -> Tensor:
    """An image as (1, 3, 64, 64) in -1..1."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 127.5 - 1


def _spoil(batch: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Blur and noise for robustness; a tenth become mixtures of two pictures, hence "nothing"."""
    if torch.rand(()) < 0.5:
        side = int(torch.randint(28, 56, ()))
        small = F.interpolate(batch, size=side, mode="area")
        batch = F.interpolate(small, size=SIDE, mode="bilinear", align_corners=False)
    batch = (batch + 0.06 * torch.randn_like(batch) * torch.rand(())).clone()
    labels = labels.clone()
    mixed = max(1, len(batch) // 10)
    other = batch.roll(mixed, 0)[:mixed]
    different = labels[:mixed] != labels.roll(mixed, 0)[:mixed]
    if torch.rand(()) < 0.5:
        blend = 0.5 * batch[:mixed] + 0.5 * other
    else:
        blend = torch.cat([batch[:mixed, :, :, : SIDE // 2], other[:, :, :, SIDE // 2 :]], 3)
    batch[:mixed] = torch.where(different[:, None, None, None], blend, batch[:mixed])
    labels[:mixed] = torch.where(different, len(CLASSES) - 1, labels[:mixed])
    return batch, labels


def train(shards: int = 4, seed: int = 5) -> None:
    """Train on the first shards and save half-precision weights."""
    from training.optimiser import Optimisers, learning_rate
    from training.shards import load_labels, load_pictures

    torch.manual_seed(seed)
    smaller, which = [], []
    for shard in range(shards):
        pixels = torch.from_numpy(np.array(load_pictures(shard)))
        for part in torch.chunk(pixels, 16):
            smaller.append(F.avg_pool2d(part.permute(0, 3, 1, 2).float() / 127.5 - 1, 2).half())
        which.append(torch.from_numpy(load_labels(shard).objects))
    pictures, labels = torch.cat(smaller), torch.cat(which)
    labels = torch.where(labels < 0, len(CLASSES) - 1, labels)
    classifier = ObjectClassifier()
    optimisers = Optimisers(classifier, muon=2.0)
    start = time.time()
    for step in range(STEPS):
        chosen = torch.randint(len(pictures), (BATCH,))
        batch, wanted = _spoil(pictures[chosen].float(), labels[chosen])
        loss = F.cross_entropy(classifier(batch), wanted, label_smoothing=0.05)
        torch.autograd.backward(loss)
        optimisers.step(learning_rate(step, STEPS, PEAK))
        if step % 100 == 0:
            print(f"judge {step}/{STEPS} loss {loss:.3f} {time.time() - start:.0f}s", flush=True)
    save_file({name: value.half() for name, value in classifier.state_dict().items()}, JUDGE)


def check(pictures: int = 500) -> tuple[float, float]:
    """Share of objects and of backgrounds read right on fresh pictures of held-out pairs."""
    from training.data import Compositor, load_sprites
    from training.vocabulary import held_out_pairs

    compositor, judge = Compositor(99), Judge.load()
    pairs = sorted(held_out_pairs())
    sprites = dict(zip(OBJECTS, load_sprites(list(OBJECTS.values())), strict=True))
    drawn = [compositor.picture(sprites[o], o, c) for o, c in (pairs * 20)[:pictures]]
    images = [Image.fromarray(picture.pixels) for picture in drawn]
    objects, backgrounds = judge.objects(images), judge.backgrounds(images)
    right = sum(picture.name == read for picture, read in zip(drawn, objects, strict=True))
    clear = sum(picture.colour == read for picture, read in zip(drawn, backgrounds, strict=True))
    return right / pictures, clear / pictures


def main() -> None:
    """Entry point."""
    torch.set_num_threads(1)
    train()
    objects, backgrounds = check()
    print(f"judge on held-out pairs: objects {objects:.3f}, backgrounds {backgrounds:.3f}")


if __name__ == "__main__":
    main()
