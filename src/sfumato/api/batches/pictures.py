"""Uploaded files as source pictures: `file_id` in place of a picture."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sfumato.api.batches.files import FileStore
from sfumato.api.batches.tables import BATCH_PURPOSE, VISION
from sfumato.errors import InvalidPicture, JobsUnavailable, in_words
from sfumato.serving import repeat


class UploadedPictures:
    """The `Uploads` of a server. `keyed`: callers have keys, and use their own files only."""

    def __init__(self, files: FileStore, *, keyed: bool) -> None:
        self._files = files
        self._keyed = keyed

    async def get(self, id: str, caller: str, param: str, take: Callable[[int], None]) -> bytes:
        """The file. `take` is called with its size before it is read, and may raise.

        Raises InvalidPicture, and JobsUnavailable if the database cannot be used.
        """
        try:
            file = await asyncio.to_thread(self._files.get, id, caller if self._keyed else None)
            if file and file.purpose != VISION:
                raise _wrong(param, f"{in_words(id)} is a file of the purpose {file.purpose}")
            content = None
            if file:
                take(file.bytes)
                content = await asyncio.to_thread(self._files.content, id)
        except JobsUnavailable:
            repeat.set_unread()
            raise
        if content is None:
            raise _wrong(param, f"{in_words(id)} is no file of yours; it may have expired")
        return content


def _wrong(param: str, what: str) -> InvalidPicture:
    return InvalidPicture(
        f"{param}: file_id: {what}. Upload the picture with POST /v1/files and the purpose {VISION} (the input of a "
        f"batch has {BATCH_PURPOSE}), or send image_url",
        param=param,
    )
