"""What the heart itself costs: microseconds per module call, and memory per parked request.

    python -m benchmarks.loop_overhead

The module does next to nothing, so what is measured is everything around it: describing the call, choosing,
joining the arguments, cutting the output, switching. Sizes are those of Stable Diffusion 1.5 at 512x512 with
guidance, and of FLUX.1 at 1024x1024.
"""

from __future__ import annotations

import gc
import os
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch

from sfumato.engine.batching import Hub
from sfumato.engine.standin import View
from sfumato.engine.trust import Trust

STEPS = 200


class UNet(torch.nn.Module):
    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool = True) -> Any:
        return (sample,)


class Transformer(torch.nn.Module):
    def forward(
        self, hidden_states: Any, timestep: Any, guidance: Any, pooled_projections: Any, encoder_hidden_states: Any,
        txt_ids: Any, img_ids: Any, joint_attention_kwargs: Any = None, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        return (hidden_states,)


def stable_diffusion(module: Any) -> None:
    value, text = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)
    for step in range(STEPS):
        module(value, torch.tensor(step), encoder_hidden_states=text, return_dict=False)


def flux(module: Any) -> None:
    value, text, pooled = torch.randn(1, 4096, 64), torch.randn(1, 512, 4096), torch.randn(1, 768)
    text_ids, image_ids = torch.zeros(512, 3), torch.zeros(4096, 3)
    for step in range(STEPS):
        module(
            hidden_states=value, timestep=torch.tensor([step / STEPS]), guidance=torch.tensor([3.5]),
            pooled_projections=pooled, encoder_hidden_states=text, txt_ids=text_ids, img_ids=image_ids,
            joint_attention_kwargs=None, return_dict=False,
        )  # fmt: skip


def per_call(run: Callable[[Any], None], module: torch.nn.Module, requests: int) -> float:
    """Seconds per module call and request, over a direct call. 0 requests: the direct call itself."""
    trusting = Trust("unlisted", shipped(run, module))
    hub = Hub(max_rows=64, max_active=64, trust=trusting)
    stand_in = View("").stand_in(module, "module")
    for _ in range(requests):
        hub.submit(lambda: run(stand_in))
    start = time.perf_counter()
    if not requests:
        run(module)
    while hub.step():
        pass
    return (time.perf_counter() - start) / STEPS / max(1, requests)


def shipped(run: Callable[[Any], None], module: torch.nn.Module) -> frozenset[str]:
    hub = Hub(trust=Trust("always", frozenset()))
    stand_in = View("").stand_in(module, "module")
    for _ in range(2):
        hub.submit(lambda: run(stand_in))
    for _ in range(4):
        hub.step()
    hub.close(KeyboardInterrupt())
    return frozenset(hub.trust.shown)


def parked_memory(count: int = 200) -> float:
    """Bytes of Python that a parked request holds besides its tensors and its pipeline's own variables."""
    module = UNet().eval()
    hub = Hub(max_active=count)
    stand_in = View("").stand_in(module, "module")
    value, text = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)
    gc.collect()
    tracemalloc.start()
    for _ in range(count):
        hub.submit(lambda: stand_in(value, 1, encoder_hidden_states=text))
    hub.step()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    hub.close(KeyboardInterrupt())
    return held / count


def main() -> None:
    print(f"{'shape':18} {'requests':>8} {'µs per call and request':>24}")
    with torch.no_grad():
        for name, run, module in (("stable diffusion", stable_diffusion, UNet()), ("flux", flux, Transformer())):
            module = module.eval()
            direct = min(per_call(run, module, 0) for _ in range(3))
            print(f"{name:18} {'direct':>8} {direct * 1e6:24.0f}")
            for requests in (1, 2, 8):
                best = min(per_call(run, module, requests) for _ in range(3))
                print(f"{name:18} {requests:8} {(best - direct) * 1e6:24.0f}")
        print(f"a parked request holds {parked_memory() / 1024:.1f} KiB besides its tensors")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
