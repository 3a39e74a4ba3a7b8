"""What a pipeline made, before it is a file: a picture is Pillow's; clips and sounds are arrays with their rates.

A clip that waits for its file holds bytes, a quarter of the floats that a pipeline returns; the file is written from
them frame by frame. So a clip is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

from sfumato.errors import Cancelled, DrawError

if TYPE_CHECKING:  # the API process has no numpy
    import numpy as np
    from numpy.typing import NDArray

MADE_NAN = "the model made NaN: set `dtype: bf16` or `dtype: fp32` in the model file"
"""Of a decoder: what it decodes was checked before."""


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    samples: NDArray[np.float32]
    """(channels, samples), -1 .. 1."""
    rate: int
    """Samples a second."""

    @property
    def layout(self) -> str:
        """As FFmpeg calls it; of more than two channels the first two count."""
        return "mono" if self.samples.shape[0] == 1 else "stereo"

    def rate_for(self, rates: Sequence[int]) -> int:
        """The rate for a codec that takes only these, in ascending order; none: it takes any."""
        return next((each for each in rates if each >= self.rate), rates[-1]) if rates else self.rate

    @property
    def seconds(self) -> float:
        return float(self.samples.shape[1]) / self.rate

    @property
    def size(self) -> tuple[int, int]:
        """It has none."""
        return (0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    frames: NDArray[Any]
    """(frames, height, width, channels), one channel is grey, three are RGB: floats, 0 .. 1, as a pipeline returns
    them, or bytes, 0 .. 255, once `rounded`."""
    fps: float
    sound: Sound | None = None
    wanted: Callable[[], bool] = lambda: True
    """Asked for each frame that is encoded: whether anybody still waits for the file."""

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of each frame, in pixels."""
        return (self.frames.shape[2], self.frames.shape[1])

    def picture(self, index: int) -> Image.Image:
        """One frame, RGB. Raises Cancelled if the clip is no longer wanted."""
        if not self.wanted():
            raise Cancelled("the request was cancelled")
        pixels = _rounded(self.frames[index])
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")

    def pictures(self) -> Iterator[Image.Image]:
        """Its frames, one after the other."""
        return (self.picture(index) for index in range(len(self)))

    def rounded(self) -> Clip:
        """The same clip in bytes, made frame by frame; the floats may go. Raises DrawError for NaN, which would be
        black."""
        import numpy as np

        frames = np.empty(self.frames.shape, np.uint8)
        for index, frame in enumerate(self.frames):
            if not np.isfinite(frame).all():
                raise DrawError(MADE_NAN)
            frames[index] = _rounded(frame)
        return replace(self, frames=frames)


def _rounded(frame: NDArray[Any]) -> NDArray[Any]:
    return frame if frame.dtype == "uint8" else (frame.clip(0, 1) * 255).round().astype("uint8")


Result: TypeAlias = Image.Image | Clip | Sound
