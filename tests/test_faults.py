"""What can go wrong while pictures are drawn, each with the right ending, and nobody else's pixels touched.

Nothing of diffusers is replaced: a fault is put around the forward of a real module, which computes as ever.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.config import ModelConfig
from sfumato.core import Done, Event, Failed, Generation, Step
from sfumato.drawing.draw import draw
from sfumato.engine.local import Local
from sfumato.engine.protocol import Answer, Engine, Report
from sfumato.engine.streams import Streams
from sfumato.errors import DrawError, LoadError, WorkerDied
from sfumato.models import load
from sfumato.models.load import Loaded
from sfumato.pictures.images import decoded
from sfumato.process.supervisor import Supervisor
from sfumato.sampling import nested
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings
from support import tiny
from support.drawing import loaded, quiet
from support.together import posted_together

SETTINGS = Settings(device="cpu", log_level="critical")

ROUNDS = 10
"""Of a kill each. What a kill does to the pixels is shown here; fifty at any moment in `test_supervisor.py`."""

CUDA_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")


@pytest.fixture(scope="module")
def config(repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("models")
    (folder / "m.yaml").write_text(
        f"name: m\nparameters:\n  model: {repositories['nitrosocke/Ghibli-Diffusion']}\ndtype: fp32\n"
    )
    return Catalog([folder]).get("m")


def wanted(id: str, **fields: Any) -> Generation:
    return Generation(
        **nested({"id": id, "prompt": "a cat", "seed": 1, "steps": 4, "width": 64, "height": 64, **fields})
    )


def source() -> bytes:
    """A picture to start from."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def mixed(count: int, seed: int, longest: int = 9) -> list[Generation]:
    """Requests that differ in everything a request may differ in."""
    dice = random.Random(seed)
    texts = ("a cat", "a red dog on a boat", "three green birds in the rain, oil on canvas", "")
    schedulers = (None, "euler", "euler_a", "ddim", "k_dpmpp_2m", "unipc")
    made = []
    for index in range(count):
        asked = wanted(
            f"{seed}-{index}",
            prompt=dice.choice(texts),
            seed=dice.randrange(2**32),
            steps=dice.randint(3, longest),
            guidance_scale=dice.choice((1.0, 3.0, 7.5)),
            scheduler=dice.choice(schedulers),
            negative_prompt=dice.choice((None, "blurry")),
        )
        if dice.random() < 0.3:
            sampling = replace(asked.sampling, strength=dice.choice((0.5, 0.8)))
            asked = replace(asked, images=(source(),), sampling=sampling)
        made.append(asked)
    return made


async def answers_of(
    engine: Engine, config: ModelConfig, asked: Sequence[Generation], seen: Callable[[Event], object] = lambda _: None
) -> list[Event]:
    """The terminal event of each, drawn together; `seen` is called with every event of any of them."""

    async def one(generation: Generation) -> Event:
        async with aclosing(engine.submit(config, generation)) as events:
            async for event in events:
                last = event
                seen(event)
        assert isinstance(last, Done | Failed)
        return last

    return await asyncio.gather(*(one(generation) for generation in asked))


def pixels(event: Event) -> np.ndarray[Any, Any]:
    assert isinstance(event, Done), event
    return np.asarray(Image.open(io.BytesIO(event.file))).astype(int)


def same(one: Event, other: Event) -> bool:
    """Equal pixels.

    A sum over a batch may be added up in another order than a sum alone, so a value that lies within 1e-6 of
    the border between two grey levels may fall to the other side: one level, in few of the 12288 values.
    """
    difference = np.abs(pixels(one) - pixels(other))
    return bool(difference.max() <= 1 and (difference > 0).sum() <= 8)


# Faults of a module, in the loop.


class Recording(Streams):
    """Streams that remember how each request ended, also when nobody listens any more."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: Counter[str] = Counter()

    def deliver(self, report: Report) -> None:
        match report:
            case Answer(id, Done() | Failed()):
                self.ends[id] += 1
        super().deliver(report)


def in_use(model: Any) -> list[str]:
    """The out-of-memory fallbacks of a model."""
    return ["tiles"] * (model.state.tiled_from is not None) + [model.state.offload] * (model.state.offload != "none")


class Workshop:
    """A started `Local`, its model in memory, and what each request gives while nothing is broken."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.engine = Local(SETTINGS)
        self.streams = self.engine._streams = Recording()
        self._runner = asyncio.Runner()
        self._runner.run(self.engine.start())
        self._undisturbed: dict[Generation, Event] = {}
        self.undisturbed([wanted("first")])

    def draw(self, asked: Sequence[Generation]) -> list[Event]:
        with posted_together(self.engine, len(asked)):
            return self._runner.run(answers_of(self.engine, self.config, asked))

    def undisturbed(self, asked: Sequence[Generation]) -> list[Event]:
        """Each alone."""
        for generation in asked:
            if generation not in self._undisturbed:
                (self._undisturbed[generation],) = self.draw([generation])
        return [self._undisturbed[generation] for generation in asked]

    def run(self, work: Any) -> Any:
        return self._runner.run(work)

    @property
    def model(self) -> Loaded:
        assert self.engine._loop
        return self.engine._loop._pool._loaded["m"]

    @property
    def unet(self) -> Any:
        return self.model.pipeline.unet

    def embedding(self, prompt: str) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.model.pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
        return found

    def stop(self) -> None:
        self._runner.run(self.engine.stop())
        self._runner.close()


@pytest.fixture
def workshop(config: ModelConfig) -> Iterator[Workshop]:
    workshop = Workshop(config)
    yield workshop
    workshop.stop()


@contextmanager
def broken(module: Any, around: Callable[..., Any]) -> Iterator[None]:
    """While entered, `around(forward, *args, **kwargs)` stands in for the module's forward."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: around(forward, *args, **kwargs)
    try:
        yield
    finally:
        del module.forward


GUILTY = "the picture that breaks everything"


def company() -> list[Generation]:
    """Neighbours, and the guilty one among them."""
    asked = [wanted(f"neighbour {at}", seed=at, steps=5 + at % 2, guidance_scale=2.0 + at) for at in range(4)]
    asked.insert(2, wanted("guilty", prompt=GUILTY, steps=5))
    return asked


def rows_of(prompt: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Which rows of a forward belong to `prompt`."""
    return torch.stack([torch.allclose(row, prompt[0], atol=1e-4) * torch.ones(()) for row in text]).bool()


def judge(workshop: Workshop, asked: list[Generation], answers: list[Event]) -> Failed:
    """All but the guilty one have the pixels of an undisturbed run; returns how the guilty one ended."""
    found = None
    for generation, answer, alone in zip(asked, answers, workshop.undisturbed(asked), strict=True):
        if generation.id == "guilty":
            assert isinstance(answer, Failed)
            found = answer
        else:
            assert same(answer, alone), generation.id
    assert found
    return found


def test_a_module_that_raises_fails_the_guilty_request_alone(workshop: Workshop) -> None:
    guilty, shared, times = workshop.embedding(GUILTY), 0, 0

    def around(forward: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        nonlocal shared, times
        if rows_of(guilty, encoder_hidden_states).any():
            times += 1
            shared += len(sample) > 2
            if times > 2:
                raise ValueError("a fault in the middle")
        return forward(sample, timestep, encoder_hidden_states=encoder_hidden_states, **kwargs)

    with broken(workshop.unet, around):
        answers = workshop.draw(company())
    failed = judge(workshop, company(), answers)
    assert isinstance(failed.error, DrawError)
    assert "a fault in the middle" in failed.error.message
    assert shared > 0, "it was never in one batch with the others"


def test_nan_fails_the_request_that_drew_it(workshop: Workshop) -> None:
    guilty = workshop.embedding(GUILTY)

    def around(forward: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        (output,) = forward(sample, timestep, encoder_hidden_states=encoder_hidden_states, **kwargs)
        output[rows_of(guilty, encoder_hidden_states)] = float("nan")
        return (output,)

    with broken(workshop.unet, around):
        answers = workshop.draw(company())
    failed = judge(workshop, company(), answers)
    assert isinstance(failed.error, DrawError)
    assert "NaN" in failed.error.message


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.flux], ids=["Stable Diffusion", "FLUX"])
def test_nan_that_only_the_vae_makes_is_an_error_and_no_black_picture(make: Callable[[], Any]) -> None:
    """As SDXL's first VAE does in fp16."""
    model = loaded(make())
    done = draw(model, wanted("well"), quiet)
    with torch.no_grad():
        model.pipeline.vae.decoder.conv_out.bias[:1] = float("nan")
    with pytest.raises(DrawError, match="NaN"):
        draw(model, wanted("broken"), quiet)
    with torch.no_grad():
        model.pipeline.vae.decoder.conv_out.bias[:1] = 0.0
    assert decoded(draw(model, wanted("mended"), quiet).file).size == decoded(done.file).size


@pytest.mark.parametrize("error", [CUDA_MEMORY, CPU_MEMORY], ids=["cuda", "cpu"])
@pytest.mark.parametrize("fits", [2, 4])
def test_a_batch_that_does_not_fit_is_halved_once_and_for_all(workshop: Workshop, error: Exception, fits: int) -> None:
    tried: list[int] = []

    def around(forward: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(len(sample))
        if len(sample) > fits:
            raise error
        return forward(sample, *args, **kwargs)

    asked = [wanted(str(at), seed=at, steps=6) for at in range(6)]
    with broken(workshop.unet, around):
        answers = workshop.draw(asked)
    alone = workshop.undisturbed(asked)
    assert all(map(same, answers, alone))
    assert max(tried) == 8
    # Once more as large, when what was kept of earlier calls has been dropped.
    assert [rows for rows in tried if rows > fits] == ([8, 8] if fits == 4 else [8, 8, 4]), "the cap was forgotten"
    assert fits in tried, "smaller than it had to be"
    assert not in_use(workshop.model)


def test_a_vae_that_does_not_fit_works_in_tiles_from_then_on(workshop: Workshop) -> None:
    tried: list[int] = []

    def around(forward: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(sample.shape[-1])
        if sample.shape[-1] > 8:
            raise CUDA_MEMORY
        return forward(sample, *args, **kwargs)

    asked = [wanted(str(at), seed=at, steps=4, width=128, height=128) for at in range(3)]
    with broken(workshop.model.pipeline.vae.decoder, around):
        answers = workshop.draw(asked)
        assert all(pixels(answer).shape == (128, 128, 3) for answer in answers)
        assert in_use(workshop.model) == ["tiles"]
        tried.clear()
        assert all(map(same, workshop.draw([replace(one, id=f"{one.id} again") for one in asked]), answers))
        assert max(tried) == 8
    for answer in answers:
        assert isinstance(answer, Done)
        assert answer.recipe.savings == ("vae_tiling",)


def tight(limit: int) -> Callable[..., Any]:
    """Around a decoder: no room for more than so many latents on a side."""

    def around(forward: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if sample.shape[-1] > limit:
            raise CUDA_MEMORY
        return forward(sample, *args, **kwargs)

    return around


def test_tiles_are_in_the_recipe_of_each_picture_and_of_no_other(workshop: Workshop) -> None:
    """A shortage that has passed changes no pixel of a picture that would have fitted, and explains those it did."""
    large = wanted("large", steps=4, width=128, height=128)
    (whole,) = workshop.undisturbed([large])
    with broken(workshop.model.pipeline.vae.decoder, tight(8)):
        (tiled,) = workshop.draw([replace(large, id="tiled")])
        small, between = wanted("small"), wanted("between", width=96, height=96)
        assert isinstance(workshop.draw([small])[0], Done)
    assert isinstance(whole, Done)
    assert isinstance(tiled, Done)
    assert whole.recipe.savings == ()
    assert tiled.recipe.savings == ("vae_tiling",)
    assert not same(whole, tiled)
    assert workshop.model.state.tiled_from == 128 * 128
    assert not workshop.model.pipeline.vae.use_tiling
    # Beside one in tiles and after it, what is smaller has no tiles; what is as large has them, and says so.
    answers = workshop.draw([replace(large, id="again"), small, between])
    for answer, alone, savings in zip(
        answers, [tiled, *workshop.undisturbed([small, between])], (("vae_tiling",), (), ()), strict=True
    ):
        assert isinstance(answer, Done)
        assert answer.recipe.savings == savings
        assert same(answer, alone)


def test_a_picture_in_tiles_is_made_again_where_there_is_room(workshop: Workshop) -> None:
    asked = wanted("large", steps=4, width=128, height=128)
    with broken(workshop.model.pipeline.vae.decoder, tight(8)):
        (tiled,) = workshop.draw([asked])
    assert isinstance(tiled, Done)
    workshop.model.state.tiled_from = None  # as on a machine with more memory
    again = replace(asked, id="again", savings=tiled.recipe.savings)
    answers = workshop.draw([again, replace(asked, id="whole")])
    assert isinstance(answers[0], Done)
    assert isinstance(answers[1], Done)
    assert np.array_equal(pixels(answers[0]), pixels(tiled))
    assert answers[0].recipe.savings == ("vae_tiling",)
    assert answers[1].recipe.savings == ()
    assert not same(answers[1], tiled)


def kept(workshop: Workshop) -> int:
    """Bytes that the engine keeps of earlier calls."""
    assert workshop.engine._loop
    batcher = workshop.engine._loop._batcher
    return batcher.prompt_cache._bytes + batcher.concatenations._bytes()


@pytest.mark.parametrize("count", [1, 4])
def test_what_is_kept_for_speed_goes_before_anything_else(workshop: Workshop, count: int) -> None:
    """As soon as it is gone all fits: no batch is smaller, nothing works in tiles."""
    asked = [wanted(str(at), seed=at, steps=5) for at in range(count)]
    alone = workshop.undisturbed(asked)
    workshop.undisturbed([wanted("another", prompt="a red dog on a boat")])
    before = kept(workshop)
    tried: list[tuple[int, bool]] = []

    def around(forward: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        fits = kept(workshop) < before
        tried.append((len(sample), fits))
        if not fits:
            raise CUDA_MEMORY
        return forward(sample, *args, **kwargs)

    with broken(workshop.unet, around):
        answers = workshop.draw([replace(one, id=f"{one.id} again") for one in asked])
    assert all(map(same, answers, alone))
    assert tried[0] == (2 * count, False)
    assert tried[1] == (2 * count, True), "something else was tried first"
    assert not in_use(workshop.model)
    assert all(isinstance(answer, Done) and answer.recipe.savings == () for answer in answers)


@pytest.mark.parametrize("error", [CUDA_MEMORY, CPU_MEMORY, MemoryError()], ids=["cuda", "cpu", "python"])
def test_what_is_kept_goes_for_a_model_that_does_not_fit(
    workshop: Workshop, config: ModelConfig, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept(workshop)
    place, tried = load._place, 0

    def around(*args: Any) -> None:
        nonlocal tried
        tried += 1
        if kept(workshop):
            raise error
        place(*args)

    monkeypatch.setattr(load, "_place", around)
    assert workshop.engine._loop
    pool = workshop.engine._loop._pool
    pool._limit = 2
    other = replace(config, name="other")
    (answer,) = workshop.run(answers_of(workshop.engine, other, [wanted("other")]))
    assert isinstance(answer, Done)
    assert tried == 2
    assert pool.evictions == 0
    # With nothing left to drop the idle model goes, and then it is an error in words.
    monkeypatch.setattr(load, "_place", lambda *args: (_ for _ in ()).throw(error))
    third = replace(config, name="third")
    (answer,) = workshop.run(answers_of(workshop.engine, third, [wanted("third")]))
    assert isinstance(answer, Failed)
    assert isinstance(answer.error, LoadError)
    assert "does not fit into memory" in answer.error.message
    assert pool.evictions == 2


def test_a_picture_that_never_fits_fails_in_words_and_the_next_is_drawn(workshop: Workshop) -> None:
    def around(forward: Any, *args: Any, **kwargs: Any) -> Any:
        raise CUDA_MEMORY

    asked = [wanted(str(at), seed=at) for at in range(3)]
    with broken(workshop.unet, around):
        answers = workshop.draw(asked)
    for answer in answers:
        assert isinstance(answer, Failed)
        assert isinstance(answer.error, DrawError)
        assert "out of memory" in answer.error.message
        assert "smaller" in answer.error.message
    assert isinstance(workshop.draw([wanted("next")])[0], Done)


def test_every_request_ends_once_whenever_it_is_cancelled(workshop: Workshop) -> None:
    dice = random.Random(4)
    asked = mixed(40, seed=5)
    alone = workshop.undisturbed(asked)
    workshop.streams.ends.clear()
    lives = {generation.id: dice.choice([0, 1, 2, 3, 5, 99, 99, 99]) for generation in asked}

    async def one(generation: Generation) -> Event | None:
        """Listens to so many events, then goes away."""
        async with aclosing(workshop.engine.submit(workshop.config, generation)) as events:
            left = lives[generation.id]
            if left == 0:
                listening = asyncio.create_task(anext(events))
                await asyncio.sleep(0)  # it has been posted now; whether it has started is up to the other thread
                listening.cancel()
                await asyncio.wait([listening])
                return None
            async for event in events:
                left -= 1
                if isinstance(event, Done | Failed):
                    return event
                if left == 0:
                    return None
        raise AssertionError("the stream ended without a terminal event")

    async def run() -> list[Event | None]:
        return await asyncio.gather(*(one(generation) for generation in asked))

    answers = workshop.run(run())
    for generation, answer, expected in zip(asked, answers, alone, strict=True):
        if answer is not None:
            assert same(answer, expected), generation
    assert answers.count(None) > 10
    workshop.draw([wanted("last")])
    assert workshop.streams.ends == Counter([generation.id for generation in asked] + ["last"])


# Faults of the process that computes.


@contextmanager
def supervised(settings: Settings = SETTINGS) -> Iterator[tuple[asyncio.Runner, Supervisor]]:
    with asyncio.Runner() as runner:
        supervisor = Supervisor(settings)
        runner.run(supervisor.start())
        try:
            yield runner, supervisor
        finally:
            runner.run(supervisor.stop())


def send(supervisor: Supervisor, number: signal.Signals) -> None:
    assert supervisor.pid
    os.kill(supervisor.pid, number)


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing(config: ModelConfig) -> None:
    """Each round's requests are answered before the next kill: two deaths would make them suspects."""
    dice = random.Random(9)
    pool = mixed(24, seed=6)
    with supervised() as (runner, supervisor):
        undisturbed = dict(zip(pool, runner.run(answers_of(supervisor, config, pool)), strict=True))
        workers = set()
        for number in range(ROUNDS):
            asked = dice.sample(pool, 6)
            # Each step is an event, and each picture; 0 is before the first of them.
            moment = dice.randrange(sum(generation.sampling.steps or 0 for generation in asked) // 2)
            heard = 0

            def seen(_: Event, moment: int = moment) -> None:
                nonlocal heard
                heard += 1
                if heard == moment:
                    workers.add(supervisor.pid)
                    send(supervisor, signal.SIGKILL)

            async def one_round(asked: list[Generation] = asked, moment: int = moment) -> list[Event]:
                if moment == 0:
                    await supervisor._up.wait()
                    workers.add(supervisor.pid)
                    asyncio.get_running_loop().call_soon(send, supervisor, signal.SIGKILL)
                return await answers_of(supervisor, config, asked, seen)

            answers = runner.run(one_round())
            for generation, answer in zip(asked, answers, strict=True):
                assert same(answer, undisturbed[generation]), (number, moment, generation)
        assert len(workers) == ROUNDS


@pytest.mark.slow
def test_a_request_that_hangs_the_worker_is_found_out_and_its_neighbours_are_drawn(config: ModelConfig) -> None:
    neighbours = [wanted(f"neighbour {at}", seed=at, steps=12) for at in range(5)]
    with supervised(replace(SETTINGS, hang_s=4)) as (runner, supervisor):
        undisturbed = runner.run(answers_of(supervisor, config, neighbours))
        stops: list[int | None] = []

        async def guilty() -> Event:
            async with aclosing(supervisor.submit(config, wanted("guilty", steps=12))) as events:
                async for event in events:
                    if event == Step(2, 13):
                        stops.append(supervisor.pid)
                        send(supervisor, signal.SIGSTOP)
            return event

        async def run() -> tuple[Event, list[Event]]:
            return await asyncio.gather(guilty(), answers_of(supervisor, config, neighbours))

        failed, answers = runner.run(run())
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, WorkerDied)
        assert "2 times" in failed.error.message
        assert len(set(stops)) == 2
        assert all(map(same, answers, undisturbed))


@pytest.mark.slow
def test_a_worker_hung_by_a_request_whose_caller_has_left_is_replaced(config: ModelConfig) -> None:
    with supervised(replace(SETTINGS, hang_s=4)) as (runner, supervisor):

        async def run() -> Event:
            async with aclosing(supervisor.submit(config, wanted("guilty", steps=12))) as events:
                assert isinstance(await anext(events), Step)
                send(supervisor, signal.SIGSTOP)
            return (await answers_of(supervisor, config, [wanted("next")]))[0]

        assert isinstance(runner.run(run()), Done)
