"""What `serve run sfumato.ray_serve:app NAME=VALUE` takes, by whom it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from ray.serve.config import AutoscalingConfig

from sfumato.errors import did_you_mean
from sfumato.settings import Settings

OURS: Mapping[str, tuple[Callable[[Any], Any], float]] = MappingProxyType(
    {"num_gpus": (float, 0), "num_cpus": (float, 0), "steps": (int, 1)}
)
"""Arguments that are neither settings nor Ray's: their type, and the least value."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of the application."""

    settings: Settings
    scaling: Mapping[str, Any]
    """Fields of Ray's `AutoscalingConfig`, which checks them."""
    num_gpus: float
    """GPUs of each replica; a part of one is shared."""
    num_cpus: float = 1.0
    """CPUs of each replica."""
    steps: int = 200
    """Denoising steps that a replica should have left at most; with more to do there are more replicas."""

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Arguments:
        """Raises ValueError naming the argument at fault, its value and what is valid."""
        settings = [spec.name for spec in fields(Settings)]
        names = [*OURS, *AutoscalingConfig.model_fields, *settings]
        for name in args:
            if name not in names:
                raise ValueError(
                    f"{name}={args[name]!r}: no argument has that name.{did_you_mean(name, names)} There are all "
                    f"settings, all fields of Ray's AutoscalingConfig, {', '.join(OURS)}"
                )
        loaded = Settings.load({name: args.get(name) for name in settings})
        # Each process of Ray has a working folder of its own.
        loaded = replace(loaded, models=loaded.models.absolute(), data=loaded.data.absolute())
        values = {"num_gpus": 0 if loaded.device == "cpu" else 1} | {
            name: _number(name, args) for name in OURS & args.keys()
        }
        return cls(loaded, {name: args[name] for name in AutoscalingConfig.model_fields if name in args}, **values)


def _number(name: str, args: Mapping[str, Any]) -> Any:
    kind, least = OURS[name]
    try:
        value = kind(args[name])
    except (TypeError, ValueError):
        raise ValueError(f"{name}={args[name]!r}: must be a number") from None
    if not value >= least:
        raise ValueError(f"{name}={args[name]!r}: must be at least {least}")
    return value
