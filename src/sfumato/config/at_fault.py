"""Whose fault a refused value is: that of the request that sets it, or of the model file whose default it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from sfumato.config.model import ModelConfig
from sfumato.errors import InvalidRequest, ModelFileError
from sfumato.sampling import PARAMETERS, Parameter, Sampling

SIZE, SEED = "size", "seed"


def _name(parameter: Parameter) -> str:
    return SIZE if parameter.side else parameter.name


NAMES: Mapping[str, str] = MappingProxyType(
    {word: _name(each) for each in PARAMETERS for word in (each.name, each.argument, *each.aliases) if word}
)
"""What errors call a parameter -> its name in requests."""

KEYS: Mapping[str, str] = MappingProxyType(
    {_name(each): each.keys[0] for each in PARAMETERS if each.keys} | {SIZE: SIZE, SEED: "parameters.seed"}
)
"""Name in requests -> key of the model file."""

DECIDED_WITH: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "steps": frozenset({"scheduler"}),
        "guidance_start": frozenset({"guidance_end"}),
        "guidance_end": frozenset({"guidance_start"}),
    }
)
"""Parameter -> those that decide with it whether its value can be used."""


def set_by(sampling: Sampling) -> frozenset[str]:
    """Names of the parameters that have a value."""
    return frozenset(_name(each) for each in PARAMETERS if sampling[each] is not None)


def error_of(error: InvalidRequest, config: ModelConfig, requested: Collection[str]) -> InvalidRequest | ModelFileError:
    """The error, as the model file's if its value is refused and not one of the request.

    `requested`: names of the parameters that the request sets.
    """
    name = NAMES.get(error.param or "", error.param or "")
    of_request = {each for each in requested if not _locked(config, each)}
    if name not in _of_file(config) or of_request & {name, *DECIDED_WITH.get(name, ())}:
        return error
    key = KEYS.get(name, "options")
    return ModelFileError(
        f"{error.message.rstrip('.')}. This is the default `{key}` of {config.file_name}: correct it there",
        param=key,
    )


def _of_file(config: ModelConfig) -> set[str]:
    seed = {SEED} if config.seed is not None else set()
    return {*set_by(config.sampling), *(NAMES.get(option, option) for option in config.options), *seed}


def _locked(config: ModelConfig, name: str) -> bool:
    return any(config.locks(each.argument or "") for each in PARAMETERS if _name(each) == name)
