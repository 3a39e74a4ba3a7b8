"""Bodies of the routes for clips."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, create_model

from sfumato.api.fields import BLANK, NUMBER, Side, openai_field
from sfumato.api.openai.bodies import Body
from sfumato.api.openai.pictures import Pictures
from sfumato.errors import InvalidRequest
from sfumato.formats import CLIP, VIDEO, of_kind
from sfumato.sampling import OF_PICTURES, PARAMETERS, Sampling
from sfumato.serving.planning import ImageRequest

OF_CLIPS = tuple(each for each in PARAMETERS if VIDEO in each.of and each not in OF_PICTURES)

_PICTURE = "Base64, data: URI or http(s) URL; in a form, a file."

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
    output_format: Annotated[str | None, BLANK] = Field(
        None, description=f"{', '.join(of_kind(VIDEO))}; absent: {CLIP}.", examples=["webp"]
    )

    @property
    def format(self) -> str:
        """A name of `formats.FORMATS`. Raises InvalidRequest for one of no clip."""
        name = self.output_format or CLIP
        if name not in of_kind(VIDEO):
            raise InvalidRequest(
                f"output_format: {name[:100]!r}; {', '.join(of_kind(VIDEO))} are valid", param="output_format"
            )
        return name

    @property
    def pictures(self) -> list[Any]:
        """Its source pictures, which are left out of the body."""
        raise NotImplementedError

    def sampling(self) -> Sampling:
        """Raises InvalidRequest for an invalid size."""
        sampling = replace(super().sampling(), **{each.name: getattr(self, each.name) for each in OF_CLIPS})
        if self.width is None and self.height is None:
            return sampling
        if sampling.size or not (self.width and self.height):
            raise InvalidRequest("width: send `width` and `height`, or `size`, and not only one side", param="width")
        return replace(sampling, width=self.width, height=self.height)

    def to_request(self, **more: Any) -> ImageRequest:
        fields = {"prompts": [self.prompt], "n": 1, "format": self.format, "images": self.pictures}
        return super().to_request(**fields | more)


class VideosBody(ClipBody):
    """Of `POST /v1/videos` and `POST /v1/videos/sync`."""

    input_reference: Pictures = Field([], description=f'The first frame. {_PICTURE} Also `{{"image_url": ...}}`.')

    @property
    def pictures(self) -> list[Any]:
        return list(self.input_reference)

    def release_pictures(self) -> None:
        self.input_reference = []


class LocalVideoBody(ClipBody):
    """Of LocalAI's `POST /video`."""

    start_image: Pictures = Field([], max_length=1, description=f"The first frame. {_PICTURE}")
    end_image: Pictures = Field([], max_length=1, description="The last frame, for classes that take one.")
    input_reference: Pictures = Field([], max_length=1, description="Same as `start_image`.")

    @property
    def pictures(self) -> list[Any]:
        return [*(self.start_image or self.input_reference), *self.end_image]

    def release_pictures(self) -> None:
        self.start_image, self.end_image, self.input_reference = [], [], []
