"""Which class of diffusers draws a model: the one that the file names, if it fits what the repository holds.

All of it is told from diffusers' source as text and from the repository's `model_index.json`, so that it can be said
before anything is downloaded, and where there is no torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato.config import ModelConfig
from sfumato.errors import LoadError, ModelFileError, did_you_mean
from sfumato.models import diffusers_source
from sfumato.pipelines import capabilities

log = logging.getLogger(__name__)

ANY = "DiffusionPipeline"
"""Reads the repository."""

AUTO: Mapping[str, str] = MappingProxyType(
    {"AutoPipelineForText2Image": "text", "AutoPipelineForImage2Image": "image", "AutoPipelineForInpainting": "mask"}
)
"""Reads it too -> the task of the class that it takes."""

PARTS: Mapping[str, str] = MappingProxyType({"control_net": "controlnet", "clip_model": "text_encoder", "vae": "vae"})
"""Field of `ModelConfig` -> the component of a pipeline that it brings."""

HARMLESS = frozenset({"safety_checker", "feature_extractor", "image_encoder", "watermarker", "image_processor"})
"""Components without which a class draws what they were trained for."""

WRITTEN_ALWAYS = "StableDiffusion"
"""LocalAI's importer writes such a class into every file, whatever the repository holds: those are not meant."""

HARDWARE = frozenset({"torch_npu", "torch_xla"})
"""Packages for machines that others have."""

MODULES: Mapping[str, str] = MappingProxyType({"opencv": "cv2", "bs4": "bs4"})
"""diffusers' word for a package -> the module that it is."""

PACKAGES: Mapping[str, str] = MappingProxyType({"opencv": "opencv-python-headless", "bs4": "beautifulsoup4"})
"""The same -> what pip calls it."""


@dataclass(frozen=True, slots=True)
class Constructor:
    """The components that a pipeline class is made of."""

    taken: frozenset[str]
    needed: frozenset[str]
    """Of these: those that it does not do without."""


def choose(config: ModelConfig, index: Mapping[str, Any] | None) -> str:
    """The name of the class for a repository with this `model_index.json`; None: it is not known yet.

    Raises ModelFileError for a name that is no class or that takes no part that the file brings, LoadError for a class
    that does not fit, and for one that needs a package that is not here.
    """
    named = config.pipeline_type or ANY
    if named not in AUTO and named != ANY and not _is_pipeline(named):
        raise ModelFileError(
            f"{config.name}: pipeline_type {named!r} is not a pipeline class of diffusers {_version()}."
            f"{did_you_mean(named, (*AUTO, *_pipelines()))} Leave it out to read it from the repository.",
            param="diffusers.pipeline_type",
        )
    _check_parts(config, named)
    own = index.get("_class_name") if index else None
    chosen = _fitting(config, named, own, index or {}) if isinstance(own, str) else named
    _check_parts(config, chosen)
    _check_packages(config, chosen)
    return chosen


def _fitting(config: ModelConfig, named: str, own: str, index: Mapping[str, Any]) -> str:
    if named == ANY:
        return own
    if named in AUTO:
        found = capabilities.task_class(own, AUTO[named], controlled=bool(config.control_net))
        if found is None:
            raise LoadError(
                f"{config.name}: diffusers has no {named} for {own}, which the repository is made for. Write "
                f"`pipeline_type: {own}`, or leave it out",
                param="diffusers.pipeline_type",
            )
        return found
    misfit = "" if named == own else _misfit(config, named, index)
    if not misfit:
        return named
    better = capabilities.task_class(own, capabilities.task_of(named) or "text", controlled=False)
    if named.startswith(WRITTEN_ALWAYS) and better:
        log.warning(
            "%s: pipeline_type %s does not fit this repository (%s); %s does and is used",
            config.name, named, misfit, better,
        )  # fmt: skip
        return better
    raise LoadError(
        f"{config.name}: pipeline_type {named} does not fit this repository, which is made for {own}: {misfit}. Write "
        f"`pipeline_type: {better or own}`, or leave it out",
        param="diffusers.pipeline_type",
    )


def _misfit(config: ModelConfig, name: str, index: Mapping[str, Any]) -> str:
    """What a repository lacks for the class, or has that it does not take; empty where it fits."""
    made_of = constructor(name)
    if made_of is None:
        return ""
    there = {part for part, value in index.items() if isinstance(value, list) and value[-1] is not None}
    there |= {component for field, component in PARTS.items() if getattr(config, field)}
    # What a repository leaves out on purpose is in its index, as null.
    lacks = (made_of.needed - there) | (made_of.taken - HARMLESS - there - index.keys())
    over = there - made_of.taken - HARMLESS
    said = [f"it has no {', '.join(sorted(lacks))}"] if lacks else []
    return "; ".join(said + ([f"it has {', '.join(sorted(over))}, which that class does not take"] if over else []))


def _check_parts(config: ModelConfig, name: str) -> None:
    made_of = constructor(name)
    for field, component in PARTS.items():
        if made_of and getattr(config, field) and component not in made_of.taken:
            better = capabilities.task_class(name, "text", controlled=True) if field == "control_net" else None
            remedy = f"write `pipeline_type: {better}`, or leave it out" if better else "leave it out"
            raise ModelFileError(f"{config.name}: {field}: {name} takes no {component}; {remedy}", param=field)


def _check_packages(config: ModelConfig, name: str) -> None:
    missing = [word for word in packages(name) if importlib.util.find_spec(MODULES.get(word, word)) is None]
    if missing:
        names = " ".join(PACKAGES.get(word, word) for word in missing)
        raise LoadError(
            f"{config.name}: {name} needs what is not installed: {names}. Run `pip install {names}` where Sfumato is "
            "installed, and start it again",
            param="diffusers.pipeline_type",
        )


@functools.cache
def constructor(name: str) -> Constructor | None:
    """Of a class of diffusers; None where that is not told by its source."""
    for function in diffusers_source.methods(name, "__init__"):
        arguments = [each.arg for each in (*function.args.args, *function.args.kwonlyargs) if each.arg != "self"]
        parts = frozenset(each.arg for each in _annotated(function) if not _is_plain(each))
        defaults = diffusers_source.defaults(function)
        optional = set(diffusers_source.literal(name, "_optional_components") or ())
        taken = frozenset(arguments) & (parts | frozenset({"controlnet"}))
        return Constructor(taken, taken - defaults.keys() - optional)
    return None


def _annotated(function: ast.FunctionDef) -> list[ast.arg]:
    return [each for each in (*function.args.args, *function.args.kwonlyargs) if each.arg != "self"]


def _is_plain(argument: ast.arg) -> bool:
    """Whether it is a setting and no component."""
    text = ast.unparse(argument.annotation) if argument.annotation else ""
    return text.split(" | ")[0] in ("bool", "int", "float", "str")


@functools.cache
def packages(name: str) -> tuple[str, ...]:
    """diffusers' words for the packages that a class needs besides those that every class does."""
    path = diffusers_source.files().get(name)
    if path is None:
        return ()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node.test for node in tree.body if isinstance(node, ast.If) and not node.orelse]
    guarded = {word for test in imports for word in _asked(test)}
    # A class that asks again, where it would use the package, does without.
    optional = {word for node in ast.walk(tree) if node not in imports for word in _asked(node)}
    return tuple(sorted((guarded - optional - HARDWARE) | _backends().get(name, frozenset())))


def _asked(node: ast.AST) -> set[str]:
    """`ftfy` of `is_ftfy_available()`."""
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    found = called.removeprefix("is_").removesuffix("_available")
    return {found} if called == f"is_{found}_available" else set()


@functools.cache
def _backends() -> Mapping[str, frozenset[str]]:
    """Class -> packages without which diffusers puts a stand-in in its place, less those that are always here."""
    found: dict[str, frozenset[str]] = {}
    for path in (diffusers_source.root() / "utils").glob("dummy_*_objects.py"):
        words = path.stem.removeprefix("dummy_").removesuffix("_objects").split("_and_")
        needed = frozenset(words) - {"torch", "transformers", "pt"}
        for node in ast.parse(path.read_text(encoding="utf-8")).body if needed else ():
            if isinstance(node, ast.ClassDef):
                found[node.name] = needed
    return found


def _is_pipeline(name: str) -> bool:
    return name.endswith("Pipeline") and name in diffusers_source.files()


def _pipelines() -> Collection[str]:
    return [name for name in diffusers_source.files() if name.endswith("Pipeline")]


def _version() -> str:
    from importlib.metadata import version

    return version("diffusers")


def index_of(folder: Path) -> dict[str, Any]:
    """A folder's `model_index.json`; empty where there is none that can be read."""
    return diffusers_source.json_of(folder / "model_index.json")
