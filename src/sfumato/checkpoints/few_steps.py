"""Models that were distilled to a few steps (Turbo, Lightning, LCM, schnell): how many, and with which guidance.

Told from the scheduler and the denoiser where they say so, else from the name: the files of most do not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

STEPS = "num_inference_steps"
GUIDANCE = "guidance_scale"

FEW = 4
"""Steps, where the name does not say how many."""

CONSISTENCY = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
"""Schedulers that only models distilled for them have."""

_NAME = re.compile(
    r"(?<![a-z])(?i:turbo|lightning|schnell|hyper[-_ ]?(sd|flux)\w*|lcm|dmd2?)(?![a-z])"
    r"|(?<=[a-z0-9])(Turbo|Lightning|Schnell)(?![a-z])|(?<![A-Za-z])(Turbo|Lightning)(?=[A-Z])"
)
"""As words of their own, or in CamelCase."""

_COUNT = re.compile(r"(?<![a-z0-9])([1-9]|1[0-6])[-_ ]?steps?(?![a-z])", re.IGNORECASE)

OF_CLASS: Mapping[str, int] = MappingProxyType({"ZImagePipeline": 9})
"""Classes whose distilled models want more steps."""


def of(
    pipeline: str, scheduler: str, denoiser: Mapping[str, Any], index: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Arguments of the call → values; empty for a model that takes many steps.

    `scheduler`: its class. `denoiser`: its configuration. `index`: the `model_index.json`. `name`: of the source.
    """
    counted = _COUNT.search(name)
    steps = int(counted[1]) if counted else OF_CLASS.get(pipeline, FEW)
    if scheduler in CONSISTENCY:
        return {STEPS: steps, GUIDANCE: 8.0 if denoiser.get("time_cond_proj_dim") else 1.0}
    second = pipeline.startswith("Flux2")
    schnell = pipeline.startswith("Flux") and not second and denoiser.get("guidance_embeds") is False
    if schnell or _NAME.search(name):
        return {STEPS: steps, GUIDANCE: 0.0}
    return {STEPS: steps, GUIDANCE: 1.0} if second and index.get("is_distilled") is True else {}
