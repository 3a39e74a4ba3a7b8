"""All that a model file names, on this disk: downloaded, or found where it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from sfumato.checkpoints import (
    contents,
    dduf,
    download,
    folder_weights,
    hub_files,
    modular,
    pipeline_class,
    priors,
    references,
    sources,
    split,
    variants,
    weight_file,
)
from sfumato.config import ModelConfig, addresses
from sfumato.models import inspection, modular_load, weight_stamps
from sfumato.status import ModelStatus

OnStatus: TypeAlias = Callable[[ModelStatus], None]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Weights on this machine: a diffusers folder or a single file, and what to call them, without secrets."""

    path: Path
    label: str
    description: Path | None = None
    """For a single file: the folder with its configurations and tokenizer."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """For a model in several files: component -> its file; `description` has the others."""
    prior: Path | None = None
    """The folder of the prior that the model file names."""
    stamps: weight_stamps.Stamps = field(default_factory=dict)
    """Of all weight files, as they were before they were read."""


def fetch(
    config: ModelConfig,
    dtype: str,
    on_status: OnStatus,
    without: Sequence[str] = (),
    on_file: weight_file.OnProgress | None = None,
) -> Fetched:
    """Have everything the model needs on this disk. Raises DownloadError, LoadError or ModelFileError.

    `without`: of these components the configurations alone. `on_file`: told of each file of a repository.
    """
    source = sources.resolve(config)
    if isinstance(source, sources.HubRepository):
        on_status(ModelStatus("downloading", source.repo))
    inspection.refuse(config, source)  # what is known before anything is fetched

    def report(fraction: float | None, name: str) -> None:
        on_status(ModelStatus("downloading", name, fraction))

    for file in config.downloads:
        url = sources.download_url(file.uri)
        download.from_url(url, config.folder / file.filename, sha256=file.sha256, report=report)
    match source:
        case sources.HubRepository(repo, revision):
            index = inspection.inspect(config, source, ask=False).index
            if modular.is_one(pipeline_class.choose(config, index)):
                variant = functools.partial(variants.choose, config, dtype)
                folder = modular_load.fetch(config, repo, revision, index, variant, report, without)
                return Fetched(folder, f"{repo}@{folder.name}")
            folder = download.from_hub(
                repo,
                revision=revision,
                variant=variants.choose(config, dtype, hub_files.files_of(repo, revision)),
                pickles=config.allow_pickle,
                without=without,
                report=report,
                on_file=on_file,
            )
            folder_weights.refuse_damaged(folder, repo, pickles=config.allow_pickle, without=without)
            return Fetched(folder, f"{repo}@{folder.name}")
        case sources.Url(url):
            path = sources.weights(config, weight_file.obtain(url, config.folder, report=report))
            return _described(config, path, addresses.redact(url), dtype, on_status, on_file)
        case sources.File(path):
            return _described(config, path, str(path), dtype, on_status, on_file)
        case sources.Folder(path):
            folder_weights.refuse_damaged(path, str(path), pickles=config.allow_pickle, without=without)
            pinned = f"{config.repo}@{config.revision or 'main'}" if config.repo else str(path)
            index = pipeline_class.index_of(path)
            if modular.is_one(pipeline_class.choose(config, index)):
                modular_load.fetch_others(
                    config, path, index, functools.partial(variants.choose, config, dtype), report
                )
            return Fetched(path, pinned)


def fetch_prior(config: ModelConfig, dtype: str, on_status: OnStatus) -> Path | None:
    """The folder of the prior that the file names, downloaded if necessary; None if it names none."""
    if config.prior is None:
        return None
    match priors.source_of(config):
        case sources.Folder(path):
            return path
        case sources.HubRepository(repo, revision):
            return download.from_hub(
                repo,
                revision=revision,
                variant=variants.choose(config, dtype, hub_files.files_of(repo, revision)),
                pickles=config.allow_pickle,
                report=lambda fraction, name: on_status(ModelStatus("downloading", name, fraction)),
            )


def _described(
    config: ModelConfig,
    path: Path,
    label: str,
    dtype: str,
    on_status: OnStatus,
    on_file: weight_file.OnProgress | None,
) -> Fetched:
    """A single file with its configurations; a denoiser alone with the base that supplies the other components."""
    if path.suffix.lower() == sources.DDUF:
        return Fetched(dduf.unpacked(path), label)
    made_of = split.contents_of(path)
    if made_of:
        contents.refuse(made_of, label)
    if made_of is None or not made_of.needs_base:
        return Fetched(path, label, download.description_of(path, config.name))
    base = inspection.base(config, made_of)

    def report(fraction: float | None, name: str) -> None:
        on_status(ModelStatus("downloading", name, fraction))

    named = {name: references.file(config, "diffusers.text_encoders", name, report) for name in config.text_encoders}
    files = split.assign(config, path, named, base)
    supplied = fetch(base.config, dtype, on_status, tuple(files), on_file).path
    return Fetched(path, label, supplied, files)
