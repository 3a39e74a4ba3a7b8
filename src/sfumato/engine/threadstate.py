"""State of torch that belongs to the thread, and so to every request on it, unless it is looked after.

Grad mode, autocast and function modes have to be the same on both sides of a switch. The global random
generator is given to each request as its own: some pipelines and schedulers draw from it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

Random: TypeAlias = tuple[torch.Tensor, ...]
"""State of the CPU's generator, then of the current GPU's where there is one in use."""


def ambient() -> tuple[Any, ...]:
    """What has to be the same on both sides of a switch."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )


def restore(found: tuple[Any, ...]) -> None:
    """Put back what can be put back of an earlier `ambient()`."""
    torch.set_grad_enabled(found[0])
    torch.set_autocast_enabled("cpu", found[2])
    torch.set_autocast_enabled("cuda", found[3])
    torch.set_default_dtype(found[4])


def seeded() -> Random:
    """For a new request: a stream of its own, decided by the global one."""
    seed = int(torch.randint(2**62, ()).item())
    states = [torch.Generator().manual_seed(seed).get_state()]
    if _on_gpu():
        states.append(torch.Generator("cuda").manual_seed(seed).get_state())
    return tuple(states)


def random() -> Random:
    states = [torch.get_rng_state()]
    if _on_gpu():
        states.append(torch.cuda.get_rng_state())
    return tuple(states)


def set_random(states: Random) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def _on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
