"""Model files as text."""

from __future__ import annotations

from pathlib import Path

from sfumato.config import Broken, ModelConfig, outcomes


def read(folder: Path, text: str) -> ModelConfig:
    (folder / "m.yaml").write_text(text)
    (found,) = outcomes(folder / "m.yaml")
    if isinstance(found, Broken):
        raise found.error
    assert isinstance(found, ModelConfig), found
    return found
