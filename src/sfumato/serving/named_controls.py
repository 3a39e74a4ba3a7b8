"""What the controls of a request name: ControlNets and IP-Adapters, which must be there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from sfumato.checkpoints import controlnets, ip_adapters
from sfumato.core import Control, labels
from sfumato.errors import InvalidRequest


async def prompts(controls: Sequence[Control], folder: Path, *, hub: bool) -> list[str]:
    """The fields with the pictures that are for IP-Adapters.

    `hub`: whether anything may be downloaded from it for requests. Raises InvalidRequest for a name that is not there.
    """
    found = []
    for label, control in zip(labels(controls), controls, strict=True):
        if not control.name:
            continue
        param = f"{label}.name"
        adapter, places = await asyncio.to_thread(ip_adapters.find_any, folder, control.name, param)
        if not hub and not all(isinstance(place, Path) for place in places):
            kind = "IP-Adapter" if adapter else "ControlNet"
            there = ip_adapters.available(folder) if adapter else controlnets.available(folder)
            raise InvalidRequest(
                f"{param}: there is no {kind} {control.name[:100]!r} in the folder, "
                f"and nothing is downloaded from the hub for requests (the setting lora_hosts). {there}; put it there, "
                "beside the model files",
                param=param,
            )
        if adapter:
            found.append(f"{label}.image")
    return found
