"""What a pipeline made, before it is a file: a picture is Pillow's; clips and sounds are arrays with their rates.

An array is kept as the pipeline returned it, and is turned into what a file holds frame by frame: a clip is never in
memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

from sfumato.errors import Cancelled

if TYPE_CHECKING:  # the API process has no numpy
    import numpy as np
    from numpy.typing import NDArray


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
    """(frames, height, width, channels), 0 .. 1; one channel is grey, three are RGB."""
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
        pixels = (self.frames[index].clip(0, 1) * 255).round().astype("uint8")
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")

    def pictures(self) -> Iterator[Image.Image]:
        """Its frames, one after the other."""
        return (self.picture(index) for index in range(len(self)))


Result: TypeAlias = Image.Image | Clip | Sound
