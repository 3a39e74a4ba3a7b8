"""Download weights on first use: from a hub, with diffusers' own selection of files, or from a plain URL.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` are huggingface_hub's and work as documented there.
"""

from __future__ import annotations

import glob
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils
from huggingface_hub import constants, get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub
from safetensors import SafetensorError

from sfumato.checkpoints import checked, descriptions, hub_files, repository_files, sources, weight_file
from sfumato.checkpoints.hub_files import UNREACHABLE, SilentBar, as_download_errors, files_of, redacted_line
from sfumato.checkpoints.weight_file import OnProgress
from sfumato.errors import DownloadError, LoadError

log = logging.getLogger(__name__)

constants.DOWNLOAD_CHUNK_SIZE = 2**18
"""huggingface_hub keeps whole chunks of what a broken connection brought; its own are of 10 MB."""
AT_ONCE = 4
"""Files of a repository that are downloaded at a time."""
DESCRIPTION_FILES = ["*.json", "*/*.json", "*.txt", "*/*.txt", "*/*.model"]


def from_hub(
    repo: str,
    *,
    revision: str | None,
    variant: str | None,
    pickles: bool,
    report: OnProgress,
    without: Sequence[str] = (),
    on_file: OnProgress | None = None,
) -> Path:
    """The local snapshot folder of a repository; files missing from the cache are downloaded first.

    diffusers' own rules say which files a pipeline needs. `without`: of these components only the configuration.
    `on_file` is told of each file's progress, in place of `report`, which is told of the sum.
    Raises DownloadError or LoadError with a readable message.
    """
    with as_download_errors(repo):
        commit = _fetch_files(repo, revision, variant, pickles, without, report, on_file)
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
        _check(repo, folder)
        return folder


def parts_from_hub(
    repo: str, *, revision: str | None, folders: Sequence[str], variant: str | None, pickles: bool, report: OnProgress
) -> Path:
    """The local snapshot folder of a repository with the weights and configurations in these folders.

    Raises DownloadError or LoadError with a readable message.
    """
    with as_download_errors(repo):
        inside = tuple(f"{folder}/" for folder in folders if folder)
        names = [name for name in files_of(repo, revision) if "/" not in name or name.startswith(inside)]
        files = repository_files.needed(names, {folder: ["", ""] for folder in folders}, variant, pickles=pickles)
        if not files:
            raise LoadError(f"{repo}: {', '.join(folders)}: there are no safetensors weights that can be loaded")
        patterns = [glob.escape(name) for name in (*files, *sources.INDEXES)]
        bar = _bar(report, repo)
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, tqdm_class=bar))
        _check(repo, folder)
        return folder


def _bar(report: OnProgress, repo: str) -> type[_ReportingBar]:
    return type("_Bar", (_ReportingBar,), {"report": staticmethod(report), "repo": repo})


def _check(repo: str, folder: Path) -> None:
    """Compare the files of a snapshot with the hub's checksums; what is damaged is downloaded once more."""
    if not (damaged := checked.damaged(folder.rglob("*"))):
        return
    names = [path.relative_to(folder).as_posix() for path in damaged]
    checked.discard(damaged)
    for name in names:
        hf_hub_download(repo, name, revision=folder.name)
    if still := checked.damaged(folder / name for name in names):
        checked.discard(still)
        raise DownloadError(
            f"{repo}: {still[0].relative_to(folder).as_posix()} does not have the sha256 that the hub gives for it. It "
            "was downloaded twice and not kept; try again later, or tell its authors"
        )


def _fetch_files(
    repo: str,
    revision: str | None,
    variant: str | None,
    pickles: bool,
    without: Sequence[str],
    report: OnProgress,
    on_file: OnProgress | None = None,
) -> str:
    """Download the files that `needed` names into the cache, with progress in bytes. Returns their commit."""
    path = hub_files.index_path(repo, revision)
    folder = path.parent
    try:
        left_out = tuple(f"{part}/" for part in without)
        tree = get_cached_repo_tree(repo, revision=folder.name)
        names = [file.path for file in tree if not file.path.startswith(left_out)]
        index = json.loads(path.read_bytes())
        files = repository_files.needed(names, index, variant, pickles=pickles)
    except (hub.CachedRepoTreeNotFoundError, FileNotFoundError):  # an old cache, or not a diffusers repository
        return folder.name
    if files and on_file:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            tuple(threads.map(partial(_fetch_file, repo, folder.name, on_file), files))
    elif files:
        patterns = [glob.escape(name) for name in files]
        snapshot_download(repo, revision=folder.name, allow_patterns=patterns, tqdm_class=_bar(report, repo))
    return folder.name


def _fetch_file(repo: str, commit: str, on_file: OnProgress, name: str) -> None:
    bar = type("_Bar", (_ReportingBar,), {"report": staticmethod(on_file), "repo": f"{repo}/{name}"})
    hf_hub_download(repo, name, revision=commit, tqdm_class=bar)
    on_file(1.0, f"{repo}/{name}")


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
        raise LoadError(f"{path} cannot be read as weights ({redacted_line(error)}); download it again") from error
    repo = single_file_utils.fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]
    shipped = descriptions.of(repo)
    with as_download_errors(repo, f"{path.name} needs its small configuration files. Run `sfumato pull {model}`"):
        try:
            return Path(snapshot_download(repo, allow_patterns=DESCRIPTION_FILES, tqdm_class=SilentBar))
        except (*UNREACHABLE, hub.HfHubHTTPError) as error:
            if shipped is None:
                raise
            log.info("%s: %s cannot be asked (%s); what Sfumato knows of it is used", path, repo, type(error).__name__)
            return shipped


class _ReportingBar(SilentBar):
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
