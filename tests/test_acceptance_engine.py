"""Acceptance rows about models that come and go: 9, 10 and 11. Row 23 is in test_tokens."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sfumato.core import Done, Event, Generation, Step
from sfumato.engine.local import Local
from sfumato.engine.protocol import Engine
from sfumato.pictures.images import decoded
from sfumato.process.supervisor import Supervisor
from sfumato.sampling import nested
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings
from support import loras, tiny
from support.tensor_memory import held

ONE = Settings(device="cpu", log_level="error", loaded_models=1)
"""Only one model fits."""

TOLERANCE = 0.1
"""Share by which the process may have grown: allocators keep what they once had."""


@pytest.fixture(scope="module")
def catalog(repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """a, b and c of three families; `tuned` is a with a LoRA."""
    folder = tmp_path_factory.mktemp("models")
    sources = {
        "a": repositories["nitrosocke/Ghibli-Diffusion"],
        "b": repositories["Linaqruf/animagine-xl"],
        "c": repositories["tiny/flux"],
        "tuned": repositories["nitrosocke/Ghibli-Diffusion"],
    }
    pipeline = tiny.stable_diffusion()
    with tiny.seeded(3):
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    for name, source in sources.items():
        lora = "lora_adapter: pytorch_lora_weights.safetensors\nlora_scale: 2\n" if name == "tuned" else ""
        (folder / f"{name}.yaml").write_text(f"name: {name}\nparameters:\n  model: {source}\ndtype: fp32\n{lora}")
    return Catalog([folder])


def wanted(id: str, **fields: Any) -> Generation:
    return Generation(
        **nested({"id": id, "prompt": "a cat", "seed": 1, "steps": 2, "width": 64, "height": 64, **fields})
    )


async def drawn(engine: Engine, catalog: Catalog, model: str, **fields: Any) -> str:
    """A fingerprint of the pixels of that model's picture."""
    async with aclosing(engine.submit(catalog.get(model), wanted(model, **fields))) as events:
        last = [event async for event in events][-1]
    assert isinstance(last, Done), last
    return hashlib.sha256(decoded(last.file).tobytes()).hexdigest()


def with_engine(make: Callable[[Settings], Engine], work: Callable[[Engine], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        engine = make(ONE)
        await engine.start()
        try:
            await work(engine)
        finally:
            await engine.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("models", "rounds"), [("abc", 5), (("tuned", "a"), 10)], ids=["three models", "LoRA on and off"]
)
def test_row_09_memory_comes_back(catalog: Catalog, models: tuple[str, ...], rounds: int) -> None:
    async def work(engine: Engine) -> None:
        first: list[str] = []
        tensors: list[int] = []
        resident: list[int] = []
        for _ in range(rounds):
            pictures = [await drawn(engine, catalog, model) for model in models]
            first = first or pictures
            assert pictures == first
            tensors.append(held())
            resident.append(engine.stats.memory_bytes)
        assert len(set(first)) == len(models)
        stats = engine.stats
        assert (stats.loads, stats.evictions) == (rounds * len(models), rounds * len(models) - 1)
        # Of weights and latents nothing is left over, to the byte.
        assert tensors == tensors[:1] * rounds
        # The second round has all that stays: the first has imported what pipelines need.
        assert resident[-1] < resident[1] * (1 + TOLERANCE)

    with_engine(Local, work)


def test_row_10_the_idle_model_leaves_and_never_one_in_use(catalog: Catalog) -> None:
    async def work(engine: Engine) -> None:
        order: list[str] = []

        async def draw(model: str, steps: int) -> list[Event]:
            asked = wanted(model, steps=steps)
            found = []
            async with aclosing(engine.submit(catalog.get(model), asked)) as events:
                async for event in events:
                    order.append(f"{model} {type(event).__name__}")
                    found.append(event)
                    if event == Step(1, 31):
                        under_way.set()
            return found

        under_way = asyncio.Event()
        using = asyncio.create_task(draw("a", 30))  # PNDM takes one more
        await under_way.wait()
        other = asyncio.create_task(draw("b", 2))
        for events in await asyncio.gather(using, other):
            assert isinstance(events[-1], Done)
        # It was in use: the other one waited. Then it was idle, and left.
        assert order.index("a Done") < order.index("b Step")
        assert (engine.status("a").state, engine.status("b").state) == ("unloaded", "ready")
        assert "another model needs its place" in engine.status("a").detail
        assert (engine.stats.loads, engine.stats.evictions, engine.stats.resident_models) == (2, 1, 1)

    with_engine(Supervisor, work)


def test_row_11_a_lora_leaves_no_trace(catalog: Catalog) -> None:
    fresh: list[str] = []
    after: list[str] = []

    async def alone(engine: Engine) -> None:
        fresh.append(await drawn(engine, catalog, "a"))

    async def following(engine: Engine) -> None:
        after.extend([await drawn(engine, catalog, model) for model in ("tuned", "a")])
        path = catalog.get("tuned").folder / "pytorch_lora_weights.safetensors"
        for weight in (2.0, 1.0):  # of requests, to the model without one
            after.append(await drawn(engine, catalog, "a", loras=(loras.of(path, weight),)))
        after.append(await drawn(engine, catalog, "a"))

    with_engine(Supervisor, alone)
    with_engine(Supervisor, following)
    tuned, plain, doubled, single, plain_again = after
    assert plain == plain_again == fresh[0]
    assert len({tuned, single, plain}) == 3
    assert doubled == tuned, "from the model file or of the request"
