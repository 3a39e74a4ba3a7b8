"""Models come and go: idle times, a memory budget, and loads that disturb nobody."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import shutil
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sfumato.config import ModelConfig
from sfumato.config.model import Adapter
from sfumato.core import Done, Event, Failed, Generation, Step, keep_alive_seconds
from sfumato.drawing.draw import draw as drawn
from sfumato.engine.local import Local
from sfumato.engine.protocol import Report, StatsReport
from sfumato.engine.streams import Streams
from sfumato.errors import Cancelled, LoadError, ModelFileError, ModelTooLarge
from sfumato.models import footprint, load
from sfumato.models.sharing import Sharing
from sfumato.residency.budget import MIB, Budget
from sfumato.residency.idle_times import IdleTimes
from sfumato.residency.main_memory import MainMemory
from sfumato.residency.turns import Turns
from sfumato.serving.catalog import Catalog
from sfumato.serving.planning import ImageRequest
from sfumato.serving.service import Service
from sfumato.settings import Settings
from support import here, loads, tiny
from support.drawing import quiet
from support.hub import Hub
from support.inside import Inside
from support.loads import turn
from support.model_files import read

SETTINGS = Settings(device="cpu", log_level="error", loaded_models=4)


@pytest.fixture(scope="module")
def folder(repositories: dict[str, Path]) -> Path:
    return repositories["nitrosocke/Ghibli-Diffusion"]


@pytest.fixture
def configs(folder: Path, tmp_path: Path) -> dict[str, ModelConfig]:
    return {name: here.config(tmp_path, folder, name=name) for name in "abc"}


# Idle times.


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(300, 300), ("300", 300), ("5m", 300), ("1h30m", 5400), ("1.5h", 5400), ("500ms", 0.5), ("10s", 10), (0, 0),
     ("0", 0), (-1, math.inf), ("-1", math.inf), ("-1m", math.inf), (2.5, 2.5)],
)  # fmt: skip
def test_durations_are_ollamas(value: object, seconds: float) -> None:
    assert keep_alive_seconds(value) == seconds


@pytest.mark.parametrize(
    "value", ["", "soon", "5 minutes", "5m!", True, None, [], "nan", "inf", "m5", "1h-5m", "9" * 50]
)
def test_what_is_no_duration(value: object) -> None:
    with pytest.raises(ValueError, match="5m"):
        keep_alive_seconds(value)


def test_a_bad_idle_time_is_named_wherever_it_stands(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SFUMATO_KEEP_ALIVE='soon'"):
        Settings.load(env={"SFUMATO_KEEP_ALIVE": "soon"})
    with pytest.raises(ModelFileError, match=r"keep_alive.*soon"):
        read(tmp_path, "name: m\nparameters:\n  model: a/b\nkeep_alive: soon\n")
    assert read(tmp_path, "name: m\nparameters:\n  model: a/b\nkeep_alive: 5m\n").keep_alive == 300
    with Inside(tmp_path).client() as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a cat", "model": "m", "keep_alive": "soon"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "keep_alive")


@pytest.mark.parametrize(("sent", "seconds"), [("5m", 300), (0, 0), (-1, math.inf), (None, None), ("", None)])
def test_a_request_says_how_long_its_model_stays(tmp_path: Path, sent: Any, seconds: float | None) -> None:
    inside = Inside(tmp_path)
    with inside.client() as client:
        body = {"prompt": "a cat", "model": "m", "keep_alive": sent}
        assert client.post("/v1/images/generations", json=body).status_code == 200
    assert inside.engine.seen[-1].keep_alive == seconds


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_idle_models_leave_after_their_time(configs: dict[str, ModelConfig]) -> None:
    clock, told = Clock(), []
    pool = loads.pool(
        4, lambda name, status: told.append((name, status.state, status.detail)), idle_times=IdleTimes(60, clock)
    )

    def used(name: str, keep_alive: float | None = None, **fields: Any) -> None:
        with pool.use(replace(configs[name], **fields), turn, keep_alive):
            clock.now += 10  # time in use does not count
            pool.tend()

    used("a")
    assert pool.until_expiry() == 60
    used("b", keep_alive=600.0)
    used("c", pinned=True)
    assert pool.until_expiry() == 40  # a was idle while two others drew
    clock.now += 39
    pool.tend()
    assert sorted(pool.sizes) == ["a", "b", "c"]
    clock.now += 1
    pool.tend()
    assert told[-1] == ("a", "unloaded", "it was idle for 60 s (keep_alive)")
    assert sorted(pool.sizes) == ["b", "c"]
    used("b", keep_alive=math.inf)
    assert pool.until_expiry() is None  # c is pinned
    used("b", keep_alive=keep_alive_seconds("9999999999h"))
    assert pool.until_expiry() is None  # longer than a clock can count
    used("b")  # the latest request decides; without a word it is the server's
    clock.now += 60
    pool.tend()
    assert sorted(pool.sizes) == ["c"]
    used("a", keep_alive=0.0)
    pool.tend()
    assert "a" not in pool.sizes
    used("b", **{"keep_alive": None})
    assert pool.until_expiry() == 60
    pool.unload("b")
    pool.preload(replace(configs["a"], keep_alive=0.0), turn)
    pool.tend()
    assert "a" in pool.sizes, "who orders a model wants it until its first request"


def test_the_loop_wakes_up_for_a_model_that_was_idle_for_long_enough(configs: dict[str, ModelConfig]) -> None:
    async def work(engine: Local) -> None:
        assert isinstance((await events(engine, configs["a"], wanted("1", keep_alive=0.05)))[-1], Done)
        await until(engine, "a", "unloaded")  # nothing more is sent: the loop has to come by itself
        assert "idle" in engine.status("a").detail

    run(work)


# The budget.


def wanted(id: str, **fields: Any) -> Generation:
    return here.asked(id=id, **fields)


async def events(engine: Local, config: ModelConfig, generation: Generation) -> list[Event]:
    async with aclosing(engine.submit(config, generation)) as stream:
        return [event async for event in stream]


async def until(engine: Local, model: str, state: str) -> None:
    for _ in itertools.count():
        if engine.status(model).state == state:
            return
        await asyncio.sleep(0.01)


def run(work: Callable[[Local], Any], settings: Settings = SETTINGS) -> None:
    async def inside() -> None:
        engine = Local(settings)
        await engine.start()
        try:
            async with asyncio.timeout(300):
                await work(engine)
        finally:
            await engine.stop()

    asyncio.run(inside())


def test_what_a_model_takes_is_told_from_its_files_and_then_measured(folder: Path, tmp_path: Path) -> None:
    needs: list[footprint.Needs] = []
    for dtype in ("fp32", "bf16"):
        config = here.config(tmp_path, folder, dtype=dtype)
        measured = sum(load.load(config, "cpu", quiet, needs.append).blocks().values())
        assert set(needs[-1].components) == {"unet", "vae", "text_encoder"}
        assert measured == pytest.approx(needs[-1].total, rel=0.02)
    assert needs[1].total == pytest.approx(needs[0].total / 2, rel=0.02)


def test_a_single_file_says_what_it_takes_too(tmp_path: Path) -> None:
    file = tiny.single_file(tiny.stable_diffusion(), tmp_path / "m.safetensors")
    parts = footprint.of_files(file, {}, "fp32", None)
    assert set(parts) == {"unet", "vae", "text_encoder"}


def test_what_a_file_names_beside_the_model_counts_too(folder: Path, tmp_path: Path) -> None:
    """A LoRA, a ControlNet and a VAE: as much as they take once they are loaded."""
    pipeline = tiny.stable_diffusion()
    pipeline.vae.save_pretrained(tmp_path / "vae")
    ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 8)).save_pretrained(
        tmp_path / "net"
    )
    pipeline.unet.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_v"]))
    layers = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, weight_name="lora.safetensors")
    needs: list[footprint.Needs] = []
    config = here.config(
        tmp_path, folder, vae="vae", control_net="net", pipeline_type="StableDiffusionControlNetPipeline",
        adapters=(Adapter("lora.safetensors", 1.0),), dtype="bf16",
    )  # fmt: skip
    model = load.load(config, "cpu", quiet, needs.append)
    own = needs[0].components
    assert set(own) == {"unet", "vae", "text_encoder", "lora 1", "controlnet 1"}
    assert sum(model.blocks().values()) == pytest.approx(needs[0].total, rel=0.02)
    for name, module in (("vae", model.pipeline.vae), ("controlnet 1", model.pipeline.controlnet)):
        assert own[name] == pytest.approx(sum(footprint.blocks([module]).values()), rel=0.02)


def size_of(config: ModelConfig) -> int:
    needs: list[footprint.Needs] = []
    load.load(config, "cpu", quiet, needs.append)
    return needs[0].total


def test_idle_models_leave_for_one_that_needs_the_memory_and_those_in_use_stay(
    configs: dict[str, ModelConfig],
) -> None:
    size = size_of(configs["a"])
    left: list[str] = []

    def on_status(name: str, status: Any) -> None:
        if status.state == "unloaded":
            left.append(name)

    pool = loads.pool(9, on_status, budget=Budget(int(2.5 * size)))
    with pool.use(configs["a"], turn), pool.use(configs["b"], turn):
        pass
    with pool.use(configs["a"], turn):
        with pool.use(configs["c"], turn):
            assert left == ["b"], "the least recently used one that is not in use"
            turns = 0

            def impatient() -> None:
                nonlocal turns
                turns += 1
                if turns == 1:
                    turn()  # until it is known what it needs
                elif turns == 3:
                    raise TimeoutError

            with pytest.raises(TimeoutError), pool.use(configs["b"], impatient):
                pytest.fail("there is no room while both others are in use")
            assert turns == 3
        assert sorted(pool.sizes) == ["a", "c"]
    with pool.use(configs["b"], turn):
        assert sorted(pool.sizes) == ["b", "c"], "a was loaded, and used, before c"


def huge(folder: Path, size: int) -> Path:
    """A diffusers folder whose UNet has `size` bytes, as a sparse file."""
    other = folder.parent / "huge"
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (other / "unet" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + size)
    return other


def test_a_model_too_large_is_refused_with_the_numbers_before_it_is_read(
    folder: Path, tmp_path: Path, configs: dict[str, ModelConfig]
) -> None:
    shutil.copytree(folder, tmp_path / "huge")
    config = here.config(tmp_path, huge(tmp_path / "m", 3 * 2**30), name="huge")
    told: list[Any] = []
    pool = loads.pool(9, lambda name, status: told.append(status), budget=Budget(2**30))
    with pool.use(configs["a"], turn):
        pass
    with pytest.raises(ModelTooLarge) as caught, pool.use(config, turn):
        pytest.fail("it does not fit")
    for words in ("huge: ", "3.0 GiB", "unet 3.0 GiB", "budget of cpu is 1.0 GiB", "memory_mb"):
        assert words in caught.value.message
    assert (caught.value.status, caught.value.code, caught.value.retry) == (507, "model_too_large", False)
    assert (told[-1].state, told[-1].detail) == ("failed", caught.value.message)
    assert sorted(pool.sizes) == ["a"], "nobody left for it"
    with pool.use(configs["b"], turn):
        pass


def test_what_counts_on_an_accelerator_is_the_largest_component() -> None:
    gib = 2**30
    budget = Budget(10 * gib)
    needs = footprint.Needs({"transformer": 8 * gib, "text_encoder_2": 5 * gib}, "cuda", "bf16")
    assert not budget.refusal("m", needs, [])
    assert not budget.fits(needs, [])
    assert "13.0 GiB" in budget.refusal("m", replace(needs, device="cpu"), [])
    refusal = budget.refusal("m", replace(needs, components={"transformer": 9 * gib}), [])
    assert "its largest component takes, with activations, 10.4 GiB" in refusal
    pinned = {("cuda", 1): 2 * gib}
    assert "pinned models take 2.0 GiB" in budget.refusal("m", needs, [pinned, pinned]), "what is shared counts once"
    assert not budget.refusal("m", needs, [{("cpu", 1): 2 * gib}])


def test_the_budget_is_what_the_device_has_less_the_headroom() -> None:
    has = Budget().of("cpu")
    assert has > 100 * MIB
    assert Budget(headroom=50 * MIB).of("cpu") == has - 50 * MIB
    assert Budget(1000, headroom=50 * MIB).of("cpu") == 1000
    assert Budget(headroom=2 * has).of("cpu") == 0


# Loads that disturb nobody.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    with Hub() as hub:
        here.use(hub, tmp_path / "cache", monkeypatch)
        hub.add("acme/slow", folder)
        yield hub


def test_a_model_draws_while_another_is_loaded(hub: Hub, tmp_path: Path, configs: dict[str, ModelConfig]) -> None:
    """The download of one waits in the middle; meanwhile the other draws all its steps, for request after request."""
    slow = here.config(tmp_path, "acme/slow", name="slow")

    async def work(engine: Local) -> None:
        before = await events(engine, configs["a"], wanted("before"))
        hub.hold("acme/slow")
        waiting = [asyncio.create_task(events(engine, slow, wanted(f"slow{i}"))) for i in range(2)]
        await asyncio.to_thread(hub.wait_held, "acme/slow")
        assert engine.status("slow").state in ("loading", "downloading")
        for at in range(3):
            during = await events(engine, configs["a"], wanted(f"during{at}", steps=10))
            assert sum(isinstance(event, Step) for event in during) >= 10
            assert isinstance(during[-1], Done)
        again = (await events(engine, configs["a"], wanted("again")))[-1]
        assert isinstance(again, Done)
        assert isinstance(before[-1], Done)
        assert again.file == before[-1].file
        assert not any(task.done() for task in waiting)
        hub.release("acme/slow")
        for answer in await asyncio.gather(*waiting):
            assert isinstance(answer[-1], Done)
        assert engine.stats.loads == 2

    run(work)


def test_requests_that_wait_for_a_load_take_no_place_of_others(hub: Hub, tmp_path: Path, folder: Path) -> None:
    """One place, and three pictures of a model whose download stands still."""
    models = tmp_path / "models"
    models.mkdir()
    for name, model in (("slow", "acme/slow"), ("quick", folder)):
        (models / f"{name}.yaml").write_text(f"name: {name}\nparameters:\n  model: {model}\nstep: 2\n")
    settings = replace(SETTINGS, max_active=1, data=tmp_path / "data")

    async def work() -> None:
        service = Service(Catalog([models]), Local(settings), settings)
        await service.start()
        try:
            hub.hold("acme/slow")
            slow = asyncio.create_task(service.draw(ImageRequest(prompts=["x"], model="slow", n=3, seed=1)))
            await asyncio.to_thread(hub.wait_held, "acme/slow")
            for seed in range(2):
                assert len(await service.draw(ImageRequest(prompts=["x"], model="quick", seed=seed))) == 1
            assert not slow.done()
            hub.release("acme/slow")
            assert len(await slow) == 3
            assert (service.queue.running, service.queue.waiting) == (0, 0)
        finally:
            hub.release("acme/slow")
            await service.stop()

    asyncio.run(asyncio.wait_for(work(), 300))


def test_a_model_draws_while_the_weights_of_another_are_read(
    configs: dict[str, ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load goes on only after the other model has drawn five more steps: if it stopped them, it would never end."""
    reading, drawn = threading.Event(), threading.Event()
    check = load._check

    def checked(config: ModelConfig, pipeline: Any) -> None:
        if config.name == "b":
            reading.set()
            assert drawn.wait(120), "the other model stood still"
        check(config, pipeline)

    async def work(engine: Local) -> None:
        assert isinstance((await events(engine, configs["a"], wanted("first")))[-1], Done)
        other = asyncio.create_task(events(engine, configs["b"], wanted("other")))
        await asyncio.to_thread(reading.wait, 120)
        steps = 0
        async with aclosing(engine.submit(configs["a"], wanted("during", steps=10))) as stream:
            async for event in stream:
                steps += isinstance(event, Step)
                if steps == 5:
                    drawn.set()
        assert isinstance((await other)[-1], Done)

    monkeypatch.setattr(load, "_check", checked)
    run(work)


def test_a_load_that_nobody_waits_for_leaves_nothing(hub: Hub, tmp_path: Path, configs: dict[str, ModelConfig]) -> None:
    slow = here.config(tmp_path, "acme/slow", name="slow")

    async def work(engine: Local) -> None:
        hub.hold("acme/slow")
        waiting = asyncio.create_task(events(engine, slow, wanted("slow")))
        await asyncio.to_thread(hub.wait_held, "acme/slow")
        waiting.cancel()
        await asyncio.wait([waiting])
        assert isinstance((await events(engine, configs["a"], wanted("other")))[-1], Done)
        hub.release("acme/slow")
        await until(engine, "slow", "unloaded")
        assert "cancelled" in engine.status("slow").detail
        assert isinstance((await events(engine, configs["a"], wanted("after")))[-1], Done)
        assert (engine.stats.resident_models, engine.stats.loads) == (1, 1)
        # And it is loaded for the next one who wants it.
        assert isinstance((await events(engine, slow, wanted("next")))[-1], Done)

    run(work)


def test_a_worker_that_loads_goes_on_reporting(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a load longer than `hang_s` is not taken for a worker that hangs."""
    slow = here.config(tmp_path, "acme/slow", name="slow")
    reports, deliver = itertools.count(1), Streams.deliver
    held, enough = threading.Event(), threading.Event()

    def counted(streams: Streams, report: Report) -> None:
        deliver(streams, report)
        if isinstance(report, StatsReport) and held.is_set() and next(reports) == 4:
            enough.set()

    monkeypatch.setattr(Streams, "deliver", counted)

    async def work(engine: Local) -> None:
        hub.hold("acme/slow")
        waiting = asyncio.create_task(events(engine, slow, wanted("slow")))
        await asyncio.to_thread(hub.wait_held, "acme/slow")
        held.set()
        assert await asyncio.to_thread(enough.wait, 120)
        hub.release("acme/slow")
        assert isinstance((await waiting)[-1], Done)

    run(work)


def test_a_load_that_was_ordered_and_is_overtaken_by_an_unload_ends(configs: dict[str, ModelConfig]) -> None:
    told: list[str] = []
    pool = loads.pool(4, lambda name, status: told.append(status.state))

    def unloads() -> None:
        assert pool.unload("a") == ()

    with pytest.raises(Cancelled):
        pool.preload(configs["a"], unloads)
    while pool.loading:
        turn()
        pool.tend()
    assert (told[-1], len(pool), pool.loads) == ("unloaded", 0, 0)
    with pool.use(configs["a"], turn):
        assert pool.loads == 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_memory_of_a_cancelled_load_is_free(
    configs: dict[str, ModelConfig], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """It is cancelled when its weights have been read; then it goes on to its end, or fails."""
    read: list[weakref.ref[Any]] = []
    reading, go = threading.Event(), threading.Event()
    check = load._check

    def checked(config: ModelConfig, pipeline: Any) -> None:
        check(config, pipeline)
        read.append(weakref.ref(pipeline.unet))
        reading.set()
        assert go.wait(120)
        if fails:
            raise RuntimeError("no more")

    monkeypatch.setattr(load, "_check", checked)
    pool = loads.pool(4)

    def impatient() -> None:
        if reading.is_set():
            raise TimeoutError
        turn()

    def admitted() -> None:  # there is no news between its admission and its end
        if pool._reading:
            assert reading.wait(120)
        impatient()

    with pytest.raises(TimeoutError), pool.use(configs["a"], admitted):
        pytest.fail("it was cancelled")
    go.set()
    while pool.loading:
        turn()
        pool.tend()
    assert [module() for module in read] == [None]
    assert (len(pool), pool.loads) == (0, 0)


def test_all_who_wait_for_a_load_get_its_error_and_the_next_tries_again(
    tmp_path: Path, folder: Path, configs: dict[str, ModelConfig]
) -> None:
    broken = here.config(tmp_path, tmp_path / "broken", name="broken")
    shutil.copytree(folder, tmp_path / "broken")
    weights = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])

    async def work(engine: Local) -> None:
        answers = await asyncio.gather(*(events(engine, broken, wanted(str(at))) for at in range(3)))
        for answer in answers:
            assert isinstance(answer[-1], Failed)
            assert isinstance(answer[-1].error, LoadError)
        assert engine.status("broken").state == "failed"
        assert torch.get_default_dtype() == torch.float32
        weights.write_bytes(whole)
        assert isinstance((await events(engine, broken, wanted("next")))[-1], Done)

    run(work)


def test_turns_and_loads_alternate_and_the_default_dtype_comes_back() -> None:
    turns, order = Turns(), []
    inside, go = threading.Event(), threading.Event()

    def load_one() -> None:
        with turns.loading():
            torch.set_default_dtype(torch.bfloat16)
            order.append("section")
            inside.set()
            go.wait(60)
            order.append("end")
            # A library that fails here does not put it back.

    thread = threading.Thread(target=load_one)
    thread.start()
    assert inside.wait(60)
    assert torch.get_default_dtype() == torch.bfloat16
    threading.Timer(0.1, go.set).start()
    with turns.turn():
        order.append("turn")
        assert torch.get_default_dtype() == torch.float32
    thread.join(60)
    assert order == ["section", "end", "turn"]
    assert torch.set_default_dtype.__module__ == "torch"
    with turns.turn():
        pass


def test_the_dtype_of_a_load_is_not_that_of_a_request(folder: Path, tmp_path: Path) -> None:
    """While modules are built in bfloat16, a request that makes tensors at the same time makes floats."""
    config = here.config(tmp_path, folder, dtype="bf16")
    turns, seen, ended = Turns(), set(), threading.Event()

    def load_it() -> None:
        try:
            with turns.loading():
                load.load(config, "cpu", quiet)
        finally:
            ended.set()

    thread = threading.Thread(target=load_it)
    thread.start()
    while not ended.is_set():
        with turns.turn():
            seen.add(torch.zeros(1).dtype)
    thread.join()
    assert seen == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_idle_models_go_to_main_memory_and_come_back(configs: dict[str, ModelConfig]) -> None:
    """In `test_main_memory.py` both are the CPU's; here the device is another."""
    told: dict[str, str] = {}
    pool = loads.pool(1, lambda name, status: told.update({name: status.state}), device="cuda", known=Sharing(),
                      main_memory=MainMemory(2**30))  # fmt: skip
    lone = replace(configs["b"], dtype="bf16")  # another dtype: nothing of it is shared

    def draw(config: ModelConfig) -> bytes:
        with pool.use(config, turn) as model:
            assert {parameter.device.type for parameter in model.pipeline.unet.parameters()} == {"cuda"}
            return drawn(model, wanted("1"), quiet).file

    with pool.use(configs["a"], turn) as model:
        pipeline = model.pipeline
    first = draw(configs["a"])
    before = torch.cuda.memory_allocated()
    other = draw(lone)
    assert (told["a"], told["b"]) == ("in_main_memory", "ready")
    assert {block[0] for block in footprint.blocks([pipeline.unet, pipeline.vae])} == {"cpu"}
    assert torch.cuda.memory_allocated() < before, "a model of half the size is there alone"
    assert draw(configs["a"]) == first
    assert draw(lone) == other
    assert pool.loads == 2
    with pool.use(configs["c"], turn) as same:  # what it shares with one in main memory comes to the device
        assert same.pipeline.vae is pipeline.vae
    assert draw(configs["c"]) == first
    assert pool.unload(None) == ()
    assert (len(pool), told) == (0, dict.fromkeys("abc", "unloaded"))
