"""diffusers' modular pipelines with the surface of ordinary ones: a call signature, tasks, and settings of guidance.

A `ModularPipeline` is a list of blocks over components. Its call takes `**kwargs`, and everything that an ordinary
pipeline states in its signature is in the inputs that its blocks declare. `adapted` gives it a class of the same name
with that signature, so that the rest of Sfumato reads it like any other. The blocks run unmodified.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import ModularPipeline
from diffusers.guiders.guider_utils import BaseGuidance

from sfumato.pipelines import workflows

BLOCKS = "block_classes"
"""Class attribute: the classes of the blocks that draw pictures; their source is the pipeline's code."""


def adapted(pipeline: Any) -> Any:
    """A ModularPipeline as a shallow copy with the surface of an ordinary pipeline; any other as it is.

    Its parameters are the inputs that its blocks declare for drawing from a prompt (or what else its simplest workflow
    draws from), and the settings of its guiders, such as `guidance_scale`. Its `tasks` are those of all workflows. It
    returns what the pipeline returns: a state, whose `images` are the pictures.
    """
    if not isinstance(pipeline, ModularPipeline) or isinstance(pipeline, Adapted):
        return pipeline
    return _of_workflow(pipeline, type(pipeline), next(iter(workflows.of_pictures(pipeline._blocks._workflow_map)), ""))


def for_task(pipeline: Any, task: str) -> Any:
    """An adapted pipeline with the surface of its workflow for a task; any other as it is."""
    if not isinstance(pipeline, Adapted):
        return pipeline
    kind: Any = type(pipeline)
    workflow = workflows.for_task(pipeline._blocks._workflow_map, task)
    return pipeline if workflow is None else _of_workflow(pipeline, kind.__bases__[-1], workflow)


def _of_workflow(pipeline: Any, kind: Any, workflow: str) -> Any:
    blocks = pipeline._blocks
    structure = tuple(type(block) for block in _blocks(blocks))
    key = _Key((kind, structure, workflow, _guider_settings(pipeline)), blocks, _guiders(pipeline))
    copied: Any = object.__new__(_class(key))
    vars(copied).update(vars(pipeline))
    return copied


def code_of(kind: Any) -> tuple[type, ...]:
    """The classes whose source says what a pipeline of this class does, besides its own and its bases'."""
    return getattr(kind, BLOCKS, ())


def rewires(pipeline: Any) -> str:
    """Which guider hooks into the denoiser during a call, which all requests share; empty if none does."""
    for guider in _guiders(pipeline).values():
        if type(guider).cleanup_models is not BaseGuidance.cleanup_models:  # it has something to undo
            return f"{type(guider).__name__} hooks into the shared denoiser while it runs"
    return ""


class Adapted:
    """What an adapted class has besides its ModularPipeline's methods."""

    _blocks: Any
    tasks: tuple[str, ...]
    workflow: Callable[[], Any]
    """The blocks of its workflow; do not run them, they are shared."""
    _all_hooks: Sequence[Any] = ()

    def register_modules(self, **modules: Any) -> None:
        """Replace components."""
        self.update_components(**modules)  # type: ignore[attr-defined]

    def set_progress_bar_config(self, **config: Any) -> None:
        """Configure the bars of all loops, nested ones too."""
        for block in _blocks(self._blocks):
            if block is not self._blocks and hasattr(block, "progress_bar"):
                block.set_progress_bar_config(**config)

    @property
    def model_cpu_offload_seq(self) -> str:
        """Names of the modules, joined as in ordinary pipelines; in no order."""
        return "->".join(_modules(self))

    def enable_model_cpu_offload(self, device: str) -> None:
        """Keep each module in main memory until it is called."""
        self._all_hooks = [cpu_offload_with_hook(module, device)[1] for module in _modules(self).values()]

    def remove_all_hooks(self) -> None:
        """Undo `enable_model_cpu_offload`; the modules stay where they are."""
        for module in _modules(self).values():
            remove_hook_from_module(module, recurse=True)

    @property
    def _unpack_latents(self) -> Callable[..., torch.Tensor]:
        """Tokens [B, tokens, C] to latents [B, C, H, W], for previews."""
        names = ("_unpack_latents", "unpack_latents")
        owners = [getattr(self, "pachifier", None), *(sys.modules[kind.__module__] for kind in code_of(type(self)))]
        found = (getattr(owner, name, None) for owner in owners for name in names)
        return _first(found, "_unpack_latents")

    @property
    def _unpatchify_latents(self) -> Callable[..., torch.Tensor]:
        """Patches [B, 4 * C, H / 2, W / 2] to latents [B, C, H, W], for previews."""
        return _first((getattr(kind, "_unpatchify_latents", None) for kind in code_of(type(self))), "_unpatchify")


def _first(found: Iterator[Any], name: str) -> Callable[..., torch.Tensor]:
    function = next((each for each in found if each is not None), None)
    if function is None:
        raise AttributeError(name)
    return function  # type: ignore[no-any-return]


class _Key:
    """What decides about an adapted class, compared by `key`, and what it is made from."""

    def __init__(self, key: tuple[Any, ...], blocks: Any, guiders: Mapping[str, Any]) -> None:
        self.key, self.blocks, self.guiders = key, blocks, guiders

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


@functools.lru_cache(maxsize=64)  # models come and go, their classes are few
def _class(key: _Key) -> type:
    kind, _, workflow, _ = key.key
    blocks = key.blocks.get_workflow(workflow) if workflow else key.blocks
    parameters = _parameters(blocks, key.guiders)
    of_guiders = {each.name for each in parameters} - {each.name for each in blocks.inputs}

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        guiders = _guiders(self)
        settings = {name: kwargs.pop(name) for name in of_guiders & kwargs.keys()}
        try:
            for name, guider in guiders.items() if settings else ():
                fitting = {setting: value for setting, value in settings.items() if setting in guider.config}
                setattr(self, name, guider.new(**fitting))
            return ModularPipeline.__call__(self, *args, **kwargs)
        finally:
            vars(self).update(guiders)

    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *parameters]
    )
    attributes = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")} | {
        "__call__": call,
        BLOCKS: tuple(dict.fromkeys(type(block) for block in _blocks(blocks))),
        "tasks": workflows.tasks(key.blocks._workflow_map, {each.name: each for each in parameters}),
        "workflow": staticmethod(lambda: blocks),
    }
    return type(kind.__name__, (Adapted, kind), attributes)


def _blocks(block: Any) -> Iterator[Any]:
    """A block and all blocks inside it."""
    yield block
    for inner in block.sub_blocks.values():
        yield from _blocks(inner)


def _parameters(blocks: Any, guiders: Mapping[str, Any]) -> list[inspect.Parameter]:
    """The inputs of a workflow, then those settings of the guiders that are not among them."""
    defaults = {
        each.name: inspect.Parameter.empty if each.required else each.default for each in blocks.inputs if each.name
    }
    for guider in guiders.values():
        for name, value in guider.config.items():
            if not name.startswith("_"):
                defaults.setdefault(name, value)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, kind, default=default) for name, default in defaults.items()]


def _guiders(pipeline: Any) -> dict[str, Any]:
    parts = vars(pipeline).items()
    return {name: part for name, part in parts if type(part).__module__.startswith("diffusers.guiders")}


def _guider_settings(pipeline: Any) -> str:
    guiders = {name: (type(guider).__name__, dict(guider.config)) for name, guider in _guiders(pipeline).items()}
    return json.dumps(guiders, sort_keys=True, default=repr)


def _modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
