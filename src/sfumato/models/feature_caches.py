"""Give a loaded transformer the feature cache that its model file names; diffusers' hooks do the work.

`batching` keeps a state per request, and draws such requests one by one: whether layers are skipped depends on the
request.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import diffusers
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, nearest_interp

from sfumato.checkpoints import feature_caches
from sfumato.config import ModelConfig


class MagCache(diffusers.MagCacheConfig):  # type: ignore[misc]
    """MagCache for runs of any number of steps: diffusers' configuration is for one."""

    mag_ratios: Any
    num_inference_steps: int

    def __init__(self, mag_ratios: Any, **settings: Any) -> None:
        super().__init__(mag_ratios=mag_ratios, num_inference_steps=len(mag_ratios), **settings)
        self._measured = self.mag_ratios

    def for_steps(self, steps: int) -> None:
        """The next forward pass is one of a run of so many steps."""
        if steps != self.num_inference_steps:
            self.num_inference_steps = steps
            self.mag_ratios = nearest_interp(self._measured, steps)


RATIOS: Mapping[str, Any] = MappingProxyType({"FluxTransformer2DModel": FLUX_MAG_RATIOS})
"""Transformer class → the ratios for MagCache that diffusers has."""

CONFIGURATIONS: Mapping[str, type[Any]] = MappingProxyType(
    {
        "first_block": diffusers.FirstBlockCacheConfig,
        "taylorseer": diffusers.TaylorSeerCacheConfig,
        "magcache": MagCache,
    }
)
"""Keys of `readers.CACHES` → diffusers' classes."""

HOW_TO_MEASURE = (
    "one number for each step: run diffusers once with MagCacheConfig(calibrate=True, num_inference_steps=...), which "
    "prints them"
)


def engage(config: ModelConfig, pipeline: Any, dtype: Any) -> None:
    """Raises ModelFileError if diffusers does not know the transformer's blocks."""
    if config.cache is None:
        return
    module = getattr(pipeline, feature_caches.DENOISER, None)
    if module is None or not hasattr(module, "enable_cache"):
        raise feature_caches.refusal(config, f"{type(pipeline).__name__} has no transformer that can have one")
    settings: dict[str, Any] = dict(config.cache.settings)
    if config.cache.kind == "taylorseer":
        settings["taylor_factors_dtype"] = dtype  # bfloat16 by default, in which fp32 loses digits
    if config.cache.kind == "magcache" and "mag_ratios" not in settings:
        if (known := RATIOS.get(type(module).__name__)) is None:
            raise feature_caches.refusal(config, f"{type(module).__name__} needs `mag_ratios`, {HOW_TO_MEASURE}")
        settings["mag_ratios"] = known
    try:
        module.enable_cache(CONFIGURATIONS[config.cache.kind](**settings))
    except (ValueError, IndexError) as error:
        raise feature_caches.refusal(config, f"not for {type(module).__name__} ({error})") from error
