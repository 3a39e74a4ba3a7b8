"""Bodies of the routes for clips."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, create_model

from sfumato.api.fields import NUMBER, Side, Text, openai_field
from sfumato.api.openai.bodies import PICTURE, Body, PartialImages
from sfumato.api.openai.pictures import Pictures
from sfumato.errors import InvalidRequest
from sfumato.formats import CLIP, VIDEO, check, of_kind
from sfumato.sampling import OF_PICTURES, PARAMETERS, Sampling
from sfumato.serving.planning import ImageRequest

OF_CLIPS = tuple(each for each in PARAMETERS if VIDEO in each.of and each not in OF_PICTURES)

if TYPE_CHECKING:
    _Sampled = Body
else:
    _Sampled = create_model("_Sampled", __base__=Body, **{each.name: openai_field(each) for each in OF_CLIPS})


class ClipBody(_Sampled):
    """Common fields of all routes for clips."""

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = ()

    prompt: str = Field(description="What to draw.", examples=["a cat walks through snow"])
    n: Annotated[Annotated[int, Field(ge=1, le=1)] | None, NUMBER] = Field(None, description="One clip is drawn.")
    width: Side = Field(None, description="Pixels; with `height`, instead of `size`.")
    height: Side = Field(None, description="Pixels.")
    partial_images: PartialImages = Field(
        None, description="Number of previews of the first frame, which `/v1/images/progress/{id}` has."
    )
    output_format: Text = Field(None, description=f"{', '.join(of_kind(VIDEO))}; absent: {CLIP}.", examples=["webp"])

    end_image: Pictures = Field(
        [], max_length=1, description=f"The last frame, for models with the input role `last`. {PICTURE}"
    )

    @property
    def format(self) -> str:
        """A name of `formats.FORMATS`. Raises InvalidRequest for one of no clip, or that cannot be written here."""
        name = (self.output_format or CLIP).strip().lower()
        check(name, VIDEO, "output_format")
        return name

    @property
    def first(self) -> tuple[str, list[Any]]:
        """The field of the pictures that it begins with, and these."""
        raise NotImplementedError

    @property
    def pictures(self) -> list[Any]:
        """Its source pictures, which are left out of the body. Raises InvalidRequest for a last one alone."""
        field, first = self.first
        if self.end_image and not first:
            raise InvalidRequest(f"end_image: a clip that ends with it also begins with one; send {field}", param=field)
        return [*first, *self.end_image]

    def sampling(self) -> Sampling:
        """Raises InvalidRequest for an invalid size."""
        sampling = replace(super().sampling(), **{each.name: getattr(self, each.name) for each in OF_CLIPS})
        if self.width is None and self.height is None:
            return sampling
        if sampling.size or not (self.width and self.height):
            raise InvalidRequest("width: send `width` and `height`, or `size`, and not only one side", param="width")
        return replace(sampling, width=self.width, height=self.height)

    def to_request(self, **more: Any) -> ImageRequest:
        field, first = self.first
        names = [field] * len(first) + ["end_image"] * len(self.end_image)
        fields = {
            "prompts": [self.prompt],
            "n": 1,
            "format": self.format,
            "images": self.pictures,
            "previews": self.partial_images or 0,
        }
        return super().to_request(**fields | {"image_fields": (field, "end_image"), "image_names": names} | more)

    def release_pictures(self) -> None:
        self.end_image = []


class VideosBody(ClipBody):
    """Of `POST /v1/videos` and `POST /v1/videos/sync`."""

    input_reference: Pictures = Field(
        [],
        description=f"The first frame, or the clip that it is drawn from, as the model takes it. {PICTURE} Also "
        '`{"image_url": ...}` and `{"video_url": ...}`.',
    )
    video_reference: Pictures = Field(
        [], max_length=1, description='A clip, whatever the model takes besides: `{"video_url": ...}`, or as a picture.'
    )

    @property
    def first(self) -> tuple[str, list[Any]]:
        return "input_reference", list(self.input_reference)

    def to_request(self, **more: Any) -> ImageRequest:
        if not self.video_reference:
            return super().to_request(**more)
        return super().to_request(video=self.video_reference[0], video_field="video_reference", **more)

    def release_pictures(self) -> None:
        super().release_pictures()
        self.input_reference, self.video_reference = [], []


class LocalVideoBody(ClipBody):
    """Of LocalAI's `POST /video`."""

    start_image: Pictures = Field([], max_length=1, description=f"The first frame. {PICTURE}")
    input_reference: Pictures = Field([], max_length=1, description="Same as `start_image`.")

    @property
    def first(self) -> tuple[str, list[Any]]:
        if self.input_reference and self.start_image:
            raise InvalidRequest(
                "input_reference: start_image says the same; send one of them", param="input_reference"
            )
        return ("input_reference", self.input_reference) if self.input_reference else ("start_image", self.start_image)

    def release_pictures(self) -> None:
        super().release_pictures()
        self.start_image, self.input_reference = [], []
