"""Give a loaded transformer the feature cache that its model file names; diffusers' hooks do the work.

`batching` keeps a state per request, and draws such requests one by one: whether layers are skipped depends on the
request.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import diffusers

from sfumato.checkpoints import feature_caches
from sfumato.config import ModelConfig

CONFIGURATIONS: Mapping[str, type[Any]] = MappingProxyType(
    {"first_block": diffusers.FirstBlockCacheConfig, "taylorseer": diffusers.TaylorSeerCacheConfig}
)
"""Keys of `readers.CACHES` → diffusers' classes."""


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
    try:
        module.enable_cache(CONFIGURATIONS[config.cache.kind](**settings))
    except (ValueError, IndexError) as error:
        raise feature_caches.refusal(config, f"not for {type(module).__name__} ({error})") from error
