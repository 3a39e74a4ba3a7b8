"""The picture in training/README.md: ``python -m training.grid`` paints six by four samples."""

import torch
from PIL import Image

from training.painter import Painter
from training.paths import GRID

PROMPTS: tuple[tuple[str, int], ...] = (
    ("a fox on a blue background", 1),
    ("a cupcake on a white background", 2),
    ("a rocket on a black background", 3),
    ("a cactus on a pink background", 4),
    ("a whale on a yellow background", 5),
    ("a castle on a purple background", 6),
    ("a panda on a red background", 7),
    ("a sunflower on a gray background", 8),
    ("a hamburger on a green background", 9),
    ("an octopus on a white background", 10),
    ("a guitar on an orange background", 11),
    ("a unicorn on a black background", 12),
    ("a strawberry on a yellow background", 13),
    ("a robot on an orange background", 14),
    ("a turtle on a purple background", 15),
    ("a balloon on a blue background", 16),
    ("a penguin on a pink background", 17),
    ("a doughnut on a green background", 18),
    ("a sailboat on a white background", 19),
    ("a butterfly on a yellow background", 20),
    ("a blue heart on a black background", 21),
    ("a frog on a red background", 22),
    ("an avocado on a gray background", 23),
    ("a ghost on a purple background", 24),
)
COLUMNS, SIDE, GAP = 6, 128, 4


def paint_grid(painter: Painter) -> Image.Image:
    """All prompts, row by row, with thin gaps."""
    images = painter.paint([text for text, _ in PROMPTS], [seed for _, seed in PROMPTS])
    rows, step = len(images) // COLUMNS, SIDE + GAP
    grid = Image.new("RGB", (COLUMNS * step - GAP, rows * step - GAP), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % COLUMNS * step, index // COLUMNS * step))
    return grid


def main() -> None:
    """Entry point."""
    with torch.inference_mode():
        grid = paint_grid(Painter.load())
    GRID.parent.mkdir(parents=True, exist_ok=True)
    grid.save(GRID, optimize=True)


if __name__ == "__main__":
    main()
