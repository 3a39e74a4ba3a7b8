"""What the files of a model say that is not loaded: what requests may ask of it."""

from __future__ import annotations

import asyncio
import time

from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.config import ModelConfig
from sfumato.status import Abilities

HOLDS_S = 5.0
"""How long what they say holds: many requests may wait for a model while it loads."""


class Foreseen:
    """Reads them again after a while, and when the model file has changed."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[Abilities | None, ModelConfig | None, float]] = {}
        """Model → what they say, of which version of its file, and when they were read."""

    async def abilities(self, config: ModelConfig) -> Abilities | None:
        """None: they are not here yet, or do not say."""
        known, config_read, read_at = self._read.get(config.name, (None, None, -HOLDS_S))
        if config_read != config or time.monotonic() > read_at + HOLDS_S:
            known = (await asyncio.to_thread(static_capabilities, config)).abilities
            self._read[config.name] = known, config, time.monotonic()
        return known
