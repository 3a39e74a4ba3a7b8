"""What other keys of a model file name (a LoRA, a VAE ...): a path, a hub repository, a file in one, or a URL."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download

from sfumato.checkpoints import controlnets, hub_files, sources, weight_file
from sfumato.checkpoints.weight_file import OnProgress
from sfumato.config import ModelConfig, addresses
from sfumato.errors import LoadError

LORA = "pytorch_lora_weights.safetensors"
"""diffusers' name for the file with a LoRA's weights."""

OTHERS = ("scheduler", "optimizer", "checkpoint")
"""Words in the names of files with training state."""

_OF_REPOSITORY = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/@]+))?/(?P<path>[^@]+)(?:@(?P<branch>[^@]+))?")


@dataclass(frozen=True, slots=True)
class Repository:
    """A hub repository, without the name of a file in it."""

    id: str
    revision: str | None


def find(config: ModelConfig, key: str, name: str, report: OnProgress) -> Path | Repository:
    """A file or folder on this disk, downloaded if necessary, or a hub repository.

    `key` is the model file's key. Raises ModelFileError, LoadError or DownloadError with a readable message.
    """
    path = (config.folder / os.path.expanduser(name)).resolve()  # noqa: PTH111
    if path.exists():
        return sources.weights(config, path, key) if path.is_file() else path
    plain = re.sub(r"^(huggingface|hf):/{0,2}", "", name, flags=re.IGNORECASE)
    if re.match(r"https?://", name, re.IGNORECASE):
        return sources.weights(config, weight_file.obtain(sources.hub_page(name), config.folder, report=report), key)
    if (match := _OF_REPOSITORY.fullmatch(plain)) and PurePosixPath(match["path"]).suffix:
        sources.weights(config, PurePosixPath(match["path"]), key)
        with hub_files.as_download_errors(match["repo"], _pull(config)):
            revision = match["revision"] or match["branch"]
            return Path(hf_hub_download(match["repo"], match["path"], revision=revision))
    repo, _, revision = plain.partition("@")
    if repo.count("/") != 1 or PurePosixPath(repo).suffix.lower() in sources.SAFE + sources.PICKLES:
        raise LoadError(
            f"{config.name}: {key}: {addresses.redact(name)!r} is neither there ({path} does not exist) nor a hub id "
            "(owner/name), a file of a repository (owner/name/file.safetensors) or a URL",
            param=key,
        )
    return Repository(repo, revision or None)


def file(config: ModelConfig, key: str, name: str, report: OnProgress) -> Path:
    """A single weight file, downloaded if necessary. Raises what `find` raises, and LoadError for anything else."""
    found = find(config, key, name, report)
    if isinstance(found, Path) and found.is_file():
        return found
    raise LoadError(
        f"{config.name}: {key}: {addresses.redact(name)!r} is no file; name one: a path, owner/name/file.safetensors "
        "or a URL",
        param=key,
    )


def control_net(config: ModelConfig, name: str) -> Path | Repository:
    """A ControlNet of the model file: a path, one of `controlnets/` beside it, or what else `find` finds."""
    key, here = "diffusers.control_net", controlnets.here(config, name)
    return here or find(config, key, name, lambda fraction, what: None)


def lora(config: ModelConfig, name: str, report: OnProgress) -> Path:
    """The file with the weights of a LoRA."""
    source = find(config, "lora_adapter", name, report)
    if isinstance(source, Repository):
        with hub_files.as_download_errors(source.id, _pull(config)):
            file = _lora_of(config, name, hub_files.files_of(source.id, source.revision))
            return Path(hf_hub_download(source.id, file, revision=source.revision))
    if source.is_dir():
        return source / _lora_of(config, name, [path.name for path in source.iterdir()])
    return source


def _lora_of(config: ModelConfig, name: str, files: list[str]) -> str:
    """Choose a file as diffusers does; diffusers itself would need the network for it."""
    kinds = (".safetensors", ".bin") if config.allow_pickle else (".safetensors",)
    candidates = [file for kind in kinds for file in sorted(files) if file.lower().endswith(kind)]
    likely = [file for file in candidates if not any(word in file for word in OTHERS)]
    for file in (*(each for each in likely if each.endswith(LORA)), *likely):
        return file
    raise LoadError(
        f"{config.name}: lora_adapter: {addresses.redact(name)!r} has no {kinds[0]} file. Name one: owner/name/file",
        param="lora_adapter",
    )


def _pull(config: ModelConfig) -> str:
    return f"Run `sfumato pull {config.name}`"
