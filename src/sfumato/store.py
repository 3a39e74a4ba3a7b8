"""Pictures on disk. A file appears under its name whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from pathlib import Path

from sfumato.errors import StorageError

_NAME = re.compile(r"[0-9a-f]{32}\.png")


class Store:
    """A folder of pictures, each under a random name that cannot be guessed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, png: bytes) -> str:
        """Keep a picture; returns its name. Raises StorageError when it cannot be written."""
        name = f"{uuid.uuid4().hex}.png"
        temporary: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
            with os.fdopen(handle, "wb") as file:
                file.write(png)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(self.folder / name)
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            raise StorageError(
                f"the picture was drawn but could not be written to {self.folder}: {error.strerror}. "
                "Free space there, mend its permissions, or ask for response_format b64_json."
            ) from error
        return name

    def path(self, name: str) -> Path | None:
        """The file of that name, or None when there is none (any other name included)."""
        path = self.folder / name
        return path if _NAME.fullmatch(name) and path.is_file() else None
