"""torch state that is per thread, and so would be shared by all requests unless it is managed.

Grad mode, autocast and function modes must be the same on both sides of a switch. Each request gets its own
state of the global random generators: some pipelines and schedulers draw from them. Both apply to
every device type that torch knows and to each device of the machine, not only to the one in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

Device: TypeAlias = tuple[str, int]
"""Type and index: ("cuda", 1)."""

Random: TypeAlias = Mapping[Device, torch.Tensor]
"""Generator state of each device."""

CPU: Device = ("cpu", 0)


def _autocast_types() -> tuple[str, ...]:
    """Device types with their own autocast."""
    kinds = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", torch._C._get_privateuse1_backend_name())
    supported = []
    for kind in kinds:
        try:
            torch.is_autocast_enabled(kind)
        except RuntimeError:  # this torch build does not know the type
            continue
        supported.append(kind)
    return tuple(supported)


AUTOCAST = _autocast_types()


def ambient() -> tuple[Any, ...]:
    """The state that must be the same on both sides of a switch."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.is_autocast_cache_enabled(),
        tuple([(kind, torch.get_autocast_dtype(kind)) for kind in AUTOCAST if torch.is_autocast_enabled(kind)]),
    )


def restore(state: tuple[Any, ...]) -> None:
    """Restore an earlier `ambient()` as far as possible."""
    torch.set_grad_enabled(state[0])
    torch.set_default_dtype(state[2])
    torch.set_autocast_cache_enabled(state[5])
    dtypes = dict(state[6])
    for kind in AUTOCAST:
        torch.set_autocast_enabled(kind, kind in dtypes)
        torch.set_autocast_dtype(kind, dtypes.get(kind, torch.get_autocast_dtype(kind)))


def derived() -> Random:
    """Random states for a new request, derived from the global one."""
    seed = int(torch.randint(2**62, ()).item())
    # The format of a generator's state depends on the device; a generator on it knows.
    return {device: torch.Generator(_name(device)).manual_seed(seed).get_state() for device in (CPU, *devices())}


def random() -> Random:
    states = {CPU: torch.get_rng_state()}
    for kind, index in devices():
        states[kind, index] = torch.get_device_module(kind).get_rng_state(index)
    return states


def set_random(states: Random) -> None:
    """Restore the states; a device first used after they were saved is left alone."""
    torch.set_rng_state(states[CPU])
    for (kind, index), state in states.items():
        if kind != "cpu":
            torch.get_device_module(kind).set_rng_state(state, index)


def devices() -> tuple[Device, ...]:
    """Every device besides the CPU whose generator may have been used."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return ()
    module = torch.get_device_module(accelerator.type)
    # Querying an unused device would initialise it, which takes seconds and memory.
    started = getattr(module, "is_initialized", torch.accelerator.is_available)
    return tuple((accelerator.type, index) for index in range(module.device_count())) if started() else ()


def _name(device: Device) -> str:
    kind, index = device
    return kind if kind in ("cpu", "mps") else f"{kind}:{index}"
