"""What becomes of the pictures of a request: where each is kept as soon as it is done."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from sfumato.core import Done, Keep
from sfumato.errors import StorageError
from sfumato.pictures.gallery import Gallery
from sfumato.serving.job import Job

log = logging.getLogger(__name__)


def keeper(gallery: Gallery, caller: str, format: str, encoded: Callable[[Done], bytes], *, must: bool) -> Keep | None:
    """Puts each picture, as it is `encoded`, into the gallery; None where the setting says that it is not kept.

    `must`: the answer is its URL. Without that a full disk costs nobody a picture.
    """
    if not must and not gallery.keeps:
        return None

    async def keep(done: Done) -> str | None:
        try:
            data = await asyncio.to_thread(encoded, done)
            return await asyncio.to_thread(gallery.keep, data, format, caller, done.recipe, time.time())
        except StorageError as error:
            if must:
                raise
            log.warning("a picture is answered and not kept: %s", error.message)
            return None

    return keep


def drop(gallery: Gallery, job: Job) -> None:
    """Delete what was kept of a request whose caller gets nothing of it. Blocks."""
    for part in job.parts:
        if part.name:
            with suppress(StorageError):
                gallery.delete(part.name)
