"""Request bodies of AUTOMATIC1111's routes; unlisted fields are accepted without effect.

Its clients send every field with its default. So a field counts as set only if its value differs from the
default; blank and null mean the model's default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model, model_validator
from pydantic_core import from_json, to_json

from sfumato.api.a1111.control_units import SCRIPT
from sfumato.api.a1111.hires import HiresFields
from sfumato.api.fields import (
    BLANK,
    NUMBER,
    PictureCount,
    Priority,
    Seed,
    Side,
    Text,
    TextOrNumber,
    a1111_field,
    plain_number,
)
from sfumato.api.lora_fields import LoraFields
from sfumato.core import INTERACTIVE, MAX_SEED
from sfumato.pictures.fitting import Fitting
from sfumato.pictures.sources import bytes_or_url
from sfumato.sampling import PARAMETERS, Parameter, Sampling
from sfumato.serving.planning import MAX_PADDING, MAX_PICTURES

DEFAULT_BLUR = 4.0
"""Pixels."""

CROPPED = (1, 2)
"""Resize modes that keep the aspect ratio; the others stretch."""

NEUTRAL: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "subseed_strength": (0,), "seed_resize_from_w": (0, -1), "seed_resize_from_h": (0, -1),
        "restore_faces": (False,), "tiling": (False,), "s_churn": (0,), "s_tmax": (0,), "s_tmin": (0,),
        "s_noise": (1,), "s_min_uncond": (0,), "initial_noise_multiplier": (1,),
        "inpainting_fill": (1,), "distilled_cfg_scale": (),
    }
)  # fmt: skip
"""AUTOMATIC1111's fields without effect here → values that count as not set."""

QUIET = re.compile(
    r"hr_.*|firstphase_.*|subseed|do_not_save_.*|script_args|image_cfg_scale|mask_round|include_init_images"
    r"|force_task_id|refiner_switch_at"
    r"|upscaling_resize_[wh]|upscaling_crop|show_extras_results|codeformer_weight"
)
"""Fields that only matter together with another one, or not at all for API callers."""

NO_OVERRIDES: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {"sd_vae": ("Automatic", "None"), "eta_noise_seed_delta": (0,), "samples_format": ("png",)}
)
"""AUTOMATIC1111's settings → values that count as not set."""

BLANKS: tuple[object, ...] = (None, "", [], {}, False)

MODEL, LAYERS = "sd_model_checkpoint", "CLIP_stop_at_last_layers"
"""The settings that a request can override."""

_NETWORK = re.compile(r"<hypernet:[^<>]+>", re.IGNORECASE)


def is_set(value: object, neutral: tuple[object, ...]) -> bool:
    return value not in (*BLANKS, *neutral)


FIELD_PARAMETERS = tuple(each for each in PARAMETERS if each.a1111)
"""Each is a field of its own."""
UNSOURCED = tuple(each for each in FIELD_PARAMETERS if not each.source)


def _with_fields(base: type[BaseModel], parameters: tuple[Parameter, ...]) -> type[BaseModel]:
    """A subclass of `base` with a field for each of these parameters, by AUTOMATIC1111's names."""
    definitions: dict[str, Any] = {str(each.a1111): a1111_field(each) for each in parameters}
    return create_model(base.__name__, __base__=base, **definitions)


class _Common(LoraFields):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    prompt: str | None = Field("", description="What to draw.", examples=["a rocket on a blue background"])
    seed: Seed = Field(None, description=f"-1 or absent: random. Picture i gets seed + i, at most {MAX_SEED}.")
    width: Side = Field(None, description="Pixels; if height is absent too: the model's size.", examples=[128])
    height: Side = Field(None, description="Pixels.", examples=[128])
    batch_size: PictureCount = Field(None, description="The number of pictures is batch_size times n_iter.")
    n_iter: PictureCount = Field(None, description="Same as batch_size: the server decides how to batch.")
    sampler_name: Text = Field(
        None,
        description="A name from /sdapi/v1/samplers; an unknown one falls back to the model's own.",
        examples=["Euler a"],
    )
    sampler_index: TextOrNumber = Field(None, description="Older name of sampler_name.")
    scheduler: Text = Field(None, description="A schedule type from /sdapi/v1/schedulers.", examples=["Automatic"])
    override_settings: dict[str, Any] | None = Field(
        None, description=f"For this request only: {MODEL} (a title from /sdapi/v1/sd-models) and {LAYERS}."
    )
    override_settings_restore_afterwards: bool | None = Field(
        True, description=f"false: {MODEL} of override_settings stays selected for the caller."
    )
    enable_hr: bool | None = Field(
        None, description="txt2img: draw in two passes, the second from the first one's picture, enlarged."
    )
    model: Text = Field(None, description=f"As {MODEL} in override_settings, for gateways that choose by it.")
    styles: list[str] | None = Field(None, description="Without effect: there are no styles.")
    script_name: Text = Field(None, description="Without effect: there are no scripts.")
    alwayson_scripts: dict[str, Any] | None = Field(
        None,
        description="`controlnet` with its units in `args`: enabled, model (a name of /controlnet/model_list or a hub "
        "id), module, image, weight, guidance_start, guidance_end, threshold_a, threshold_b. Others have no effect; a "
        "header lists them.",
    )
    send_images: bool | None = Field(True, description="false: the answer has no pictures.")
    priority: Priority = INTERACTIVE
    save_images: bool | None = Field(False, description="Also store the pictures on the server; info has their URLs.")


if TYPE_CHECKING:
    _Sampled = _Common
else:
    _Sampled = _with_fields(_Common, UNSOURCED)


class DrawBody(_Sampled):
    """Common fields of txt2img and img2img."""

    TAKES: ClassVar[tuple[Parameter, ...]] = UNSOURCED

    @property
    def overrides(self) -> dict[str, Any]:
        return self.override_settings or {}

    @property
    def sampler(self) -> str | None:
        name = self.sampler_name or self.sampler_index
        return None if name is None else str(name)

    @property
    def pictures(self) -> int:
        return (self.batch_size or 1) * (self.n_iter or 1)

    @property
    def size(self) -> tuple[int, int] | tuple[None, None]:
        if self.width is None and self.height is None:
            return None, None
        return self.width or 512, self.height or 512  # AUTOMATIC1111's default for an omitted side

    def sampling(self, scheduler: str | None) -> Sampling:
        """The requested parameters, with the scheduler that `sampler` maps to."""
        width, height = self.size
        values = {each.name: self._value(each) for each in self.TAKES}
        return Sampling(**values, scheduler=scheduler, width=width, height=height)

    def _value(self, parameter: Parameter) -> Any:
        value = getattr(self, parameter.a1111 or "")
        if parameter.one_based:
            value = _from_one(self.overrides.get(LAYERS, value))
        return None if value in parameter.neutral else value

    def ignored(self) -> list[str]:
        """Names of fields that are set but have no effect; no values."""
        extra = [name for name, value in (self.model_extra or {}).items() if _is_ignored(name, value)]
        settings = [
            f"override_settings.{name}"
            for name, value in self.overrides.items()
            if name != MODEL and is_set(value, NO_OVERRIDES.get(name, ())) and not (name == LAYERS and _is_layer(value))
        ]
        scripts = [f"alwayson_scripts.{name}" for name in self.alwayson_scripts or () if name.casefold() != SCRIPT]
        unsupported = [name for name in ("styles", "script_name") if is_set(getattr(self, name), ())]
        return [*extra, *settings, *scripts, *unsupported]

    def warnings(self) -> list[str]:
        """Where the result differs from the request, one sentence each, beginning with the field."""
        warnings = []
        if match := _NETWORK.search(self.prompt or ""):
            warnings.append(f"prompt: {match[0][:60]!r} is treated as text: there are no hypernetworks")
        return warnings

    def understood(self) -> dict[str, Any]:
        """The response's `parameters`: the request as understood, without pictures and unknown fields."""
        without_effect = {name: value for name, value in (self.model_extra or {}).items() if name in NEUTRAL}
        fields = self.model_dump(exclude={"init_images", "mask", *(self.model_extra or {})}) | without_effect
        return from_json(to_json(fields, inf_nan_mode="null"))  # type: ignore[no-any-return]


_SWITCH: TypeAdapter[bool | None] = TypeAdapter(bool | None)


class Txt2ImgBody(HiresFields, DrawBody):
    """Of `POST /sdapi/v1/txt2img`."""

    @model_validator(mode="before")
    @classmethod
    def _of_one_pass(cls, values: Any) -> Any:
        """Without the second pass's fields if there is none: clients send them whatever their values are."""
        if not isinstance(values, dict):
            return values
        try:
            if _SWITCH.validate_python(values.get("enable_hr")):
                return values
        except ValidationError:  # of the field
            return values
        return {name: value for name, value in values.items() if name not in HiresFields.model_fields}


if TYPE_CHECKING:
    _SampledFromPicture = DrawBody
else:
    _SampledFromPicture = _with_fields(DrawBody, tuple(each for each in FIELD_PARAMETERS if each.source))


class Img2ImgBody(_SampledFromPicture):
    """Of `POST /sdapi/v1/img2img`."""

    TAKES = FIELD_PARAMETERS

    init_images: list[str] = Field(
        min_length=1, max_length=MAX_PICTURES, description="The source picture: base64, a data: URI or an http(s) URL."
    )
    resize_mode: Annotated[Literal[0, 1, 2, 3] | None, NUMBER] = Field(
        None, description="How to fit to width x height: 0 and 3 stretch the picture, 1 and 2 crop it."
    )
    mask: Text = Field(None, description="Base64, a data: URI or an http(s) URL; white areas are redrawn.")
    mask_blur: Annotated[Annotated[float, Field(ge=0, le=256)] | None, NUMBER] = Field(
        None, description="Gaussian blur of the mask's edge, in pixels; absent: 4, as in AUTOMATIC1111."
    )
    inpaint_full_res: Annotated[bool | None, BLANK] = Field(
        None, description="Draw only the area around the mask, at width x height, and paste it back into the picture."
    )
    inpaint_full_res_padding: Annotated[Annotated[int, Field(ge=0, le=MAX_PADDING)] | None, NUMBER] = Field(
        None, description="With inpaint_full_res: context pixels around the mask; absent: 0, as in AUTOMATIC1111."
    )
    inpainting_mask_invert: Annotated[Literal[0, 1] | None, BLANK] = Field(
        None, description="1: black areas are redrawn."
    )

    @property
    def mask_padding(self) -> int | None:
        """Padding of an edit of the masked area only; None for an edit of the whole picture."""
        return (self.inpaint_full_res_padding or 0) if self.inpaint_full_res and self.mask else None

    def fitting(self) -> Fitting:
        """How pictures and mask are fitted to the requested size, or to the first picture's."""
        whole = self.mask_padding is None  # else the size is that of the drawn area
        return Fitting(
            size=(self.width or 512, self.height or 512) if whole and (self.width or self.height) else None,
            crop=self.resize_mode in CROPPED,
            blur=DEFAULT_BLUR if self.mask_blur is None else self.mask_blur,
            invert=bool(self.inpainting_mask_invert),
        )

    def sources(self) -> tuple[list[str | bytes], str | bytes | None]:
        """The files or URLs of pictures and mask, which this body then releases. Raises InvalidPicture. Slow."""
        images = [bytes_or_url(text, f"init_images[{index}]") for index, text in enumerate(self.init_images)]
        mask = bytes_or_url(self.mask, "mask") if self.mask else None
        self.init_images.clear()
        self.mask = None
        return images, mask

    def ignored(self) -> list[str]:
        unmasked = () if self.mask else ("inpainting_fill",)
        return [name for name in super().ignored() if name not in unmasked]

    def warnings(self) -> list[str]:
        second = ["enable_hr: a second pass is for txt2img; the picture is drawn once"] if self.enable_hr else []
        otherwise = {2: "resize_mode: 2 (resize and fill) is treated as 1 (crop and resize)",
                     3: "resize_mode: 3 (latent upscale) is treated as 0 (just resize)"}  # fmt: skip
        return super().warnings() + second + [text for mode, text in otherwise.items() if mode == self.resize_mode]


class PngInfoBody(BaseModel):
    """Of `POST /sdapi/v1/png-info`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    image: str = Field(description="PNG, JPEG or WebP as base64, a data: URI or an http(s) URL.")

    def ignored(self) -> list[str]:
        return list(self.model_extra or {})


class UpscaleBody(BaseModel):
    """Of `POST /sdapi/v1/extra-single-image`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    image: str = Field(description="Base64, a data: URI or an http(s) URL.")
    upscaler_1: Text = Field(None, description="A name from /sdapi/v1/upscalers.")
    upscaling_resize: Annotated[float | None, NUMBER] = Field(2, description="2 or 4, whichever the upscaler supports.")
    resize_mode: Annotated[Literal[0] | None, NUMBER] = Field(None, description="Only 0: scale by upscaling_resize.")
    priority: Priority = INTERACTIVE

    def ignored(self) -> list[str]:
        """Fields that are set but have no effect; those of resize_mode 1 do not count."""
        return [
            name
            for name, value in (self.model_extra or {}).items()
            if not QUIET.fullmatch(name) and is_set(value, (0, "None"))
        ]


def _is_ignored(name: str, value: object) -> bool:
    return not QUIET.fullmatch(name) and (name not in NEUTRAL or is_set(value, NEUTRAL[name]))


def _is_layer(value: object) -> bool:
    try:
        int(plain_number(value))
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _from_one(value: object) -> int | None:
    """Our count of layers to skip. Clients send the last layer by default."""
    layer = int(value) if _is_layer(value) else 1  # type: ignore[call-overload]
    return layer - 1 if layer > 1 else None
