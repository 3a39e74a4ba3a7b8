"""Files on the hub that a request names: within a size, and without a long wait for a hub that is not reached.

`hf_hub_download` asks an unreachable hub for 23 seconds before it says so; here it is asked once.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Sequence
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as hub

from sfumato.checkpoints.hub_files import UNREACHABLE, SilentBar, as_download_errors, files_of
from sfumato.checkpoints.remote_limits import Limits
from sfumato.errors import LoadError

TIMEOUT_S = 10.0
"""For the hub to say which files there are."""

SHOWN = 8
"""Files that a message names."""


def fetch(repo: str, revision: str | None, names: Sequence[str], limits: Limits, remedy: str = "") -> Path:
    """The snapshot of a repository with these files, downloaded if necessary.

    Raises TooLarge before anything is downloaded, LoadError for a file that is not there, and DownloadError.
    """
    patterns = [glob.escape(name) for name in names]
    with as_download_errors(repo, remedy):
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
        except (*UNREACHABLE, hub.HfHubHTTPError) as error:
            status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else None
            if status is not None and status < httpx2.codes.INTERNAL_SERVER_ERROR:
                raise
            try:
                folder = snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True)
                return _complete(Path(folder), names)
            except hub.LocalEntryNotFoundError:
                raise error from None
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if missing := [name for name in names if name not in sizes]:
            raise LoadError(f"{repo} has no {missing[0]}{_alike(missing[0], sizes)}")
        here = [name for name in names if isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str)]
        limits.check_size(
            f"{repo}/{names[0]}" if len(names) == 1 else repo, sum(sizes[name] for name in {*names} - {*here})
        )
        folder = snapshot_download(repo, revision=revision, allow_patterns=patterns, tqdm_class=_bar(repo, limits))
        return _complete(Path(folder), names)


def names(repo: str, revision: str | None, remedy: str = "") -> list[str]:
    """The files of a repository. Raises DownloadError if the hub is not reached and none is here."""
    with as_download_errors(repo, remedy):
        if there := files_of(repo, revision):
            return there
        snapshot_download(repo, revision=revision, allow_patterns=["*.json"])  # this says why
    return []


def _bar(repo: str, limits: Limits) -> type[SilentBar]:
    class Bar(SilentBar):
        """Ends the download if more comes than the hub has told."""

        def update(self, n: float | None = 1) -> bool | None:
            displayed: bool | None = super().update(n)
            if self._bytes:
                limits.check_size(repo, int(self.n))
            return displayed

    return Bar


def _complete(folder: Path, names: Sequence[str]) -> Path:
    if gone := [name for name in names if not (folder / name).is_file()]:
        raise hub.LocalEntryNotFoundError(f"{gone[0]} is not in the cache")
    return folder


def _alike(name: str, there: Collection[str]) -> str:
    same = sorted(each for each in there if Path(each).suffix == Path(name).suffix)[:SHOWN]
    return f"; it has {', '.join(same)}" if same else ""
