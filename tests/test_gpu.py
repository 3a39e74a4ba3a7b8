"""On a real GPU: half precision, the CPU's seeds, memory that really runs out, and a worker that is really killed.

Skipped without CUDA. `benchmarks/gpu.py` runs them where there is one. Low memory and residency have their own.
"""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from benchmarks import parity
from sfumato.batching.batcher import Batcher
from sfumato.batching.verification import Verification
from sfumato.config import ModelConfig
from sfumato.core import Done, Event, Generation, Step
from sfumato.drawing import out_of_memory
from sfumato.drawing.draw import draw
from sfumato.errors import OutOfMemory
from sfumato.models import load
from sfumato.models.load import Loaded
from sfumato.process.supervisor import Supervisor
from sfumato.sampling import nested
from sfumato.serving.catalog import EMBEDDED, Catalog
from sfumato.settings import Settings
from support import tiny
from support.drawing import quiet, wanted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore"),  # diffusers' and transformers' own, some of them about toy sizes
]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDING = {"fp16": 2**-11, "bf16": 2**-8}
"""Relative, of one operation."""

HALF = 4
"""Roundings of the denoiser's output by which a batch may differ from its members: its kernels sum in another order."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", parity.FAMILIES)
def test_batched_is_solo_in_half_precision(name: str, dtype: str, record_property: Any) -> None:
    """No further than some roundings of the denoiser's output, whose effect on the picture is measured with them."""
    family = parity.FAMILIES[name]
    pipe = family.build().to("cuda", DTYPES[dtype])
    pipe.set_progress_bar_config(disable=True)
    calls = parity.seeded(family.calls)
    try:
        with torch.no_grad():
            alone = [parity.draw(pipe, call) for call in calls]
    except (RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"diffusers alone does not draw it: {type(error).__name__}: {error}"[:200])
    if not all(np.isfinite(each).all() for each in alone):
        pytest.skip("diffusers alone draws NaN")
    batcher = Batcher(max_rows=16, verification=Verification())
    together = parity.together(batcher, pipe, family.calls)
    error = parity.difference(alone, together)
    count = batcher.counts[family.denoiser]
    record_property("mean batch", round(count.calls / max(1, count.forwards), 2))
    record_property("error", error)
    if error:
        with parity.jittered(getattr(pipe, family.denoiser), ROUNDING[dtype]), torch.no_grad():
            noise = parity.difference(alone, [parity.draw(pipe, call) for call in parity.seeded(family.calls)])
        record_property("noise", noise)
        assert error <= HALF * noise


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    made = {
        "sd": tiny.stable_diffusion, "sdxl": tiny.stable_diffusion_xl, "sd3": tiny.stable_diffusion_3,
        "flux": tiny.flux,
    }  # fmt: skip
    return {name: tiny.save(make(), root / name) for name, make in made.items()}


def config_of(folder: Path, **fields: Any) -> ModelConfig:
    return ModelConfig(**nested({"name": "m", "model": str(folder), "dtype": "fp32", **fields}))


def pixels(done: Done) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(done.file)).convert("RGB")).astype(int)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_a_seed_is_the_cpus(family: str, folders: dict[str, Path]) -> None:
    """Noise is drawn on the CPU; what differs is how each device sums (TF32 is in the convolutions)."""
    asked = wanted(prompt="a cat", width=64, height=64, steps=3)
    here, there = (
        draw(load.load(config_of(folders[family]), device, quiet), asked, quiet) for device in ("cpu", "cuda")
    )
    difference = np.abs(pixels(here) - pixels(there))
    assert difference.mean() < 2
    other = draw(load.load(config_of(folders[family]), "cuda", quiet), replace(asked, seed=asked.seed + 1), quiet)
    assert np.abs(pixels(here) - pixels(other)).mean() > 4 * difference.mean()


# Memory that runs out.

MB = 2**20


@contextmanager
def room(size: int) -> Iterator[None]:
    """While entered, torch's allocator of this process has this many bytes."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def peak(model: Loaded, asked: Generation) -> int:
    """Bytes that torch reserves at most while it draws."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    draw(model, asked, quiet)
    return torch.cuda.max_memory_reserved()


def drawn(model: Loaded, asked: Generation) -> Done:
    return out_of_memory.with_less(model, asked, lambda each: draw(model, each, quiet))


def heavy(folder: Path) -> Path:
    """A Stable Diffusion with more weights than activations: a UNet of 750 MB, a text encoder of 300 MB, in fp32."""
    pipe = tiny.stable_diffusion()
    torch.manual_seed(0)
    text = pipe.text_encoder.config
    pipe.register_modules(
        unet=d.UNet2DConditionModel(
            block_out_channels=(320, 960), layers_per_block=1, attention_head_dim=8, cross_attention_dim=1024,
            sample_size=8, down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        ),
        text_encoder=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=6,
                vocab_size=text.vocab_size, bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id,
                pad_token_id=text.pad_token_id, max_position_embeddings=text.max_position_embeddings,
            )
        ),
    )  # fmt: skip
    return tiny.save(pipe, folder)


def test_a_real_shortage_is_met_with_tiles(folders: dict[str, Path]) -> None:
    model = load.load(config_of(folders["sd"], vae_slicing=False), "cuda", quiet)
    asked = wanted(prompt="a cat", width=1024, height=1024, steps=2)
    draw(model, replace(asked, sampling=replace(asked.sampling, width=64, height=64)), quiet)  # cuDNN's own memory
    whole, tiled = peak(model, asked), peak(model, replace(asked, savings=("vae_tiling",)))
    assert tiled < whole
    with room((whole + tiled) // 2):
        done = drawn(model, asked)
    assert done.recipe.savings == ("vae_tiling",)
    assert np.array_equal(pixels(done), pixels(draw(model, replace(asked, savings=("vae_tiling",)), quiet)))


def test_every_rung_is_taken_and_the_picture_is_the_same(tmp_path: Path) -> None:
    config = config_of(heavy(tmp_path), vae_tiling=False)
    asked = wanted(prompt="a cat", width=64, height=64, steps=2)
    resident = load.load(replace(config, offload="none"), "cuda", quiet)
    expected, whole = pixels(draw(resident, asked, quiet)), peak(resident, asked)
    weights = sum(each.numel() * each.element_size() for each in resident.pipeline.unet.parameters())
    del resident
    model = load.load(config, "cuda", quiet)
    assert model.state.offload == "none"
    with room(whole - 150 * MB):  # without the text encoder it fits
        done = drawn(model, asked)
        assert model.state.offload == "model"
        assert np.abs(pixels(done) - expected).max() <= 1
    with room(weights // 2):
        done = drawn(model, asked)
        assert model.state.offload == "group"
        assert np.abs(pixels(done) - expected).max() <= 1
    with room(24 * MB), pytest.raises(OutOfMemory, match="Request a smaller size"):
        drawn(model, replace(asked, sampling=replace(asked.sampling, width=1024, height=1024)))
    assert np.abs(pixels(drawn(model, asked)) - expected).max() <= 1, "the next request is drawn"


def test_unloading_frees_the_card(tmp_path: Path) -> None:
    folder = heavy(tmp_path)
    load.load(config_of(folder), "cuda", quiet)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = load.load(config_of(folder), "cuda", quiet)
    draw(model, wanted(prompt="a cat", width=64, height=64), quiet)
    took = torch.cuda.memory_reserved() - before
    del model
    gc.collect()
    torch.cuda.empty_cache()
    assert took > 500 * MB
    assert torch.cuda.memory_reserved() - before < 0.05 * took


# A worker in a process of its own.

REQUESTS = [
    wanted(id=str(seed), prompt="a rocket on a blue background", seed=seed, steps=10 + seed, width=128, height=128)
    for seed in range(8)
]


async def answers(supervisor: Supervisor, seen: Callable[[Event], object] = lambda event: None) -> list[Done]:
    async def one(asked: Generation) -> Done:
        async with aclosing(supervisor.submit(Catalog([EMBEDDED]).get("sfumato-tiny"), asked)) as events:
            async for event in events:
                last = event
                seen(event)
        assert isinstance(last, Done), last
        return last

    return await asyncio.gather(*(one(asked) for asked in REQUESTS))


def test_what_a_killed_worker_was_drawing_is_drawn_again() -> None:
    """`kill -9` in the middle of eight requests, each with other steps."""
    supervisor = Supervisor(Settings(log_level="error"))
    killed: list[int] = []

    def kill(event: Event) -> None:
        if isinstance(event, Step) and event.step > 4 and not killed and supervisor.pid:
            killed.append(supervisor.pid)
            os.kill(supervisor.pid, signal.SIGKILL)

    with asyncio.Runner() as runner:
        runner.run(supervisor.start())
        try:
            before = runner.run(answers(supervisor))
            after = runner.run(answers(supervisor, kill))
            assert killed
            assert supervisor.pid not in killed
            info = supervisor.status("sfumato-tiny").info
            assert info
            assert info.device.startswith("cuda")
        finally:
            runner.run(supervisor.stop())
    for one, other in zip(before, after, strict=True):
        difference = np.abs(pixels(one) - pixels(other))
        assert difference.max() <= 8, (
            "bf16: who joins a batch when is not the same, and neither is the order of its sums"
        )
        assert difference.mean() < 0.2
