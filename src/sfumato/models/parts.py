"""Modules that do not come from the model's own source: ControlNet, text encoder, VAE, LoRAs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download

from sfumato.batching.batcher import is_out_of_memory
from sfumato.checkpoints import (
    controlnets,
    diffusers_source,
    hub_files,
    lora_files,
    references,
    sources,
    tiny_vaes,
    variants,
    weight_file,
)
from sfumato.checkpoints.weight_file import OnProgress
from sfumato.config import ModelConfig, addresses
from sfumato.errors import LoadError, ModelFileError
from sfumato.loras import Lora
from sfumato.models import footprint, net_files
from sfumato.models.device import DTYPES

_WEIGHTS = re.compile(r"(diffusion_pytorch_|pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
"""Of a component, without a variant."""


def components(config: ModelConfig, dtype: torch.dtype, described: Path) -> dict[str, Any]:
    """Components to pass to the pipeline's constructor. `described`: the folder with the configurations of the rest."""
    modules: dict[str, Any] = {}
    if config.control_net:
        nets = [_control_net(config, name, dtype, described) for name in controlnets.of_model(config)]
        modules["controlnet"] = nets if isinstance(config.control_net, tuple) else nets[0]
    if config.clip_model:
        source = component(config, config.clip_model, config.clip_subfolder or "")
        with hub_files.as_download_errors(config.clip_model):
            modules["text_encoder"] = transformers.CLIPTextModel.from_pretrained(
                source, subfolder=config.clip_subfolder or "", local_files_only=True, dtype=dtype
            )
    return modules


def _control_net(config: ModelConfig, name: str, dtype: torch.dtype, described: Path) -> Any:
    """A ControlNet of the class that its configuration, or its file's header, names."""
    source = _control_net_source(config, name)
    if source.is_file():
        return net_files.load(source, _denoiser(described), dtype)
    with hub_files.as_download_errors(name):
        kind = diffusers.ControlNetModel.load_config(source, local_files_only=True).get("_class_name", "")
        cls = getattr(diffusers, kind, None) if "ControlNet" in kind else None
        return (cls or diffusers.ControlNetModel).from_pretrained(source, local_files_only=True, dtype=dtype)


def _control_net_source(config: ModelConfig, name: str) -> Path:
    """Its folder or file, downloaded if necessary. Raises LoadError for a file that is no ControlNet."""
    source = references.control_net(config, name)
    if isinstance(source, references.Repository):
        return Path(component(config, name))
    if source.is_file():
        controlnets.refuse(source)
    return source


def _denoiser(described: Path) -> dict[str, Any]:
    """Settings of the model's denoiser."""
    found = (diffusers_source.json_of(described / part / "config.json") for part in ("unet", "transformer"))
    return net_files.settings_of(next((each for each in found if each), {}))


def prior(config: ModelConfig, folder: Path, dtype: str) -> Any:
    """The pipeline of the prior at `folder`."""
    files = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
    return diffusers.DiffusionPipeline.from_pretrained(
        folder,
        dtype=DTYPES[dtype],
        variant=variants.choose(config, dtype, files),
        use_safetensors=None if config.allow_pickle else True,
        local_files_only=True,
    )


def places(config: ModelConfig) -> Iterator[Path]:
    """The files and folders on this disk that it names besides the model itself, other than LoRAs."""
    for net in controlnets.of_model(config):
        if there := controlnets.here(config, net):
            yield there
    for name in (config.vae, config.clip_model):
        if name and (path := Path(path_or_id(config, name))).exists():
            yield path


def sizes(config: ModelConfig, dtype: str, report: OnProgress) -> dict[str, int]:
    """Bytes that each will take in `dtype`, told from its files; of the hub only those that are here count."""
    named: dict[str, Path | references.Repository] = {
        f"lora {at}": references.lora(config, adapter.source, report) for at, adapter in enumerate(config.adapters, 1)
    }
    named |= {
        f"controlnet {at}": references.control_net(config, net)
        for at, net in enumerate(controlnets.of_model(config), 1)
    }
    if config.vae and config.vae != tiny_vaes.TINY:
        named["vae"] = references.find(config, "vae", config.vae, report)
    if config.clip_model:
        named["text_encoder"] = Path(path_or_id(config, config.clip_model)) / (config.clip_subfolder or "")
    return {name: footprint.of_part(path, name, dtype) for name, path in named.items() if isinstance(path, Path)}


def fetch(config: ModelConfig, described: Path, report: OnProgress) -> None:
    """Download all that the file names besides the model itself, so that loading needs no network.

    `described`: the folder with the configurations of its components.
    """
    config = tiny_vaes.resolve(config, diffusers_source.json_of(described / "vae" / "config.json"))
    for net in controlnets.of_model(config):
        _control_net_source(config, net)
    if config.preview_vae:
        component(config, config.preview_vae)
    if config.clip_model:
        component(config, config.clip_model, config.clip_subfolder or "")
    if config.original_config:
        original_config(config)
    if config.vae and isinstance(vae := references.find(config, "vae", config.vae, report), references.Repository):
        with hub_files.as_download_errors(addresses.redact(config.vae)):
            _fetch_vae(vae)
    for adapter in config.adapters:
        references.lora(config, adapter.source, report)


def component(config: ModelConfig, name: str, folder: str = "") -> Path:
    """Where the component that a file names is on this disk; of a hub id, what `from_pretrained` of this folder in it
    loads is downloaded if necessary. An unreachable hub is asked once, not for each file."""
    path = Path(path_or_id(config, name))
    if path.exists():
        return path
    with hub_files.as_download_errors(name):
        prefix = f"{folder}/" if folder else ""
        names = [each for each in hub_files.files_of(name, None) if each.rpartition("/")[0] == folder]
        plain = [each for each in names if _WEIGHTS.fullmatch(each.removeprefix(prefix))]
        safe = [each for each in plain if ".safetensors" in each]
        return Path(snapshot_download(name, allow_patterns=[f"{prefix}config.json", *(safe or plain)]))


def original_config(config: ModelConfig) -> Path:
    """The YAML that a single file was trained with, on this disk. Raises LoadError or DownloadError."""
    name = config.original_config or ""
    if re.match(r"https?://", name, re.IGNORECASE):
        url = sources.hub_page(name)
        target = weight_file.path_for(url, config.folder)
        return weight_file.fetch(url, target, sha256=None, report=lambda fraction, what: None)
    path = Path(path_or_id(config, name))
    if not path.is_file():
        raise LoadError(
            f"{config.name}: original_config_file: {name!r} does not exist; a path beside the model file, or a URL",
            param="diffusers.original_config_file",
        )
    return path


def path_or_id(config: ModelConfig, name: str) -> str:
    """A path relative to the model file when it exists, else the name as it is (a hub id)."""
    path = (config.folder / Path(name).expanduser()).resolve()
    return str(path) if path.exists() else name


def replace_vae(config: ModelConfig, pipeline: Any, dtype: torch.dtype, report: OnProgress) -> None:
    """Give the pipeline the VAE that the file names. Raises ModelFileError if that VAE does not fit its latents."""
    if not config.vae:
        return
    original, label = pipeline.vae, addresses.redact(config.vae)
    source = references.find(config, "vae", config.vae, report)
    if isinstance(source, Path) and source.is_file():
        vae = _vae_of_file(source, original, dtype)
    else:
        with hub_files.as_download_errors(label):
            vae = _vae_of_folder(_fetch_vae(source) if isinstance(source, references.Repository) else source, dtype)
    channels, model_channels = (getattr(each, "config", {}).get("latent_channels") for each in (vae, original))
    factors = [len(getattr(each, "config", {}).get("block_out_channels", ())) for each in (vae, original)]
    if channels != model_channels or factors[0] != factors[1]:
        raise ModelFileError(
            f"{config.name}: vae {label} decodes latents of {channels} channels in {factors[0]} levels; this model's "
            f"have {model_channels} in {factors[1]}. Take one made for it, or leave it out",
            param="vae",
        )
    if isinstance(vae, diffusers.AutoencoderTiny):
        tiny_vaes.refuse(config, type(pipeline).__name__)
    pipeline.register_modules(vae=vae)


def _vae_of_file(path: Path, layout: Any, dtype: torch.dtype) -> Any:
    """Load a VAE's weights into the class and configuration of `layout`, the model's own VAE."""
    with TemporaryDirectory() as folder, weight_file.in_lower_case(path) as file:
        (Path(folder) / "config.json").write_text(json.dumps({**layout.config, "_class_name": type(layout).__name__}))
        return type(layout).from_single_file(str(file), config=folder, dtype=dtype)


def _fetch_vae(repository: references.Repository) -> Path:
    """Download only the VAE of a repository, which may be the whole repository or its folder `vae`."""
    files = hub_files.files_of(repository.id, repository.revision)
    part = "vae/" if "vae/config.json" in files else ""
    weights = [file for file in files if re.fullmatch(rf"{part}diffusion_pytorch_model[^/]*\.safetensors", file)]
    plain = [file for file in weights if file.count(".") == 1]
    patterns = [f"{part}config.json", *(plain or weights)]
    return Path(snapshot_download(repository.id, revision=repository.revision, allow_patterns=patterns))


def _vae_of_folder(folder: Path, dtype: torch.dtype) -> Any:
    part = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    cls = getattr(diffusers, str(diffusers_source.json_of(part / "config.json").get("_class_name")), None)
    if cls is None:
        raise LoadError(f"{folder} has no VAE whose config.json names a class of diffusers; name a file", param="vae")
    files = [path.name for path in part.glob("diffusion_pytorch_model*")]
    variant = variants.pick([f"vae/{file}" for file in files], (None,))
    return cls.from_pretrained(part, variant=variant, use_safetensors=True, local_files_only=True, dtype=dtype)


def load_adapters(config: ModelConfig, pipeline: Any, report: OnProgress) -> tuple[Lora, ...]:
    """Load the file's LoRAs into the pipeline, each with its scale, and say which they are."""
    if not config.adapters:
        return ()
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelFileError(
            f"{config.name}: lora_adapter: {type(pipeline).__name__} takes no LoRA; leave it out", param="lora_adapter"
        )
    names, loras = [], []
    for index, adapter in enumerate(config.adapters):
        names.append(f"adapter_{index}")
        path = references.lora(config, adapter.source, report)
        source, digests = addresses.redact(adapter.source), lora_files.digests(path)
        loras.append(Lora(source, adapter.scale, None, str(path), *digests, default=index))
        with weight_file.in_lower_case(path) as file, _as_load_error(config, adapter.source, pipeline):
            pipeline.load_lora_weights(
                str(file.parent),
                weight_name=file.name,
                adapter_name=names[-1],
                use_safetensors=None if config.allow_pickle else True,
            )
            if not any(names[-1] in loaded for loaded in pipeline.get_list_adapters().values()):
                raise ValueError("none of its names is one of the model's")
    pipeline.set_adapters(names, [adapter.scale for adapter in config.adapters])
    return tuple(loras)


@contextmanager
def _as_load_error(config: ModelConfig, source: str, pipeline: Any) -> Iterator[None]:
    """Turn what diffusers and peft raise for a LoRA that does not fit this model into a LoadError."""
    try:
        yield
    except (ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise LoadError(
            f"{config.name}: the LoRA {addresses.redact(source)} has nothing for {type(pipeline).__name__} ({error}); "
            "it may be made for models of another kind",
            param="lora_adapter",
        ) from error
