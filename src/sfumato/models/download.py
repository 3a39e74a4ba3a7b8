"""Download weights on first use: from a hub, with diffusers' own selection of files, or from a plain URL.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` are huggingface_hub's and work as documented there.
"""

from __future__ import annotations

import functools
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
from huggingface_hub import errors as hub
from huggingface_hub import get_cached_repo_tree, snapshot_download
from safetensors import SafetensorError
from tqdm.auto import tqdm

from sfumato.errors import DownloadError, LoadError
from sfumato.models import repository_files, sources, weight_file
from sfumato.models.weight_file import OnProgress

log = logging.getLogger(__name__)

DESCRIPTION_FILES = ["*.json", "*/*.json", "*.txt", "*/*.txt", "*/*.model"]


def from_hub(
    repo: str, *, revision: str | None, variants: Sequence[str | None], pickles: bool, report: OnProgress
) -> Path:
    """The local snapshot folder of a repository; files missing from the cache are downloaded first.

    Takes the first of `variants` that the repository has. diffusers decides which files a pipeline
    needs. Raises DownloadError or LoadError with a readable message.
    """
    with words_for_hub_errors(repo):
        commit = _fetched(repo, revision, variants, pickles, report)
        # diffusers looks whether all is there by its own rule, fetches what is not, and refuses what it cannot load.
        complete = functools.partial(
            DiffusionPipeline.download, repo, revision=commit, use_safetensors=None if pickles else True
        )
        for variant in variants[:-1]:
            with suppress(ValueError):  # "no such modeling files are available"
                return Path(complete(variant=variant))
        return Path(complete(variant=variants[-1]))


def _fetched(repo: str, revision: str | None, variants: Sequence[str | None], pickles: bool, report: OnProgress) -> str:
    """Have the files in the cache that `needed` names, and tell of every byte. The commit they are of."""
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[sources.INDEX], tqdm_class=_Silent))
    index = folder / sources.INDEX
    try:
        names = [file.path for file in get_cached_repo_tree(repo, revision=folder.name)]
        files = repository_files.needed(names, json.loads(index.read_bytes()), variants, pickles=pickles)
    except (hub.CachedRepoTreeNotFoundError, FileNotFoundError):  # a cache of old, or no repository of diffusers
        return folder.name
    if files:
        bar = type("_Bar", (_ReportingBar,), {"report": staticmethod(report), "repo": repo})
        patterns = [glob.escape(name) for name in files]
        snapshot_download(repo, revision=folder.name, allow_patterns=patterns, tqdm_class=bar)
    return folder.name


def from_url(url: str, target: Path, *, sha256: str | None, report: OnProgress) -> Path:
    """Download a file once; it gets its name only when it is complete (and its hash is right)."""
    return weight_file.fetch(url, target, sha256=sha256, report=report)


def description_of(path: Path, model: str) -> Path:
    """The folder with the configurations and the tokenizer that belong to a single file.

    A single file contains only weights. diffusers identifies the matching repository from their names
    and shapes; its few small files are downloaded once.
    """
    try:
        checkpoint = single_file_utils.load_single_file_checkpoint(str(path), local_files_only=True)
    except (OSError, SafetensorError, ValueError) as error:
        raise LoadError(f"{path} cannot be read as weights ({_first_line(error)}); download it again") from error
    repo = single_file_utils.fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]
    with words_for_hub_errors(repo, f"{path.name} needs its small configuration files. Run `sfumato pull {model}`"):
        return Path(snapshot_download(repo, allow_patterns=DESCRIPTION_FILES))


DIFFUSERS = "(a diffusers repository has a model_index.json and safetensors weights)"

UNREACHABLE = (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, httpx2.TransportError)
"""The hub was not contacted, or did not answer."""


@contextmanager
def words_for_hub_errors(repo: str, remedy: str = "") -> Iterator[None]:
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
        if isinstance(error.__cause__, hub.HfHubHTTPError):  # it did answer
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
    why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else f"{endpoint} cannot be reached"
    return DownloadError(f"{repo} is not in the local cache and {why}. {remedy} once while online.")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class _Silent(tqdm):  # type: ignore[misc]
    """A tqdm that draws nothing; huggingface_hub makes one for files, two for bytes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._bytes = kwargs.get("unit") == "B"
        kwargs.pop("name", None)
        super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere()})


class _ReportingBar(_Silent):
    """Tells how many of the bytes are here."""

    report: OnProgress
    repo: str
    _logged = 0.0

    def update(self, n: float | None = 1) -> bool | None:
        shown: bool | None = super().update(n)
        if self._bytes and self.total:
            self.report(min(1.0, self.n / self.total), self.repo)
            if time.monotonic() - self._logged > 5:
                self._logged = time.monotonic()
                log.info("%s: %.0f of %.0f MB", self.repo, self.n / 1e6, self.total / 1e6)
        return shown


class _Nowhere:
    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass
