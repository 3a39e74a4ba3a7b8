"""Previews: pictures on the way, from every kind of latents, that change nothing of what is drawn."""

from __future__ import annotations

import asyncio
import copy
import functools
import io
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from PIL import Image

from support import families, tiny

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import parity
from sfumato.config import ModelConfig
from sfumato.core import Done, Event, Generation, Preview, Step
from sfumato.drawing.draw import draw
from sfumato.engine.local import Local
from sfumato.errors import ModelFileError
from sfumato.models import load
from sfumato.previews.decode import MakePicture, PreviewImage, cheap_decoder, preview
from sfumato.previews.latent_rgb import LatentRGB, fit
from sfumato.previews.steps import RunPreviews, due
from sfumato.previews.x0 import X0_FORMULAS, StepResult, x0_or_sample
from sfumato.sampling import nested
from sfumato.serving.catalog import EMBEDDED, Catalog
from sfumato.settings import Settings

MODELS: dict[str, Callable[[], Any]] = {
    "sd": tiny.stable_diffusion,
    "xl": tiny.stable_diffusion_xl,
    "sd3": tiny.stable_diffusion_3,
    "flux": tiny.flux,
    "pixart": tiny.pixart,
    "ddpm": tiny.ddpm,
}


class Studio:
    """An engine with `MODELS`, and the event loop that it lives on."""

    def __init__(self, folder: Path) -> None:
        for name, build in MODELS.items():
            tiny.save(build(), folder / name)
            (folder / f"{name}.yaml").write_text(f"name: {name}\nparameters:\n  model: {name}\ndtype: fp32\n")
        self.catalog = Catalog([folder])
        self.engine = Local(Settings(device="cpu", log_level="error", loaded_models=len(MODELS)))
        self.runner = asyncio.Runner()
        self.runner.run(self.engine.start())

    def draw(self, *asked: tuple[str, Generation]) -> list[list[Event]]:
        """The events of each, of all at once."""

        async def one(config: ModelConfig, generation: Generation) -> list[Event]:
            async with aclosing(self.engine.submit(config, generation)) as events:
                return [event async for event in events]

        async def run() -> list[list[Event]]:
            return await asyncio.gather(*(one(self.catalog.get(name), generation) for name, generation in asked))

        return self.runner.run(run())

    def close(self) -> None:
        self.runner.run(self.engine.stop())
        self.runner.close()


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    studio = Studio(tmp_path_factory.mktemp("models"))
    yield studio
    studio.close()
    torch.set_num_threads(threads)


def wanted(id: str, **fields: Any) -> Generation:
    return Generation(
        **nested({"id": id, "prompt": "a cat", "seed": 1, "steps": 8, "width": 64, "height": 64, **fields})
    )


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)))


def shown(events: list[Event]) -> list[Preview]:
    return [event for event in events if isinstance(event, Preview)]


def final(events: list[Event]) -> np.ndarray[Any, Any]:
    assert isinstance(events[-1], Done), events[-1]
    return pixels(events[-1].file)


def source(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, "PNG")
    return file.getvalue()


CASES = {
    "sd": ("sd", {}),
    "sd, ddim": ("sd", {"scheduler": "ddim"}),
    "sd from a picture": ("sd", {"images": (source(64, 64),), "strength": 0.75}),
    "xl": ("xl", {}),
    "xl, a noise of its own at each step": ("xl", {"scheduler": "euler_a"}),
    "sd3": ("sd3", {}),
    "flux": ("flux", {}),
    "flux, wide": ("flux", {"width": 128, "height": 64}),
    "pixart, drawn larger": ("pixart", {}),
    "ddpm": ("ddpm", {"prompt": "", "width": None, "height": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_previews_are_spread_and_change_nothing(studio: Studio, case: str) -> None:
    name, fields = CASES[case]
    (plain,) = studio.draw((name, wanted("plain", **fields)))
    (events,) = studio.draw((name, wanted("shown", previews=3, **fields)))
    assert not shown(plain)
    previews = shown(events)
    total = previews[0].total
    assert [(each.index, each.step) for each in previews] == [(n, total * (n + 1) // 4) for n in range(3)]
    # Each right after the step that it shows.
    assert [events[at - 1] for at, event in enumerate(events) if isinstance(event, Preview)] == [
        Step(each.step, total) for each in previews
    ]
    pictures = [pixels(each.png) for each in previews]
    assert {(each.height, each.width) for each in previews} == {final(events).shape[:2]}
    assert len({each.tobytes() for each in [*pictures, final(events)]}) == 4
    assert np.array_equal(final(events), final(plain))


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_neighbour_does_not_notice(studio: Studio, name: str) -> None:
    (alone,) = studio.draw((name, wanted("alone", seed=5)))
    with_previews, neighbour = studio.draw(
        (name, wanted("shown", previews=16, prompt="a dog")), (name, wanted("other", seed=5))
    )
    assert len(shown(with_previews)) == shown(with_previews)[0].total - 1  # all there are
    assert not shown(neighbour)
    assert np.abs(final(neighbour).astype(int) - final(alone)).max() <= 1


def test_previews_are_small_and_say_of_which_size_the_picture_will_be(studio: Studio) -> None:
    (events,) = studio.draw(("sd", wanted("large", width=640, height=320, steps=2, previews=1)))
    assert [pixels(each.png).shape for each in shown(events)] == [(40, 80, 3)]
    assert [(each.width, each.height) for each in shown(events)] == [(640, 320)]
    assert final(events).shape == (320, 640, 3)


def test_a_preview_that_fails_ends_the_previews_only(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    (plain,) = studio.draw(("sd", wanted("plain")))
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("cannot")

    monkeypatch.setattr("sfumato.previews.steps.decoded", fail)
    (events,) = studio.draw(("sd", wanted("shown", previews=3)))
    assert len(calls) == 1
    assert not shown(events)
    assert np.array_equal(final(events), final(plain))


def test_a_preview_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(*_: Any) -> MakePicture:
        torch.rand(())
        return lambda: PreviewImage(Image.new("RGB", (8, 8)), 64, 64)

    monkeypatch.setattr("sfumato.previews.steps.decoded", noisy)
    got: list[Preview] = []
    pipe = tiny.stable_diffusion()
    latents = torch.zeros(1, 4, 8, 8)
    before = torch.get_rng_state()
    RunPreviews(pipe, 1, None, None, got.append).after(
        1, 2, StepResult(diffusers.DDIMScheduler(), latents, 1, (latents,))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert len(got) == 1


def test_cancelled_at_a_preview(studio: Studio) -> None:
    async def run() -> None:
        async with aclosing(
            studio.engine.submit(studio.catalog.get("sd"), wanted("long", steps=900, previews=16))
        ) as events:
            async for event in events:
                if isinstance(event, Preview):
                    break

    studio.runner.run(asyncio.wait_for(run(), 300))
    (events,) = studio.draw(("sd", wanted("next")))
    assert isinstance(events[-1], Done)


def test_what_is_no_picture_has_no_preview() -> None:
    pipe = tiny.stable_diffusion()
    assert preview(pipe, torch.zeros(1, 4, 8, 8), None, None) is not None
    assert preview(pipe, torch.zeros(1, 3, 5, 8, 8), None, None) is None  # frames, but not its latents
    assert preview(pipe, torch.zeros(1, 64, 16), 64, 64) is None  # packed, and nothing unpacks it
    assert preview(pipe, torch.zeros(1, 64), None, None) is None  # an embedding
    assert preview(pipe, torch.zeros(1, 8, 8, dtype=torch.long), None, None) is None  # tokens
    assert preview(pipe, torch.full((1, 4, 8, 8), torch.nan), None, None) is None
    flux = tiny.flux()
    assert preview(flux, torch.zeros(1, 7, 16), 64, 64) is None  # no such shape


def test_a_half_precision_decoder_is_raised_and_put_back() -> None:
    pipe = tiny.stable_diffusion_xl()
    pipe.vae.half()
    assert preview(pipe, torch.zeros(1, 4, 8, 8, dtype=torch.float16), None, None) is not None
    assert pipe.vae.dtype == torch.float16


def test_which_step_shows() -> None:
    def steps(total: int, count: int) -> list[int]:
        return [step for step in range(1, total + 1) if due(step, total, count) is not None]

    assert steps(8, 3) == [2, 4, 6]
    assert steps(50, 1) == [25]
    assert steps(4, 16) == [1, 2, 3]
    assert steps(1, 3) == steps(8, 0) == []
    for total in range(2, 40):
        for count in range(17):
            assert len(steps(total, count)) == min(count, total - 1)
            assert total not in steps(total, count)


def shown_of(scheduler: Any, result: Any) -> torch.Tensor | None:
    return x0_or_sample(StepResult(scheduler, torch.zeros(1, 4, 2, 2), torch.tensor(1), result))


def test_the_clean_sample_is_preferred() -> None:
    noisy, clean = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    for kind in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.LCMScheduler):
        assert shown_of(kind(), (noisy, clean)) is clean
    assert shown_of(diffusers.TCDScheduler(), (noisy, clean)) is noisy  # its second is noised again
    assert shown_of(diffusers.HeunDiscreteScheduler(), (noisy,)) is noisy
    assert shown_of(None, DDIMSchedulerOutput(prev_sample=noisy, pred_original_sample=clean)) is clean
    assert shown_of(None, DDIMSchedulerOutput(prev_sample=noisy)) is noisy


SOLVERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm++ stochastic": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++ single": (diffusers.DPMSolverSinglestepScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_with_a_denoiser_that_knows_each_step_shows_the_picture(name: str) -> None:
    kind, options = SOLVERS[name]
    scheduler = kind(**options)
    scheduler.set_timesteps(9)
    dice = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 4, 8, 8, generator=dice) for _ in range(2))
    flow = name == "flow"
    first = scheduler.timesteps[:1]
    latents = scheduler.scale_noise(clean, first, noise) if flow else scheduler.add_noise(clean, noise, first)
    assert not torch.allclose(latents, clean, atol=0.5)
    shown = 0
    for timestep in scheduler.timesteps:
        # Where noise is drawn anew it is not the one that the picture began with.
        at = scheduler.alphas_cumprod[timestep.int()] if not flow else None
        output = noise - clean if at is None else (latents - at**0.5 * clean) / (1 - at) ** 0.5
        result = scheduler.step(output, timestep, latents, return_dict=False)
        guess = x0_or_sample(StepResult(scheduler, output, timestep, result))
        latents = result[0]
        assert guess is not None
        assert torch.allclose(guess, clean, atol=2e-3), (guess - clean).abs().max()
        shown += guess is not latents
    assert shown > 7
    assert type(scheduler).__name__ in X0_FORMULAS


UNKNOWN: list[Any] = [
    lambda: diffusers.UniPCMultistepScheduler(predict_x0=False),
    lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    lambda: diffusers.PNDMScheduler(skip_prk_steps=True, prediction_type="v_prediction"),
]


@pytest.mark.parametrize("make", UNKNOWN)
def test_where_the_guess_is_not_known_the_sample_is_shown(make: Callable[[], Any]) -> None:
    scheduler = make()
    scheduler.set_timesteps(3)
    output = torch.ones(1, 4, 2, 2)
    result = scheduler.step(output, scheduler.timesteps[0], output, return_dict=False)
    assert x0_or_sample(StepResult(scheduler, output, scheduler.timesteps[0], result)) is result[0]


# The map to colours


def small(image: Image.Image, side: int = 16) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BOX), float).ravel()


def test_previews_of_the_embedded_model_look_like_its_pictures() -> None:
    model = load.load(Catalog([EMBEDDED]).get("sfumato-tiny"), "cpu", lambda status: None)
    assert isinstance(model.preview_decoder, LatentRGB)
    before = torch.get_rng_state()
    drawn: list[tuple[list[Preview], Done]] = []
    for seed, prompt in enumerate(("a rocket on a blue background", "a cat on a green background")):
        got: list[Preview] = []
        asked = wanted("1", prompt=prompt, seed=seed, steps=12, width=None, height=None, previews=3)
        torch.set_rng_state(before)
        drawn.append((got, draw(model, asked, lambda *_: None, got.append)))
    finals = [small(Image.open(io.BytesIO(done.file))) for _, done in drawn]
    for number, (previews, _) in enumerate(drawn):
        likeness = [
            [float(np.corrcoef(small(Image.open(io.BytesIO(each.png))), final)[0, 1]) for final in finals]
            for each in previews
        ]
        own = [row[number] for row in likeness]
        assert own == sorted(own), "later ones are nearer"
        assert own[-1] > 0.9
        assert likeness[-1][number] > likeness[-1][1 - number] + 0.5


def test_the_map_is_the_same_each_time_and_disturbs_nothing() -> None:
    pipe = tiny.stable_diffusion_xl()
    pipe.vae.half()
    before = torch.get_rng_state()
    one, other = fit(pipe.vae, 8), fit(pipe.vae, 8)
    assert one is not None
    assert other is not None
    assert torch.equal(one.weight, other.weight)
    assert one.factor == 8
    assert torch.equal(torch.get_rng_state(), before)
    assert pipe.vae.dtype == torch.float16


def test_the_map_is_found_where_colours_are_linear() -> None:
    class Shrink(torch.nn.Conv2d):
        """An autoencoder whose latents are the mean colour of 4x4 pixels, doubled, and a channel of nothing."""

        dtype = torch.float32
        config = types.SimpleNamespace(in_channels=3)

        def __init__(self) -> None:
            super().__init__(3, 4, 4, 4, bias=False)
            with torch.no_grad():
                self.weight.zero_()
                for channel in range(3):
                    self.weight[channel, channel] = 2 / 16

        def encode(self, pixels: torch.Tensor) -> Any:
            return types.SimpleNamespace(latents=self(pixels))

    vae = Shrink()
    colours = fit(vae, 4)
    assert colours is not None
    assert colours.factor == 4
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    wanted = torch.nn.functional.avg_pool2d(pixels, 4)
    assert torch.allclose(colours(vae(pixels)), wanted, atol=0.01)
    assert fit(torch.nn.Linear(2, 2), 8) is None  # encodes nothing


def test_waiting_in_main_memory_a_decoder_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.stable_diffusion()
    colours = cheap_decoder(pipe)
    pipe.vae._hf_hook = object()  # as model offloading leaves it
    assert preview(pipe, torch.zeros(1, 4, 8, 8), None, None) is None
    made = preview(pipe, torch.zeros(1, 4, 8, 16), None, None, colours)
    assert made is not None
    assert (made.image.size, made.width, made.height) == ((16, 8), 128, 64)


@pytest.fixture
def small_decoder(tmp_path: Path) -> Path:
    families.small_decoder().vae.save_pretrained(tmp_path / "taesd")
    return tmp_path


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_a_tiny_autoencoder_that_the_file_names_shows_previews(studio: Studio, small_decoder: Path, name: str) -> None:
    source = studio.catalog.get(name)
    (small_decoder / "m.yaml").write_text(
        f"name: m\nparameters:\n  model: {source.folder / source.model}\ndtype: fp32\n"
        "diffusers:\n  preview_vae: taesd\n"
    )
    model = load.load(Catalog([small_decoder]).get("m"), "cpu", lambda status: None)
    assert type(model.preview_decoder).__name__ == "AutoencoderTiny"
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    made = preview(model.pipeline, latents, 64, 64, model.preview_decoder)
    assert made is not None
    # It takes latents as the denoiser has them, unscaled by the large decoder's factor.
    with torch.no_grad():
        decoded = model.preview_decoder.decode(latents).sample
    wanted = model.pipeline.image_processor.postprocess(decoded)[0]
    assert np.array_equal(np.asarray(made.image), np.asarray(wanted))


def test_a_tiny_autoencoder_of_another_family_is_refused(studio: Studio, small_decoder: Path) -> None:
    source = studio.catalog.get("sd3")  # 16 channels
    (small_decoder / "m.yaml").write_text(
        f"name: m\nparameters:\n  model: {source.folder / source.model}\ndtype: fp32\n"
        "diffusers:\n  preview_vae: taesd\n"
    )
    with pytest.raises(ModelFileError, match=r"4 channels.*16") as caught:
        load.load(Catalog([small_decoder]).get("m"), "cpu", lambda status: None)
    assert caught.value.param == "diffusers.preview_vae"


OTHERWISE = {
    "SanaSprint": "its pipeline decodes its scheduler's other output",
    "KandinskyV22Prior": "draws an embedding",
    "KandinskyV22Combined": "the scheduler of the picture belongs to a pipeline inside of it (see test_combined)",
    "StableCascadeCombined": "the scheduler of the picture belongs to a pipeline inside of it (see test_combined)",
    "Kandinsky5T2I": "its output has no `images`",
    "WanImageToVideo (first and last)": "draws a clip",
    "Wan (2.2, two denoisers)": "draws a clip",
    "Wan (2.2, a time per token)": "draws a clip",
    "LongCatAudioDiT": "draws sound",
    "LongCatAudioDiT (no convolution over text)": "draws sound",
    "Allegro": "draws a clip",
}
"""Families whose last step is not the picture that comes out, and why."""

PICTURES = [
    name
    for name, family in parity.FAMILIES.items()
    if "moving" not in family.build.__module__ and name not in OTHERWISE
]


WITHOUT_A_MAP = {
    "DDPM": "its samples are pixels",
    "StableDiffusion (small decoder)": "its decoder is cheap",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # diffusers' own, some of them about toy sizes
@pytest.mark.parametrize("family", PICTURES)
def test_a_preview_of_the_last_step_is_the_picture(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.previews.x0.X0_NAMES", ())
    monkeypatch.setattr("sfumato.previews.x0.X0_FORMULAS", {})
    pipe = parity.FAMILIES[family].build()
    pipe.set_progress_bar_config(disable=True)
    call = parity.seeded(parity.FAMILIES[family].calls)[0]
    pipe.scheduler = copy.deepcopy(call.pop("scheduler", pipe.scheduler))
    step, results = pipe.scheduler.step, []

    @functools.wraps(step)
    def keeping(output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        results.append((output, timestep, step(output, timestep, *args, **kwargs)))
        return results[-1][-1]

    pipe.scheduler.step = keeping
    with torch.no_grad():
        picture = pipe(**call).images[0]
    latents = x0_or_sample(StepResult(pipe.scheduler, *results[-1]))
    assert latents is not None
    made = preview(pipe, latents, call.get("width"), call.get("height"))
    assert made is not None
    assert (made.width, made.height) == picture.size
    if "mask_image" not in call or "9 channels" in family:  # else the pipeline puts the source's rest around it
        assert np.abs(np.asarray(made.image).astype(int) - np.asarray(picture)).max() <= 1
    colours = cheap_decoder(pipe)
    assert (colours is None) == (family in WITHOUT_A_MAP)
    cheap = preview(pipe, latents, call.get("width"), call.get("height"), colours)
    assert cheap is not None
    assert (cheap.width, cheap.height) == picture.size
