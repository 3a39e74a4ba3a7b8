"""Choose the diffusers class that draws a model: the one that the model file names, if it fits the repository.

Everything is read from diffusers' source as text and from the repository's `model_index.json`, so that errors are
reported before anything is downloaded, and without importing torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato.checkpoints import class_needs, class_reading, diffusers_source, modular, processor_packages, sources
from sfumato.config import ModelConfig
from sfumato.errors import InvalidRequest, LoadError, ModelFileError, UnfitPipeline, did_you_mean
from sfumato.pipelines import capabilities, syntax
from sfumato.pipelines.inputs import OUTPUTS

log = logging.getLogger(__name__)

ANY = "DiffusionPipeline"
"""Takes the class that the repository names."""

AUTO: Mapping[str, str] = MappingProxyType(
    {"AutoPipelineForText2Image": "text", "AutoPipelineForImage2Image": "image", "AutoPipelineForInpainting": "mask"}
)
"""These do too -> the task that the class must support."""

PARTS: Mapping[str, str] = MappingProxyType({"control_net": "controlnet", "clip_model": "text_encoder", "vae": "vae"})
"""Field of `ModelConfig` -> the pipeline component that it sets."""

HARMLESS = frozenset({"safety_checker", "feature_extractor", "image_encoder", "watermarker", "image_processor"})
"""Components that a class can do without."""

WRITTEN_ALWAYS = "StableDiffusion"
"""LocalAI's importer writes such a class into every file, whatever the repository has: it may be replaced."""

HARDWARE = frozenset({"torch_npu", "torch_xla"})
"""Packages for other hardware."""

MODULES: Mapping[str, str] = MappingProxyType({"opencv": "cv2", "bs4": "bs4", "onnx": "onnxruntime"})
"""diffusers' name for a package -> the module to import."""

PACKAGES: Mapping[str, str] = MappingProxyType(
    {"opencv": "opencv-python-headless", "bs4": "beautifulsoup4", "onnx": "onnxruntime", "note_seq": "note-seq"}
)
"""diffusers' name for a package -> its name on PyPI."""


@dataclass(frozen=True, slots=True)
class Constructor:
    """The components that a pipeline class's constructor takes."""

    accepted: frozenset[str]
    required: frozenset[str]
    """The required ones of `accepted`."""


def choose(config: ModelConfig, index: Mapping[str, Any] | None) -> str:
    """The name of the class for a repository with this `model_index.json` (None: not known yet).

    With `control_net` it is the class that takes one. Raises UnfitPipeline if the name is not a pipeline class, or the
    class does not fit the repository; ModelFileError if it does not take a component that the file sets; LoadError if
    it needs a package that is not installed; InvalidRequest if it draws no picture.
    """
    requested = _controlled(config, config.pipeline_type or ANY)
    if requested not in AUTO and requested != ANY and not _is_pipeline(requested):
        raise UnfitPipeline(
            f"{config.name}: pipeline_type {requested!r} is not a pipeline class of diffusers {_version()}."
            f"{did_you_mean(requested, (*AUTO, *_pipelines()))} Leave it out to read it from the repository.",
            param="diffusers.pipeline_type",
        )
    _check_parts(config, requested)
    listed = index.get("_class_name") if index else None
    chosen = requested
    if isinstance(listed, str):
        chosen = _controlled(config, _fitting(config, requested, modular.successor(listed), index or {}))
    known = isinstance(listed, str) and _is_pipeline(chosen)
    if listed is not None and requested in (ANY, *AUTO) and not known:
        raise UnfitPipeline(
            f"{config.name}: the repository is made for {_written(listed)}, which diffusers {_version()} does not "
            "have; code from repositories is never run. If one of its classes fits, write that as pipeline_type",
            param="diffusers.pipeline_type",
        )
    if modular.is_one(chosen) and index:
        modular.check(chosen, index)
    _check_parts(config, chosen)
    _check_packages(config, chosen, index or {})
    _check_output(config, chosen)
    return chosen


def _controlled(config: ModelConfig, name: str) -> str:
    """The class that takes a ControlNet on the weights of this one, if the file names a ControlNet and there is one."""
    made_of = constructor(name)
    if not config.control_net or made_of is None or "controlnet" in made_of.accepted:
        return name
    by_name = f"{name.removesuffix('Pipeline')}ControlNetPipeline"
    better = capabilities.task_class(name, "text", controlled=True) or (by_name if _is_pipeline(by_name) else None)
    return better or name


def _fitting(config: ModelConfig, requested: str, listed: str, index: Mapping[str, Any]) -> str:
    if requested == ANY or (requested in AUTO and modular.is_one(listed)):
        return listed
    if requested == modular.BASE:
        return modular.sibling(listed) or listed
    if requested in AUTO:
        sibling = capabilities.task_class(listed, AUTO[requested], controlled=bool(config.control_net))
        if sibling is None:
            raise UnfitPipeline(
                f"{config.name}: diffusers has no {requested} for {listed}, which the repository is made for. Write "
                f"`pipeline_type: {listed}`, or leave it out",
                param="diffusers.pipeline_type",
            )
        return sibling
    misfit = "" if requested == listed else _misfit(config, requested, listed, index)
    if not misfit:
        return requested
    task = capabilities.task_of(requested) or "text"
    better = listed if modular.is_one(listed) else capabilities.task_class(listed, task, controlled=False)
    if requested.startswith(WRITTEN_ALWAYS) and better:
        log.warning(
            "%s: pipeline_type %s does not fit this repository (%s); %s does and is used",
            config.name, requested, misfit, better,
        )  # fmt: skip
        return better
    remedy = f"Write `pipeline_type: {better or listed}`, or leave it out"
    raise UnfitPipeline(
        f"{config.name}: pipeline_type {requested} does not fit this repository, which is made for {listed}: {misfit}. "
        f"{remedy if better or _is_pipeline(listed) else 'Name a class of diffusers that takes these components'}",
        param="diffusers.pipeline_type",
    )


def _misfit(config: ModelConfig, name: str, listed: str, index: Mapping[str, Any]) -> str:
    """Which components the class needs or does not take; empty if it fits the repository."""
    if modular.is_one(name):
        return modular.misfit(name, listed)
    if modular.is_one(listed):
        return "its index is for modular pipelines"
    made_of = constructor(name)
    if made_of is None:
        return ""
    present = {part for part, value in index.items() if isinstance(value, list) and value[1] is not None}
    present |= {component for field, component in PARTS.items() if getattr(config, field)}
    # A component that is left out on purpose is null in the index.
    missing = (made_of.required - present) | (made_of.accepted - HARMLESS - present - index.keys())
    extra = present - made_of.accepted - HARMLESS
    faults = [f"it has no {', '.join(sorted(missing))}"] if missing else []
    return "; ".join(faults + ([f"it has {', '.join(sorted(extra))}, which that class does not take"] if extra else []))


def _check_parts(config: ModelConfig, name: str) -> None:
    if modular.is_one(name) and config.control_net:
        raise ModelFileError(
            f"{config.name}: control_net: {name} takes none here; write an ordinary pipeline_type, or leave it out",
            param="diffusers.control_net",
        )
    made_of = constructor(name)
    for field, component in PARTS.items():
        if made_of and getattr(config, field) and component not in made_of.accepted:
            raise ModelFileError(f"{config.name}: {field}: {name} takes no {component}; leave it out", param=field)


def _check_packages(config: ModelConfig, name: str, index: Mapping[str, Any]) -> None:
    needed = [*packages(name), *processor_packages.of(index)]
    missing = [package for package in needed if importlib.util.find_spec(MODULES.get(package, package)) is None]
    if missing:
        names = " ".join(PACKAGES.get(package, package) for package in missing)
        raise LoadError(
            f"{config.name}: {name} needs what is not installed: {names}. Run `pip install {names}` where Sfumato is "
            "installed, and start it again",
            param="diffusers.pipeline_type",
        )


def _check_output(config: ModelConfig, name: str) -> None:
    reading = class_reading.of_name(name)
    if reading and (problem := reading.problem(config.options)):
        instead = _instead(name) if reading.output == OUTPUTS["image_embeds"] else ""
        raise InvalidRequest(f"{config.name} draws no picture: {problem}{instead}", param="model")


def _instead(name: str) -> str:
    """Of a class that makes embeddings: classes that draw with it, else a model that takes it as its prior."""
    combined = [
        kind
        for kind in _pipelines()
        if kind.endswith("CombinedPipeline") and name in class_needs.inner_pipelines(kind).values()
    ]
    if combined:
        return f". Write `pipeline_type: {'` or `'.join(sorted(combined))}` for a repository that has both stages"
    reading = class_reading.of_name(name)
    if reading is None or not reading.sources:
        return ""
    return f". Name a {_family(name)} model in parameters.model, and this one as its `diffusers: {{prior: ...}}`"


def _family(name: str) -> str:
    """The first word of a class's name, with its version: `Flux2`."""
    match = re.match(r"[A-Z][a-z]+\d*", name)
    return match[0] if match else name


@functools.cache
def constructor(name: str) -> Constructor | None:
    """The constructor of a diffusers class; None if it is not in diffusers' source, or made of blocks."""
    if modular.is_one(name):
        return None
    for function in diffusers_source.methods(name, "__init__"):
        arguments = [each.arg for each in (*function.args.args, *function.args.kwonlyargs) if each.arg != "self"]
        parts = frozenset(each.arg for each in _annotated(function) if not _is_plain(each))
        defaults = diffusers_source.defaults(function)
        optional = set(diffusers_source.literal(name, "_optional_components") or ())
        accepted = frozenset(arguments) & (parts | frozenset({"controlnet"}))
        return Constructor(accepted, accepted - defaults.keys() - optional)
    return None


def _annotated(function: ast.FunctionDef) -> list[ast.arg]:
    return [each for each in (*function.args.args, *function.args.kwonlyargs) if each.arg != "self"]


def _is_plain(argument: ast.arg) -> bool:
    """Whether an argument is a setting, not a component."""
    text = ast.unparse(argument.annotation) if argument.annotation else ""
    return text.split(" | ")[0] in ("bool", "int", "float", "str")


@functools.cache
def packages(name: str) -> tuple[str, ...]:
    """diffusers' names for the packages that a class needs besides those that every class needs."""
    path = diffusers_source.files().get(name)
    if path is None:
        return ()
    tree = syntax.parsed(path.read_text(encoding="utf-8"))
    imports = [node.test for node in tree.body if isinstance(node, ast.If) and not node.orelse]
    guarded = {package for test in imports for package in _checked_package(test)}
    # A class that checks again where it would use the package works without it.
    optional = {package for node in ast.walk(tree) if node not in imports for package in _checked_package(node)}
    return tuple(sorted((guarded - optional - HARDWARE) | _backends().get(name, frozenset())))


def _checked_package(node: ast.AST) -> set[str]:
    """`ftfy`, for a call of `is_ftfy_available()`; empty for other nodes."""
    function = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    package = function.removeprefix("is_").removesuffix("_available")
    return {package} if function == f"is_{package}_available" else set()


@functools.cache
def _backends() -> Mapping[str, frozenset[str]]:
    """Class -> packages without which diffusers replaces it with a placeholder, less those always installed."""
    backends: dict[str, frozenset[str]] = {}
    for path in (diffusers_source.root() / "utils").glob("dummy_*_objects.py"):
        backend_packages = path.stem.removeprefix("dummy_").removesuffix("_objects").split("_and_")
        needed = frozenset(backend_packages) - {"torch", "transformers", "pt"}
        for node in syntax.parsed(path.read_text(encoding="utf-8")).body if needed else ():
            if isinstance(node, ast.ClassDef):
                backends[node.name] = needed
    return backends


def _is_pipeline(name: str) -> bool:
    return name.endswith("Pipeline") and name in diffusers_source.files()


def _written(listed: Any) -> str:
    """A class as `model_index.json` names it: alone, or after the file that defines it."""
    return str(listed[-1] if isinstance(listed, list) and listed else listed)[:100]


def _pipelines() -> Collection[str]:
    return [name for name in diffusers_source.files() if name.endswith("Pipeline")]


def _version() -> str:
    from importlib.metadata import version

    return version("diffusers")


def index_of(folder: Path) -> dict[str, Any]:
    """A folder's `model_index.json`, else its modular one; empty where there is none that can be read."""
    return next((index for name in sources.INDEXES if (index := diffusers_source.json_of(folder / name))), {})
