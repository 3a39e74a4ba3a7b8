"""ControlNets that requests name: loaded for themselves, and put beside a model's components for one request.

The model's own pipeline is never changed: a request draws with a pipeline of the ControlNet's class over the same
modules. Requests with the same ControlNets have the same module, so their calls share forward passes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from sfumato.checkpoints import controlnets, diffusers_source, net_classes, request_files
from sfumato.checkpoints.controlnets import HubNet
from sfumato.checkpoints.net_classes import NetClass
from sfumato.checkpoints.remote_limits import ANY, Limits
from sfumato.config import ModelConfig
from sfumato.errors import InvalidRequest, LoadError
from sfumato.models import footprint, net_files, request_parts
from sfumato.models.content_hashes import ContentHashes
from sfumato.models.device import DTYPES
from sfumato.models.fetch import OnStatus
from sfumato.models.load import Loaded, MakeRoom
from sfumato.models.sharing import Sharing
from sfumato.models.siblings import over
from sfumato.status import ModelStatus

log = logging.getLogger(__name__)

ALIKE = (
    "in_channels", "cross_attention_dim", "block_out_channels", "addition_embed_type",
    "joint_attention_dim", "num_attention_heads", "attention_head_dim", "pooled_projection_dim",
    "caption_projection_dim",
)  # fmt: skip
"""Settings that a ControlNet has in common with the denoiser it was made for."""


class Part:
    """What is loaded, in place of a pipeline."""

    def __init__(self, controlnet: torch.nn.Module, digest: str) -> None:
        self.controlnet = controlnet
        self.digest = digest
        """SHA-256 of its weights."""


def config_of(model: Loaded, name: str, param: str) -> ModelConfig:
    """What loads the ControlNet that a request names, as the model needs it. Raises InvalidRequest with `param`."""
    base = model.config
    label, source = _one_of(model, controlnets.find(base.folder, name, param), name, param)
    where, revision, file = (str(source), None, None) if isinstance(source, Path) else (
        source.id, source.revision, source.file)  # fmt: skip
    denoiser, kind = None, ""
    if file or (isinstance(source, Path) and source.is_file()):
        denoiser = json.dumps(net_files.settings_of(getattr(_denoiser(model), "config", {})))
        kind = f", for {hashlib.sha256(denoiser.encode()).hexdigest()[:8]}"  # models of one kind share it
    return ModelConfig(
        name=f"{controlnets.FOLDER}/{label} ({model.dtype} on {model.device}{kind})", part="controlnet", model=where,
        part_file=file, denoiser=denoiser, revision=revision, folder=base.folder, dtype=model.dtype, cuda=base.cuda,
        main_gpu=base.main_gpu,
    )  # fmt: skip


def _one_of(model: Loaded, found: Mapping[str, Path | HubNet], name: str, param: str) -> tuple[str, Path | HubNet]:
    """The one that fits the model, of those with the same name. Raises InvalidRequest if there is not one."""
    if len(found) > 1:
        problems = {label: _problem(model, source) for label, source in found.items() if isinstance(source, Path)}
        fitting = [label for label, problem in problems.items() if problem is None]
        if len(fitting) > 1:
            raise InvalidRequest(
                f"{param}: {name[:100]!r} may be {' or '.join(fitting)}; name one of them", param=param
            )
        if not fitting:
            told = "; ".join(f"{label}: {problem}" for label, problem in problems.items())
            raise InvalidRequest(
                f"{param}: no ControlNet {name[:100]!r} is for {model.config.name}: {told[:1500]}", param=param
            )
        return fitting[0], found[fitting[0]]
    label, source = next(iter(found.items()))
    if isinstance(source, Path):
        _class_for(model, controlnets.class_of(source) or "", param)
        if why := _problem(model, source):
            raise _other_model(model, why, param)
    return label, source


def _problem(model: Loaded, path: Path) -> str | None:
    """Why a ControlNet does not go with the model, told without its weights; None if it does."""
    kind = controlnets.class_of(path) or ""
    own = type(model.pipeline).__name__
    if not any(kind in each.kinds for each in net_classes.of(own)):
        return f"a {kind} does not go with {own}"
    denoiser = dict(getattr(_denoiser(model), "config", {}))
    if path.is_file():
        return net_files.problem(path, net_files.settings_of(denoiser))
    return _other_size(diffusers_source.json_of(path / controlnets.DESCRIPTION), denoiser)


def load(
    config: ModelConfig,
    device_setting: str,
    on_status: OnStatus,
    make_room: MakeRoom,
    known: Sharing | None = None,
    limits: Limits = ANY,
) -> Loaded:
    """Load a ControlNet. `limits`: of what is downloaded.

    Raises LoadError, or DownloadError, and what torch raises when memory runs out.
    """
    path = Path(config.model)
    if not path.is_absolute():
        on_status(ModelStatus("downloading", config.model))
        path = _fetch(HubNet(config.model, config.revision, config.part_file), limits)
    device, dtype = request_parts.place(config, device_setting)
    if path.is_file():
        controlnets.refuse(path)
        sizes, files = {"controlnet": footprint.of_part(path, "controlnet", dtype)}, [path]
        read: Callable[[], torch.nn.Module] = functools.partial(
            net_files.load, path, json.loads(config.denoiser or "{}"), DTYPES[dtype]
        )
    else:
        sizes, files, read = _of_folder(config, path, dtype)
    make_room(footprint.Needs(sizes, device, dtype))
    with request_parts.reading(path) as state:
        net = request_parts.detached(read().to(device))
        digest = request_parts.digest(files, known.hashes if known else ContentHashes())
    return Loaded(config, Part(net, digest), str(path), device, dtype, state=state)


def _of_folder(
    config: ModelConfig, path: Path, dtype: str
) -> tuple[dict[str, int], list[Path], Callable[[], torch.nn.Module]]:
    """Bytes, files and what reads them, of a folder in diffusers' layout."""
    variant, files = controlnets.chosen(each.name for each in path.iterdir())
    cls = getattr(diffusers, controlnets.class_of(path) or "", None)
    if cls is None or not files:
        why = "has no diffusion_pytorch_model.safetensors" if cls else "names no ControlNet of diffusers in config.json"
        raise LoadError(f"{path.name if Path(config.model).is_absolute() else config.model} {why}")
    read = functools.partial(
        cls.from_pretrained, path, dtype=DTYPES[dtype], variant=variant, use_safetensors=True, local_files_only=True
    )
    return footprint.of_folders({"controlnet": path}, dtype, variant), [path / file for file in files], read


def _fetch(net: HubNet, limits: Limits) -> Path:
    """Download a ControlNet's file, or its configuration and safetensors weights. Raises LoadError or DownloadError."""
    repo, revision = net.id, net.revision
    remedy = f"Put it into {controlnets.FOLDER}/ beside the model files, or name it"
    if net.file:
        return request_files.fetch(repo, revision, [net.file], limits, remedy) / net.file
    there = request_files.names(repo, revision, remedy)
    _, files = controlnets.chosen(there)
    if not files or controlnets.DESCRIPTION not in there:
        single = [name for name in there if Path(name).suffix.lower() in controlnets.SUFFIXES]
        named = f". Name one of its files: {', '.join(f'{repo}/{each}' for each in single[:8])}" if single else ""
        raise LoadError(
            f"{repo} has no diffusion_pytorch_model.safetensors with a config.json: it is no ControlNet in "
            f"diffusers' layout{named}"
        )
    return request_files.fetch(repo, revision, [controlnets.DESCRIPTION, *files], limits, remedy)


def beside(model: Loaded, nets: Sequence[torch.nn.Module], params: Sequence[str]) -> Loaded:
    """The model with a pipeline of the ControlNets' class over its components, for one request.

    `params`: of the request, one for each net. Raises InvalidRequest with one of them for a net of another model.
    """
    cls: NetClass | None = None
    for net, param in zip(nets, params, strict=True):
        cls = _class_for(model, type(net).__name__, param, cls)
        _refuse_other_size(model, net, param)
    assert cls is not None
    if len(nets) > 1 and not cls.several:
        raise InvalidRequest(f"controls: {model.config.name} ({cls.name}) takes one ControlNet", param="controls")
    return replace(model, pipeline=_over(model.pipeline, getattr(diffusers, cls.name), nets), task_pipelines={})


def _class_for(model: Loaded, kind: str, param: str, chosen: NetClass | None = None) -> NetClass:
    """The diffusers class that draws with such a ControlNet. Raises InvalidRequest if there is none, or it is not the
    one `chosen` for the others."""
    own = type(model.pipeline).__name__
    fitting = next((each for each in net_classes.of(own) if kind in each.kinds), None)
    if fitting is None or chosen not in (None, fitting):
        taken = sorted({word for each in net_classes.of(own) for word in each.kinds})
        takes = f"it takes {', '.join(taken)}" if taken else "diffusers has no pipeline with one for it"
        raise InvalidRequest(f"{param}: a {kind} does not go with {model.config.name} ({own}); {takes}", param=param)
    return fitting


def _denoiser(model: Loaded) -> Any:
    return getattr(model.pipeline, "unet", None) or getattr(model.pipeline, "transformer", None)


def _refuse_other_size(model: Loaded, net: Any, param: str) -> None:
    """Raises InvalidRequest for a net made for a denoiser of another shape, such as XL's for Stable Diffusion 1.5."""
    if why := _other_size(dict(net.config), dict(getattr(_denoiser(model), "config", {}))):
        raise _other_model(model, why, param)


def _other_model(model: Loaded, why: str, param: str) -> InvalidRequest:
    message = why if "made for another model" in why else f"this ControlNet was made for another model: {why}"
    return InvalidRequest(f"{param}: {message}; {model.config.name} is a {type(model.pipeline).__name__}", param=param)


def _other_size(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """In what a net's settings are not the denoiser's."""
    for name in ALIKE:
        if name in mine and name in other and _plain(mine[name]) != _plain(other[name]):
            return f"its {name} is {mine[name]}, the model's is {other[name]}"
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


_SEVERAL: weakref.WeakValueDictionary[tuple[int, ...], Any] = weakref.WeakValueDictionary()
"""Ids of nets -> the module that diffusers makes of them, while a request uses it: it keeps the nets, and so their ids.
Two requests with the same nets have one module, and share its forward passes."""


def _over(pipeline: Any, cls: Any, nets: Sequence[Any]) -> Any:
    """A pipeline of `cls` over the components of another, with these nets."""
    key = tuple(id(net) for net in nets)
    one = nets[0] if len(nets) == 1 else _SEVERAL.get(key) or list(nets)
    made = over(pipeline, cls, controlnet=one)
    if len(nets) > 1:
        _SEVERAL[key] = made.controlnet
    return made
