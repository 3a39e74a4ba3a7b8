"""Schedulers: what we make draws what plain diffusers draws with the class and arguments written here."""

from __future__ import annotations

import copy
import functools
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sfumato import schedulers
from sfumato.core import MAX_SEED
from sfumato.errors import InvalidRequest
from sfumato.pipelines import request_scheduler, scheduler_calls
from support import tiny

pytestmark = [
    # diffusers hands tensors to numpy in a way that NumPy 2 announces the end of.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # torchsde rounds the ends of its interval, finds a query a hair outside, and clips it.
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
]

Hand = tuple[str, dict[str, Any]]

KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SEED = 1234

PAGE: Mapping[str, Hand] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "k_lms": ("LMSDiscreteScheduler", KARRAS),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "k_dpm_2": ("KDPM2DiscreteScheduler", KARRAS),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "k_dpm_2_a": ("KDPM2AncestralDiscreteScheduler", KARRAS),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "k_dpmpp_2m": ("DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {"noise_sampler_seed": SEED}),
    "k_dpmpp_sde": ("DPMSolverSDEScheduler", {"noise_sampler_seed": SEED, **KARRAS}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE),
    "k_dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {**SDE, **KARRAS}),
}
"""The 18 names of LocalAI's page, as someone who knows diffusers would write them."""

BEYOND: Mapping[str, Hand] = {
    "k_heun": ("HeunDiscreteScheduler", KARRAS),
    "k_unipc": ("UniPCMultistepScheduler", KARRAS),
    "k_euler": ("EulerDiscreteScheduler", KARRAS),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 3}),
    "k_dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {**SDE, **KARRAS, "solver_order": 3}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "k_dpmpp_2s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True, **KARRAS}),
    "deis": ("DEISMultistepScheduler", {}),
    "k_deis": ("DEISMultistepScheduler", KARRAS),
    "sa_solver": ("SASolverScheduler", {}),
    "k_sa_solver": ("SASolverScheduler", KARRAS),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}

SUFFIXED: Mapping[str, Hand] = {
    "euler_exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    "euler_beta": ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
    "euler_sgm_uniform": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler_a_sgm_uniform": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "ddim_sgm_uniform": ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
    "dpmpp_2m_sgm_uniform": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "dpmpp_2m_beta": ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_sde_exponential": (
        "DPMSolverSDEScheduler",
        {"use_exponential_sigmas": True, "noise_sampler_seed": SEED},
    ),
    "unipc_beta": ("UniPCMultistepScheduler", {"use_beta_sigmas": True}),
}

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
"""Both tiny flow models have a shift of 3; FLUX's is replaced by one that goes with the picture's size."""

FLOWING: Mapping[str, Hand] = {
    "unipc": ("UniPCMultistepScheduler", FLOW),
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "k_euler": ("FlowMatchEulerDiscreteScheduler", KARRAS),
    "euler_beta": ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}),
    "euler_exponential": ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", FLOW),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {**FLOW, **SDE}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {**FLOW, "lower_order_final": True}),
    "lcm": ("FlowMatchLCMScheduler", {}),
}
NOISY = {"dpmpp_2m_sde", "lcm"}
"""Those that add noise at each step; the flow pipelines pass them no generator."""

HEUN: Mapping[str, Hand] = {"heun": ("FlowMatchHeunDiscreteScheduler", {})}

BUILDERS: Mapping[str, Callable[[], Any]] = {
    "sd": tiny.stable_diffusion,
    "xl": tiny.stable_diffusion_xl,
    "flux": tiny.flux,
    "sd3": tiny.stable_diffusion_3,
    "pixart": tiny.pixart,
    "ddpm": tiny.ddpm,
    "depth": tiny.stable_diffusion_depth,
}

SAME = [
    *(("sd", name, hand) for table in (PAGE, BEYOND, SUFFIXED) for name, hand in table.items()),
    *(("xl", name, hand) for name, hand in PAGE.items()),
    *(("flux", name, hand) for name, hand in FLOWING.items()),
    *(("sd3", name, hand) for table in (FLOWING, HEUN) for name, hand in table.items()),
]


@pytest.fixture(scope="module")
def pipelines() -> Callable[[str], Any]:
    built: dict[str, Any] = {}

    def pipeline(kind: str) -> Any:
        if kind not in built:
            built[kind] = BUILDERS[kind]()
            built[kind].set_progress_bar_config(disable=True)
        return built[kind]

    return pipeline


@contextmanager
def scheduled(pipeline: Any, scheduler: Any) -> Iterator[Any]:
    """`pipeline` with another scheduler for a while."""
    own = pipeline.scheduler
    pipeline.scheduler = scheduler
    try:
        yield pipeline
    finally:
        pipeline.scheduler = own


def draw(pipeline: Any, scheduler: Any, seed: int | list[int] = SEED, steps: int = 5) -> Any:
    seeds = [seed] if isinstance(seed, int) else seed
    # The CPU generator takes 64 bits.
    generators = [torch.Generator().manual_seed(each) for each in seeds]
    with scheduled(pipeline, scheduler):
        if type(pipeline).__name__ == "DDPMPipeline":
            arguments: dict[str, Any] = {"batch_size": len(seeds)}
        else:
            arguments = {"prompt": ["a red fox"] * len(seeds), "height": 32, "width": 32}
        return pipeline(**arguments, generator=generators, num_inference_steps=steps, output_type="np").images


def by_hand(pipeline: Any, hand: Hand) -> Any:
    cls, arguments = hand
    return getattr(diffusers, cls).from_config(pipeline.scheduler.config, **arguments)


def alike(one: Any, other: Any) -> bool:
    return bool(np.abs(one - other).max() <= 1e-5)


@pytest.mark.parametrize(("kind", "name", "hand"), SAME, ids=[f"{kind}-{name}" for kind, name, _ in SAME])
def test_draws_what_plain_diffusers_draws(pipelines: Callable[[str], Any], kind: str, name: str, hand: Hand) -> None:
    pipeline, choice = pipelines(kind), schedulers.parse(name)
    own, before = pipeline.scheduler, dict(pipeline.scheduler.config)
    request_scheduler.check(pipeline, choice)
    made = request_scheduler.make(pipeline, choice, SEED)
    assert type(made).__name__ == hand[0]

    ours = draw(pipeline, made)
    assert np.isfinite(ours).all()
    assert ours.std() > 0.01, "a grey picture proves nothing"
    plain = by_hand(pipeline, hand)
    if kind in {"flux", "sd3"} and name in NOISY:
        # Plain diffusers takes torch's global state here, and two runs differ.
        assert not alike(draw(pipeline, plain), draw(pipeline, plain))
        plain.step = functools.partial(plain.step, generator=request_scheduler.noise(SEED))
    assert alike(ours, draw(pipeline, plain))

    assert pipeline.scheduler is own
    assert dict(own.config) == before


def test_every_name_is_compared_above() -> None:
    assert set(schedulers.names()) == PAGE.keys() | BEYOND.keys()
    flow = {name for name, solver in schedulers.SOLVERS.items() if solver.flow}
    assert flow <= FLOWING.keys() | HEUN.keys()


def test_the_page_s_names_have_the_page_s_descriptions() -> None:
    words = (
        "DDIM, PNDM, Heun, UniPC, Euler, Euler a, LMS, LMS Karras, DPM2, DPM2 Karras, DPM2 a, DPM2 a Karras,"
        " DPM++ 2M, DPM++ 2M Karras, DPM++ SDE, DPM++ SDE Karras, DPM++ 2M SDE, DPM++ 2M SDE Karras"
    )
    assert [schedulers.descriptions()[name] for name in PAGE] == words.split(", ")
    assert [schedulers.parse(name).description for name in PAGE] == words.split(", ")


def test_every_class_is_one_of_diffusers() -> None:
    for solver in schedulers.SOLVERS.values():
        for form in filter(None, (solver.noise, solver.flow)):
            assert issubclass(getattr(diffusers, form.cls), diffusers.SchedulerMixin)


@pytest.mark.parametrize("name", [name for name in schedulers.names() if name.startswith("k_")])
def test_karras_differs(pipelines: Callable[[str], Any], name: str) -> None:
    sd = pipelines("sd")
    karras, plain = (
        draw(sd, request_scheduler.make(sd, schedulers.parse(each), SEED)) for each in (name, name.removeprefix("k_"))
    )
    assert not alike(karras, plain)


def test_parse() -> None:
    assert schedulers.parse("k_euler") == schedulers.parse("euler_karras")
    assert schedulers.parse("k_euler") == schedulers.parse("euler", "karras")
    assert schedulers.parse("k_euler") == schedulers.parse("k_euler", "karras")
    assert schedulers.parse("euler_a").schedule is None
    assert schedulers.parse("euler_a", "sgm_uniform").name == "euler_a_sgm_uniform"
    assert schedulers.parse("k_dpp_sde").name == "k_dpmpp_sde"


def test_every_choice_can_be_parsed_from_its_name() -> None:
    for base, solver in schedulers.SOLVERS.items():
        for schedule in (None, *solver.noise.schedules):
            choice = schedulers.parse(base, schedule)
            assert choice.schedule == schedule
            assert schedulers.parse(choice.name) == choice


@pytest.mark.parametrize(
    ("name", "schedule", "words"),
    [
        ("eular", None, "'eular'. Did you mean 'euler'?"),
        ("dpmpp2m", None, "Did you mean 'dpmpp_2m'?"),
        ("dpmpp_2m_sgm_unifrom", None, "Did you mean 'dpmpp_2m_sgm_uniform'?"),
        ("", None, "Valid: ddim, pndm"),
        ("euler", "karas", "Did you mean 'karras'?"),
        ("k_euler", "beta", "names the schedule 'karras'"),
        ("euler_a", "karras", "it supports: sgm_uniform. Schedulers that support 'karras': heun"),
        ("lcm", "beta", "it supports: none"),
        ("ddim", "karras", "'ddim' does not support the schedule 'karras'"),
    ],
)
def test_what_cannot_be_parsed(name: str, schedule: str | None, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        schedulers.parse(name, schedule)
    assert words in caught.value.message
    assert caught.value.param == "scheduler"


def test_the_names_need_no_torch() -> None:
    code = "import sys, sfumato.schedulers; sys.exit(bool({'torch', 'diffusers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_request_has_its_own(pipelines: Callable[[str], Any]) -> None:
    sd = pipelines("sd")
    for choice in (None, schedulers.parse("dpmpp_2m")):
        one, other = (request_scheduler.make(sd, choice, SEED) for _ in range(2))
        assert one is not other
        assert one is not sd.scheduler
        one.set_timesteps(7)
        assert one.num_inference_steps == 7
        assert other.num_inference_steps is None


@pytest.mark.parametrize("kind", ["sd", "xl", "flux", "sd3", "pixart", "ddpm"])
def test_no_choice_is_the_model_s_own(pipelines: Callable[[str], Any], kind: str) -> None:
    pipeline = pipelines(kind)
    request_scheduler.check(pipeline, None)
    made = request_scheduler.make(pipeline, None, SEED)
    assert isinstance(made, type(pipeline.scheduler))
    assert {k: v for k, v in made.config.items() if k[0] != "_"} == {
        k: v for k, v in pipeline.scheduler.config.items() if k[0] != "_"
    }
    assert alike(draw(pipeline, made), draw(pipeline, by_hand(pipeline, (type(made).__name__, {}))))


@pytest.mark.parametrize("seed", [0, 2**31, MAX_SEED])
def test_sde_takes_any_seed(pipelines: Callable[[str], Any], seed: int) -> None:
    sd, choice = pipelines("sd"), schedulers.parse("dpmpp_sde")
    one, again = (draw(sd, request_scheduler.make(sd, choice, seed)) for _ in range(2))
    # The pipeline's generator has one seed throughout: only the solver's noise differs.
    other = draw(sd, request_scheduler.make(sd, choice, seed - 1 if seed else 1))
    assert np.array_equal(one, again)
    assert not alike(one, other)


def test_sde_draws_alone_what_it_draws_in_a_batch(pipelines: Callable[[str], Any]) -> None:
    sd, choice, seeds = pipelines("sd"), schedulers.parse("k_dpmpp_sde"), [5, 6]
    together = draw(sd, request_scheduler.make(sd, choice, seeds), seeds)
    for picture, seed in zip(together, seeds, strict=True):
        assert np.abs(picture - draw(sd, request_scheduler.make(sd, choice, seed), seed)[0]).max() < 1e-4


@pytest.mark.parametrize("name", sorted(NOISY))
def test_the_seed_decides_the_noise_of_flow_models_too(pipelines: Callable[[str], Any], name: str) -> None:
    flux, choice, seeds = pipelines("flux"), schedulers.parse(name), [0, MAX_SEED]
    together = draw(flux, request_scheduler.make(flux, choice, seeds), seeds)
    for picture, seed in zip(together, seeds, strict=True):
        assert np.abs(picture - draw(flux, request_scheduler.make(flux, choice, seed), seed)[0]).max() < 1e-4
    # One seed for the latents, another for the noise.
    assert not alike(draw(flux, request_scheduler.make(flux, choice, 1), 0), together[:1])
    # It is not the noise that the latents began as.
    first = torch.randn(8, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(first, torch.randn(8, generator=request_scheduler.noise(7)))


def test_pipelines_may_copy_the_scheduler(pipelines: Callable[[str], Any]) -> None:
    """Some do, to step sound beside pictures: the copy has to step itself, not the original."""
    made = request_scheduler.make(pipelines("flux"), schedulers.parse("lcm"), SEED)
    assert copy.deepcopy(made).step.func.__self__ is not made


def test_check_uses_up_no_random_numbers(pipelines: Callable[[str], Any]) -> None:
    torch.manual_seed(3)
    request_scheduler.check(pipelines("sd"), schedulers.parse("euler_a"))
    used = torch.rand(1)
    torch.manual_seed(3)
    assert used == torch.rand(1)


def own(scheduler: Any, cls: type = diffusers.StableDiffusionPipeline) -> Any:
    """Something of this pipeline class that has a scheduler and nothing else."""
    pipeline: Any = object.__new__(cls)
    pipeline.__dict__["scheduler"] = scheduler
    return pipeline


def test_the_sampler_s_switches_do_not_carry_over() -> None:
    shipped = diffusers.DPMSolverMultistepScheduler(
        **SDE,
        **KARRAS,
        solver_order=3,
        solver_type="heun",
        euler_at_final=True,
        final_sigmas_type="sigma_min",
    )
    for name in schedulers.names():
        config = request_scheduler.make(own(shipped), schedulers.parse(name), SEED).config
        assert bool(config.get("use_karras_sigmas")) is name.startswith("k_")
    plain = request_scheduler.make(own(shipped), schedulers.parse("dpmpp_2m"), SEED).config
    assert plain["algorithm_type"] == "dpmsolver++"
    assert plain["solver_order"] == 2
    # Two sigma switches at once raise in diffusers.
    assert request_scheduler.make(own(shipped), schedulers.parse("euler_beta"), SEED).config["use_beta_sigmas"]


def test_the_model_s_facts_carry_over() -> None:
    shipped = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    for name in schedulers.names():
        made = request_scheduler.make(own(shipped), schedulers.parse(name), SEED)
        assert made.config["prediction_type"] == "v_prediction"
        # Not written down by the model, and the classes' defaults disagree.
        assert made.config["beta_start"] == 0.0001
        assert made.config["rescale_betas_zero_snr"] is True
        assert made.config["timestep_spacing"] == "trailing"
        assert made.config["steps_offset"] == 1


def test_clipping_is_for_models_that_clip() -> None:
    pixels, latents = diffusers.DDPMScheduler(), diffusers.PNDMScheduler(skip_prk_steps=True)
    assert request_scheduler.make(own(pixels), schedulers.parse("ddim"), SEED).config["clip_sample"] is True
    assert request_scheduler.make(own(latents), schedulers.parse("ddim"), SEED).config["clip_sample"] is False


def test_what_the_pipeline_corrected_after_loading_stays() -> None:
    shipped = diffusers.PNDMScheduler(skip_prk_steps=True)
    # StableDiffusionPipeline mends old files like this, and leaves the value in the list of defaults.
    shipped._internal_dict = diffusers.configuration_utils.FrozenDict({**shipped.config, "steps_offset": 1})
    assert "steps_offset" in shipped.config["_use_default_values"]
    assert request_scheduler.make(own(shipped), None, SEED).config["steps_offset"] == 1
    assert request_scheduler.make(own(shipped), schedulers.parse("ddim"), SEED).config["steps_offset"] == 1


def test_the_shift_goes_both_ways() -> None:
    wan = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    euler = request_scheduler.make(own(wan, diffusers.WanPipeline), schedulers.parse("euler"), SEED)
    assert euler.config["shift"] == 5.0
    back = request_scheduler.make(own(euler, diffusers.StableDiffusion3Pipeline), schedulers.parse("dpmpp_2m"), SEED)
    assert back.config["flow_shift"] == 5.0
    flux = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9)
    made = request_scheduler.make(own(flux, diffusers.FluxPipeline), schedulers.parse("dpmpp_2m"), SEED)
    assert made.config["use_dynamic_shifting"] is True
    assert made.config["max_shift"] == 0.9, "the pipeline works out mu from it"


def refusal(pipeline: Any, name: str, steps: int | None = None) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        request_scheduler.check(pipeline, schedulers.parse(name), steps)
    return caught.value


def test_a_flow_model_refuses_what_has_no_flow_form(pipelines: Callable[[str], Any]) -> None:
    error = refusal(pipelines("flux"), "euler_a")
    assert error.param == "scheduler"
    assert "'euler_a' does not work with FluxPipeline" in error.message
    assert f"These work: {', '.join(request_scheduler.works_with(pipelines('flux')))}." in error.message
    assert "own (FlowMatchEulerDiscreteScheduler)" in error.message
    with pytest.raises(InvalidRequest):
        request_scheduler.make(pipelines("flux"), schedulers.parse("euler_a"), SEED)
    unipc, euler = (refusal(pipelines("sd3"), name).message for name in ("k_unipc", "euler_sgm_uniform"))
    assert "flow-matching models, and this is one, UniPC takes no schedule" in unipc
    assert "this is one, Euler takes only the schedules karras, exponential, beta" in euler


FITTING = {
    "flux": "unipc euler k_euler dpmpp_2m dpmpp_2m_sde dpmpp_2s lcm",
    "flux without dynamic shifting": "unipc euler k_euler lcm",
    "sd3": "heun unipc euler k_euler dpmpp_2m dpmpp_2m_sde dpmpp_2s lcm",
    "sd3 with dynamic shifting": "unipc euler k_euler dpmpp_2m dpmpp_2m_sde dpmpp_2s lcm",
    "sd": " ".join(schedulers.names()),
    "pixart": " ".join(schedulers.names()),
    # It passes no noise scale and always a generator.
    "ddpm": "ddim dpmpp_2m k_dpmpp_2m dpmpp_2m_sde k_dpmpp_2m_sde dpmpp_3m_sde k_dpmpp_3m_sde"
    " dpmpp_2s k_dpmpp_2s sa_solver k_sa_solver ddpm lcm tcd",
}


@pytest.mark.parametrize("case", FITTING)
def test_works_with_is_the_truth(pipelines: Callable[[str], Any], case: str) -> None:
    kind, _, change = case.partition(" ")
    pipeline = pipelines(kind)
    shifting = change.startswith("with ") if change else pipeline.scheduler.config.get("use_dynamic_shifting")
    shipped = (
        type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_dynamic_shifting=shifting)
        if change
        else pipeline.scheduler
    )
    with scheduled(pipeline, shipped):
        fitting = request_scheduler.works_with(pipeline)
        assert " ".join(fitting) == FITTING[case]
        # On the models that take nearly everything it has run above.
        for name in fitting if kind not in {"sd", "pixart"} else ("euler", "dpmpp_sde"):
            assert np.isfinite(draw(pipeline, request_scheduler.make(pipeline, schedulers.parse(name), SEED))).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("heun", "set_timesteps"),
        ("sa_solver", "unexpected keyword"),
        ("deis", ""),
    ],
)
def test_what_flux_refuses_does_fail_there(pipelines: Callable[[str], Any], name: str, message: str) -> None:
    """The other direction: we refuse no more than we must."""
    flux = pipelines("flux")
    by_name = {**HEUN, "sa_solver": ("SASolverScheduler", FLOW), "deis": ("DEISMultistepScheduler", FLOW)}
    assert name not in request_scheduler.works_with(flux)
    hand = by_hand(flux, by_name[name])
    if name == "deis":
        hand.set_timesteps(4, mu=1.0)
        assert hand.sigmas[-1] > 0.1, "diffusers mended it: give it its flow form back"
    else:
        with pytest.raises((ValueError, TypeError), match=message):
            draw(flux, hand)


@pytest.mark.parametrize(
    "cls",
    [
        diffusers.StableDiffusionImg2ImgPipeline,
        diffusers.StableDiffusionXLInpaintPipeline,
    ],
)
def test_img2img_of_stable_diffusion_takes_every_name(cls: type) -> None:
    assert request_scheduler.works_with(own(diffusers.EulerDiscreteScheduler(), cls)) == schedulers.names()


@pytest.mark.parametrize("name", schedulers.SOLVERS)
def test_img2img_draws(pipelines: Callable[[str], Any], name: str) -> None:
    depth = pipelines("depth")
    source = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with scheduled(depth, request_scheduler.make(depth, schedulers.parse(name), SEED)):
        (picture,) = depth(
            prompt="a red fox",
            image=source,
            depth_map=source[0, :1],
            strength=0.6,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(SEED),
            output_type="np",
        ).images
    assert np.isfinite(picture).all()


def test_img2img_needs_scale_noise() -> None:
    shipped = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    picture = own(shipped, diffusers.StableDiffusion3Img2ImgPipeline)
    assert "uses the scheduler's scale_noise" in refusal(picture, "unipc").message
    assert request_scheduler.works_with(picture) == ("heun", "euler", "k_euler", "lcm")


def test_own_sigmas_need_a_scheduler_that_takes_them() -> None:
    shipped = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9)
    qwen = own(shipped, diffusers.QwenImagePipeline)
    assert request_scheduler.works_with(qwen) == ("unipc", "euler", "k_euler", "lcm")
    assert "shift_terminal (0.02)" in refusal(qwen, "dpmpp_2m").message


@pytest.mark.parametrize(
    ("cls", "scheduler"),
    [
        (diffusers.WuerstchenDecoderPipeline, diffusers.DDPMWuerstchenScheduler()),
        (diffusers.AmusedPipeline, diffusers.AmusedScheduler(mask_token_id=5)),
        (diffusers.StableDiffusionXLPipeline, diffusers.EDMDPMSolverMultistepScheduler()),
        (diffusers.SanaSprintPipeline, diffusers.SCMScheduler()),
    ],
)
def test_some_models_keep_their_own(cls: type, scheduler: Any) -> None:
    pipeline = own(scheduler, cls)
    error = refusal(pipeline, "euler")
    assert f"works only with {type(scheduler).__name__}" in error.message
    assert "Leave the scheduler out" in error.message
    assert request_scheduler.works_with(pipeline) == ()
    assert type(request_scheduler.make(pipeline, None, SEED)) is type(scheduler)


def test_a_pipeline_without_a_scheduler() -> None:
    for bare in (SimpleNamespace(), SimpleNamespace(scheduler=None)):
        assert request_scheduler.make(bare, None, SEED) is None
        assert request_scheduler.works_with(bare) == ()
        assert "has no scheduler" in refusal(bare, "euler").message
        with pytest.raises(InvalidRequest, match="has no scheduler"):
            request_scheduler.make(bare, schedulers.parse("euler"), SEED)


def test_a_pipeline_that_drives_others_keeps_theirs() -> None:
    combined = own(diffusers.DDPMScheduler(), diffusers.KandinskyV22CombinedPipeline)
    assert "does not use a scheduler" in refusal(combined, "ddim").message


def test_a_number_of_steps_that_the_scheduler_cannot_do(pipelines: Callable[[str], Any]) -> None:
    sd = pipelines("sd")
    request_scheduler.check(sd, schedulers.parse("lcm"), 50)
    error = refusal(sd, "lcm", 60)
    assert error.param == "step"
    assert "cannot draw in 60 steps" in error.message


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(pipelines: Callable[[str], Any], steps: int) -> None:
    """`check` with the number of steps foretells what happens, down to a single one."""
    sd = pipelines("sd")
    for name in schedulers.SOLVERS:
        choice = schedulers.parse(name)
        try:
            request_scheduler.check(sd, choice, steps)
        except InvalidRequest as refused:
            assert refused.param == "step"
        else:
            assert np.isfinite(draw(sd, request_scheduler.make(sd, choice, SEED), steps=steps)).all(), name


def test_handover() -> None:
    flux = scheduler_calls.read(diffusers.FluxPipeline)
    assert flux is not None
    (run,) = flux.runs
    assert run.with_values({}) == {"sigmas", "mu"}
    assert run.with_values({"use_flow_sigmas": True}) == {"mu"}
    sd3 = scheduler_calls.read(diffusers.StableDiffusion3Pipeline)
    assert sd3 is not None
    (run,) = sd3.runs
    assert run.names({}) == set()
    assert run.names({"use_dynamic_shifting": True}) == {"mu"}
    assert scheduler_calls.read(diffusers.KandinskyV22CombinedPipeline) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the pipelines' own modules, as they are imported
def test_handover_reads_every_pipeline_of_diffusers() -> None:
    classes = [
        getattr(diffusers, name)
        for name in dir(diffusers)
        if name.endswith("Pipeline") and "Modular" not in name and isinstance(getattr(diffusers, name), type)
    ]
    assert sum(scheduler_calls.read(cls) is not None for cls in classes) > 250


# What a check costs: it is on the thread that draws for everybody.


@pytest.fixture
def rehearsals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The schedulers that were rehearsed since the beginning of the test, by class."""
    held: list[str] = []
    rehearse = request_scheduler._rehearse

    def counted(scheduler: Any, *args: Any) -> str | None:
        held.append(type(scheduler).__name__)
        return rehearse(scheduler, *args)

    monkeypatch.setattr(request_scheduler, "_rehearse", counted)
    request_scheduler._why_unfit.cache_clear()
    yield held
    request_scheduler._why_unfit.cache_clear()


def test_a_rehearsal_is_held_once(rehearsals: list[str]) -> None:
    pipeline = own(diffusers.PNDMScheduler(skip_prk_steps=True))
    for _ in range(3):
        request_scheduler.check(pipeline, schedulers.parse("k_dpm_2_a"), 30)
        # Another object of the same content, as a second copy of the model has it.
        request_scheduler.check(own(diffusers.PNDMScheduler(skip_prk_steps=True)), schedulers.parse("k_dpm_2_a"), 30)
    assert len(rehearsals) == 1
    request_scheduler.check(pipeline, schedulers.parse("k_dpm_2_a"), 31)
    request_scheduler.check(pipeline, schedulers.parse("dpm_2_a"), 31)
    request_scheduler.check(
        own(pipeline.scheduler, diffusers.StableDiffusionImg2ImgPipeline), schedulers.parse("dpm_2_a"), 31
    )
    assert len(rehearsals) == 4


@pytest.mark.parametrize("change", [{"prediction_type": "v_prediction"}, {"trained_betas": np.full(1000, 0.01)}])
def test_what_is_kept_belongs_to_the_content_of_the_config(rehearsals: list[str], change: dict[str, Any]) -> None:
    pipeline = own(diffusers.PNDMScheduler(skip_prk_steps=True))
    request_scheduler.check(pipeline, schedulers.parse("euler"))
    request_scheduler.check(own(diffusers.PNDMScheduler(skip_prk_steps=True, **change)), schedulers.parse("euler"))
    assert len(rehearsals) == 2
    pipeline.scheduler.register_to_config(num_train_timesteps=900)  # the same object, changed after it was looked at
    request_scheduler.check(pipeline, schedulers.parse("euler"))
    assert len(rehearsals) == 3


def test_a_refusal_is_worded_once(rehearsals: list[str]) -> None:
    first = refusal(own(diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.FluxPipeline), "heun")
    held = len(rehearsals)
    again = refusal(own(diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.FluxPipeline), "heun")
    assert again.message == first.message
    assert len(rehearsals) == held
    assert refusal(own(diffusers.PNDMScheduler(skip_prk_steps=True)), "lcm", 60).param == "step"
    held = len(rehearsals)
    assert refusal(own(diffusers.PNDMScheduler(skip_prk_steps=True)), "lcm", 60).param == "step"
    assert len(rehearsals) == held


def state(scheduler: Any) -> dict[str, str]:
    """Everything that a scheduler knows, in a form that can be compared: nan is not equal to itself."""
    return {key: str(value.tolist() if hasattr(value, "tolist") else value) for key, value in vars(scheduler).items()}


@pytest.mark.parametrize("changes", [{}, KARRAS, {"timestep_spacing": "trailing"}, {"beta_schedule": "scaled_linear"}])
@pytest.mark.parametrize("name", sorted(request_scheduler.SLOW_CONSTRUCTORS))
def test_a_scheduler_made_in_a_hurry_is_the_same_once_its_steps_are_set(name: str, changes: dict[str, Any]) -> None:
    cls = getattr(diffusers, name)
    plain, quick = cls(**changes), request_scheduler._unscheduled(cls, changes)
    assert type(quick) is cls
    assert quick.config == plain.config
    for scheduler in (plain, quick):
        scheduler.set_timesteps(12)
    assert state(quick) == state(plain)


def test_every_solver_that_begins_with_a_long_schedule_is_known() -> None:
    classes = {solver.noise.cls for solver in schedulers.SOLVERS.values()}
    begins = {name for name in classes if "self.set_timesteps(" in inspect.getsource(getattr(diffusers, name).__init__)}
    assert begins == request_scheduler.SLOW_CONSTRUCTORS


@pytest.mark.parametrize("name", ["KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"])
def test_no_request_waits_for_a_schedule_of_all_training_steps(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also where such a scheduler is the model's own and no other is asked for."""
    cls = getattr(diffusers, name)
    pipeline = own(cls())
    longest = 0
    real = cls.set_timesteps

    @functools.wraps(real)
    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal longest
        longest = max(longest, inspect.signature(real).bind(*args, **kwargs).arguments["num_inference_steps"])
        real(*args, **kwargs)

    monkeypatch.setattr(cls, "set_timesteps", counted)
    request_scheduler._why_unfit.cache_clear()
    by_class = {choice.noise.cls: choice for choice in map(schedulers.parse, schedulers.names())}
    request_scheduler.check(pipeline, by_class[name], 20)
    request_scheduler.make(pipeline, by_class[name], SEED)
    request_scheduler.make(pipeline, None, SEED)
    assert longest == 20


def test_a_pipeline_that_sets_no_steps_gets_the_whole_schedule() -> None:
    combined = own(diffusers.HeunDiscreteScheduler(), diffusers.KandinskyV22CombinedPipeline)
    assert len(request_scheduler.make(combined, None, SEED).timesteps) == len(combined.scheduler.timesteps) > 1000


def steps_through(scheduler: Any, **settings: Any) -> bool:
    """Whether the result of all steps is finite."""
    scheduler.set_timesteps(**settings)
    sample = torch.zeros(1, 4, 2, 2)
    for timestep in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(torch.zeros_like(sample), timestep, sample, return_dict=False)[0]
    return bool(torch.isfinite(sample).all())


def test_as_many_steps_as_the_model_was_trained_with(pipelines: Callable[[str], Any]) -> None:
    """Of every solver, and the model's own: it draws, or is refused with the number, never an error of diffusers."""
    sd, refused = pipelines("sd"), set[str | None]()
    for name in (None, *schedulers.SOLVERS):
        choice = schedulers.parse(name) if name else None
        try:
            request_scheduler.check(sd, choice, 1000)
        except InvalidRequest as error:
            assert error.param == "step"
            assert "1000" in error.message
            refused.add(name)
        else:
            assert steps_through(request_scheduler.make(sd, choice, SEED), num_inference_steps=1000), name
    assert refused >= {None, "pndm", "ddim", "unipc", "dpmpp_2m"}
    request_scheduler.check(sd, None, 999)


def test_so_many_steps_that_two_fall_on_one_time_step(pipelines: Callable[[str], Any]) -> None:
    sd3 = pipelines("sd3")
    unipc, euler = schedulers.parse("unipc"), schedulers.parse("euler")
    with pytest.raises(InvalidRequest, match="cannot draw in 500 steps") as caught:
        request_scheduler.check(sd3, unipc, 500)
    assert caught.value.param == "step"
    with pytest.raises(AssertionError):
        steps_through(request_scheduler.make(sd3, unipc, SEED), num_inference_steps=500)
    request_scheduler.check(sd3, unipc, 50)
    request_scheduler.check(sd3, euler, 500)
