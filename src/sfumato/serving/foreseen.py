"""What the files of a model say that is not loaded: what requests may ask of it."""

from __future__ import annotations

import asyncio
import time

from sfumato.checkpoints.static_capabilities import StaticCapabilities, static_capabilities
from sfumato.config import ModelConfig
from sfumato.core import Limits
from sfumato.errors import InvalidRequest
from sfumato.formats import VIDEO, kind_of
from sfumato.pipelines import inputs
from sfumato.serving.planning import ImageRequest
from sfumato.status import Abilities, FrameRule

HOLDS_S = 5.0
"""How long what they say holds: many requests may wait for a model while it loads."""


class Foreseen:
    """Reads them again after a while, and when the model file has changed."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[StaticCapabilities, ModelConfig | None, float]] = {}
        """Model → what they say, of which version of its file, and when they were read."""

    async def abilities(self, config: ModelConfig) -> Abilities | None:
        """None: they are not here yet, or do not say."""
        return (await self._capabilities(config)).abilities

    async def check(self, request: ImageRequest, config: ModelConfig, limits: Limits) -> None:
        """Raises InvalidRequest for what they say that the model does not draw."""
        known, sampling, kind = await self._capabilities(config), request.sampling, kind_of(request.format)
        if not (can := known.abilities):
            return
        inputs.check(
            config.name, can, kind=kind, frames=sampling.num_frames, seconds=sampling.seconds,
            pictures=len(request.images), mask=request.mask is not None, controls=len(request.controls),
            fields=request.image_fields, names=request.image_names, others=request.others,
        )  # fmt: skip
        if kind != VIDEO:
            return
        if sampling.size and known.size_multiple:
            inputs.check_sides(config.name, *sampling.size, known.size_multiple)
        if request.video is None and sampling.seconds and (fps := sampling.fps or known.fps):
            frames = (can.frames or FrameRule()).at_least(sampling.seconds * fps)
            _check_seconds(config.name, can.frames, limits, sampling.size or (1, 1), sampling.seconds, fps, frames)

    async def _capabilities(self, config: ModelConfig) -> StaticCapabilities:
        known, config_read, read_at = self._read.get(config.name, (StaticCapabilities(), None, -HOLDS_S))
        if config_read != config or time.monotonic() > read_at + HOLDS_S:
            known = await asyncio.to_thread(static_capabilities, config)
            self._read[config.name] = known, config, time.monotonic()
        return known


def _check_seconds(
    model: str, rule: FrameRule | None, limits: Limits, size: tuple[int, int], seconds: float, fps: float, frames: int
) -> None:
    """As for `num_frames`, naming what the request has."""
    told = f"seconds: {seconds:g} at {fps:g} frames a second"
    if rule and (why := rule.violation(frames)):
        raise InvalidRequest(f"{told} are {frames}; {model} does not draw that many: {why}", param="seconds")
    try:
        limits.check_clip(*size, frames)
    except InvalidRequest as error:
        raise InvalidRequest(f"{told}: {error.message}", param="seconds") from None
