"""Idle models wait in main memory and come back from there. Here device and main memory are both the CPU's: what has
moved has another address."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import shutil
import weakref
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sfumato.config import ModelConfig
from sfumato.config.model import Adapter
from sfumato.core import Done
from sfumato.drawing.draw import draw as drawn
from sfumato.engine import loop
from sfumato.engine.local import Local
from sfumato.errors import LoadError
from sfumato.models import footprint
from sfumato.models.load import Loaded
from sfumato.models.sharing import Sharing
from sfumato.residency.budget import Budget
from sfumato.residency.idle_times import IdleTimes
from sfumato.residency.main_memory import MainMemory, available, is_beside
from sfumato.residency.pool import ModelPool
from sfumato.settings import Settings
from sfumato.status import ModelStatus
from support import here, loads, tiny
from support.drawing import quiet
from support.loads import turn


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`one` and `two` differ in their UNet alone; `three` has nothing in common with them."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in ((1, "one"), (2, "three")):
        tiny.save(tiny.stable_diffusion(seed=seed), root / name)
    shutil.copytree(root / "one", root / "two")
    shutil.rmtree(root / "two" / "unet")
    shutil.copytree(root / "three" / "unet", root / "two" / "unet")
    pipeline = tiny.stable_diffusion(seed=1)
    with tiny.seeded(3):
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        layers = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(root, unet_lora_layers=layers, weight_name="lora.safetensors")
    return {path.name: path for path in root.iterdir()}


def config(folders: dict[str, Path], name: str, model: str | None = None, **fields: Any) -> ModelConfig:
    folder = folders[model or name]
    return here.config(folder.parent, folder, name=name, **fields)


def beside(device: str) -> bool:
    return True


def plenty() -> int:
    return 2**40


def main_memory(models: float, folders: dict[str, Path]) -> MainMemory:
    """For so many models."""
    return MainMemory(int(models * size_of(folders)), beside, plenty)


def size_of(folders: dict[str, Path]) -> int:
    index = json.loads((folders["one"] / "model_index.json").read_text())
    return sum(footprint.of_files(folders["one"], index, "fp32", None).values())


class Told:
    """Each model's latest state."""

    def __init__(self) -> None:
        self.states: dict[str, ModelStatus] = {}

    def __call__(self, name: str, status: ModelStatus) -> None:
        self.states[name] = status

    def __getitem__(self, name: str) -> str:
        return self.states[name].state


def use(pool: ModelPool, config: ModelConfig) -> Loaded:
    with pool.use(config, turn) as model:
        return model


def picture(pool: ModelPool, config: ModelConfig) -> bytes:
    with pool.use(config, turn) as model:
        return drawn(model, here.asked(), quiet).file


def addresses(module: Any) -> set[Any]:
    return set(footprint.blocks([module]))


def test_the_least_recently_used_goes_to_main_memory_then_to_disk(folders: dict[str, Path]) -> None:
    told = Told()
    pool = loads.pool(9, told, budget=Budget(int(1.5 * size_of(folders))), main_memory=main_memory(2.5, folders))
    one, two, three, four = (config(folders, name, "one") for name in ("one", "two", "three", "four"))
    expected = picture(pool, one)
    use(pool, two)
    assert (told["one"], told["two"]) == ("in_main_memory", "ready")
    assert told.states["one"].detail == "another model needs its place"
    assert len(pool) == 2
    assert pool.sizes["one"] == pool.sizes["two"]
    assert picture(pool, one) == expected
    assert (told["one"], told["two"], pool.loads) == ("ready", "in_main_memory", 2), "it was not read from disk"
    use(pool, three)
    use(pool, four)
    assert [told[name] for name in ("two", "one", "three", "four")] == [
        "unloaded", "in_main_memory", "in_main_memory", "ready"
    ]  # fmt: skip
    assert told.states["two"].detail == "its main memory is needed"
    assert (pool.loads, pool.evictions) == (4, 4)


def test_it_comes_back_without_its_files(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["one"], tmp_path / "one")
    pool = loads.pool(1, main_memory=main_memory(2, folders))
    gone = here.config(tmp_path, tmp_path / "one", name="gone")
    before = picture(pool, gone)
    model = use(pool, gone)
    unet, place = model.pipeline.unet, addresses(model.pipeline.unet)
    use(pool, config(folders, "three"))
    assert not addresses(unet) & place, "its tensors have moved"
    shutil.rmtree(tmp_path / "one")
    assert picture(pool, gone) == before
    assert use(pool, gone).pipeline.unet is unet
    pool.unload("gone")
    with pytest.raises(LoadError):
        use(pool, gone)


@pytest.mark.parametrize("place", ["device", "main memory"])
def test_unloading_on_request_frees_both(folders: dict[str, Path], place: str) -> None:
    told = Told()
    pool = loads.pool(1, told, main_memory=main_memory(2, folders))
    module = weakref.ref(use(pool, config(folders, "one")).pipeline.unet)
    if place == "main memory":
        use(pool, config(folders, "three"))
        assert told["one"] == "in_main_memory"
    assert pool.unload("one") == ()
    assert module() is None
    assert told["one"] == "unloaded"
    pool.unload(None)
    assert (len(pool), pool.sizes) == (0, {})


def test_what_is_in_use_or_pinned_or_offloaded_never_waits_there(folders: dict[str, Path]) -> None:
    told = Told()
    pool = loads.pool(2, told, main_memory=main_memory(9, folders))
    with pool.use(config(folders, "one"), turn):
        use(pool, config(folders, "pinned", "one", pinned=True))
        pool.pin("pinned", False)
        use(pool, config(folders, "three"))
        assert (told["one"], told["pinned"]) == ("ready", "in_main_memory")
    pool.pin("one", True)
    pool.pin("three", False)
    use(pool, config(folders, "two"))
    assert (told["one"], told["three"]) == ("ready", "in_main_memory")
    model = use(pool, config(folders, "two"))
    model.state.offload = "model"
    use(pool, config(folders, "three"))
    assert told["two"] == "unloaded", "its modules are there already, with hooks for its device"


def test_there_is_no_main_memory_beside_the_cpus_own(folders: dict[str, Path]) -> None:
    assert [is_beside(device) for device in ("cpu", "cuda", "cuda:1", "mps", "xpu")] == [False, True, True, True, True]
    for memory in (MainMemory(available=plenty), MainMemory(-1, beside, plenty), MainMemory(1, beside, plenty)):
        told = Told()
        pool = loads.pool(1, told, main_memory=memory)
        use(pool, config(folders, "one"))
        use(pool, config(folders, "three"))
        assert told["one"] == "unloaded"


def test_what_is_free_is_measured(folders: dict[str, Path]) -> None:
    assert available() < Budget().of("cpu")
    free = 3.5 * size_of(folders)
    memory = MainMemory(0, beside, lambda: int(free) - sum(memory.sizes.values()))
    told = Told()
    pool = loads.pool(1, told, main_memory=memory)
    one, two, three = (config(folders, name, "one") for name in ("one", "two", "three"))
    use(pool, one)
    use(pool, two)
    assert told["one"] == "in_main_memory"
    free = 1.5 * size_of(folders)  # another program has taken some
    use(pool, three)
    assert (told["one"], told["two"]) == ("unloaded", "unloaded"), "room to read the new one is needed as well"


def test_idle_times_go_on_in_main_memory(folders: dict[str, Path]) -> None:
    now, told = [0.0], Told()
    pool = loads.pool(1, told, main_memory=main_memory(9, folders), idle_times=IdleTimes(60, lambda: now[0]))
    use(pool, config(folders, "one"))
    now[0] = 10
    use(pool, config(folders, "three", keep_alive=math.inf))
    assert pool.until_expiry() == 50
    now[0] = 60
    pool.tend()
    assert (told["one"], told["three"]) == ("unloaded", "ready")
    assert "keep_alive" in told.states["one"].detail
    assert pool.until_expiry() is None


def test_a_changed_file_is_read_anew(folders: dict[str, Path]) -> None:
    told = Told()
    pool = loads.pool(1, told, main_memory=main_memory(9, folders))
    one, three = config(folders, "one"), config(folders, "three")
    before = use(pool, one)
    use(pool, three)
    other = config(folders, "one", dtype="bf16")
    assert use(pool, other).pipeline is not before.pipeline
    assert (pool.loads, len(pool)) == (3, 2)
    changed = config(folders, "three", seed=7)  # what requests read themselves needs no load
    assert use(pool, changed).config.seed == 7
    assert pool.loads == 3


def test_what_two_models_share_stays_on_the_device_while_one_is_there(folders: dict[str, Path]) -> None:
    told = Told()
    pool = loads.pool(1, told, main_memory=main_memory(9, folders), known=Sharing())
    configs = {name: config(folders, name) for name in ("one", "two", "three")}
    expected = {name: picture(loads.pool(9), each) for name, each in configs.items()}
    one = use(pool, configs["one"])
    vae, unet = addresses(one.pipeline.vae), addresses(one.pipeline.unet)
    two = use(pool, configs["two"])
    assert two.pipeline.vae is one.pipeline.vae
    assert addresses(one.pipeline.vae) == vae, "the other model uses it"
    assert not addresses(one.pipeline.unet) & unet
    assert picture(pool, configs["one"]) == expected["one"]
    assert addresses(one.pipeline.vae) == vae
    pool.unload("one")
    assert told["two"] == "in_main_memory"
    assert not addresses(two.pipeline.vae) & vae, "no model on the device uses it any more"
    use(pool, configs["three"])
    place = addresses(two.pipeline.vae)
    again = use(pool, configs["one"])
    assert again.pipeline.vae is two.pipeline.vae
    assert not addresses(two.pipeline.vae) & place, "a model that was read from disk has it on the device again"
    for name in ("one", "two", "three", "two", "one", "three"):
        assert picture(pool, configs[name]) == expected[name]
        together = {block: n for model in (two, again) for block, n in model.blocks().items()}
        assert len(together) < len(two.blocks()) + len(again.blocks()), "they share it still"


def test_a_base_under_a_lora_is_in_memory_once_wherever_it_is(folders: dict[str, Path]) -> None:
    pool = loads.pool(1, main_memory=main_memory(9, folders), known=Sharing())
    plain = config(folders, "plain", "one")
    tuned = config(folders, "tuned", "one", adapters=(Adapter("lora.safetensors", 1.0),))
    expected = [picture(loads.pool(9), each) for each in (plain, tuned)]
    assert expected[0] != expected[1]
    one, other = use(pool, plain), use(pool, tuned)
    for _ in range(2):
        assert [picture(pool, plain), picture(pool, tuned)] == expected
        use(pool, config(folders, "three"))
        together = {block: n for model in (one, other) for block, n in model.blocks().items()}
        assert sum(together.values()) < 1.1 * sum(one.blocks().values())
    pool.unload("plain")
    assert picture(pool, tuned) == expected[1]


def test_tensors_that_are_one_stay_one() -> None:
    """Tied weights, and a view of a part of another tensor."""

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.arange(12.0).reshape(4, 3))
            self.head = torch.nn.Linear(3, 4, bias=False)
            self.head.weight = self.table
            self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    class Pipeline:
        def __init__(self) -> None:
            self.text_encoder = Tied()

    module = Pipeline()
    model = Loaded(ModelConfig(name="m", model="m"), module, "here", "cpu", "fp32")
    memory = MainMemory(2**30, beside, plenty)
    memory.add("m", model, 0)
    before = addresses(module.text_encoder)
    memory.take(memory.to_take(()))
    assert not addresses(module.text_encoder) & before
    assert module.text_encoder.head.weight is module.text_encoder.table
    assert memory.needs(model).total == 13 * 4
    memory.give(model.blocks(), "cpu")
    assert memory.needs(model).total == 0
    assert torch.equal(module.text_encoder.table, torch.arange(12.0).reshape(4, 3))
    assert module.text_encoder.scale == 2


def test_a_model_that_cannot_move_leaves_altogether(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told()
    pool = loads.pool(1, told, main_memory=main_memory(9, folders))
    use(pool, config(folders, "one"))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("this one stays where it is")

    with monkeypatch.context() as patched:
        patched.setattr(MainMemory, "_move", fail)
        use(pool, config(folders, "three"))
        pool.tend()
    assert (told["one"], told["three"]) == ("unloaded", "ready")
    assert "stays where it is" in told.states["one"].detail
    assert picture(pool, config(folders, "one"))


def test_who_gives_up_on_the_way_back_leaves_it_in_main_memory(folders: dict[str, Path]) -> None:
    told = Told()
    pool = loads.pool(1, told, main_memory=main_memory(9, folders))
    one, three = config(folders, "one"), config(folders, "three")
    expected = picture(pool, one)

    def gives_up() -> None:
        raise TimeoutError

    with pool.use(three, turn), pytest.raises(TimeoutError), pool.use(one, gives_up):
        pytest.fail("there is no place for it")
    assert told["one"] == "in_main_memory"
    assert picture(pool, one) == expected
    assert pool.loads == 2


def test_the_engine_says_where_a_model_is(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loop, "MainMemory", functools.partial(MainMemory, is_beside=beside, available=plenty))
    one, three = config(folders, "one"), config(folders, "three")

    async def draw(engine: Local, model: ModelConfig) -> Done:
        async with aclosing(engine.submit(model, here.asked(id=model.name))) as events:
            done = [event async for event in events][-1]
        assert isinstance(done, Done)
        return done

    async def work() -> None:
        settings = Settings(device="cpu", log_level="error", loaded_models=1, data=tmp_path, main_memory_mb=4096)
        engine = Local(settings)
        await engine.start()
        try:
            first = await draw(engine, one)
            await draw(engine, three)
            assert (engine.status("one").state, engine.status("three").state) == ("in_main_memory", "ready")
            again = await draw(engine, one)
            assert again.file == first.file
            assert (engine.stats.loads, engine.stats.resident_models) == (2, 2)
            assert set(engine.stats.model_bytes) == {"one", "three"}
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(work(), 300))
