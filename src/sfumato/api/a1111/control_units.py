"""What AUTOMATIC1111's ControlNet extension takes of a request, `alwayson_scripts.controlnet.args`, as controls."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.api.fields import number_within
from sfumato.checkpoints import controlnets
from sfumato.core import CANNY, DEPTH, INVERT, POSE, Control
from sfumato.errors import InvalidRequest
from sfumato.pictures.sources import bytes_or_url

SCRIPT = "controlnet"
"""Its name in `alwayson_scripts`; clients write it in any case."""

NONE = "none"
"""What the extension calls no module, and no model."""

READERS = (
    "ip-adapter-auto", "ip-adapter_clip_h", "ip-adapter_clip_g", "ip-adapter_clip_sd15", "ip-adapter_clip_sdxl",
    "ip-adapter_clip_sdxl_plus_vith",
)  # fmt: skip
"""What the extension calls the image encoders of IP-Adapters; each adapter has its own here."""

DEPTHS = ("depth", "depth_anything", "depth_anything_v2", "depth_midas", "depth_zoe", "depth_leres", "depth_leres++")
"""What the extension calls estimators of depth; the server has one. Others that begin so are taken for that, too."""

BODY, OTHER_POSES = ("openpose",), ("openpose_full", "openpose_hand", "openpose_face", "dw_openpose_full")
"""What the extension calls estimators of poses; the second find hands or faces as well, which are left out here."""

MODULES: Mapping[str, str | None] = {
    NONE: None,
    "canny": CANNY,
    "invert": INVERT,
    **dict.fromkeys(DEPTHS, DEPTH),
    **dict.fromkeys((*BODY, *OTHER_POSES), POSE),
    **dict.fromkeys(READERS),
}
"""The extension's preprocessors that there are here."""

MODEL_FREE = (NONE, "canny", "invert")

NO_DEPTH = ("depth_hand",)
"""Beginnings of modules that do not estimate the depth of a whole picture."""

CROPPED = ("crop and resize", "1", "inner fit (scale to fit)")
"""How a control picture is fitted to the drawn size; other ways are treated so, with a warning."""
BALANCED = ("balanced", "0")
MAX_NAME = 300

QUIET = frozenset(
    {"enabled", "module", "model", "weight", "image", "input_image", "resize_mode", "guidance_start", "guidance_end",
     "guidance", "control_mode", "threshold_a", "threshold_b", "pixel_perfect", "low_vram", "lowvram", "processor_res",
     "hr_option", "save_detected_map", "is_ui", "input_mode", "batch_images", "output_dir", "loopback",
     "union_control_type"}
)  # fmt: skip
"""Fields of a unit that are read, and those that mean nothing for one picture: it is read at the drawn size anyway."""


@dataclass(frozen=True, slots=True)
class Units:
    """The enabled units."""

    controls: list[Control]
    warnings: list[str]


def units_of(scripts: Mapping[str, Any] | None, sources: Sequence[str | bytes]) -> Units:
    """The units of a request; one without a picture follows the first of `sources`. Raises InvalidRequest. Slow."""
    controls, warnings = [], []
    for number, unit in enumerate(_args(scripts)):
        where = f"{SCRIPT} unit {number}"
        if not isinstance(unit, Mapping):
            raise InvalidRequest(f"{where}: must be an object", param="alwayson_scripts")
        if unit.get("enabled") is False:
            continue
        name = _text(unit.get("model"))
        if not name or name.casefold() == NONE:
            warnings.append(f"{where}: left out: it names no model")
            continue
        controls.append(_control(unit, name, where, sources))
        warnings += _warnings(unit, where)
    return Units(controls, warnings)


def _args(scripts: Mapping[str, Any] | None) -> list[Any]:
    for name, script in (scripts or {}).items():
        if name.casefold() == SCRIPT:
            args = script.get("args") if isinstance(script, Mapping) else script
            return args if isinstance(args, list) else [args] if args else []
    return []


def release(scripts: dict[str, Any] | None) -> None:
    """Drop the pictures of the units: a body lives until its request is answered."""
    for unit in _args(scripts):
        if isinstance(unit, dict):
            for field in ("image", "input_image", "mask", "mask_image", "effective_region_mask"):
                if unit.get(field):
                    unit[field] = None


def _control(unit: Mapping[str, Any], name: str, where: str, sources: Sequence[str | bytes]) -> Control:
    picture = _picture(unit, where)
    if picture is None and not sources:
        raise InvalidRequest(f"{where}: it has no image", param="alwayson_scripts")
    module = _text(unit.get("module")) or NONE
    plain = _module(unit)
    if plain not in MODULES:
        known = ", ".join(MODULES)
        raise InvalidRequest(
            f"{where}: module {module[:60]!r} is not there; {known} are. Send a picture that is prepared already, with "
            "module none",
            param="alwayson_scripts",
        )
    thresholds = (_number(unit, "threshold_a", where, -1, 255), _number(unit, "threshold_b", where, -1, 255))
    set_ones = [each for each in thresholds if each is not None and each >= 0]
    return Control(
        sources[0] if picture is None else picture,
        weight=_number(unit, "weight", where, 0, 10),
        start=_number(unit, "guidance_start", where, 0, 1),
        end=_number(unit, "guidance_end", where, 0, 1),
        name=controlnets.without_hash(name[:MAX_NAME]),
        preprocess=MODULES[plain],
        thresholds=(set_ones[0], set_ones[1]) if MODULES[plain] == CANNY and len(set_ones) == 2 else None,
    )


def _module(unit: Mapping[str, Any]) -> str:
    """A key of `MODULES`, or what the unit names otherwise."""
    plain = (_text(unit.get("module")) or NONE).casefold().partition(" ")[0]
    return DEPTH if plain.startswith(DEPTH) and not plain.startswith(NO_DEPTH) else plain


def _picture(unit: Mapping[str, Any], where: str) -> str | bytes | None:
    value = unit.get("image") or unit.get("input_image")
    if isinstance(value, Mapping):  # with a mask beside it
        value = value.get("image")
    if not value:
        return None
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}: image must be base64, a data: URI or a URL", param="alwayson_scripts")
    return bytes_or_url(value, f"{where}: image")


def _warnings(unit: Mapping[str, Any], where: str) -> Iterator[str]:
    if (mode := _text(unit.get("resize_mode"))) and mode.casefold() not in CROPPED:
        yield f"{where}: resize_mode {mode[:40]!r} is treated as 'Crop and Resize'"
    if (mode := _text(unit.get("control_mode"))) and mode.casefold() not in BALANCED:
        yield f"{where}: control_mode {mode[:40]!r} is treated as 'Balanced'"
    if _module(unit) in OTHER_POSES:
        yield f"{where}: module {_module(unit)}: only bodies are found, no hands and faces"
    inner = unit.get("image")
    masked = unit.get("mask") or unit.get("mask_image") or (isinstance(inner, Mapping) and inner.get("mask"))
    if masked:
        yield f"{where}: mask has no effect"
    unknown = [re.sub(r"\W", "?", str(field))[:40] for field, value in unit.items() if field not in QUIET and value]
    if others := [field for field in unknown if field not in ("mask", "mask_image")]:
        yield f"{where}: {', '.join(others[:20])}: no effect"


def _text(value: object) -> str:
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _number(unit: Mapping[str, Any], field: str, where: str, least: float, most: float) -> float | None:
    value = unit.get(field)
    if value in (None, ""):
        return None
    try:
        return number_within(value, least, most)
    except ValueError as error:
        raise InvalidRequest(f"{where}: {field}: {error}", param="alwayson_scripts") from None
