"""What the model can draw: objects, background colours, the pairs held out, and the captions.

Everything here is pure text; :mod:`training.data` turns it into pictures.
"""

import random

OBJECTS: dict[str, str] = {
    # our word: label in emojibase-data
    "apple": "red apple",
    "lemon": "lemon",
    "banana": "banana",
    "strawberry": "strawberry",
    "watermelon": "watermelon",
    "grapes": "grapes",
    "carrot": "carrot",
    "avocado": "avocado",
    "hamburger": "hamburger",
    "pizza": "pizza",
    "doughnut": "doughnut",
    "cupcake": "cupcake",
    "mushroom": "mushroom",
    "cactus": "cactus",
    "sunflower": "sunflower",
    "tulip": "tulip",
    "cat": "cat face",
    "dog": "dog face",
    "fox": "fox",
    "panda": "panda",
    "frog": "frog",
    "rabbit": "rabbit face",
    "pig": "pig face",
    "owl": "owl",
    "penguin": "penguin",
    "octopus": "octopus",
    "fish": "tropical fish",
    "whale": "whale",
    "turtle": "turtle",
    "butterfly": "butterfly",
    "snail": "snail",
    "unicorn": "unicorn",
    "elephant": "elephant",
    "ghost": "ghost",
    "robot": "robot",
    "snowman": "snowman without snow",
    "teddy bear": "teddy bear",
    "rocket": "rocket",
    "car": "automobile",
    "sailboat": "sailboat",
    "house": "house",
    "castle": "castle",
    "balloon": "balloon",
    "gift": "wrapped gift",
    "guitar": "guitar",
    "alarm clock": "alarm clock",
    "star": "star",
    "red heart": "red heart",
    "green heart": "green heart",
    "blue heart": "blue heart",
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 44),
    "orange": (244, 132, 28),
    "yellow": (250, 214, 48),
    "green": (52, 160, 72),
    "blue": (44, 104, 214),
    "purple": (124, 60, 178),
    "pink": (248, 150, 190),
    "white": (244, 244, 242),
    "gray": (134, 136, 140),
    "black": (24, 24, 28),
}

Pair = tuple[str, str]

_PLACED = (
    "a {o} on a {c} background",
    "a {o} on a {c} background",
    "{o}, {c} background",
    "{o} on {c}",
    "a {o} on {c}",
    "{c} background, {o}",
    "a {o} in front of a {c} wall",
    "a {o} with a {c} background",
    "a picture of a {o} on a {c} background",
    "a 3d icon of a {o} on a {c} background",
    "a cute {o} on a {c} background",
    "the {o} on the {c} background",
)
_COLOURLESS = ("a {o}", "{o}", "a picture of a {o}", "a 3d icon of a {o}", "a cute {o}", "the {o}")
_EMPTY = ("a {c} background", "{c} background", "{c}", "an empty {c} background")


def held_out_pairs() -> frozenset[Pair]:
    """One colour per object (a tenth of all pairs, five per colour) that training never shows."""
    colours = list(COLOURS)
    return frozenset(
        (name, colours[(3 * index + index // len(colours)) % len(colours)]) for index, name in enumerate(OBJECTS)
    )


def seen_pairs() -> list[Pair]:
    """Every pair that training shows, in a fixed order."""
    held_out = held_out_pairs()
    return [(o, c) for o in OBJECTS for c in COLOURS if (o, c) not in held_out]


def _with_article(text: str) -> str:
    """Turn "a apple" into "an apple" (and "a grapes" into "grapes")."""
    words = text.replace("a grapes", "grapes").split(" ")
    for i in range(len(words) - 1):
        if words[i] == "a" and words[i + 1][0] in "aeio":
            words[i] = "an"
    return " ".join(words)


def prompt(name: str, colour: str | None) -> str:
    """The plain caption of a pair, e.g. ``an apple on a blue background``; ``None`` names no colour."""
    template = _COLOURLESS[0] if colour is None else _PLACED[0]
    return _with_article(template.format(o=name, c=colour))


def caption(name: str | None, colour: str, size: float, chance: random.Random) -> str:
    """A random caption of a picture; ``name`` is None when it shows only its background.

    ``size`` is the drawn scale: large and small ones are sometimes called "big" and "small".
    One caption in eight names no colour.
    """
    if name is None:
        return _with_article(chance.choice(_EMPTY).format(c=colour))
    said = name
    if size > 0.97 and chance.random() < 0.25:
        said = f"big {name}"
    elif size < 0.78 and chance.random() < 0.25:
        said = f"small {name}"
    templates = _COLOURLESS if chance.random() < 0.125 else _PLACED
    return _with_article(chance.choice(templates).format(o=said, c=colour))
