"""The schedulers a request can name. A table; nothing here imports torch or diffusers.

A name is a solver, optionally followed by a schedule: how the noise levels are spread over the steps.

    euler   k_euler   euler_beta   dpmpp_2m_sgm_uniform        "euler", schedule="karras"

`k_` in front is Karras where the solver takes it, as the names came to be written; `k_euler`, `euler_karras` and
`euler` with `schedule="karras"` are the same choice. `sgm_uniform` is diffusers' `timestep_spacing="trailing"`.
Which of them fits a given model is for `sfumato.pipelines.request_scheduler` to say: that takes the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sfumato.errors import InvalidRequest, did_you_mean


@dataclass(frozen=True, slots=True)
class SolverForm:
    """A diffusers class, and the constructor arguments that make it this solver."""

    cls: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    schedules: tuple[str, ...] = ()
    """The schedules that this class supports."""


@dataclass(frozen=True, slots=True)
class Solver:
    description: str
    noise: SolverForm
    """For models that predict noise, the sample or a velocity: Stable Diffusion 1, 2, XL and similar."""
    flow: SolverForm | None = None
    """For flow-matching models (FLUX, Stable Diffusion 3); None if diffusers has no such form."""


@dataclass(frozen=True, slots=True)
class SchedulerChoice:
    """One solver with one schedule. `parse(choice.name)` returns an equal one."""

    name: str
    description: str
    solver: str
    """Its key in `SOLVERS`."""
    schedule: str | None
    noise: SolverForm
    """Its arguments include those of the schedule."""
    flow: SolverForm | None
    """None: there is no flow form, or not with this schedule."""


SCHEDULES: Mapping[str, tuple[str, Mapping[str, object]]] = MappingProxyType(
    {
        "karras": ("Karras", {"use_karras_sigmas": True}),
        "exponential": ("exponential", {"use_exponential_sigmas": True}),
        "beta": ("beta", {"use_beta_sigmas": True}),
        "sgm_uniform": ("SGM uniform", {"timestep_spacing": "trailing"}),
    }
)
"""Schedule -> (words for the description, constructor arguments)."""

SIGMAS = ("karras", "exponential", "beta")
SPACING = ("sgm_uniform",)
EVERY = SIGMAS + SPACING

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""Constructor arguments that turn diffusers' noise solvers into their flow form."""

_SDE = {"algorithm_type": "sde-dpmsolver++"}
_MULTISTEP, _SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
# Odd step counts need it; otherwise diffusers sets it silently, with a warning.
_LOWER_LAST = {"lower_order_final": True}

SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        "ddim": Solver("DDIM", SolverForm("DDIMScheduler", {}, SPACING)),
        # The Runge-Kutta warm-up is for pixel models; every Stable Diffusion model ships without it.
        "pndm": Solver("PNDM", SolverForm("PNDMScheduler", {"skip_prk_steps": True}, SPACING)),
        "heun": Solver(
            "Heun", SolverForm("HeunDiscreteScheduler", {}, EVERY), SolverForm("FlowMatchHeunDiscreteScheduler")
        ),
        "unipc": Solver(
            "UniPC", SolverForm("UniPCMultistepScheduler", {}, EVERY), SolverForm("UniPCMultistepScheduler", FLOW)
        ),
        "euler": Solver(
            "Euler",
            SolverForm("EulerDiscreteScheduler", {}, EVERY),
            SolverForm("FlowMatchEulerDiscreteScheduler", {}, SIGMAS),
        ),
        "euler_a": Solver("Euler a", SolverForm("EulerAncestralDiscreteScheduler", {}, SPACING)),
        "lms": Solver("LMS", SolverForm("LMSDiscreteScheduler", {}, EVERY)),
        "dpm_2": Solver("DPM2", SolverForm("KDPM2DiscreteScheduler", {}, EVERY)),
        "dpm_2_a": Solver("DPM2 a", SolverForm("KDPM2AncestralDiscreteScheduler", {}, EVERY)),
        "dpmpp_2m": Solver("DPM++ 2M", SolverForm(_MULTISTEP, {}, EVERY), SolverForm(_MULTISTEP, FLOW)),
        # The solver of the stochastic differential equation itself, with a Brownian tree for noise.
        "dpmpp_sde": Solver("DPM++ SDE", SolverForm("DPMSolverSDEScheduler", {}, EVERY)),
        "dpmpp_2m_sde": Solver(
            "DPM++ 2M SDE", SolverForm(_MULTISTEP, _SDE, EVERY), SolverForm(_MULTISTEP, {**_SDE, **FLOW})
        ),
        "dpmpp_3m_sde": Solver("DPM++ 3M SDE", SolverForm(_MULTISTEP, {**_SDE, "solver_order": 3}, EVERY)),
        "dpmpp_2s": Solver(
            "DPM++ 2S", SolverForm(_SINGLESTEP, _LOWER_LAST, SIGMAS), SolverForm(_SINGLESTEP, {**_LOWER_LAST, **FLOW})
        ),
        # No flow form for these two: diffusers' version ends above zero and leaves the last step's noise.
        "deis": Solver("DEIS", SolverForm("DEISMultistepScheduler", {}, EVERY)),
        "sa_solver": Solver("SA-Solver", SolverForm("SASolverScheduler", {}, EVERY)),
        "ddpm": Solver("DDPM", SolverForm("DDPMScheduler", {}, SPACING)),
        # For models distilled for them; both have their own step spacing.
        "lcm": Solver("LCM", SolverForm("LCMScheduler"), SolverForm("FlowMatchLCMScheduler", {}, SIGMAS)),
        "tcd": Solver("TCD", SolverForm("TCDScheduler")),
    }
)
"""Name -> solver. The forms' classes and arguments are diffusers'."""

ALIASES: Mapping[str, str] = MappingProxyType(
    # LocalAI's page gives this as its default; the table on the same page spells it differently.
    {"k_dpp_sde": "k_dpmpp_sde"}
)


@dataclass(frozen=True, slots=True)
class Sampler:
    """A solver under its AUTOMATIC1111 name."""

    solver: str
    """Its key in `SOLVERS`."""
    default_schedule: str | None = None
    """The schedule used with it if the request names none."""
    aliases: tuple[str, ...] = ()


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "DPM++ 2M": Sampler("dpmpp_2m", "karras", ("k_dpmpp_2m",)),
        "DPM++ SDE": Sampler("dpmpp_sde", "karras", ("k_dpmpp_sde",)),
        "DPM++ 2M SDE": Sampler("dpmpp_2m_sde", "exponential", ("k_dpmpp_2m_sde",)),
        "DPM++ 3M SDE": Sampler("dpmpp_3m_sde", "exponential", ("k_dpmpp_3m_sde",)),
        "DPM++ 2S": Sampler("dpmpp_2s"),
        "Euler a": Sampler("euler_a", None, ("k_euler_a", "k_euler_ancestral", "euler_ancestral")),
        "Euler": Sampler("euler", None, ("k_euler",)),
        "LMS": Sampler("lms", None, ("k_lms",)),
        "Heun": Sampler("heun", None, ("k_heun",)),
        "DPM2": Sampler("dpm_2", "karras", ("k_dpm_2",)),
        "DPM2 a": Sampler("dpm_2_a", "karras", ("k_dpm_2_a", "dpm_2_ancestral")),
        "DDIM": Sampler("ddim"),
        "PLMS": Sampler("pndm"),
        "UniPC": Sampler("unipc"),
        "DEIS": Sampler("deis"),
        "SA-Solver": Sampler("sa_solver"),
        "DDPM": Sampler("ddpm"),
        "LCM": Sampler("lcm", None, ("k_lcm",)),
        "TCD": Sampler("tcd"),
    }
)
"""Name in AUTOMATIC1111 -> solver. There `k_` means k-diffusion, not Karras."""

SCHEDULE_TYPES: Mapping[str, str] = MappingProxyType(
    {"karras": "Karras", "exponential": "Exponential", "sgm_uniform": "SGM Uniform", "beta": "Beta"}
)
"""Schedule -> AUTOMATIC1111's name for it."""

AUTOMATIC, UNIFORM = "Automatic", "Uniform"
"""AUTOMATIC1111's names for a sampler's default schedule, and for no schedule."""


def sampler_of(name: str) -> tuple[str, str] | None:
    """AUTOMATIC1111's sampler and schedule type for a name that `parse` accepts; None if it has none."""
    try:
        choice = parse(name)
    except InvalidRequest:
        return None
    sampler = next(word for word, each in SAMPLERS.items() if each.solver == choice.solver)
    plain = UNIFORM if SAMPLERS[sampler].default_schedule else AUTOMATIC
    return sampler, SCHEDULE_TYPES[choice.schedule] if choice.schedule else plain


def names() -> tuple[str, ...]:
    """Every solver in table order, each followed by its Karras form; other schedules are suffixes."""
    return tuple(descriptions())


def descriptions() -> dict[str, str]:
    """Name -> description, for `names()`."""
    every: dict[str, str] = {}
    for name, solver in SOLVERS.items():
        every[name] = solver.description
        if "karras" in solver.noise.schedules:
            every[f"k_{name}"] = f"{solver.description} Karras"
    return every


def without_schedule(name: str) -> str | None:
    """The solver of this scheduler, to fall back on; None if the name has no schedule that could be left out."""
    choice = parse(name)
    return choice.solver if choice.schedule else None


def parse(name: str, schedule: str | None = None) -> SchedulerChoice:
    """The choice for a name and an optional separate schedule.

    Raises InvalidRequest if either is unknown, if the schedule in the name and the separate one disagree,
    or if the solver does not support the schedule.
    """
    if schedule is not None and schedule not in SCHEDULES:
        raise InvalidRequest(
            f"Unknown schedule {schedule!r}.{did_you_mean(schedule, SCHEDULES)} Valid: {', '.join(SCHEDULES)}.",
            param="scheduler",
        )
    base, from_name = _split(name)
    if from_name and schedule and from_name != schedule:
        raise InvalidRequest(
            f"Scheduler {name!r} names the schedule {from_name!r}, but the separate schedule is {schedule!r}."
            f" Use {base!r} with one of them.",
            param="scheduler",
        )
    return _choice(base, from_name or schedule)


def canonical_name(name: object) -> str | None:
    """The name that `parse` gives it; None if it is not one of ours, such as a diffusers class."""
    try:
        return parse(str(name)[:80]).name
    except InvalidRequest:
        return None


def _split(name: str) -> tuple[str, str | None]:
    """Split a name into solver and schedule."""
    plain = ALIASES.get(name, name)
    if plain in SOLVERS:
        return plain, None
    if plain.startswith("k_") and plain[2:] in SOLVERS:
        # LocalAI's rule: Karras where the class has it, else the plain solver.
        return plain[2:], "karras" if "karras" in SOLVERS[plain[2:]].noise.schedules else None
    for schedule in SCHEDULES:
        base = plain.removesuffix(f"_{schedule}")
        if base != plain and base in SOLVERS:
            return base, schedule
    suffixed = [_name(base, schedule) for base in SOLVERS for schedule in SOLVERS[base].noise.schedules]
    raise InvalidRequest(
        f"Unknown scheduler {name!r}.{did_you_mean(name, [*names(), *suffixed])}"
        f" Valid: {', '.join(names())}; each may be followed by a schedule: {', '.join(SCHEDULES)}.",
        param="scheduler",
    )


def _choice(base: str, schedule: str | None) -> SchedulerChoice:
    solver = SOLVERS[base]
    if schedule is None:
        return SchedulerChoice(base, solver.description, base, None, solver.noise, solver.flow)
    if schedule not in solver.noise.schedules:
        fitting = [name for name, other in SOLVERS.items() if schedule in other.noise.schedules]
        supported = ", ".join(solver.noise.schedules) or "none"
        raise InvalidRequest(
            f"Scheduler {base!r} does not support the schedule {schedule!r}; it supports: {supported}."
            f" Schedulers that support {schedule!r}: {', '.join(fitting)}.",
            param="scheduler",
        )
    label, _ = SCHEDULES[schedule]
    flow = solver.flow if solver.flow and schedule in solver.flow.schedules else None
    return SchedulerChoice(
        _name(base, schedule),
        f"{solver.description} {label}",
        base,
        schedule,
        _scheduled(solver.noise, schedule),
        flow and _scheduled(flow, schedule),
    )


def _name(base: str, schedule: str) -> str:
    return f"k_{base}" if schedule == "karras" else f"{base}_{schedule}"


def _scheduled(form: SolverForm, schedule: str) -> SolverForm:
    _, arguments = SCHEDULES[schedule]
    return SolverForm(form.cls, {**form.arguments, **arguments}, form.schedules)


_NOISE_CLASSES = frozenset(solver.noise.cls for solver in SOLVERS.values())
FLOW_CLASSES = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"})


def is_flow(kind: str, config: Mapping[str, Any]) -> bool:
    """Whether a model predicts a flow, whose own scheduler is of this class with this configuration."""
    return kind in FLOW_CLASSES or (
        kind in _NOISE_CLASSES
        and (config.get("prediction_type") == "flow_prediction" or bool(config.get("use_flow_sigmas")))
    )


def form_for(choice: SchedulerChoice, kind: str, config: Mapping[str, Any]) -> SolverForm | None:
    """The form of the solver for such a model; None if it has none."""
    if is_flow(kind, config):
        return choice.flow
    return choice.noise if kind in _NOISE_CLASSES else None


def why_no_form(choice: SchedulerChoice, kind: str, config: Mapping[str, Any]) -> str:
    """Why `form_for` is None, in words."""
    if not is_flow(kind, config):
        return f"this model works only with {kind}"
    flow = SOLVERS[choice.solver].flow
    if flow is None:
        return f"there is no {SOLVERS[choice.solver].description} for flow-matching models, and this is one"
    schedules = f"only the schedules {', '.join(flow.schedules)}" if flow.schedules else "no schedule"
    return f"with flow-matching models, and this is one, {SOLVERS[choice.solver].description} takes {schedules}"
