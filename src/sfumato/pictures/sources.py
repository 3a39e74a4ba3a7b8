"""The source pictures of one request: kept encoded until its turn, then decoded for the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sfumato.core import Control, Generation, Limits, SourceClip, SourceSound, labels
from sfumato.errors import InvalidPicture, InvalidRequest
from sfumato.pictures import images as pictures
from sfumato.pictures import source_sounds
from sfumato.pictures.budget import Share
from sfumato.pictures.decoder_pool import Decoders
from sfumato.pictures.fetch import PictureFetcher
from sfumato.pictures.fitting import Fitting
from sfumato.pictures.source_clips import Drawn

_UPLOADED = "file_id:"


def uploaded(id: str) -> str:
    """What stands for the picture in an uploaded file."""
    return _UPLOADED + id


def is_uploaded(picture: str | bytes) -> bool:
    return isinstance(picture, str) and picture.startswith(_UPLOADED)


def is_url(picture: str | bytes) -> bool:
    return isinstance(picture, str) and picture[:16].strip().lower().startswith(("http:", "https:"))


def bytes_or_url(text: str, param: str) -> str | bytes:
    """The file of base64 or a `data:` URI; a URL as it is. Raises InvalidPicture. Slow for a large one."""
    return text.strip() if is_url(text) else pictures.from_text(text, param)


def encoded_size(picture: str | bytes) -> int:
    """Bytes of an encoded picture, as far as known; 0 for a URL or an uploaded file."""
    if is_url(picture) or is_uploaded(picture):
        return 0
    return len(picture) if isinstance(picture, bytes) else len(picture) * 3 // 4


async def file_of(picture: str | bytes, param: str, fetcher: PictureFetcher, share: Share, caller: str = "") -> bytes:
    """The file of a picture: bytes, base64, `data:` URI, URL or an uploaded file of the caller; what is fetched is
    taken from the share.

    Raises InvalidPicture, or TooManyRequests if the share's budget is used up.
    """
    if isinstance(picture, bytes):
        return picture
    if is_uploaded(picture) and fetcher.uploads:
        return await fetcher.uploads.get(picture.removeprefix(_UPLOADED), caller, param, share.take)
    if is_url(picture):
        return await fetcher.get(picture.strip(), param, share.take)
    return await asyncio.to_thread(pictures.from_text, picture, param)


@dataclass(frozen=True, slots=True)
class Decoded:
    """The pictures of a request as PNG, in the form of `Generation`."""

    images: tuple[bytes, ...] = ()
    mask: bytes | None = None
    controls: tuple[bytes, ...] = ()
    clip: SourceClip | None = None
    sound: SourceSound | None = None

    def put_into(self, generation: Generation) -> Generation:
        pairs = zip(generation.controls, self.controls, strict=True)
        return replace(
            generation,
            images=self.images,
            mask=self.mask,
            controls=tuple(replace(control, image=png) for control, png in pairs),
            clip=self.clip,
            sound=self.sound,
        )


@dataclass(frozen=True, slots=True)
class EncodedSound:
    """The sound that another is made from, as its request has it."""

    file: str | bytes
    """As of `EncodedClip`."""
    field: str


@dataclass(frozen=True, slots=True)
class EncodedClip:
    """The clip that another is drawn from, as its request has it."""

    file: str | bytes
    """File bytes, base64, `data:` URI, URL or an uploaded file."""
    field: str
    drawn: Drawn


class Sources:
    """Source pictures, control pictures, mask, clip and sound: file bytes, base64, `data:` URI, URL or uploaded file.

    `fetch` turns all of them into bytes and checks their headers, `decode` turns them into what the engine
    takes. Both raise InvalidRequest naming the picture, and stop when cancelled.
    """

    def __init__(
        self,
        images: Sequence[str | bytes],
        mask: str | bytes | None,
        controls: Sequence[Control] = (),
        *,
        whole: Sequence[str] = (),
        share: Share,
        limits: Limits,
        fitting: Fitting | None,
        scale: int | None,
        caller: str = "",
        names: Sequence[str] = (),
        clip: EncodedClip | None = None,
        sound: EncodedSound | None = None,
    ) -> None:
        """`caller`: whose uploaded files they may be. `names`: of the images in errors; empty: as their API has them.
        `whole`: fields whose pictures keep their shape, whatever `fitting` says. `scale`: size of the result, relative
        to the first picture; None: the size is known."""
        default = ("image" if fitting is None else f"init_images[{index}]" for index in range(len(images)))
        self._pictures: list[tuple[str, str | bytes]] = list(zip(names or default, images, strict=True))
        labelled = zip(labels(controls), controls, strict=True)
        self._pictures += [(f"{label}.image", control.image) for label, control in labelled]
        self._images = len(images)
        if mask is not None:
            self._pictures.append(("mask", mask))
        self._masked = mask is not None
        self._whole = frozenset(whole)
        self._share = share
        self._limits = limits
        self._fitting = fitting
        self._scale = scale
        self._caller = caller
        self.clip = clip
        self.sound = sound
        share.take(sum(encoded_size(picture) for _, picture in self._pictures))
        share.take(sum(encoded_size(each.file) for each in (clip, sound) if each))

    async def fetch(self, fetcher: PictureFetcher, decoders: Decoders, clip_decoders: Decoders) -> None:
        """Turn all of them into bytes, one after another."""
        if clip := self.clip:
            data = await file_of(clip.file, clip.field, fetcher, self._share, self._caller)
            await clip_decoders.run("clip_size", data, clip.field)
            self.clip = replace(clip, file=data)
        if sound := self.sound:
            data = await file_of(sound.file, sound.field, fetcher, self._share, self._caller)
            source_sounds.check_format(data, sound.field)
            self.sound = replace(sound, file=data)
        for index, (param, picture) in enumerate(self._pictures):
            data = await file_of(picture, param, fetcher, self._share, self._caller)
            self._pictures[index] = (param, data)
            answer, _ = await decoders.run("read_size", data, param)
            if index == 0 and self._scale:
                self._refuse_large(param, *answer["size"])

    async def decode_clip(self, decoders: Decoders, own: tuple[int, int], multiple: int) -> SourceClip:
        """The clip, which must be there, at the size that is drawn; the encoded one is released.

        `own`, `multiple`: the size that the model draws by itself, and what its sides are multiples of
        (`source_clips.Drawn`).
        """
        clip, self.clip = self.clip, None
        assert clip
        assert isinstance(clip.file, bytes)
        drawn: dict[str, Any] = asdict(replace(clip.drawn, own=own, multiple=multiple))
        # Not counted: a hundred times their file, they would refuse who comes next. Places in the queue bound them.
        answer, frames = await decoders.run("clip", clip.file, clip.field, **drawn)
        return SourceClip(frames, **answer | {"size": tuple(answer["size"])})

    async def decode_sound(self, decoders: Decoders, rate: int | None) -> SourceSound:
        """The sound, which must be there; the encoded one is released.

        `rate`: samples a second that the model takes; None: not known.
        """
        sound, self.sound = self.sound, None
        assert sound
        assert isinstance(sound.file, bytes)
        answer, samples = await decoders.run("sound", sound.file, sound.field, most_s=self._limits.seconds, rate=rate)
        return SourceSound(samples, **answer)

    async def decode(self, decoders: Decoders) -> Decoded:
        """The pictures; the encoded ones are released."""
        decoded: list[bytes] = []
        sizes: list[tuple[int, int]] = []
        fitting = self._fitting
        fit = fitting.size if fitting else None
        while self._pictures:
            param, data = self._pictures.pop(0)
            assert isinstance(data, bytes)
            if not self._pictures and self._masked:
                mask = await self._mask(decoders, param, data, fit, sizes[0])
                return Decoded(tuple(decoded[: self._images]), mask, tuple(decoded[self._images :]))
            options = {"fit": fit, "crop": fitting.crop} if fitting and fit and param not in self._whole else {}
            answer, png = await decoders.run("picture", data, param, **options)
            if fitting and fit is None:
                fit = pictures.size(png)
            self._share.count(len(png))
            decoded.append(png)
            width, height = answer["size"]
            sizes.append((width, height))
        return Decoded(tuple(decoded[: self._images]), None, tuple(decoded[self._images :]))

    async def _mask(
        self, decoders: Decoders, param: str, data: bytes, fit: tuple[int, int] | None, first: tuple[int, int]
    ) -> bytes:
        if self._fitting:
            options = {name: value for name, value in asdict(self._fitting).items() if name != "size"}
            _, png = await decoders.run("fitted_mask", data, param, fit=fit, **options)
        else:
            answer, png = await decoders.run("mask", data, param)
            if (size := tuple(answer["size"])) != first:
                raise InvalidPicture(
                    f"the mask is {size[0]}x{size[1]}, the picture {first[0]}x{first[1]}: both must have the same size",
                    param="mask",
                )
        self._share.count(len(png))
        return png

    def _refuse_large(self, param: str, width: int, height: int) -> None:
        scale = self._scale or 1
        violation = self._limits.violation(width * scale, height * scale)
        if violation:
            raise InvalidRequest(
                f"{param}: it would become {width * scale}x{height * scale}; {violation}. "
                "Send a size, or a smaller picture.",
                param=param,
            )
