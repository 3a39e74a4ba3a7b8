"""Values of a model file that its pipeline class cannot use, told from the class's source and its configurations.

A request that sets something else may still be drawn, so that only `sfumato check` refuses them beforehand.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato import schedulers
from sfumato.checkpoints import class_reading, controlnets, diffusers_source, modular, static_capabilities
from sfumato.config import ModelConfig
from sfumato.core import MAX_SEED
from sfumato.errors import InvalidRequest, LoadError, ModelFileError, did_you_mean
from sfumato.pipelines import guidance, source_table
from sfumato.sampling import NAMED, PARAMETERS, clip_layer, refuse_no_guidance

INTERNAL = re.compile(r"generator|latents|output_type|return_dict|callback.*|.*_(kwargs|embeds|latents|mask)|args|self")
"""Parameters of calls that no text can be the value of."""


def refuse_options(config: ModelConfig, name: str, parameters: Collection[str]) -> None:
    """Raises ModelFileError if `options` has what the call of the class `name` does not take."""
    unknown = [option for option in config.options if option not in parameters]
    if unknown:
        valid = [each for each in parameters if not INTERNAL.fullmatch(each)]
        is_no = "is no argument" if len(unknown) == 1 else "are no arguments"
        raise ModelFileError(
            f"{config.file or config.name}: options: {', '.join(unknown)} {is_no} of {name}."
            f"{did_you_mean(unknown[0], valid)} It takes: {', '.join(valid)}",
            param="options",
        )


def problems(config: ModelConfig, name: str, index: Mapping[str, Any], folder: Path | None) -> Iterator[str]:
    """What requests that do not set it themselves would fail for, one sentence each, beginning with the key.

    `name`: the pipeline class. `index` and `folder`: of its components, if they are known.
    """
    if config.seed is not None and config.seed > MAX_SEED - ((config.n or 1) - 1):
        yield f"parameters.seed: {config.seed} with n {config.n}: the last picture's seed is above {MAX_SEED}"
    for net in controlnets.of_model(config):
        if (path := controlnets.here(config, net)) and path.is_file():
            try:
                controlnets.refuse(path)
            except LoadError as error:
                yield f"diffusers.control_net: {error.message}"
    if modular.is_one(name):
        return
    if parameters := class_reading.parameters(name):
        try:
            refuse_options(config, name, parameters)
        except ModelFileError as error:
            yield error.message
        yield from _too_large(config, name)
        yield from _guided_throughout(config, name, parameters)
    if folder is None:
        return
    multiple = static_capabilities.static_capabilities(config).size_multiple
    size = config.sampling.size
    if size and multiple and any(side % multiple for side in size):
        near = "x".join(str(max(multiple, round(side / multiple) * multiple)) for side in size)
        yield f"size: {size[0]}x{size[1]}: {name} needs sides that are multiples of {multiple}; the nearest is {near}"
    yield from _too_deep(config, name, folder)
    yield from _unfit_scheduler(config, name, index, folder)


def _too_large(config: ModelConfig, name: str) -> Iterator[str]:
    """Numbers above those that the class compares its arguments with before it draws."""
    limits = dict(_limits(name))
    for each in PARAMETERS:
        value = config.options.get(each.argument or "", config.sampling[each])
        if each.argument in limits and isinstance(value, int | float) and value > limits[each.argument]:
            yield f"{each.keys[0]}: {value:g}: {name} takes at most {limits[each.argument]:g}"


def _guided_throughout(config: ModelConfig, name: str, parameters: Collection[str]) -> Iterator[str]:
    """An interval of guidance that contains no step, or that the class does not have."""
    try:
        refuse_no_guidance(config.sampling)
    except InvalidRequest as error:
        yield f"{error.param}: {error.message}"
    for field in guidance.FIELDS:
        value = config.sampling[NAMED[field]]
        if value not in (None, 0, 1) and not guidance.limitable(name, parameters):
            yield f"{field}: {value:g}: {guidance.why_not(name)}"


def _limits(name: str) -> Iterator[tuple[str, int]]:
    for function in diffusers_source.methods(name, "check_inputs"):
        for node in ast.walk(function):
            match node:
                case ast.Compare(
                    left=ast.Name(id=argument), ops=[ast.Gt()], comparators=[ast.Constant(value=int(most))]
                ):
                    yield argument, most
        return


def _too_deep(config: ModelConfig, name: str, folder: Path) -> Iterator[str]:
    encoders = (diffusers_source.json_of(folder / part / "config.json") for part in ("text_encoder", "text_encoder_2"))
    layers = [count for each in encoders if isinstance(count := each.get("num_hidden_layers"), int)]
    clip_skip = config.sampling.clip_skip
    most = min(layers) + 1 - clip_layer(0, name) if layers else None
    taken = "clip_skip" in (class_reading.parameters(name) or {})
    if taken and clip_skip is not None and most is not None and clip_skip > most:
        yield f"clip_skip: {clip_skip}: the text encoder has too few layers; 0 to {most} are valid"


def _unfit_scheduler(config: ModelConfig, name: str, index: Mapping[str, Any], folder: Path) -> Iterator[str]:
    listed = index.get("scheduler")
    if not config.sampling.scheduler or not isinstance(listed, list) or not _uses_scheduler(name):
        return
    described = diffusers_source.json_of(folder / "scheduler" / "scheduler_config.json")
    choice = schedulers.parse(config.sampling.scheduler)
    kind = str(listed[-1])
    if schedulers.form_for(choice, kind, described) is None:
        yield f"scheduler_type: {choice.name}: {schedulers.why_no_form(choice, kind, described)}"


def _uses_scheduler(name: str) -> bool:
    """Whether it is known what the class passes to its scheduler: else it keeps its own, with a warning."""
    return any(path.endswith(f".{name}") and row.get("scheduler") for path, row in source_table.table().items())
