"""Which store the settings name: a folder, or what is behind a URL."""

from __future__ import annotations

from pathlib import Path

from sfumato.pictures.store import Store
from sfumato.settings import Settings


def folder_of(settings: Settings) -> Path:
    """Where generated pictures are on this disk, unless `outputs_url` says another place."""
    return settings.data / "generated-images"


def store_of(settings: Settings) -> Store:
    """A store with the place and limits from the settings. Raises ValueError naming the setting at fault."""
    max_age_s, max_bytes = settings.outputs_max_age_h * 3600, settings.outputs_max_mb * 2**20
    if not settings.outputs_url:
        return Store(folder_of(settings), max_age_s=max_age_s, max_bytes=max_bytes)
    from sfumato.pictures.object_store import ObjectStore  # and with it fsspec, which few need

    return ObjectStore(settings.outputs_url, max_age_s=max_age_s, max_bytes=max_bytes)
