"""Store the pictures, clips and sounds of a request in the gallery, each as soon as it is finished."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress

from sfumato.core import Done, StorePicture
from sfumato.errors import StorageError
from sfumato.pictures.gallery import Gallery
from sfumato.pictures.store import RANDOM_DIGITS
from sfumato.serving import repeat
from sfumato.serving.job import Job

log = logging.getLogger(__name__)

FILE_HEADER = "x-sfumato-file"
"""Of an answer that is, or tells of, one clip or sound: its name below /generated-images/."""


def keeper(
    gallery: Gallery, caller: str, format: str, encode: Callable[[Done], bytes], *, required: bool
) -> StorePicture | None:
    """A callback that encodes each picture and stores it in the gallery; None if the settings say not to keep it.

    `required`: the answer is its URL, so storing must succeed; otherwise a full disk only logs a warning.
    """
    if not required and not gallery.keeps_all:
        return None

    async def keep(done: Done) -> str | None:
        try:
            data = await asyncio.to_thread(encode, done)
            stored = repeat.CURRENT.get()
            random = stored.picture_digits(done.recipe, RANDOM_DIGITS) if stored else ""
            keep = functools.partial(gallery.keep, random=random)
            return await asyncio.to_thread(keep, data, format, caller, done.recipe, time.time())
        except StorageError as error:
            if required:
                raise
            log.warning("a picture was returned but could not be stored: %s", error.message)
            return None

    return keep


def file_keeper(gallery: Gallery, caller: str, format: str, *, required: bool) -> StorePicture | None:
    """The same for a clip or a sound, whose file is stored as it was made."""
    return keeper(gallery, caller, format, lambda done: done.file, required=required)


def file_headers(job: Job, done: Done) -> dict[str, str]:
    """The seed of the one result of a job, and its name in the gallery, if it is kept."""
    name = job.parts[0].name
    return {"x-sfumato-seed": str(done.recipe.seed), **({FILE_HEADER: name} if name else {})}


@asynccontextmanager
async def dropped_if_left(gallery: Gallery, job: Job) -> AsyncGenerator[None, None]:
    """An error or a cancellation inside means that the caller gets no picture: those that are stored are deleted."""
    try:
        yield
    except BaseException:
        if not job.detached:
            await asyncio.shield(asyncio.to_thread(_drop, gallery, job))
        raise


def _drop(gallery: Gallery, job: Job) -> None:
    """Blocks."""
    for part in job.parts:
        if part.name:
            with suppress(StorageError):
                gallery.delete(part.name)
