"""Download weights on first use: from a hub, with diffusers' own selection of files, or from a plain URL.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` are huggingface_hub's and work as documented there.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils
from huggingface_hub import HfApi, get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from tqdm.auto import tqdm

from sfumato.errors import DownloadError, LoadError
from sfumato.models import descriptions, diffusers_source, repository_files, sources, weight_file
from sfumato.models.weight_file import OnProgress

log = logging.getLogger(__name__)

DESCRIPTION_FILES = ["*.json", "*/*.json", "*.txt", "*/*.txt", "*/*.model"]


def from_hub(
    repo: str,
    *,
    revision: str | None,
    variant: str | None,
    pickles: bool,
    report: OnProgress,
    without: Sequence[str] = (),
) -> Path:
    """The local snapshot folder of a repository; files missing from the cache are downloaded first.

    diffusers' own rules say which files a pipeline needs. `without`: of these components only the configuration.
    Raises DownloadError or LoadError with a readable message.
    """
    with as_download_errors(repo):
        commit = _fetch_files(repo, revision, variant, pickles, without, report)
        # diffusers checks by its own rules that all files are there, downloads missing ones, and refuses others.
        folder = Path(
            DiffusionPipeline.download(
                repo,
                revision=commit,
                variant=variant,
                use_safetensors=None if pickles else True,
                **dict.fromkeys(without),
            )
        )
        for part in without:
            with suppress(hub.EntryNotFoundError):
                hf_hub_download(repo, f"{part}/config.json", revision=commit)
        return folder


def _fetch_files(
    repo: str, revision: str | None, variant: str | None, pickles: bool, without: Sequence[str], report: OnProgress
) -> str:
    """Download the files that `needed` names into the cache, with progress in bytes. Returns their commit."""
    path = _index(repo, revision)
    folder = path.parent
    try:
        left_out = tuple(f"{part}/" for part in without)
        tree = get_cached_repo_tree(repo, revision=folder.name)
        names = [file.path for file in tree if not file.path.startswith(left_out)]
        index = json.loads(path.read_bytes())
        files = repository_files.needed(names, index, variant, pickles=pickles)
    except (hub.CachedRepoTreeNotFoundError, FileNotFoundError):  # an old cache, or not a diffusers repository
        return folder.name
    if files:
        bar = type("_Bar", (_ReportingBar,), {"report": staticmethod(report), "repo": repo})
        patterns = [glob.escape(name) for name in files]
        snapshot_download(repo, revision=folder.name, allow_patterns=patterns, tqdm_class=bar)
    return folder.name


def _index(repo: str, revision: str | None) -> Path:
    """Where the `model_index.json` of the snapshot is, if it has one. Asks the hub once, and then takes the cache."""
    folder = snapshot_download(repo, revision=revision, allow_patterns=[sources.INDEX], tqdm_class=_SilentBar)
    return Path(folder) / sources.INDEX


def files_of(repo: str, revision: str | None) -> list[str]:
    """Paths in a repository on the hub or, if that is unreachable, in the cache; empty if it is in neither."""
    with as_download_errors(repo):
        try:
            # Not `list_repo_files`, which asks an unreachable hub for 23 seconds.
            return [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()]
        except UNREACHABLE:
            pass
        except hub.HfHubHTTPError as error:
            if error.response is not None and error.response.status_code < httpx2.codes.INTERNAL_SERVER_ERROR:
                raise
    with suppress(hub.LocalEntryNotFoundError):
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return []


def index_of(repo: str, revision: str | None) -> dict[str, Any]:
    """A repository's `model_index.json`, downloaded if necessary; empty if it has none."""
    with as_download_errors(repo):
        return diffusers_source.json_of(_index(repo, revision))


def from_url(url: str, target: Path, *, sha256: str | None, report: OnProgress) -> Path:
    """Download a file once; it gets its name only when it is complete (and its hash is right)."""
    return weight_file.fetch(url, target, sha256=sha256, report=report)


def description_of(path: Path, model: str) -> Path:
    """The folder with the configurations and the tokenizer that belong to a single file.

    A single file contains only weights. diffusers identifies the matching repository from their names
    and shapes; its few small files are downloaded once.
    """
    try:
        with weight_file.in_lower_case(path) as file:
            checkpoint = single_file_utils.load_single_file_checkpoint(str(file), local_files_only=True)
    except (OSError, SafetensorError, ValueError) as error:
        raise LoadError(f"{path} cannot be read as weights ({_first_line(error)}); download it again") from error
    repo = single_file_utils.fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]
    shipped = descriptions.of(repo)
    with as_download_errors(repo, f"{path.name} needs its small configuration files. Run `sfumato pull {model}`"):
        try:
            return Path(snapshot_download(repo, allow_patterns=DESCRIPTION_FILES))
        except (*UNREACHABLE, hub.HfHubHTTPError) as error:
            if shipped is None:
                raise
            log.info("%s: %s cannot be asked (%s); what Sfumato knows of it is used", path, repo, type(error).__name__)
            return shipped


DIFFUSERS = "(a diffusers repository has a model_index.json and safetensors weights)"

UNREACHABLE = (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, httpx2.TransportError)
"""The hub was not contacted, or did not answer."""


@contextmanager
def as_download_errors(repo: str, remedy: str = "") -> Iterator[None]:
    """Turn what huggingface_hub and diffusers raise while downloading `repo` into errors with a remedy."""
    remedy = remedy or f"Run `sfumato pull {repo}`"
    endpoint = os.environ.get("HF_ENDPOINT", "the hub")
    try:
        yield
    except hub.GatedRepoError as error:
        raise LoadError(
            f"{repo} is gated: accept its licence on {endpoint} and set HF_TOKEN to a token of that account."
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise LoadError(
            f"{repo} is not on {endpoint}, or it is private. Check the spelling of parameters.model; "
            "for a private repository set HF_TOKEN."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise LoadError(f"{repo} has no such revision: {error}") from error
    except UNREACHABLE as error:
        if isinstance(error.__cause__, hub.HfHubHTTPError):  # the hub did answer
            raise DownloadError(
                f"{repo} could not be fetched from {endpoint}: {_first_line(error.__cause__)}"
            ) from error
        raise _unreachable(repo, endpoint, remedy) from error
    except hub.RemoteEntryNotFoundError as error:
        raise LoadError(f"{repo} cannot be loaded by diffusers: {_first_line(error)} {DIFFUSERS}") from error
    except (hub.HfHubHTTPError, httpx2.HTTPError) as error:  # httpx2 is huggingface_hub's HTTP client
        raise DownloadError(f"{repo} could not be fetched from {endpoint}: {_first_line(error)}") from error
    except OSError as error:
        if isinstance(error.__cause__, UNREACHABLE):  # diffusers looked into its cache first and found nothing
            raise _unreachable(repo, endpoint, remedy) from error
        if not isinstance(error.__cause__, hub.EntryNotFoundError) and error.errno is not None:
            raise DownloadError(f"{repo} could not be written to the cache: {error}") from error
        raise LoadError(f"{repo} cannot be loaded by diffusers: {_first_line(error)} {DIFFUSERS}") from error


def _unreachable(repo: str, endpoint: str, remedy: str) -> DownloadError:
    reason = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else f"{endpoint} cannot be reached"
    return DownloadError(f"{repo} is not in the local cache and {reason}. {remedy} once while online.")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class _SilentBar(tqdm):  # type: ignore[misc]
    """A progress bar without output; huggingface_hub creates one for files and two for bytes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._bytes = kwargs.get("unit") == "B"
        kwargs.pop("name", None)
        super().__init__(*args, **{**kwargs, "disable": False, "file": _NullFile()})


class _ReportingBar(_SilentBar):
    """Reports the downloaded fraction of the bytes."""

    report: OnProgress
    repo: str
    _logged = 0.0

    def update(self, n: float | None = 1) -> bool | None:
        displayed: bool | None = super().update(n)
        if self._bytes and self.total:
            self.report(min(1.0, self.n / self.total), self.repo)
            if time.monotonic() - self._logged > 5:
                self._logged = time.monotonic()
                log.info("%s: %.0f of %.0f MB", self.repo, self.n / 1e6, self.total / 1e6)
        return displayed


class _NullFile:
    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass
