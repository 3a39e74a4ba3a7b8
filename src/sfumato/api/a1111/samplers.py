"""Map AUTOMATIC1111's samplers and schedule types to our schedulers. Unknown names never raise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sfumato import schedulers
from sfumato.errors import InvalidRequest, did_you_mean
from sfumato.schedulers import AUTOMATIC, SAMPLERS, SCHEDULE_TYPES, SOLVERS, UNIFORM

SAMPLER_OF: Mapping[str, str] = MappingProxyType(
    {
        spelling.casefold(): name
        for name, sampler in SAMPLERS.items()
        for spelling in (name, SOLVERS[sampler.solver].description, *sampler.aliases)
    }
)
"""Clients' spelling → name in `SAMPLERS`."""

SCHEDULE_OF: Mapping[str, str | None] = MappingProxyType(
    {spelling.casefold(): schedule for schedule, label in SCHEDULE_TYPES.items() for spelling in (schedule, label)}
    | {"ka": "karras", "sgmuniform": "sgm_uniform", UNIFORM.casefold(): None}
)
"""Clients' spelling → our schedule."""


MAX_NAME = 80
"""Maximum characters considered."""


@dataclass(frozen=True, slots=True)
class SamplerChoice:
    scheduler: str | None = None
    """A name of `sfumato.schedulers`; None: the model's own."""
    warnings: tuple[str, ...] = ()


def choose(sampler: str | None, schedule_type: str | None) -> SamplerChoice:
    """The scheduler for a request's `sampler_name` and `scheduler`; unsupported parts are dropped with a warning."""
    sampler, schedule_type = (sampler or "")[:MAX_NAME], (schedule_type or AUTOMATIC)[:MAX_NAME]
    if not sampler.strip():
        alone = schedule_type.strip().casefold() not in ("", AUTOMATIC.casefold())
        return SamplerChoice(None, (f"scheduler: {schedule_type!r} needs a sampler_name beside it",) if alone else ())
    match = _parse_sampler(sampler)
    if match is None:
        return _by_own_name(sampler)
    name, combined = match
    solver, default_schedule = SAMPLERS[name].solver, SAMPLERS[name].default_schedule
    if combined:
        return _fitting(name, solver, SCHEDULE_OF[combined])
    typed = schedule_type.strip().casefold()
    if typed == AUTOMATIC.casefold():
        return _fitting(name, solver, default_schedule)
    if typed not in SCHEDULE_OF:
        near = did_you_mean(typed, SCHEDULE_OF)
        unknown = f"scheduler: {schedule_type!r} is not a schedule type of this server.{near} {name} uses its own"
        return SamplerChoice(_fitting(name, solver, default_schedule).scheduler, (unknown,))
    return _fitting(name, solver, SCHEDULE_OF[typed])


def _parse_sampler(sampler: str) -> tuple[str, str | None] | None:
    """A name in `SAMPLERS` and an appended schedule type, as in `DPM++ 2M Karras`."""
    spelling = " ".join(sampler.split()).casefold()
    if spelling in SAMPLER_OF:
        return SAMPLER_OF[spelling], None
    for schedule in SCHEDULE_OF:
        for joint in (" ", "_"):
            base = spelling.removesuffix(joint + schedule)
            if base != spelling and base in SAMPLER_OF:
                return SAMPLER_OF[base], schedule
    return None


def _by_own_name(sampler: str) -> SamplerChoice:
    try:
        return SamplerChoice(schedulers.parse(sampler.strip().casefold()).name)
    except InvalidRequest:
        near = did_you_mean(sampler, SAMPLERS)
        warning = f"sampler_name: there is no sampler {sampler!r}.{near} The model's own is used"
        return SamplerChoice(None, (warning,))


def _fitting(name: str, solver: str, schedule: str | None) -> SamplerChoice:
    if schedule and schedule not in SOLVERS[solver].noise.schedules:
        warning = f"scheduler: {name} does not support the schedule {SCHEDULE_TYPES[schedule]!r}; it uses its own"
        return SamplerChoice(solver, (warning,))
    return SamplerChoice(schedulers.parse(solver, schedule).name)
