"""ControlNets that requests name: loaded for themselves, and put beside a model's components for one request.

The model's own pipeline is never changed: a request draws with a pipeline of the ControlNet's class over the same
modules. Requests with the same ControlNets have the same module, so their calls share forward passes.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import snapshot_download

from sfumato.batching.batcher import is_out_of_memory
from sfumato.checkpoints import controlnets, hub_files
from sfumato.checkpoints.controlnets import HubNet
from sfumato.config import ModelConfig
from sfumato.core import ModelStatus
from sfumato.errors import InvalidRequest, LoadError, SfumatoError
from sfumato.models import footprint
from sfumato.models.content_hashes import ContentHashes
from sfumato.models.device import DTYPES, choose_device
from sfumato.models.fetch import OnStatus
from sfumato.models.load import Loaded, MakeRoom
from sfumato.models.sharing import Sharing
from sfumato.pipelines import capabilities

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
    label, source = controlnets.find(base.folder, name, param)
    where = str(source) if isinstance(source, Path) else source.id
    revision = source.revision if isinstance(source, HubNet) else None
    return ModelConfig(
        name=f"{controlnets.FOLDER}/{label} ({model.dtype} on {model.device})", part="controlnet", model=where,
        revision=revision, folder=base.folder, dtype=model.dtype, cuda=base.cuda, main_gpu=base.main_gpu,
    )  # fmt: skip


def load(
    config: ModelConfig,
    device_setting: str,
    on_status: OnStatus,
    make_room: MakeRoom,
    known: Sharing | None = None,
) -> Loaded:
    """Load a ControlNet. Raises LoadError, or DownloadError, and what torch raises when memory runs out."""
    path = Path(config.model)
    if not path.is_absolute():
        on_status(ModelStatus("downloading", config.model))
        path = _fetch(HubNet(config.model, config.revision))
    device, dtype = choose_device(config, device_setting), config.dtype or "fp32"
    variant, files = controlnets.chosen(each.name for each in path.iterdir())
    cls = getattr(diffusers, controlnets.class_of(path) or "", None)
    if cls is None or not files:
        why = "has no diffusion_pytorch_model.safetensors" if cls else "names no ControlNet of diffusers in config.json"
        raise LoadError(f"{path.name if Path(config.model).is_absolute() else config.model} {why}")
    make_room(footprint.Needs(footprint.of_folders({"controlnet": path}, dtype, variant), device, dtype))
    try:
        net = cls.from_pretrained(
            path, dtype=DTYPES[dtype], variant=variant, use_safetensors=True, local_files_only=True
        ).to(device)
        digest = _digest([path / file for file in files], known.hashes if known else ContentHashes())
    except SfumatoError:
        raise
    except Exception as error:  # whatever a damaged file makes diffusers raise
        if is_out_of_memory(error):
            raise
        raise LoadError(f"{path.name} cannot be loaded: {type(error).__name__}: {error}") from error
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.device.type == "cpu":  # what is read is mapped, and changes with a file that is written over
            tensor.data = tensor.data.clone()
    return Loaded(config, Part(net.eval(), digest), str(path), device, dtype)


def _fetch(repository: HubNet) -> Path:
    """Download a ControlNet's configuration and safetensors weights. Raises LoadError or DownloadError."""
    repo, revision = repository.id, repository.revision
    with hub_files.as_download_errors(repo):
        _, files = controlnets.chosen(hub_files.files_of(repo, revision))
        if not files:
            raise LoadError(f"{repo} has no diffusion_pytorch_model.safetensors: it is no ControlNet for diffusers")
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[controlnets.DESCRIPTION, *files]))


def _digest(files: Sequence[Path], hashes: ContentHashes) -> str:
    """SHA-256 of the weights; of several files, of their digests."""
    digests = [hashes.of(file) for file in sorted(files)]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def beside(model: Loaded, nets: Sequence[torch.nn.Module], params: Sequence[str]) -> Loaded:
    """The model with a pipeline of the ControlNets' class over its components, for one request.

    `params`: of the request, one for each net. Raises InvalidRequest with one of them for a net of another model.
    """
    own = type(model.pipeline).__name__
    cls: Any = None
    for net, param in zip(nets, params, strict=True):
        kind = type(net).__name__
        fitting = next((each for each in _classes(own) if _takes(each, kind)), None)
        if fitting is None or cls not in (None, fitting):
            taken = sorted({word for each in _classes(own) for word in _taken(each)})
            takes = f"it takes {', '.join(taken)}" if taken else "diffusers has no pipeline with one for it"
            raise InvalidRequest(
                f"{param}: a {kind} does not go with {model.config.name} ({own}); {takes}", param=param
            )
        cls = fitting
        _refuse_other_size(model, net, param)
    if len(nets) > 1 and not any(word.startswith(("list", "tuple")) for word in _words(cls)):
        raise InvalidRequest(f"controls: {model.config.name} ({cls.__name__}) takes one ControlNet", param="controls")
    return replace(model, pipeline=_over(model.pipeline, cls, nets), task_pipelines={})


def _classes(own: str) -> list[Any]:
    """The diffusers classes that draw with a ControlNet what this class draws without."""
    plain = re.sub(r"(?:ControlNet(?:Union)?|Img2Img|Inpaint(?:ing)?)+(?=Pipeline$)", "", own)
    names = [
        capabilities.task_class(own, "text", controlled=True),
        plain.removesuffix("Pipeline") + "ControlNetPipeline",
        plain.removesuffix("Pipeline") + "ControlNetUnionPipeline",
    ]
    return [getattr(diffusers, name) for name in dict.fromkeys(names) if name and hasattr(diffusers, name)]


def _words(cls: Any) -> list[str]:
    """What its constructor's annotation of `controlnet` names."""
    annotation = inspect.signature(cls.__init__).parameters["controlnet"].annotation
    return [part.strip() for part in str(annotation).split("|")]


def _taken(cls: Any) -> set[str]:
    names = {name for word in _words(cls) for name in re.findall(r"\w+(?=\W*$)", word)}
    return {name for name in names if "Multi" not in name}


def _takes(cls: Any, kind: str) -> bool:
    return kind in _taken(cls)


def _refuse_other_size(model: Loaded, net: Any, param: str) -> None:
    """Raises InvalidRequest for a net made for a denoiser of another shape, such as XL's for Stable Diffusion 1.5."""
    denoiser = getattr(model.pipeline, "unet", None) or getattr(model.pipeline, "transformer", None)
    mine, other = dict(net.config), dict(getattr(denoiser, "config", {}))
    for name in ALIKE:
        if name in mine and name in other and _plain(mine[name]) != _plain(other[name]):
            raise InvalidRequest(
                f"{param}: this ControlNet was made for another model: its {name} is {mine[name]}, that of "
                f"{model.config.name} is {other[name]}",
                param=param,
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


_SEVERAL: weakref.WeakValueDictionary[tuple[int, ...], Any] = weakref.WeakValueDictionary()
"""Ids of nets -> the module that diffusers makes of them, while a request uses it: it keeps the nets, and so their ids.
Two requests with the same nets have one module, and share its forward passes."""


def _over(pipeline: Any, cls: Any, nets: Sequence[Any]) -> Any:
    """A pipeline of `cls` over the components and settings of another; `from_pipe` would cast the shared modules."""
    expected, optional = cls._get_signature_keys(cls)
    modules = {name: module for name, module in pipeline.components.items() if name in expected}
    settings = {name: value for name, value in pipeline.config.items() if name in optional and name not in modules}
    if "requires_safety_checker" in optional and modules.get("safety_checker") is None:
        settings["requires_safety_checker"] = False  # else every request would log a warning
    key = tuple(id(net) for net in nets)
    one = nets[0] if len(nets) == 1 else _SEVERAL.get(key) or list(nets)
    made = cls(**{**modules, "controlnet": one}, **settings)
    if len(nets) > 1:
        _SEVERAL[key] = made.controlnet
    made.set_progress_bar_config(disable=True)
    made._all_hooks = list(getattr(pipeline, "_all_hooks", ()))
    return made
