"""IP-Adapters that requests name: loaded for themselves, and put into a twin of a model's denoiser for one request.

The model itself is never changed. diffusers' own code makes the attention processors and the projection of a picture;
they use the adapter's tensors as they are in memory. Requests with the same adapters have the same twin, and share its
forward passes where the adapters act equally strongly.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection, SiglipImageProcessor, SiglipVisionModel

from sfumato.batching.adapted import AdaptedModule, Selection
from sfumato.batching.attending import Attending, Extended
from sfumato.batching.batcher import is_out_of_memory
from sfumato.checkpoints import controlnets, diffusers_source, hub_files, ip_adapters, request_files
from sfumato.checkpoints.ip_adapters import ARGUMENT, IMAGE, PROJECTION, SIGLIP, HubFile
from sfumato.checkpoints.remote_limits import ANY, Limits
from sfumato.config import ModelConfig
from sfumato.errors import InvalidRequest, LoadError
from sfumato.models import attention_kinds, footprint, request_parts
from sfumato.models.attention_kinds import Kind
from sfumato.models.by_layer import has_feature_cache, is_cast_by_layer, waits_by_layer
from sfumato.models.content_hashes import ContentHashes
from sfumato.models.device import DTYPES
from sfumato.models.fetch import OnStatus
from sfumato.models.load import Loaded, MakeRoom
from sfumato.models.picture_prompt import Adapter, ImageEncoder, PicturePrompt, Weights
from sfumato.models.sharing import Sharing
from sfumato.pipelines.capabilities import parameters_of
from sfumato.status import ModelStatus

PROCESSOR = "preprocessor_config.json"
"""Beside an image encoder: how it wants its pictures."""

# What is loaded.


def config_of(model: Loaded, label: str, source: Path | HubFile) -> ModelConfig:
    """What loads an adapter, as the model needs it."""
    base = model.config
    where = str(source) if isinstance(source, Path) else f"{source.id}/{source.file}"
    revision = source.revision if isinstance(source, HubFile) else None
    return _part(model, "ip_adapter", f"{ip_adapters.FOLDER}/{label}", where, revision, base.folder)


def config_of_encoder(model: Loaded, adapter: ModelConfig, folder: str) -> ModelConfig:
    """What loads the image encoder of an adapter, as the model needs it."""
    if Path(folder).is_absolute():
        real = Path(folder).resolve()
        return _part(model, "image_encoder", f"image encoder {real}", str(real), None, model.config.folder)
    repo = "/".join(adapter.model.split("/")[:2])
    where = f"{repo}/{folder}"
    label = f"image encoder {where}" + (f"@{adapter.revision}" if adapter.revision else "")
    return _part(model, "image_encoder", label, where, adapter.revision, model.config.folder)


def _part(model: Loaded, part: str, label: str, where: str, revision: str | None, folder: Path) -> ModelConfig:
    base = model.config
    return ModelConfig(
        name=f"{label} ({model.dtype} on {model.device})", part=part, model=where, revision=revision, folder=folder,
        dtype=model.dtype, cuda=base.cuda, main_gpu=base.main_gpu,
    )  # fmt: skip


def load(
    config: ModelConfig,
    device_setting: str,
    on_status: OnStatus,
    make_room: MakeRoom,
    known: Sharing | None = None,
    limits: Limits = ANY,
) -> Loaded:
    """Load an adapter. `limits`: of what is downloaded.

    Raises LoadError, or DownloadError, and what torch raises when memory runs out.
    """
    path = Path(config.model)
    if not path.is_absolute():
        on_status(ModelStatus("downloading", config.model))
        path = _fetch(config, limits)
    encoder = ip_adapters.encoder_of(path)
    on_hub = not Path(config.model).is_absolute()
    folder = (_folder_on_hub(config, encoder) if on_hub else None) or _folder_here(config, path, encoder)
    device, dtype = request_parts.place(config, device_setting)
    make_room(footprint.Needs({"adapter": footprint.of_part(path, "", dtype)}, device, dtype))
    with request_parts.reading(path) as state:
        read = load_file(path)
        tensors = {ip_adapters.canonical(key): each.to(device, DTYPES[dtype]) for key, each in read.items()}
        strange = [key for (key, each), cast in zip(read.items(), tensors.values(), strict=True)
                   if not each.is_floating_point() or not cast.isfinite().all()]  # fmt: skip
        if strange:
            raise LoadError(f"{path.name} has no finite numbers in {ip_adapters.shown(strange)}; download it again")
        weights = request_parts.detached(Weights(tensors))
        digest = (known.hashes if known else ContentHashes()).of(path)
    return Loaded(config, Adapter(weights, digest, encoder, folder), str(path), device, dtype, state=state)


def load_encoder(
    config: ModelConfig,
    device_setting: str,
    on_status: OnStatus,
    make_room: MakeRoom,
    known: Sharing | None = None,
    limits: Limits = ANY,
) -> Loaded:
    """Load an image encoder. Raises as `load`."""
    path = Path(config.model)
    if not path.is_absolute():
        on_status(ModelStatus("downloading", config.model))
        path = _fetch_encoder(*_repository(config.model), config.revision, limits)
    device, dtype = request_parts.place(config, device_setting)
    make_room(footprint.Needs(footprint.of_folders({"image_encoder": path}, dtype, None), device, dtype))
    with request_parts.reading(path) as state:
        described = diffusers_source.json_of(path / controlnets.DESCRIPTION)
        siglip = str(described.get("model_type", "")).startswith("siglip")
        kind: Any = SiglipVisionModel if siglip else CLIPVisionModelWithProjection
        read: Any = kind.from_pretrained(path, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True)
        encoder = request_parts.detached(read.to(device))
        own = siglip and (path / PROCESSOR).is_file()  # diffusers takes CLIP's by its size
        processor = SiglipImageProcessor.from_pretrained(path, local_files_only=True) if own else None
    return Loaded(config, ImageEncoder(encoder, processor), str(path), device, dtype, state=state)


def _repository(where: str) -> tuple[str, str]:
    owner, name, path = where.split("/", 2)
    return f"{owner}/{name}", path


def _fetch(config: ModelConfig, limits: Limits = ANY) -> Path:
    repo, file = _repository(config.model)
    return request_files.fetch(repo, config.revision, [file], limits) / file


def _fetch_encoder(repo: str, folder: str, revision: str | None, limits: Limits = ANY) -> Path:
    files = controlnets.DESCRIPTION, ip_adapters.ENCODER_WEIGHTS, PROCESSOR
    patterns = [f"{folder}/{name}" for name in files]
    names = [name for name in hub_files.files_of(repo, revision) if any(fnmatch(name, each) for each in patterns)]
    return request_files.fetch(repo, revision, names, limits) / folder


def fetch(config: ModelConfig) -> None:
    """Download the adapters that a model file names on the hub, and their image encoders."""
    for name in config.ip_adapters:
        source = ip_adapters.find(config.folder, name, "diffusers.ip_adapter")
        if source and isinstance(where := source[1], HubFile):
            part = replace(config, model=f"{where.id}/{where.file}", revision=where.revision)
            if folder := _folder_on_hub(part, ip_adapters.encoder_of(_fetch(part))):
                _fetch_encoder(where.id, folder, where.revision)


def _folder_on_hub(config: ModelConfig, encoder: ip_adapters.Encoder) -> str | None:
    """The folder of the image encoder in the repository of an adapter; None: there is none that fits."""
    repo, file = _repository(config.model)
    names = hub_files.files_of(repo, config.revision)
    folders = [name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == controlnets.DESCRIPTION]
    for folder in ip_adapters.nearest(file, [each for each in folders if each]):
        description = f"{folder}/{controlnets.DESCRIPTION}"
        there = request_files.fetch(repo, config.revision, [description], ANY)
        if encoder.fits(diffusers_source.json_of(there / description)):
            return folder
    return None


def _folder_here(config: ModelConfig, file: Path, encoder: ip_adapters.Encoder) -> str | None:
    folder = ip_adapters.local_encoder(file, config.folder.resolve(), encoder)
    return str(folder) if folder else None


# What a request draws with.


def beside(model: Loaded, prompt: PicturePrompt, encoder: ImageEncoder | None) -> Loaded:
    """The model as a request draws with it: with the image encoder of its adapters, if it has none of its own.

    Raises InvalidRequest for a model that has no IP-Adapters.
    """
    pipeline, name = model.pipeline, f"{model.config.name} ({type(model.pipeline).__name__})"
    denoiser = _denoiser(pipeline)
    if denoiser is None or ARGUMENT not in parameters_of(pipeline):
        raise InvalidRequest(
            f"{prompt.param}: {name} takes no IP-Adapters: diffusers has none for its denoiser, or it takes no "
            f"{ARGUMENT}; leave it out",
            param=prompt.param,
        )
    _refuse_several(prompt, name, attention_kinds.of(denoiser))
    if waits_by_layer([denoiser]) or is_cast_by_layer(denoiser) or has_feature_cache([denoiser]):
        raise InvalidRequest(
            f"{prompt.param}: the layers of {model.config.name} wait in main memory (offload: group), are stored in "
            "fp8 (layerwise_casting) or have a feature cache (cache), where requests cannot have IP-Adapters",
            param=prompt.param,
        )
    copied = copy.copy(pipeline)
    if encoder is not None:
        vars(copied)["image_encoder"] = encoder.image_encoder
    if getattr(copied, "feature_extractor", None) is None:
        vars(copied)["feature_extractor"] = (encoder and encoder.processor) or _processor(copied.image_encoder.config)
    return replace(model, pipeline=copied, task_pipelines={}, prompt=prompt)


def _refuse_several(prompt: PicturePrompt, name: str, kind: Kind | None) -> None:
    most = kind.most if kind else None
    if most and max(len(prompt.adapters), *(len(each.controls) for each in prompt.adapters)) > most:
        raise InvalidRequest(
            f"{prompt.param}: {name} takes {most} IP-Adapter, with {most} picture; leave the others out",
            param=prompt.param,
        )


def _processor(config: Any) -> Any:
    """What makes pictures ready for an image encoder that comes without it."""
    side = config.image_size
    if config.model_type == SIGLIP:
        return SiglipImageProcessor(size={"height": side, "width": side})
    return CLIPImageProcessor(size=side, crop_size=side)


def own_encoder(model: Loaded, adapter: Adapter) -> bool:
    """Whether the model has an image encoder that fits an adapter."""
    own = getattr(model.pipeline, "image_encoder", None)
    return own is not None and adapter.encoder.fits(own.config.to_dict())


def selections(model: Loaded, selected: Mapping[int, Selection]) -> tuple[Mapping[int, Selection], Attending | None]:
    """`selected` with what the request's adapters add to the denoiser. Raises InvalidRequest if one does not fit."""
    prompt, denoiser = model.prompt, _denoiser(model.pipeline)
    if prompt is None or denoiser is None:
        return selected, None
    own = selected.get(id(denoiser))
    key = (id(denoiser), id(own.adapted.layers) if own else None, tuple(id(each) for each in prompt.of_files))
    extended = _EXTENDED.get(key)
    if extended is None:
        adapted = own.adapted if own else AdaptedModule(denoiser)
        extended = _EXTENDED[key] = _extended(model.config.name, adapted, prompt)
    attending = Attending(extended, prompt.strengths())
    selection = own or Selection(extended.adapted, extended.adapted.defaults)
    return {**selected, id(denoiser): replace(selection, attending=attending)}, attending


_EXTENDED: weakref.WeakValueDictionary[tuple[Any, ...], Extended] = weakref.WeakValueDictionary()
"""Ids of denoiser, layers with LoRAs and adapters -> the twin with them, while a request uses it: it keeps them all."""


def _extended(model: str, adapted: AdaptedModule, prompt: PicturePrompt) -> Extended:
    """A twin of a denoiser with the attention processors of the adapters, and what makes tokens of their pictures."""
    module = adapted.extended()
    kind = attention_kinds.of(module)
    assert kind is not None
    states = [{"image_proj": each.weights.of(PROJECTION), "ip_adapter": each.weights.of(IMAGE)} for each in
              prompt.of_files]  # fmt: skip
    for state in states:
        _refuse_other_keys(model, kind.shapes(module, state["ip_adapter"]), state["ip_adapter"], prompt.param)
    try:
        processors, projections = kind.put(module, states)
    except Exception as error:  # whatever diffusers raises for a file of another kind
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:500]
        raise InvalidRequest(f"{prompt.param}: it does not fit {model}: {text}", param=prompt.param) from error
    for made in projections:
        absent = [name for name, tensor in made.named_parameters() if tensor.device.type == "meta"]
        if absent:
            raise InvalidRequest(
                f"{prompt.param}: its file lacks tensors for {ip_adapters.shown(absent)} of {type(made).__name__}",
                param=prompt.param,
            )
    module.eval()
    following = [each for each in processors.values() if hasattr(each, "to_k_ip")]
    return Extended(module, following, adapted, (adapted.layers, prompt.of_files))


def _refuse_other_keys(
    model: str, expected: Mapping[str, torch.Size], attention: Mapping[str, torch.Tensor], param: str
) -> None:
    """Raises InvalidRequest naming the keys of an adapter that was made for another denoiser."""
    missing = sorted(expected.keys() - attention.keys())
    strange = sorted(attention.keys() - expected.keys())
    other = sorted(key for key in expected.keys() & attention.keys() if attention[key].shape != expected[key])
    for keys, why in ((strange, "has keys that the model has no place for"), (missing, "lacks"), (other, "has shapes "
                      "of another model in")):  # fmt: skip
        if keys:
            named = [IMAGE + key for key in keys]
            raise InvalidRequest(
                f"{param}: it does not fit {model}: it {why} {ip_adapters.shown(named)}. It may be made for models of "
                "another kind",
                param=param,
            )


def _denoiser(pipeline: Any) -> Any:
    """The denoiser that takes adapters; None: there is none."""
    parts = (getattr(pipeline, name, None) for name in ("unet", "transformer"))
    return next((part for part in parts if attention_kinds.of(part)), None)


def arguments(model: Loaded, pipeline: Any, pictures: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What the call of a pipeline takes for the pictures of each adapter."""
    kind = attention_kinds.of(_denoiser(model.pipeline))
    assert kind is not None
    return attention_kinds.arguments(kind, pipeline, pictures)
