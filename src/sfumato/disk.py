"""What survives a power cut: a file once it is synced, and its name once its folder is."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def sync_names(folder: Path) -> None:
    """Names of the files in a folder survive a power cut from now on. Blocks.

    Errors count for nothing, as in SQLite: a file system without such a thing says EINVAL, Windows opens no folder,
    and a disk that fails says so when the file itself is synced.
    """
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_folder(folder: Path) -> None:
    """So does the folder itself, whoever has made it and those that it is in. Blocks."""
    for each in (folder, *folder.absolute().parents):
        sync_names(each)
