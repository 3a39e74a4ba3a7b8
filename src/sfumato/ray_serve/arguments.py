"""What `serve run sfumato.ray_serve:app NAME=VALUE` takes, by whom it is for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from ray.serve.config import AutoscalingConfig

from sfumato.config import document
from sfumato.errors import ModelFileError, did_you_mean
from sfumato.settings import Settings

OURS: Mapping[str, tuple[Callable[[Any], Any], float]] = MappingProxyType(
    {"num_gpus": (float, 0), "num_cpus": (float, 0), "steps": (int, 1)}
)
"""Arguments that are neither settings nor Ray's: their type, and the least value. And `groups`."""

INGRESS = "sfumato"
"""Name of the deployment with the server."""


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
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Name of a deployment → the models that it has together. Each other model has its own."""

    def deployments(self, models: Collection[str]) -> dict[str, list[str]]:
        """Name of each deployment → its models. Raises ValueError if a group has others than `models`."""
        for group, members in self.groups.items():
            for model in members:
                if model not in models:
                    raise ValueError(
                        f"groups: {group}: no model file has {model!r}.{did_you_mean(model, models)} "
                        f"There are {', '.join(sorted(models))}"
                    )
        of = {model: group for group, members in self.groups.items() for model in members}
        found: dict[str, list[str]] = {}
        owners: dict[str, dict[str, None]] = {INGRESS: {"the server": None}}
        for model in models:
            name = deployment_name(of.get(model, model))
            found.setdefault(name, []).append(model)
            owner = f"the group {of[model]!r} of groups" if model in of else f"the model {model!r}"
            owners.setdefault(name, {})[owner] = None
        for name, each in owners.items():
            if len(each) > 1:
                raise ValueError(f"{name!r} would be the name of two deployments: {' and '.join(each)}; rename one")
        return found

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Arguments:
        """Raises ValueError naming the argument at fault, its value and what is valid."""
        settings = [spec.name for spec in fields(Settings)]
        names = [*OURS, "groups", *AutoscalingConfig.model_fields, *settings]
        for name in args:
            if name not in names:
                raise ValueError(
                    f"{name}={args[name]!r}: no argument has that name.{did_you_mean(name, names)} There are all "
                    f"settings, all fields of Ray's AutoscalingConfig, {', '.join(OURS)}, groups"
                )
        loaded = Settings.load({name: args.get(name) for name in settings})
        # Each process of Ray has a working folder of its own.
        loaded = replace(loaded, models=loaded.models.absolute(), data=loaded.data.absolute())
        values = {"num_gpus": 0 if loaded.device == "cpu" else 1} | {
            name: _number(name, args) for name in OURS & args.keys()
        }
        scaling = {name: args[name] for name in AutoscalingConfig.model_fields if name in args}
        return cls(loaded, scaling, groups=_groups(args.get("groups", {})), **values)


def _number(name: str, args: Mapping[str, Any]) -> Any:
    kind, least = OURS[name]
    try:
        value = kind(args[name])
    except (TypeError, ValueError):
        raise ValueError(f"{name}={args[name]!r}: must be a number") from None
    if not value >= least:
        raise ValueError(f"{name}={args[name]!r}: must be at least {least}")
    return value


def deployment_name(name: str) -> str:
    """Of a model or a group; Ray makes names of files and actors of it."""
    return re.sub(r"[^\w.-]", "-", name)


def _groups(value: Any) -> Mapping[str, Sequence[str]]:
    """From YAML, also as a text on the command line."""
    try:
        groups = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        groups = None
    lists = isinstance(groups, Mapping) and all(isinstance(each, list) and each for each in groups.values())
    if not lists or not all(isinstance(name, str) and name for name in [*groups, *itertools.chain(*groups.values())]):
        raise ValueError(f"groups={value!r}: must be as {{name: [model, model]}}, without an empty name")
    if isinstance(value, str):
        try:
            document.documents(value, Path("groups"))
        except ModelFileError as error:  # a name twice, of which PyYAML keeps the last
            raise ValueError(error.message) from None
    of: dict[str, str] = {}
    for group, model in ((group, model) for group, members in groups.items() for model in members):
        if model in of:
            raise ValueError(f"groups: {model!r} is in {of[model]!r} and in {group!r}; a model is in one group, once")
        of[model] = group
    return dict(groups)
