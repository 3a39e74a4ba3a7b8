"""Resident memory really falls: measured in the worker process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sfumato.config import ModelConfig
from sfumato.core import Done
from sfumato.engine.protocol import Load, Unload
from sfumato.process.supervisor import Supervisor
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings
from support import here, tiny

FREED = 0.95
"""Share of what a model took that is free again."""

GROWTH = 0.05
"""Share by which the worker may have grown after many loads."""


def with_worker(folder: Path, work: Callable[[Supervisor], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def run() -> None:
        engine = Supervisor(Settings(device="cpu", log_level="error", data=folder / "data", **settings))
        await engine.start()
        try:
            await work(engine)
        finally:
            await engine.stop()

    asyncio.run(run())


async def draw(engine: Supervisor, config: ModelConfig, id: str) -> None:
    async with aclosing(engine.submit(config, here.asked(id=id, steps=1))) as events:
        last = [event async for event in events][-1]
    assert isinstance(last, Done), last


async def unloaded(engine: Supervisor) -> int:
    """Resident bytes of the worker with no model in memory."""
    assert (await engine.carry_out(Unload(None))).in_use == ()
    assert engine.stats.resident_models == 0
    return engine.stats.memory_bytes


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_unloading_frees_what_the_model_took(tmp_path: Path, dtype: str) -> None:
    """Cast to another dtype its weights are allocated, as stored they may be mapped from the file."""
    pipeline: Any = tiny.stable_diffusion()
    with tiny.seeded(0):
        pipeline.register_modules(
            unet=UNet2DConditionModel(
                block_out_channels=(320, 640), layers_per_block=1, cross_attention_dim=tiny.WIDTH, sample_size=8,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            )
        )  # fmt: skip
    config = here.config(tmp_path, tiny.save(pipeline, tmp_path / "m"), dtype=dtype)

    async def work(engine: Supervisor) -> None:
        for id in ("first", "second"):  # imports what pipelines need, and fills what stays, once and for all
            await draw(engine, config, id)
            before = await unloaded(engine)
        assert (await engine.carry_out(Load(config))).error is None
        weights = sum(engine.stats.model_bytes.values())
        await draw(engine, config, "third")  # weights that are mapped from the file are read now
        took = engine.stats.memory_bytes - before
        assert took > 0.5 * weights > 50 * 2**20
        assert await unloaded(engine) - before <= (1 - FREED) * took

    with_worker(tmp_path, work)


@pytest.mark.slow
def test_models_with_loras_come_and_go_and_nothing_is_left(repositories: dict[str, Path], tmp_path: Path) -> None:
    """Three models in turn, twenty times, each with its LoRA, where one fits."""
    sources = {
        "a": (repositories["nitrosocke/Ghibli-Diffusion"], tiny.stable_diffusion(), "unet"),
        "b": (repositories["Linaqruf/animagine-xl"], tiny.stable_diffusion_xl(), "unet"),
        "c": (repositories["tiny/flux"], tiny.flux(), "transformer"),
    }
    for name, (source, pipeline, part) in sources.items():
        denoiser: Any = getattr(pipeline, part)
        with tiny.seeded(3):
            denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
            layers: Any = {f"{part}_lora_layers": get_peft_model_state_dict(denoiser)}
        saved: Any = pipeline
        saved.save_lora_weights(tmp_path, weight_name=f"{name}.safetensors", **layers)
        (tmp_path / f"{name}.yaml").write_text(
            f"name: {name}\nparameters:\n  model: {source}\ndtype: fp32\nlora_adapter: {name}.safetensors\n"
        )
    catalog = Catalog([tmp_path])

    async def work(engine: Supervisor) -> None:
        sizes = []
        for at in range(20):
            for name in sources:
                await draw(engine, catalog.get(name), f"{name}{at}")
            sizes.append(engine.stats.memory_bytes)
        assert engine.stats.loads == 60
        assert sizes[-1] <= sizes[0] * (1 + GROWTH), sizes

    with_worker(tmp_path, work, loaded_models=1)
