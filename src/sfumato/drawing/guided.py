"""The part of the steps that is drawn with guidance: how a request's interval reaches its pipeline."""

from __future__ import annotations

from typing import Any

from sfumato.batching import views
from sfumato.batching.guidance import Interval
from sfumato.pipelines import guidance
from sfumato.pipelines.capabilities import parameters_of
from sfumato.sampling import Sampling

WHOLE = Sampling().guided


def arguments(pipeline: Any, sampling: Sampling) -> dict[str, float]:
    """Those of a modular pipeline, whose guider leaves out the steps itself."""
    taken = parameters_of(pipeline)
    fields = zip(guidance.OF_GUIDER, (sampling.guidance_start, sampling.guidance_end), strict=True)
    return {name: value for name, value in fields if value is not None and name in taken}


def limit(pipeline: Any, sampling: Sampling) -> Interval | None:
    """Limit the guidance of a view of a class that computes both rows at once; None if it guides in every step."""
    if sampling.guided == WHOLE or type(pipeline).__name__ not in guidance.CONCATENATING:
        return None
    interval = Interval(*sampling.guided)
    views.limit_guidance(pipeline, interval)
    return interval


def warnings(interval: Interval | None, sampling: Sampling) -> list[str]:
    """A warning if a run had no step whose guidance was left out, or none with guidance."""
    if interval is None or (interval.left_out and not interval.covers_none):
        return []
    start, end = sampling.guided
    if interval.left_out:
        return [f"guidance_start {start:g}, guidance_end {end:g}: no step of {interval.total} lies between them"]
    why = "it covers every step" if interval.covers_all else "the picture is drawn without guidance"
    return [f"guidance_start {start:g}, guidance_end {end:g}: no effect, {why}"]
