"""Poses of people as OpenPose draws them, which ControlNets for poses were trained with: limbs and joints, on black."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

Place = tuple[float, float]

NECK = 1
SHOULDERS = (5, 6)
"""In COCO's order; OpenPose's neck is in their middle."""

COCO = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
"""OpenPose's 18 points -> COCO's 17: nose, neck, right and left arm, right and left leg, eyes, ears."""

LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
"""Pairs of OpenPose's points, in the order of their colours."""

COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255),
    (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip

SHADE = 0.6
"""Of the limbs' colours."""

WIDTH = 4 / 512
"""Half the width of a limb and the radius of a joint, of the shorter side: OpenPose's pixels at its size."""

CORNERS = 48
"""Of the polygon that is drawn for an ellipse."""


def openpose(joints: Mapping[int, Place]) -> dict[int, Place]:
    """OpenPose's points of COCO's, those that are seen."""
    points = {point: joints[of] for point, of in enumerate(COCO) if of is not None and of in joints}
    if all(each in joints for each in SHOULDERS):
        (x, y), (other_x, other_y) = (joints[each] for each in SHOULDERS)
        points[NECK] = (x + other_x) / 2, (y + other_y) / 2
    return points


def drawn(people: Sequence[Mapping[int, Place]], size: tuple[int, int]) -> Image.Image:
    """The skeletons of people (COCO's joints, in pixels) in a picture of this size."""
    image = Image.new("RGB", size, "black")
    draw = ImageDraw.Draw(image)
    width = max(1.0, WIDTH * min(size))
    for points in map(openpose, people):
        for (one, other), colour in zip(LIMBS, COLOURS, strict=False):
            if one in points and other in points:
                shaded = tuple(int(SHADE * level) for level in colour)
                draw.polygon(_ellipse(points[one], points[other], width), fill=shaded)
    for points in map(openpose, people):
        for point, (x, y) in points.items():
            draw.ellipse((x - width, y - width, x + width, y + width), fill=COLOURS[point])
    return image


def _ellipse(one: Place, other: Place, width: float) -> list[Place]:
    """Around a limb: as long as it, and twice `width` wide."""
    (x, y), (other_x, other_y) = one, other
    along, angle = math.dist(one, other) / 2, math.atan2(other_y - y, other_x - x)
    corners = []
    for turn in (2 * math.pi * at / CORNERS for at in range(CORNERS)):
        a, b = along * math.cos(turn), width * math.sin(turn)
        corners.append(
            (
                (x + other_x) / 2 + a * math.cos(angle) - b * math.sin(angle),
                (y + other_y) / 2 + a * math.sin(angle) + b * math.cos(angle),
            )
        )
    return corners
