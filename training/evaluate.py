"""Score the shipped model: ``python -m training.evaluate`` prints a table, writes ``results.json``.

Needs no data: the judge's weights ship beside this file. Name sections to measure only those anew,
e.g. ``python -m training.evaluate seen held-out``.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from training.judge import Judge
from training.painter import Painter
from training.paths import RESULTS
from training.vocabulary import Pair, held_out_pairs, prompt, seen_pairs

SAMPLERS = (
    "ddim", "pndm", "heun", "unipc", "euler", "euler_a", "lms", "k_lms", "dpm_2", "k_dpm_2", "dpm_2_a", "k_dpm_2_a",
    "dpmpp_2m", "k_dpmpp_2m", "dpmpp_sde", "k_dpmpp_sde", "dpmpp_2m_sde", "k_dpmpp_2m_sde", "dpmpp_2s",
)  # fmt: skip


@dataclass(frozen=True)
class Score:
    """One measured number; ``target`` is the least that we want."""

    section: str
    what: str
    value: float
    target: float

    @property
    def reached(self) -> bool:
        return self.value >= self.target


@dataclass(frozen=True)
class Bench:
    """What every section needs."""

    painter: Painter
    judge: Judge

    def accuracy(self, images: Sequence[Image.Image], pairs: Sequence[Pair]) -> tuple[float, float, float]:
        """Shares of images with the right object, with the right background, and with both."""
        objects = np.array([o for o, _ in pairs]) == np.array(self.judge.objects(images))
        colours = np.array([c for _, c in pairs]) == np.array(self.judge.backgrounds(images))
        return float(objects.mean()), float(colours.mean()), float((objects & colours).mean())


Section = Callable[[Bench], list[Score]]


def some_seen(count: int, seed: int) -> list[Pair]:
    """A random choice of seen pairs."""
    return random.Random(seed).sample(seen_pairs(), count)


def floats(image: Image.Image) -> NDArray[np.float32]:
    """Pixels (128, 128, 3) in 0..1."""
    return np.asarray(image.convert("RGB"), np.float32) / np.float32(255)


def distance(one: Image.Image, other: Image.Image) -> float:
    """Root mean square difference of two images, in 0..1."""
    return float(np.sqrt(np.square(floats(one) - floats(other)).mean()))


def seen(bench: Bench) -> list[Score]:
    """Pairs that training showed."""
    pairs = some_seen(100, 1)
    images = bench.painter.paint([prompt(*pair) for pair in pairs], range(100))
    objects, colours, both = bench.accuracy(images, pairs)
    return [
        Score("seen", "object right, 100 prompts", objects, 0.90),
        Score("seen", "background right, 100 prompts", colours, 0.95),
        Score("seen", "both right, 100 prompts", both, 0.90),
    ]


def unseen(bench: Bench) -> list[Score]:
    """Pairs that training never showed."""
    pairs = sorted(held_out_pairs())
    images = bench.painter.paint([prompt(*pair) for pair in pairs], range(200, 200 + len(pairs)))
    objects, colours, both = bench.accuracy(images, pairs)
    return [
        Score("held-out", f"object right, {len(pairs)} prompts", objects, 0.70),
        Score("held-out", f"background right, {len(pairs)} prompts", colours, 0.70),
        Score("held-out", f"both right, {len(pairs)} prompts", both, 0.70),
    ]


def samplers(bench: Bench) -> list[Score]:
    """Every sampler at the default guidance, and one at a high guidance."""
    pairs = some_seen(40, 2)
    prompts = [prompt(*pair) for pair in pairs]
    scores = []
    for name, guidance in [*((name, 3.0) for name in SAMPLERS), ("k_dpmpp_sde", 8.0)]:
        images = bench.painter.paint(prompts, range(300, 340), sampler=name, guidance_scale=guidance)
        objects, colours, _ = bench.accuracy(images, pairs)
        label = f"{name}, guidance {guidance:g}"
        scores.append(Score("samplers", f"{label}: object right", objects, 0.85))
        scores.append(Score("samplers", f"{label}: background right", colours, 0.85))
        print(f"{label}: object {objects:.3f}, background {colours:.3f}", file=sys.stderr, flush=True)
    return scores


def seeds(bench: Bench) -> list[Score]:
    """Eight seeds of one prompt differ, and still show the object."""
    spreads, right = [], []
    for pair in some_seen(6, 3):
        images = bench.painter.paint([prompt(*pair)] * 8, range(400, 408))
        spreads.append(np.stack([floats(image) for image in images]).std(0).mean())
        right.append(bench.accuracy(images, [pair] * 8)[0])
    return [
        Score("seeds", "mean spread of pixels over 8 seeds, 6 prompts", float(np.mean(spreads)), 0.03),
        Score("seeds", "smallest spread of a prompt", float(np.min(spreads)), 0.03),
        Score("seeds", "object right", float(np.mean(right)), 0.90),
    ]


def image_to_image(bench: Bench) -> list[Score]:
    """Low strength keeps the source, high strength follows the prompt."""
    wanted, others = some_seen(20, 4), some_seen(20, 5)
    prompts = [prompt(*pair) for pair in wanted]
    plain = bench.painter.paint(prompts, range(500, 520))
    scores = []
    for label, pairs in (("another caption's", others), ("the same caption's", wanted)):
        sources = bench.painter.paint([prompt(*pair) for pair in pairs], range(600, 620))
        made = bench.painter.paint(prompts, range(500, 520), image=sources, strength=0.3)
        nearer = [distance(m, source) < distance(m, free) for m, source, free in zip(made, sources, plain, strict=True)]
        what = f"strength 0.3: nearer to {label} picture than to text-to-image"
        scores.append(Score("image", what, float(np.mean(nearer)), 0.95))
        if pairs is others:
            made = bench.painter.paint(prompts, range(500, 520), image=sources, strength=0.8)
            objects, colours, _ = bench.accuracy(made, wanted)
            scores.append(Score("image", "strength 0.8: object of the prompt", objects, 0.85))
            scores.append(Score("image", "strength 0.8: background of the prompt", colours, 0.85))
    return scores


def inpaint(bench: Bench) -> list[Score]:
    """A masked object is replaced by another one, on the background that is there."""
    pairs = [(o, c) for (o, _), (_, c) in zip(some_seen(20, 6), some_seen(20, 7), strict=True)]
    sources = bench.painter.paint([prompt(*pair) for pair in some_seen(20, 7)], range(700, 720))
    mask = Image.new("L", (128, 128))
    mask.paste(255, (10, 10, 118, 118))
    images = bench.painter.paint(
        [prompt(*pair) for pair in pairs], range(720, 740),
        image=sources, mask_image=[mask] * 20, strength=1.0, height=128, width=128,
    )  # fmt: skip
    objects, colours, _ = bench.accuracy(images, pairs)
    return [
        Score("inpaint", "object of the prompt inside the mask", objects, 0.70),
        Score("inpaint", "background kept", colours, 0.90),
    ]


def negative(bench: Bench) -> list[Score]:
    """Naming the drawn background in the negative prompt draws another one."""
    names = [name for name, _ in some_seen(30, 8)]
    prompts = [prompt(name, None) for name in names]
    plain = bench.painter.paint(prompts, range(800, 830))
    drawn = bench.judge.backgrounds(plain)
    against = [f"{colour} background" for colour in drawn]
    images = bench.painter.paint(prompts, range(800, 830), negative_prompt=against)
    moved = np.array(drawn) != np.array(bench.judge.backgrounds(images))
    right = np.array(names) == np.array(bench.judge.objects(images))
    return [
        Score("negative", "background moves away from the named colour", float(moved.mean()), 0.80),
        Score("negative", "object still right", float(right.mean()), 0.85),
        Score("negative", "colours drawn when none is named", float(len(set(drawn))), 3),
    ]


SECTIONS: dict[str, Section] = {
    "seen": seen,
    "held-out": unseen,
    "samplers": samplers,
    "seeds": seeds,
    "image": image_to_image,
    "inpaint": inpaint,
    "negative": negative,
}


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table."""
    lines = ["| section | what | score | wanted | |", "|---|---|---:|---:|---|"]
    for score in scores:
        mark = "yes" if score.reached else "**no**"
        lines.append(f"| {score.section} | {score.what} | {score.value:.3f} | {score.target:g} | {mark} |")
    return "\n".join(lines)


def merge(fresh: Sequence[Score], measured: Sequence[str]) -> list[Score]:
    """Fresh scores, and those that ``results.json`` has of other sections, in the order of sections."""
    saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = [Score(**entry) for entry in saved if entry["section"] not in measured]
    return sorted([*kept, *fresh], key=lambda score: list(SECTIONS).index(score.section))


def main() -> None:
    """Entry point."""
    chosen = sys.argv[1:] or list(SECTIONS)
    start = time.time()
    bench = Bench(Painter.load(), Judge.load())
    scores: list[Score] = []
    with torch.inference_mode():
        for name in chosen:
            scores += SECTIONS[name](bench)
            print(f"{name}: {time.time() - start:.0f}s", file=sys.stderr, flush=True)
    scores = merge(scores, chosen)
    print(table(scores))
    RESULTS.write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n")


if __name__ == "__main__":
    main()
