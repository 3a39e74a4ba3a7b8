"""Pictures that a recipe has the fingerprints of: found again beside the picture that it made, or in the store."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from sfumato.core import Control, Recipe
from sfumato.errors import InvalidRequest, SfumatoError
from sfumato.pictures import images
from sfumato.pictures.images import Bounds

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_FILES = 500
"""Of a folder, the newest: each is decoded."""


def passed(text: str) -> Control:
    """A control as the command line has it, `FILE` or `NAME=FILE`. Raises InvalidRequest."""
    name, mark, file = text.partition("=")
    if not mark or Path(text).is_file():
        name, file = "", text
    if not Path(file).is_file():
        raise InvalidRequest(f"--control: there is no file {file!r}; FILE or NAME=FILE is valid", param="--control")
    return Control(Path(file).read_bytes(), name=name or None)


def found(digests: Collection[str], folders: Sequence[Path], bounds: Bounds) -> dict[str, bytes]:
    """Fingerprint → the file with that picture, of those that are there."""
    there: dict[str, bytes] = {}
    for file in _pictures(folders):
        if len(there) == len(set(digests)):
            break
        try:
            data = file.read_bytes()
            png, _ = images.normalise(data, str(file), bounds)
        except (OSError, SfumatoError):  # no picture, or one that no request would take
            continue
        if (digest := images.fingerprint(png)) in digests:
            there.setdefault(digest, data)
    return there


def _pictures(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        files = [file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
        yield from sorted(files, key=lambda file: -file.stat().st_mtime)[:MAX_FILES]


def controls(given: Sequence[Control], recipe: Recipe, folders: Sequence[Path], bounds: Bounds) -> list[Control]:
    """The controls that a recipe was made with, with their pictures: those given, in the recipe's order if they have
    names, else those found in `folders`. Raises InvalidRequest that says which are missing, and how to pass them."""
    made = recipe.controls
    if given and len(given) == len(made):
        pictures: list[str | bytes] = [
            control.image for control in _in_order(given, [control.name for control in made])
        ]
    elif given or not made:
        return list(given)  # their number is refused where those of other sources are
    else:
        there = found({control.image_sha256 for control in made}, folders, bounds)
        missing = [control for control in made if control.image_sha256 not in there]
        if missing:
            looked = " and ".join(str(folder) for folder in folders)
            told = "; ".join(f"{control.name or 'control'}: {control.image_sha256}" for control in missing)
            flags = " ".join(f"--control {f'{control.name}=' if control.name else ''}FILE" for control in made)
            raise InvalidRequest(
                f"--control: the recipe was made from {len(made)} such pictures, but 0 were passed, and in {looked} "
                f"there is none with the fingerprint (SHA-256 of mode, size and pixels) {told}. Pass them: {flags}",
                param="--control",
            )
        pictures = [there[control.image_sha256] for control in made]
    return [
        Control(
            picture,
            each.weight,
            each.start,
            each.end,
            each.mode,
            each.name,
            each.preprocess,
            each.thresholds,
            each.joins,
            tuple(name for name, _ in each.estimators),
        )
        for picture, each in zip(pictures, made, strict=True)
    ]


def _in_order(given: Sequence[Control], names: Sequence[str | None]) -> list[Control]:
    """As they stand if none has a name, else by the recipe's names."""
    if not any(control.name for control in given):
        return list(given)
    if not any(names):
        raise InvalidRequest(
            "--control: the recipe's ControlNets are the model file's own; pass FILE without a name", param="--control"
        )
    left, ordered = list(given), []
    for name in names:
        fitting = next((control for control in left if control.name == name), None)
        if fitting is None:
            raise InvalidRequest(
                f"--control: the recipe has the ControlNets {', '.join(str(each) for each in names)}, so pass each as "
                f"NAME=FILE; there is none for {name}",
                param="--control",
            )
        left.remove(fitting)
        ordered.append(fitting)
    return ordered
