"""A model's capabilities before it is loaded: read from its files, and from diffusers' source as text.

Neither diffusers nor torch is imported, which would take seconds and gigabytes in the API process.
What the files do not say is None; once the model is loaded, `status.ModelInfo` has everything.
"""

from __future__ import annotations

import ast
import copy
import inspect
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato.checkpoints import (
    class_reading,
    clip_rules,
    dduf,
    descriptions,
    diffusers_source,
    modular,
    pipeline_class,
    single_file,
    sound_rules,
    sources,
    split,
    weight_file,
)
from sfumato.config import ModelConfig
from sfumato.errors import SfumatoError
from sfumato.pipelines import capabilities, tokens, with_prior, workflows
from sfumato.pipelines.inputs import MOVING, SOUND, Kin, Reading
from sfumato.status import Abilities, FrameRule

DEFAULT_MULTIPLE = 8
"""Default of diffusers' image processors."""


@dataclass(frozen=True, slots=True)
class StaticCapabilities:
    """The part of `status.ModelInfo` that files reveal."""

    pipeline: str | None = None
    abilities: Abilities | None = None
    size_multiple: int | None = None
    prompt_tokens: int | None = None
    fps: float | None = None
    """Of clips that say no other."""

    @property
    def tasks(self) -> tuple[str, ...] | None:
        return self.abilities.tasks if self.abilities else None


class _Unknown(Exception):
    """An expression that cannot be evaluated without the model."""


def static_capabilities(config: ModelConfig) -> StaticCapabilities:
    """Capabilities of a model file; None for what is not on this disk. Blocks."""
    folder, index = folder_of(config), index_of(config)
    name: Any
    try:
        name = pipeline_class.choose(config, index)
    except SfumatoError:  # requests for the model get this error
        name = config.pipeline_type or index.get("_class_name")
    if not isinstance(name, str) or name == pipeline_class.ANY or name in pipeline_class.AUTO:
        return StaticCapabilities(None)
    if modular.is_one(name):
        found = modular.workflows(name)
        if not found:
            return StaticCapabilities(name)
        blocks = class_reading.of_declared(name, workflows.tasks(found, {}))
        return StaticCapabilities(name, class_reading.abilities_of(config, Kin(blocks)))
    if config.prior:
        joined = with_prior.class_name(name)
        blocks = class_reading.of_declared(joined, with_prior.TASKS)
        return StaticCapabilities(joined, class_reading.abilities_of(config, Kin(blocks)))
    parameters, reading = class_reading.parameters(name), class_reading.of_name(name)
    if parameters is None or reading is None:
        return StaticCapabilities(name)
    fps = _fps(name, parameters, config) if reading.output == MOVING else None
    if not index or folder is None:
        kin = class_reading.kin_of(reading, nets=_nets(config), more=not config.control_net)
        return StaticCapabilities(name, class_reading.abilities_of(config, kin), fps=fps)
    replaced = {"controlnet": config.control_net, "text_encoder": config.clip_model}
    parts = _Parts(folder, index | {part: ["", ""] for part, source in replaced.items() if source})
    abilities = class_reading.abilities_of(config, _kin(reading, parts, _nets(config)))
    return StaticCapabilities(name, abilities, _multiple(name, parts), _tokens(name, parameters, parts, config), fps)


def _nets(config: ModelConfig) -> int:
    return len(config.control_net) if isinstance(config.control_net, tuple) else 1


def _kin(reading: Reading, parts: _Parts, nets: int) -> Kin:
    """Equals `class_reading.kin_of_pipeline` of the loaded pipeline."""
    channels, kinds = parts.known("unet", "in_channels"), parts.known("controlnet", "num_control_type")
    hidden_type = parts.known("unet", "encoder_hid_dim_type")
    more = any(parts.kind(part).startswith("Multi") for part in ("controlnet", "adapter"))
    return class_reading.kin_of(
        reading, unet_channels=channels, hidden_type=hidden_type, nets=nets, kinds=kinds or 0, more=more,
        lacks=parts.lacks, setting=parts.known, frames=_frames(reading.name, parts),
        sound=sound_rules.sound_rule(reading.name, parts.known) if reading.output == SOUND else None,
    )  # fmt: skip


def index_of(config: ModelConfig) -> dict[str, Any]:
    """The `model_index.json` of a model whose files are on this disk, or the modular one, else empty. Blocks."""
    folder = folder_of(config)
    if folder and sources.has_index(folder):
        return pipeline_class.index_of(folder)
    try:
        match sources.resolve(config):
            case sources.File(path) if path.suffix.lower() == sources.DDUF:
                return dduf.index_of(path)
    except SfumatoError:  # requests for the model get this error
        pass
    return {}


class _Parts:
    """The components of a folder in diffusers' layout, read from their configurations."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self._folder, self._index = folder, index
        self._without = {part for part, value in index.items() if isinstance(value, list) and value[1:] == [None]}
        self._classes = {
            part: str(value[1]) for part, value in index.items() if isinstance(value, list) and value[1:] != [None]
        }

    def __contains__(self, part: object) -> bool:
        return part in self._classes

    def lacks(self, part: str) -> bool:
        """Whether the model has been made without this component, as the index says."""
        return part in self._without

    def setting(self, part: str, key: str) -> Any:
        """A value of a component's configuration, else its class's default. Raises _Unknown."""
        config = diffusers_source.json_of(self._folder / part / "config.json")
        if key in config:
            return config[key]
        for function in diffusers_source.methods(self._classes.get(part, ""), "__init__"):
            if key in (defaults := diffusers_source.defaults(function)):
                return defaults[key]
        raise _Unknown

    def attribute(self, part: str, key: str) -> Any:
        """A setting, or where nothing sets it what the component's class computes from others. Raises _Unknown."""
        with suppress(_Unknown):
            if (value := self.setting(part, key)) is not None:
                return value
        for function in diffusers_source.methods(self._classes.get(part, ""), "__init__"):
            for target, value in _assignments(function):
                if target == key:
                    return _evaluate(_Settled(self, part).visit(copy.deepcopy(value)), {}, self)
        raise _Unknown

    def known(self, part: str, key: str) -> Any:
        """As `setting`, with an empty name of the pipeline itself; None if it is not known."""
        if not part:
            return self._index.get(key)
        with suppress(_Unknown):
            return self.setting(part, key) if part in self else None
        return None

    def kind(self, part: str) -> str:
        """A component's class; empty if there is none, or the model file replaces it."""
        return self._classes.get(part, "")

    def guidance_embeds(self) -> bool | None:
        """Of the denoiser; None: it has no such setting."""
        try:
            return bool(self.setting("transformer", "guidance_embeds"))
        except _Unknown:
            return None

    def tokenizer(self, part: str) -> tuple[str, Any]:
        """A tokenizer's class, and its maximum length in tokens, if it has one."""
        config = diffusers_source.json_of(self._folder / part / "tokenizer_config.json")
        return self._classes.get(part, ""), config.get("model_max_length")


class _Settled(ast.NodeTransformer):
    """Replaces the parameters of a component's constructor by their values."""

    def __init__(self, parts: _Parts, part: str) -> None:
        self._parts, self._part = parts, part

    def visit_Name(self, node: ast.Name) -> ast.expr:
        with suppress(_Unknown):
            return ast.Constant(self._parts.setting(self._part, node.id))
        return node


def _tokens(name: str, parameters: Mapping[str, inspect.Parameter], parts: _Parts, config: ModelConfig) -> int | None:
    """Equals `tokens.capacity` of the loaded pipeline."""
    limit = parameters.get("max_sequence_length")
    max_length = config.options.get("max_sequence_length") or config.sampling.max_sequence_length
    max_length = max_length or tokens.usual_limit(config.pipeline_type, name, parts.guidance_embeds())
    max_length = max_length or (limit.default if limit else None)
    capacities = []
    for part, encoder in tokens.ENCODERS.items():
        if part in parts and encoder in parts:
            kind, model_max_length = parts.tokenizer(part)
            capacity = model_max_length if "CLIP" in kind or not isinstance(max_length, int) else max_length
            if isinstance(capacity, int) and capacity < tokens.UNLIMITED:
                capacities.append(capacity)
    return max(capacities, default=None)


def _frames(name: str, parts: _Parts) -> FrameRule | None:
    """Equals `clip_rules.of_pipeline` of the loaded pipeline; None if that cannot be evaluated."""
    if own := clip_rules.OWN.get(name):
        return own
    attributes = _attributes(name, parts)
    named = [attributes[each] for each in clip_rules.STEPS if each in attributes]
    longest = parts.known("motion_adapter", clip_rules.LONGEST)
    if named and named[0] is None:
        return None
    return clip_rules.frame_rule(next(iter(named), None), longest, parts.kind("vae"))


def _fps(name: str, parameters: Mapping[str, inspect.Parameter], config: ModelConfig) -> float:
    """Equals the rate of a clip of the loaded pipeline."""

    def value(parameter: str) -> Any:
        default = parameters[parameter].default if parameter in parameters else None
        return config.options.get(parameter) or (default if isinstance(default, int | float) else None)

    return config.sampling.fps or clip_rules.own_rate(name, value)


def _multiple(name: str, parts: _Parts) -> int | None:
    """Equals `arguments.size_multiple`, from the arithmetic in the class's `__init__`."""
    if larger := capabilities.UPSCALERS.get(name):
        return larger.multiple * larger.factor
    if multiple := capabilities.MULTIPLES.get(name):
        return multiple
    attributes: dict[str, Any] = {}
    processor: Any = None
    for function in diffusers_source.methods(name, "__init__"):
        for target, value in _assignments(function):
            if target == "image_processor" and isinstance(value, ast.Call):
                factors = [each.value for each in value.keywords if each.arg == "vae_scale_factor"]
                processor = _value(factors[0], attributes, parts) if factors else DEFAULT_MULTIPLE
            else:
                attributes[target] = _value(value, attributes, parts)
    reading = class_reading.of_name(name)
    if reading and reading.output == MOVING:
        return clip_rules.side_multiple(name, lambda value: _value(value, attributes, parts))
    factor = processor if processor is not None else attributes.get("vae_scale_factor", DEFAULT_MULTIPLE)
    return int(factor) if isinstance(factor, int | float) and factor else None


def default_size(name: str, folder: Path, index: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height in pixels that a class draws by default, by its signature or its components; None: unknown."""
    parameters = class_reading.parameters(name) or {}
    sides = [parameters[side].default for side in ("width", "height") if side in parameters]
    if len(sides) == 2 and all(isinstance(side, int) for side in sides):
        return sides[0], sides[1]
    side = default_side(name, folder, index)
    return _latent_size(name, _Parts(folder, index)) or ((side, side) if side else None)


LATENT_SIDES = ("sample_width", "sample_height")
"""Settings of denoisers of clips: sides in latents, with the pipeline's `vae_scale_factor_spatial` in pixels."""


def _latent_size(name: str, parts: _Parts) -> tuple[int, int] | None:
    try:
        width, height = (parts.setting("transformer", side) for side in LATENT_SIDES)
    except _Unknown:
        return None
    factor = _attributes(name, parts).get("vae_scale_factor_spatial")
    known = isinstance(width, int) and isinstance(height, int) and isinstance(factor, int)
    return (width * factor, height * factor) if known else None


def default_side(name: str, folder: Path, index: Mapping[str, Any]) -> int | None:
    """Pixels of each side that a class draws by default on components with these configurations; None: unknown."""
    parts = _Parts(folder, index)
    attributes = _attributes(name, parts)
    factor = attributes.get("vae_scale_factor", DEFAULT_MULTIPLE)
    sizes: list[Any] = [attributes.get("default_sample_size")]
    for part in ("unet", "transformer"):
        with suppress(_Unknown):
            sizes.append(parts.setting(part, "sample_size"))
    side = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    return side * factor if side and isinstance(factor, int) else None


def _attributes(name: str, parts: _Parts) -> dict[str, Any]:
    """What the constructor of a class sets, where it can be evaluated."""
    attributes: dict[str, Any] = {}
    for function in diffusers_source.methods(name, "__init__"):
        for target, value in _assignments(function):
            attributes.setdefault(target, _value(value, attributes, parts))
    return attributes


def _assignments(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """Its assignments to attributes of `self`, in order."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and _attribute(node.targets[0]):
            yield _attribute(node.targets[0]), node.value


def _attribute(node: ast.expr) -> str:
    """`name` of `self.name`, else an empty string."""
    of_self = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if of_self and isinstance(node, ast.Attribute) else ""


OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = MappingProxyType(
    {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
     ast.Pow: operator.pow}
)  # fmt: skip
FUNCTIONS: Mapping[str, Callable[[Any], Any]] = MappingProxyType({"len": len, "sum": sum, "int": int})


def _value(node: ast.expr, attributes: Mapping[str, Any], parts: _Parts) -> Any:
    """Value of an expression over components' configurations; None if it needs more than those."""
    try:
        return _evaluate(node, attributes, parts)
    except (_Unknown, TypeError, ValueError):
        return None


def _evaluate(node: ast.expr, attributes: Mapping[str, Any], parts: _Parts) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_evaluate(left, attributes, parts), _evaluate(right, attributes, parts))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_evaluate(value, attributes, parts) for value in values)
        case ast.IfExp(test=test, body=body, orelse=otherwise):
            return _evaluate(body if _evaluate(test, attributes, parts) else otherwise, attributes, parts)
        case ast.Call(
            func=ast.Name(id="getattr" | "hasattr"), args=[ast.Name(id="self"), ast.Constant(value=part), *_]
        ):
            return part in parts
        case ast.Call(func=ast.Name(id=name), args=[argument]) if name in FUNCTIONS:
            return FUNCTIONS[name](_evaluate(argument, attributes, parts))
        case ast.Compare(left=ast.Call() as left, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return _evaluate(left, attributes, parts)
        case ast.Compare(left=ast.Constant(value=value), ops=[ast.Is()], comparators=[ast.Constant(value=None)]):
            return value is None
        case ast.Compare(left=left, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]) if _attribute(left):
            return _attribute(left) in parts
        case ast.Attribute(value=ast.Attribute(value=inner, attr="config"), attr=key) if _attribute(inner):
            return parts.setting(_attribute(inner), key)
        case ast.Attribute(value=inner, attr=key) if _attribute(inner):
            return parts.attribute(_attribute(inner), key)
        case ast.Attribute(attr=name) if _attribute(node) and attributes.get(name) is not None:
            return attributes[name]
    raise _Unknown


def folder_of(config: ModelConfig) -> Path | None:
    """Where the model's configurations lie in diffusers' layout, if they are on this disk."""
    try:
        source = sources.resolve(config)
    except SfumatoError:
        # Requests for the model get this error, unless what it lacks is a file that comes later.
        return folder_of(split.with_source(config, config.base_model)) if config.base_model else None
    match source:
        case sources.Folder(path):
            return path
        case sources.HubRepository(repo, revision):
            return snapshot(repo, revision or "main")
        case sources.File(path):
            return _description(config, path)
        case sources.Url(url):
            return _description(config, weight_file.path_for(url, config.folder))


def _description(config: ModelConfig, path: Path) -> Path | None:
    """The folder that describes a single file, if it was downloaded."""
    if config.base_model:
        return folder_of(split.with_source(config, config.base_model))
    if path.suffix.lower() == sources.DDUF:
        return dduf.folder_of(path) if path.is_file() else None
    repo = single_file.described_by(path)
    return (snapshot(repo, "main") or descriptions.of(repo)) if repo else None


def snapshot(repo: str, revision: str) -> Path | None:
    """A repository's folder in huggingface_hub's cache."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE", Path(home) / "hub")).expanduser()
    folder = cache / ("models--" + repo.replace("/", "--"))
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except OSError:
        commit = revision
    snapshot = folder / "snapshots" / commit
    return snapshot if sources.has_index(snapshot) else None
