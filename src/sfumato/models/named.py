"""What a key names besides the model itself (a LoRA, a VAE ...): a path, a repository, a file of one, or a URL."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download

from sfumato.config import ModelConfig, addresses
from sfumato.errors import LoadError
from sfumato.models import download, sources, weight_file
from sfumato.models.weight_file import OnProgress

LORA = "pytorch_lora_weights.safetensors"
"""What diffusers calls the weights of a LoRA."""

OTHERS = ("scheduler", "optimizer", "checkpoint")
"""Words in the names of files that hold a state of training."""

_OF_REPOSITORY = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/@]+))?/(?P<path>[^@]+)(?:@(?P<branch>[^@]+))?")


@dataclass(frozen=True, slots=True)
class Repository:
    """Of which nobody has said which file is meant."""

    id: str
    revision: str | None


def find(config: ModelConfig, key: str, name: str, report: OnProgress) -> Path | Repository:
    """A file or folder on this disk, fetched where it was not here, or a hub repository.

    `key` is what it stands under in the model file. Raises ModelFileError, LoadError or DownloadError in words.
    """
    path = (config.folder / os.path.expanduser(name)).resolve()  # noqa: PTH111
    if path.exists():
        return sources.weights(config, path, key) if path.is_file() else path
    plain = re.sub(r"^(huggingface|hf):/{0,2}", "", name, flags=re.IGNORECASE)
    if re.match(r"https?://", name, re.IGNORECASE):
        return sources.weights(config, weight_file.obtain(sources.hub_page(name), config.folder, report=report), key)
    if (match := _OF_REPOSITORY.fullmatch(plain)) and PurePosixPath(match["path"]).suffix:
        sources.weights(config, PurePosixPath(match["path"]), key)
        with download.words_for_hub_errors(match["repo"], _pull(config)):
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


def lora(config: ModelConfig, name: str, report: OnProgress) -> Path:
    """The file with the weights of a LoRA."""
    found = find(config, "lora_adapter", name, report)
    if isinstance(found, Repository):
        with download.words_for_hub_errors(found.id, _pull(config)):
            file = _lora_of(config, name, download.files_of(found.id, found.revision))
            return Path(hf_hub_download(found.id, file, revision=found.revision))
    if found.is_dir():
        return found / _lora_of(config, name, [path.name for path in found.iterdir()])
    return found


def _lora_of(config: ModelConfig, name: str, files: list[str]) -> str:
    """diffusers' own choice, which it makes with a network alone."""
    kinds = (".safetensors", ".bin") if config.allow_pickle else (".safetensors",)
    known = [file for kind in kinds for file in sorted(files) if file.lower().endswith(kind)]
    likely = [file for file in known if not any(word in file for word in OTHERS)]
    for file in (*(each for each in likely if each.endswith(LORA)), *likely):
        return file
    raise LoadError(
        f"{config.name}: lora_adapter: {addresses.redact(name)!r} has no {kinds[0]} file. Name one: owner/name/file",
        param="lora_adapter",
    )


def _pull(config: ModelConfig) -> str:
    return f"Run `sfumato pull {config.name}`"
