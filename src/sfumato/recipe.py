"""A picture carries its recipe: AUTOMATIC1111's infotext for other tools, our JSON to make it again.

The PNG text chunk `parameters` holds the infotext (the layout that Stable Diffusion web UIs read),
the chunk `sfumato` the whole `Recipe` as JSON.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from sfumato import __version__
from sfumato.core import Recipe
from sfumato.errors import InvalidPicture

INFOTEXT_CHUNK = "parameters"
RECIPE_CHUNK = "sfumato"


def encode(image: Image.Image, recipe: Recipe) -> bytes:
    """The picture as PNG bytes with both chunks."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(INFOTEXT_CHUNK, infotext(recipe))
    chunks.add_text(RECIPE_CHUNK, json.dumps(asdict(recipe), ensure_ascii=False))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def infotext(recipe: Recipe) -> str:
    """One block of text as AUTOMATIC1111 writes it: prompt, negative prompt, then `Key: value` pairs."""
    pairs: dict[str, Any] = {
        "Steps": recipe.steps,
        "Sampler": recipe.scheduler,
        "CFG scale": recipe.guidance_scale,
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model": recipe.model,
        "Denoising strength": recipe.strength,
        "Clip skip": recipe.clip_skip,
        "Version": f"sfumato {__version__}",
    }
    lines = [recipe.prompt]
    if recipe.negative_prompt:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items() if value is not None))
    return "\n".join(lines)


def read(path: Path) -> Recipe:
    """The recipe inside a picture of ours. Raises InvalidPicture when there is none that we can read."""
    try:
        with Image.open(path) as image:
            text = image.info.get(RECIPE_CHUNK)
    except OSError as error:
        raise InvalidPicture(f"{path}: not a picture that can be read ({error})") from None
    if text is None:
        raise InvalidPicture(
            f"{path}: carries no recipe. Only PNG files that Sfumato made do; editors and chat programs often strip it."
        )
    known = {spec.name for spec in fields(Recipe)}
    try:
        values = json.loads(text)
        return Recipe(**{key: _frozen(value) for key, value in values.items() if key in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidPicture(f"{path}: its recipe cannot be read ({error})") from None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
