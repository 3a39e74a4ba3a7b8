"""The size that a model draws by itself: the same before it is loaded, where its files are on this disk."""

from __future__ import annotations

import asyncio

from sfumato.checkpoints import static_capabilities
from sfumato.checkpoints.static_capabilities import DEFAULT_MULTIPLE
from sfumato.config import ModelConfig
from sfumato.engine.protocol import Engine


async def own_size(engine: Engine, config: ModelConfig, unknown: int) -> tuple[tuple[int, int], int]:
    """Width and height in pixels, and what its sides are multiples of. `unknown`: the sides if nothing says them."""
    if info := engine.status(config.name).info:
        return info.sampling.size or config.sampling.size or (unknown, unknown), info.size_multiple
    return await asyncio.to_thread(_by_its_files, config, unknown)


def _by_its_files(config: ModelConfig, unknown: int) -> tuple[tuple[int, int], int]:
    known = static_capabilities.static_capabilities(config)
    multiple = known.size_multiple or DEFAULT_MULTIPLE
    folder, index = static_capabilities.folder_of(config), static_capabilities.index_of(config)
    if config.sampling.size or not (known.pipeline and folder):
        return config.sampling.size or (unknown, unknown), multiple
    own = static_capabilities.default_size(known.pipeline, folder, index)
    return own or (unknown, unknown), multiple
