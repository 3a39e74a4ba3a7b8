"""Ask a hub for the small files of a repository, and say in words what went wrong with it. Without torch.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` are huggingface_hub's and work as documented there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import errors as hub
from tqdm.auto import tqdm

from sfumato.checkpoints import diffusers_source, sources
from sfumato.config import addresses
from sfumato.errors import DownloadError, LoadError, first_line

MAX_RETRY_AFTER_S = 3600
DESCRIPTIONS = [*sources.INDEXES, "*/config.json", "scheduler/scheduler_config.json"]
"""What tells of components without their weights."""


def index_path(repo: str, revision: str | None) -> Path:
    """Where the index of the snapshot is, if it has one. Asks the hub once, and then takes the cache."""
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*sources.INDEXES], tqdm_class=SilentBar))
    return folder / next((name for name in sources.INDEXES if (folder / name).is_file()), sources.INDEX)


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
        # Without patterns it raises unless the whole repository is there.
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[], local_files_only=True))
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return []


def index_of(repo: str, revision: str | None) -> dict[str, Any]:
    """A repository's `model_index.json` or modular one, downloaded if necessary; empty if it has none."""
    with as_download_errors(repo):
        return diffusers_source.json_of(index_path(repo, revision))


def bases_of(repo: str) -> list[str]:
    """The repositories that a repository's card says it was made from; empty if the hub cannot be asked."""
    try:
        with as_download_errors(repo):
            card = HfApi().model_info(repo).card_data
    except LoadError:
        return []
    bases = card.get("base_model") if card else None
    return [base for base in (bases if isinstance(bases, list) else [bases]) if isinstance(base, str)]


def described(repo: str, revision: str | None) -> Path:
    """A snapshot with the configurations of a repository's components, downloaded if necessary."""
    with as_download_errors(repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=DESCRIPTIONS, tqdm_class=SilentBar))


DIFFUSERS = "(a diffusers repository has a model_index.json and safetensors weights)"
NAMED = 4
"""Weight files that an error names at most."""

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
            if refusal := refused(repo, endpoint, error.__cause__.response):
                raise refusal from error
            raise DownloadError(
                f"{repo} could not be fetched from {endpoint}: {redacted_line(error.__cause__)}"
            ) from error
        raise _unreachable(repo, endpoint, remedy) from error
    except hub.RemoteEntryNotFoundError as error:
        raise _no_layout(repo, error) from error
    except (hub.HfHubHTTPError, httpx2.HTTPError) as error:  # httpx2 is huggingface_hub's HTTP client
        if isinstance(error, hub.HfHubHTTPError) and (refusal := refused(repo, endpoint, error.response)):
            raise refusal from error
        raise DownloadError(f"{repo} could not be fetched from {endpoint}: {redacted_line(error)}") from error
    except OSError as error:
        if isinstance(error.__cause__, UNREACHABLE):  # diffusers looked into its cache first and found nothing
            raise _unreachable(repo, endpoint, remedy) from error
        if not isinstance(error.__cause__, hub.EntryNotFoundError) and error.errno is not None:
            raise DownloadError(f"{repo} could not be written to the cache: {error}") from error
        if "Consistency check" in str(error):
            raise DownloadError(
                f"{repo} came damaged from {endpoint}, and was not kept: {redacted_line(error)}"
            ) from error
        raise _no_layout(repo, error) from error


def refused(repo: str, endpoint: str, response: httpx2.Response | None) -> LoadError | None:
    """The error for an answer that says more than that it failed; None for others."""
    status = response.status_code if response is not None else None
    if response is not None and status == httpx2.codes.TOO_MANY_REQUESTS:
        wait = response.headers.get("retry-after", "")
        seconds = min(int(wait), MAX_RETRY_AFTER_S) if wait.isdigit() else None
        when = f"in {seconds} s" if seconds else "later"
        return DownloadError(
            f"{repo} could not be fetched: {endpoint} is asked too often (429). Try again {when}; with HF_TOKEN set it "
            "allows more"
        ).after(seconds)
    if status in (httpx2.codes.UNAUTHORIZED, httpx2.codes.FORBIDDEN):
        return LoadError(
            f"{repo} could not be fetched: {endpoint} answers {status}. It is gated or private, or HF_TOKEN is not "
            "valid: accept its licence there, and set HF_TOKEN to a token of that account"
        )
    if status == httpx2.codes.NOT_FOUND:
        return LoadError(f"{repo} could not be fetched: {endpoint} answers 404. Check the spelling and the revision")
    return None


def _no_layout(repo: str, error: Exception) -> LoadError:
    """The error for a repository without what diffusers looks for: which weight files it has instead."""
    files: list[str] = []
    with suppress(LoadError):
        files = files_of(repo, None)
    weights = [name for name in files if "/" not in name and name.endswith(sources.TENSORS)]
    if not weights or not set(files).isdisjoint(sources.INDEXES):
        return LoadError(f"{repo} cannot be loaded by diffusers: {redacted_line(error)} {DIFFUSERS}")
    listed = ", ".join(weights[:NAMED]) + (f" and {len(weights) - NAMED} more" if len(weights) > NAMED else "")
    return LoadError(
        f"{repo} has no {sources.INDEX}, so it is no repository in diffusers' layout. It has {listed}: name "
        f"one of them, as parameters.model: huggingface://{repo}/{weights[0]}, or another repository with these "
        "weights in that layout"
    )


def _unreachable(repo: str, endpoint: str, remedy: str) -> DownloadError:
    reason = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else f"{endpoint} cannot be reached"
    return DownloadError(f"{repo} is not in the local cache and {reason}. {remedy} once while online.")


def redacted_line(error: BaseException) -> str:
    """`first_line` without what is secret in its URLs: those that a hub answers with are signed."""
    return addresses.redact(first_line(error))


class SilentBar(tqdm):  # type: ignore[misc]
    """A progress bar without output; huggingface_hub creates one for files and two for bytes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._bytes = kwargs.get("unit") == "B"
        kwargs.pop("name", None)
        super().__init__(*args, **{**kwargs, "disable": False, "file": _NullFile()})


class _NullFile:
    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass
