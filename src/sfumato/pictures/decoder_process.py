"""The decoder process: reads tasks from its standard input, answers on its standard output.

It limits itself. A task that exceeds its CPU time ends the process (the timer's signal is not caught, as
decoders written in C do not let Python run), and the memory of the
process is limited once at start. Its parent kills it if the answer is no longer needed.
"""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, TypeAlias

from PIL import AvifImagePlugin, Image

from sfumato import allocator
from sfumato.errors import InvalidPicture
from sfumato.pictures import decoder_frames, fitting, images, recipe, source_clips, source_sounds
from sfumato.pictures.images import Bounds
from sfumato.pictures.source_clips import Drawn

DecoderAnswer: TypeAlias = tuple[dict[str, Any], bytes | memoryview]
"""What is known about the picture or clip, and the resulting bytes."""


def read_size(data: bytes, param: str, bounds: Bounds) -> DecoderAnswer:
    """`size`, from the header."""
    return {"size": images.read_size(data, param, bounds)}, b""


def picture(data: bytes, param: str, bounds: Bounds, fit: list[int] | None = None, crop: bool = False) -> DecoderAnswer:
    """A source picture as PNG, and its original `size`; fitted to the size `fit` if given."""
    png, original_size = images.normalise(data, param, bounds)
    return {"size": original_size}, fitting.fitted(png, (fit[0], fit[1]), crop) if fit else png


def mask(data: bytes, param: str, bounds: Bounds) -> DecoderAnswer:
    """A mask in OpenAI's form, and its original `size`."""
    png, original_size = images.normalise(data, param, bounds)
    return {"size": original_size}, images.as_mask(png)


def fitted_mask(data: bytes, param: str, bounds: Bounds, fit: list[int], **options: Any) -> DecoderAnswer:
    """A mask in AUTOMATIC1111's form."""
    png, original_size = images.normalise(data, param, bounds)
    return {"size": original_size}, fitting.mask(png, (fit[0], fit[1]), fitting.Fitting(**options))


def clip_size(data: bytes, param: str, bounds: Bounds) -> DecoderAnswer:
    """`size` of a clip, from the header."""
    return {"size": source_clips.check(data, param, bounds)}, b""


def clip(data: bytes, param: str, bounds: Bounds, **drawn: Any) -> DecoderAnswer:
    """The frames of a source clip. `drawn`: fields of `source_clips.Drawn`."""
    drawn |= {name: tuple(drawn[name]) for name in ("size", "own") if drawn.get(name)}
    return source_clips.decode(data, param, bounds, Drawn(**drawn))


def sound(data: bytes, param: str, bounds: Bounds, most_s: float, rate: int | None = None) -> DecoderAnswer:
    """The samples of a source sound."""
    return source_sounds.decode(data, param, most_s, rate)


def texts(data: bytes, param: str, bounds: Bounds) -> DecoderAnswer:
    """`texts` of a picture file; its pixels are not decoded."""
    return {"texts": recipe.texts(data, param)}, b""


TASKS: Mapping[str, Callable[..., DecoderAnswer]] = MappingProxyType(
    {function.__name__: function for function in (read_size, picture, mask, fitted_mask, clip_size, clip, sound, texts)}
)


def main() -> None:
    """Answer tasks until the input ends. Arguments: CPU seconds per task, bytes of memory."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    with suppress(ValueError, OSError):  # macOS does not support this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    allocator.return_large_blocks()  # so that the process shrinks again after a huge picture
    Image.MAX_IMAGE_PIXELS = None  # `pictures.images` has its own limit, with its own message
    Image.init()
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # leave the other CPU cores to others
    while True:
        try:
            request, data = decoder_frames.read(sys.stdin.buffer)
        except EOFError:
            return
        except MemoryError:
            return  # the file alone exceeds the memory limit: the parent reports it
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer, output = _answer(request, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        decoder_frames.write(sys.stdout.buffer, answer, output)
        del data, output


def _answer(request: dict[str, Any], data: bytes) -> DecoderAnswer:
    task, bounds = TASKS[request.pop("task")], Bounds(**request.pop("bounds"))
    try:
        return task(data, bounds=bounds, **request)
    except InvalidPicture as error:
        return {"error": error.message, "param": error.param}, b""
    except MemoryError:
        return {"error": f"{request['param']}: decoding the picture takes too much memory"}, b""


if __name__ == "__main__":
    main()
