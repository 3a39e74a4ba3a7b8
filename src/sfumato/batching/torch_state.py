"""State of torch that belongs to the thread, and so to every request on it, unless it is looked after.

Grad mode, autocast and function modes have to be the same on both sides of a switch. The global random
generators are given to each request as its own: some pipelines and schedulers draw from them. Both hold for
every type of device that torch knows and for each device of the machine, not for the one in use alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

Device: TypeAlias = tuple[str, int]
"""Type and index: ("cuda", 1)."""

Random: TypeAlias = Mapping[Device, torch.Tensor]
"""State of the generator of each device."""

CPU: Device = ("cpu", 0)


def _casting() -> tuple[str, ...]:
    """Types of devices that have an autocast of their own."""
    known = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", torch._C._get_privateuse1_backend_name())
    found = []
    for kind in known:
        try:
            torch.is_autocast_enabled(kind)
        except RuntimeError:  # this torch was built without a word for it
            continue
        found.append(kind)
    return tuple(found)


AUTOCAST = _casting()


def ambient() -> tuple[Any, ...]:
    """What has to be the same on both sides of a switch."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.is_autocast_cache_enabled(),
        tuple([(kind, torch.get_autocast_dtype(kind)) for kind in AUTOCAST if torch.is_autocast_enabled(kind)]),
    )


def restore(found: tuple[Any, ...]) -> None:
    """Put back what can be put back of an earlier `ambient()`."""
    torch.set_grad_enabled(found[0])
    torch.set_default_dtype(found[2])
    torch.set_autocast_cache_enabled(found[5])
    casting = dict(found[6])
    for kind in AUTOCAST:
        torch.set_autocast_enabled(kind, kind in casting)
        torch.set_autocast_dtype(kind, casting.get(kind, torch.get_autocast_dtype(kind)))


def seeded() -> Random:
    """For a new request: streams of its own, decided by the global one."""
    seed = int(torch.randint(2**62, ()).item())
    # What a generator's state is made of differs from device to device; a generator there knows.
    return {device: torch.Generator(_name(device)).manual_seed(seed).get_state() for device in (CPU, *devices())}


def random() -> Random:
    states = {CPU: torch.get_rng_state()}
    for kind, index in devices():
        states[kind, index] = torch.get_device_module(kind).get_rng_state(index)
    return states


def set_random(states: Random) -> None:
    """A device that came into use after they were taken is left as it is."""
    torch.set_rng_state(states[CPU])
    for (kind, index), state in states.items():
        if kind != "cpu":
            torch.get_device_module(kind).set_rng_state(state, index)


def devices() -> tuple[Device, ...]:
    """Every device beside the CPU whose generator may have been drawn from."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return ()
    module = torch.get_device_module(accelerator.type)
    # Asking a device that nobody has used would start it, which takes seconds and memory.
    started = getattr(module, "is_initialized", torch.accelerator.is_available)
    return tuple((accelerator.type, index) for index in range(module.device_count())) if started() else ()


def _name(device: Device) -> str:
    kind, index = device
    return kind if kind in ("cpu", "mps") else f"{kind}:{index}"
