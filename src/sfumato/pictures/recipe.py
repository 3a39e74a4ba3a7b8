"""The recipe embedded in a picture: AUTOMATIC1111's infotext for other tools, our JSON to reproduce it.

The PNG text chunk `parameters` holds the infotext (the layout that Stable Diffusion web UIs read),
the chunk `sfumato` the whole `Recipe` as JSON; in WebP and JPEG files both are in the EXIF block. A GIF has the JSON in
its comment, and so has a WAV file; MP4, WebM, FLAC, MP3 and Opus have it in the tag of that name.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, PngImagePlugin

from sfumato import __version__, schedulers
from sfumato.core import Recipe, RecordedControl
from sfumato.errors import InvalidPicture, InvalidRequest
from sfumato.loras import Lora
from sfumato.pictures import containers, images, riff
from sfumato.sampling import PARAMETERS, Hires, Sampling, clip_layer, flat, nested

INFOTEXT_CHUNK = "parameters"
RECIPE_CHUNK = "sfumato"

COMMENT = "comment"
"""The tag of GIF and of containers that holds the recipe as JSON."""

NEGATIVE = "Negative prompt:"

_PAIR = re.compile(r'(?:^|,)\s*(\w[^:,"]*):\s*("(?:[^"\\]|\\.)*"|[^,]*)')
"""`Key: value` or `Key: "value, quoted as in JSON"`."""
MAX_PAIRS = 20_000
"""Maximum characters of the line of pairs; parsing a longer one could take minutes."""

_SIZE = re.compile(r"(\d+)x(\d+)")
_UNICODE = b"UNICODE\0"
"""EXIF's prefix for a text in UTF-16."""

RARE = frozenset(
    {
        "drawn_size",
        "weights",
        "embeddings",
        "mask_from_alpha",
        "controls",
        "loras",
        "without_loras",
        "loras_off",
        "runner",
        "hires",
        "video_sha256",
        "audio_sha256",
    }
)
"""Fields of a recipe that its JSON has only if they are set."""

MAX_SIDES: Mapping[str, int] = {"webp": 16383, "jpeg": 65500}

MAX_EXIF = 65_000
"""In bytes; the limit of a JPEG segment."""


def encode(image: Image.Image, recipe: Recipe) -> bytes:
    """The picture as PNG bytes with both chunks."""
    chunks = PngImagePlugin.PngInfo()
    for name, text in chunks_of(recipe).items():
        chunks.add_text(name, text)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def chunks_of(recipe: Recipe) -> dict[str, str]:
    """The texts that a file has of a recipe, by the names of PNG's chunks."""
    return {INFOTEXT_CHUNK: infotext(recipe), RECIPE_CHUNK: json_of(recipe)}


def exif(recipe: Recipe) -> bytes:
    """The EXIF block of a WebP or JPEG file with this recipe; empty if it does not fit."""
    return _exif(chunks_of(recipe))


def convert(
    png: bytes,
    format: str = "png",
    compression: int = 100,
    *,
    opaque: bool = False,
    size: tuple[int, int] | None = None,
) -> bytes:
    """Convert a picture of ours to png, webp or jpeg (`compression` 0 .. 100 is their quality), keeping its recipe.

    `opaque`: put an alpha channel on white, as always for JPEG. `size`: scale to it, for previews. A PNG that needs no
    change is returned unchanged.
    """
    image: Image.Image = Image.open(io.BytesIO(png), formats=("PNG",))
    flat = "A" in image.getbands() and (opaque or format == "jpeg")
    scaled = size is not None and image.size != size
    if format == "png" and not flat and not scaled:
        return png
    image.load()
    texts = {key: str(value) for key, value in image.info.items() if key in (INFOTEXT_CHUNK, RECIPE_CHUNK)}
    if flat:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    if size and scaled:
        image = image.resize(size, Image.Resampling.BICUBIC)
    options: dict[str, Any] = {"quality": compression, "exif": _exif(texts)}
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        for key, text in texts.items():
            chunks.add_text(key, text)
        options = {"pnginfo": chunks}
    file = io.BytesIO()
    if max(image.size) > MAX_SIDES.get(format, max(image.size)):
        raise InvalidRequest(
            f"output_format: a {format} file has at most {MAX_SIDES[format]} pixels per side, the picture is "
            f"{image.width}x{image.height}; request png",
            param="output_format",
        )
    image.save(file, format.upper(), **options)
    return file.getvalue()


def _exif(texts: Mapping[str, str]) -> bytes:
    """The infotext where AUTOMATIC1111 puts it (UserComment), the recipe in ImageDescription, if they fit."""
    exif = Image.Exif()
    if INFOTEXT_CHUNK in texts:
        comment = _UNICODE + texts[INFOTEXT_CHUNK].encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    if RECIPE_CHUNK in texts:
        exif[ExifTags.Base.ImageDescription] = json.dumps(json.loads(texts[RECIPE_CHUNK]))  # ASCII, as EXIF requires
    data = exif.tobytes()
    return data if len(data) <= MAX_EXIF else b""


def as_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as an object of JSON, all of its fields side by side."""
    values = {key: value for key, value in asdict(recipe).items() if key != "sampling"}
    return {key: value for key, value in values.items() if value or key not in RARE} | flat(recipe.sampling)


def json_of(recipe: Recipe) -> str:
    """As text."""
    return json.dumps(as_json(recipe), ensure_ascii=False)


def infotext(recipe: Recipe) -> str:
    """One block of text as AUTOMATIC1111 writes it: prompt, negative prompt, then `Key: value` pairs."""
    sampling = recipe.sampling
    sampler, schedule_type = schedulers.sampler_of(sampling.scheduler or "") or (sampling.scheduler, None)
    width, height = (recipe.hires and recipe.hires.first) or recipe.size
    composite_pairs: dict[str, dict[str, Any]] = {
        "scheduler": {"Sampler": sampler, "Schedule type": schedule_type},
        "width": {"Seed": recipe.seed, "Size": f"{width}x{height}", "Model": recipe.model},
    }
    pairs: dict[str, Any] = {}
    for parameter in PARAMETERS:
        value = sampling[parameter]
        if parameter.one_based:
            layer = clip_layer(value, recipe.pipeline)
            value = layer if value is not None and layer > 1 else None
        pairs |= {parameter.infotext: value} if parameter.infotext else composite_pairs.get(parameter.name, {})
    pairs |= hires_pairs(recipe)
    pairs |= {f"ControlNet {number}": _unit(control) for number, control in enumerate(_units(recipe))}
    if recipe.embeddings:  # AUTOMATIC1111 shortens hashes to ten digits
        pairs["TI hashes"] = ", ".join(f"{name}: {digest[:10]}" for name, digest in _hashes(recipe))
    loras = [Lora(source, weight, text, "", digest, short) for source, digest, short, weight, text in recipe.loras]
    if loras:
        pairs["Lora hashes"] = ", ".join(f"{lora.tag_name}: {lora.short_hash}" for lora in loras)
    pairs["Version"] = f"sfumato {__version__}"
    tags = [lora.tag for lora in (*loras, *(Lora(name, 0.0) for name in recipe.loras_off))]
    lines = [" ".join([recipe.prompt, *tags]).strip()]
    if sampling.negative_prompt:
        lines.append(f"{NEGATIVE} {sampling.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value is not None))
    return "\n".join(lines)


def hires_pairs(recipe: Recipe) -> dict[str, Any]:
    """Of an infotext, as AUTOMATIC1111 writes a second pass: what differs from the first."""
    if not (hires := recipe.hires):
        return {}
    first, second = recipe.sampling, hires.sampling
    width, height = recipe.size
    sampler, schedule_type = schedulers.sampler_of(second.scheduler or "") or (second.scheduler, None)
    other = second.scheduler != first.scheduler
    return {
        "Denoising strength": second.strength,
        "Hires upscale": f"{hires.scale:g}" if hires.scale else None,
        "Hires resize": None if hires.scale else f"{width}x{height}",
        "Hires steps": hires.steps,
        "Hires upscaler": hires.upscaler,
        "Hires sampler": sampler if other else None,
        "Hires schedule type": schedule_type if other else None,
        "Hires CFG Scale": second.guidance_scale if second.guidance_scale != first.guidance_scale else None,
        "Hires prompt": hires.prompt,
        "Hires negative prompt": second.negative_prompt if second.negative_prompt != first.negative_prompt else None,
    }


def _units(recipe: Recipe) -> list[RecordedControl]:
    """The controls, without further pictures of one."""
    return [control for control in recipe.controls if not control.joins]


def _unit(control: RecordedControl) -> str:
    """A control as AUTOMATIC1111's extension writes it; hashes are shortened to eight digits."""
    digest = f" [{control.net_sha256[:8]}]" if control.net_sha256 else ""
    low, high = control.thresholds or (None, None)
    values = {
        "Module": control.preprocess or "none",
        "Model": f"{control.name or 'None'}{digest}",
        "Weight": 1.0 if control.weight is None else control.weight,
        "Resize Mode": "Crop and Resize",
        "Threshold A": low,
        "Threshold B": high,
        "Guidance Start": control.start or 0.0,
        "Guidance End": 1.0 if control.end is None else control.end,
        "Pixel Perfect": True,
        "Control Mode": "Balanced",
    }
    return ", ".join(f"{key}: {value}" for key, value in values.items() if value is not None)


def _hashes(recipe: Recipe) -> list[tuple[str, str]]:
    """Name and hash of each textual inversion."""
    return [(name, digest) for name, _, digest in (each.rpartition(":") for each in recipe.embeddings)]


def parse(infotext: str) -> dict[str, str]:
    """The pairs of an infotext, with `Prompt` and `Negative prompt`; a size becomes `Size-1` and `Size-2`."""
    *lines, last = infotext.strip().split("\n")
    pairs = _PAIR.findall(last[:MAX_PAIRS])
    if len(pairs) < 3:  # a prompt with a colon in it
        lines, pairs = [*lines, last], []
    at = next((index for index, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    negative = "\n".join(line.strip() for line in lines[at:]).removeprefix(NEGATIVE).strip()
    values = {"Prompt": "\n".join(line.strip() for line in lines[:at]), "Negative prompt": negative}
    for key, value in pairs:
        if size := _SIZE.fullmatch(value):
            values |= {f"{key.strip()}-1": size[1], f"{key.strip()}-2": size[2]}
        else:
            values[key.strip()] = _unquoted(value.strip())
    return values


def texts(file: bytes, param: str = "image") -> dict[str, str]:
    """Texts in a picture file by the name of their chunk; empty if there are none.

    Raises InvalidPicture if the file is not a picture.
    """
    with images.open_untrusted(file, param) as image:
        found = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
        comment, described = _comment(image), _description(image)
    ours = {RECIPE_CHUNK: described} if described.startswith("{") else {}
    return ours | ({INFOTEXT_CHUNK: comment} if comment else {}) | found


def _comment(image: Image.Image) -> str:
    """EXIF's UserComment; empty if there is none, or the block is damaged."""
    try:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except (OSError, ValueError, SyntaxError, struct.error):
        return ""
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return ""
    return comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")


def _description(image: Image.Image) -> str:
    """EXIF's ImageDescription, which contains the recipe in our WebP and JPEG files."""
    try:
        return str(image.getexif().get(ExifTags.Base.ImageDescription) or "")
    except (OSError, ValueError, SyntaxError, struct.error):
        return ""


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def _unquoted(text: str) -> str:
    if len(text) < 2 or not (text[0] == text[-1] == '"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def read(path: Path) -> Recipe:
    """The recipe inside a file of ours. Raises InvalidPicture if it has none, or is damaged."""
    try:
        with path.open("rb") as file:
            return read_open(file, str(path))
    except OSError as error:
        raise InvalidPicture(f"{path}: cannot be read ({error})") from None


def read_open(file: BinaryIO, path: str) -> Recipe:
    """The same of an open file, whose format the suffix of `path` says."""
    suffix = Path(path).suffix.lower()
    try:
        text = (
            riff.comment(file)
            if suffix == ".wav"
            else _tag(file)
            if suffix in containers.SUFFIXES
            else _in_picture(file)
        )
    except (OSError, ValueError, struct.error) as error:
        raise InvalidPicture(f"{path}: not a picture, a clip or a sound, or damaged ({error})") from None
    except ImportError as error:
        raise InvalidPicture(f"{path}: to read it, pip install 'sfumato[video]' ({error})") from None
    if text is None:
        raise InvalidPicture(
            f"{path}: contains no recipe. Only files made by Sfumato have one; editors and chats often strip it."
        )
    try:
        return from_json(json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidPicture(f"{path}: its recipe cannot be read ({error})") from None


def _in_picture(file: BinaryIO) -> Any:
    with Image.open(file, formats=images.FORMATS) as image:
        comment = image.info.get(COMMENT) if image.format == "GIF" else None
        return image.info.get(RECIPE_CHUNK) or image.getexif().get(ExifTags.Base.ImageDescription) or comment


def _tag(file: BinaryIO) -> str | None:
    with containers.opened(file) as container:
        tags = [container.metadata, *(stream.metadata for stream in container.streams)]  # Ogg has those of streams
        return next((text for each in tags for name, text in each.items() if name.lower() == COMMENT), None)


def from_json(values: Mapping[str, Any]) -> Recipe:
    """What `as_json` gave, or an earlier version's. Raises TypeError, ValueError or AttributeError for others."""
    field_names = {spec.name for spec in fields(Recipe)}
    by_field = nested({key: _frozen(value) for key, value in values.items()})
    if controls := values.get("controls"):
        by_field["controls"] = tuple(
            RecordedControl(**{name: _frozen(value) for name, value in each.items()})
            if isinstance(each, dict)
            else RecordedControl(*each)
            for each in controls
        )
    if hires := values.get("hires"):
        passes = {name: _frozen(value) for name, value in hires.items()}
        by_field["hires"] = Hires(**passes | {"sampling": Sampling(**hires["sampling"])})
    return Recipe(**{key: value for key, value in by_field.items() if key in field_names})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value
