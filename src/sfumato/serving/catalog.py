"""The models that requests can name: from the model files in some folders, reread when they change."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from sfumato.config import Broken, ModelConfig, ParsedFile, Redirect, Skipped, outcomes
from sfumato.config.parse import config_for
from sfumato.errors import ModelFileError, ModelNotFound, did_you_mean
from sfumato.settings import Settings

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent.parent / "models"
"""The folder with the model that comes with Sfumato."""

Signature: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """An error in a model file."""

    file: Path
    message: str

    def __str__(self) -> str:
        return self.message


class Catalog:
    """Models by name and alias. If two folders have the same name, the earlier folder silently wins. An alias with `*`
    is for every name that no other is.

    `refresh` checks the files' dates and sizes and reads what changed, so a new, edited or removed
    file needs no restart. An invalid file affects only its own models; one that could not be read is retried.
    """

    def __init__(self, folders: Sequence[Path], *, default: str | None = None, open: bool = False) -> None:
        """`folders` in order of precedence. `open`: hub ids, paths and URLs are valid names too."""
        self._folders = tuple(folders)
        self._default = default or None
        self._open = open
        self._parsed: dict[Path, tuple[Signature, list[ParsedFile]]] = {}
        self._models: list[ModelConfig] = []
        self._names: dict[str, ModelConfig | ModelFileError] = {}
        self._patterns: dict[str, ModelConfig] = {}
        """Aliases with `*`, in order of precedence."""
        self._problems: list[Problem] = []
        self.refresh()

    @classmethod
    def of(cls, settings: Settings, *, open: bool = False) -> Catalog:
        """The user's models, then the built-in ones."""
        return cls([settings.models, EMBEDDED], default=settings.default_model, open=open)

    def refresh(self) -> None:
        """Read files that changed since the last time."""
        current = {path: signature for folder in self._folders for path, signature in _files(folder)}
        if list(current.items()) == [(path, signature) for path, (signature, _) in self._parsed.items()] and not any(
            _unread(parsed) for _, parsed in self._parsed.values()
        ):
            return
        before, self._parsed = self._parsed, {}
        for path, signature in current.items():
            previous = before.get(path)
            if previous and previous[0] == signature and not _unread(previous[1]):
                self._parsed[path] = previous
            else:
                self._parsed[path] = signature, [self._placed(outcome) for outcome in outcomes(path)]
                _warn(self._parsed[path][1])
        self._index()

    def get(self, name: str | None) -> ModelConfig:
        """The model of a name or alias; for None the default model.

        Raises ModelNotFound, and ModelFileError if the file with this name has an error.
        """
        name = name or self._default or self._first()
        config = self._names.get(name)
        if isinstance(config, ModelFileError):
            raise config
        if config is None and self._open and _is_source(name):
            return config_for(name)
        config = config or next((each for alias, each in self._patterns.items() if _fits(name, alias)), None)
        if config is None:
            names = ", ".join(config.name for config in self.all()) or "none"
            short_name = name if len(name) <= 100 else name[:100] + "..."
            raise ModelNotFound(
                f"There is no model {short_name!r}.{did_you_mean(name, self._names)} Available: {names}.", param="model"
            )
        if config.disabled:
            raise ModelNotFound(
                f"The model {config.name!r} is disabled. Remove `disabled: true` from {config.file_name}.",
                param="model",
            )
        return config

    def all(self) -> list[ModelConfig]:
        """Every usable model once, in order of precedence."""
        return [config for config in self._models if not config.disabled]

    def problems(self) -> list[Problem]:
        """All errors, in the files' order."""
        return list(self._problems)

    def outcomes(self) -> dict[Path, list[ParsedFile]]:
        """Every file with its models, including those hidden by another file with the same name."""
        return {path: list(parsed) for path, (_, parsed) in self._parsed.items()}

    def _placed(self, outcome: ParsedFile) -> ParsedFile:
        """The built-in model finds LoRAs, ControlNets and embeddings where the user's models do."""
        home = self._folders[0]
        if not isinstance(outcome, ModelConfig) or outcome.folder != EMBEDDED or home == EMBEDDED:
            return outcome
        return replace(outcome, folder=home if home.is_dir() else home.parent, model=str(EMBEDDED / outcome.model))

    def _first(self) -> str:
        for config in self.all():
            return config.name
        raise ModelNotFound(
            f"There is no model yet. Put a model file into {self._folders[0] if self._folders else 'models'}.",
            param="model",
        )

    def _index(self) -> None:
        """Register names, then names in invalid files, then aliases, folder by folder; earlier folders win."""
        self._models, self._names, self._patterns, self._problems = [], {}, {}, []
        for folder in self._folders:
            in_folder = [
                outcome
                for path, (_, parsed) in self._parsed.items()
                if path == folder or path.parent == folder
                for outcome in parsed
            ]
            owners: dict[str, Path] = {}
            for outcome in in_folder:
                self._claim_name(outcome, owners)
            for broken in (outcome for outcome in in_folder if isinstance(outcome, Broken)):
                for name in broken.names:
                    self._names.setdefault(name, broken.error)
            for outcome in in_folder:
                self._claim_aliases(outcome, owners)
        for outcome in (outcome for _, parsed in self._parsed.values() for outcome in parsed):
            if isinstance(outcome, Redirect):
                self._redirect(outcome)

    def _claim_name(self, outcome: ParsedFile, owners: dict[str, Path]) -> None:
        match outcome:
            case Broken(_, file, error):
                self._problems.append(Problem(file, error.message))
            case ModelConfig(name=name, file=Path() as file):
                if name in owners:
                    also = f"{name!r} is also in {owners[name]}, which wins; rename one"
                    self._problems.append(Problem(file, f"{file}: name: {also}"))
                elif name not in self._names:
                    owners[name] = file
                    self._names[name] = outcome
                    self._models.append(outcome)

    def _claim_aliases(self, outcome: ParsedFile, owners: dict[str, Path]) -> None:
        if not isinstance(outcome, ModelConfig) or outcome.file is None or outcome not in self._models:
            return
        for alias in outcome.aliases:
            owner = owners.get(alias)
            if owner not in (None, outcome.file):
                self._problems.append(
                    Problem(outcome.file, f"{outcome.file}: alias: {alias!r} is also in {owner}, which wins")
                )
            taken = self._patterns if "*" in alias else self._names
            if alias not in taken:
                owners[alias] = outcome.file
                taken[alias] = outcome

    def _redirect(self, redirect: Redirect) -> None:
        target = self._names.get(redirect.target)
        if isinstance(target, ModelConfig):
            self._names.setdefault(redirect.name, target)
            return
        error = ModelFileError(
            f"{redirect.file}: alias: {redirect.name!r} points to {redirect.target!r}, but there is no such model."
            f"{did_you_mean(redirect.target, [config.name for config in self._models])}",
            param="alias",
        )
        self._problems.append(Problem(redirect.file, error.message))
        self._names.setdefault(redirect.name, error)


def _fits(name: str, alias: str) -> bool:
    """Whether an alias is for this name: each `*` in it stands for any text."""
    return bool(re.fullmatch(".*".join(map(re.escape, alias.split("*"))), name, re.DOTALL))


def _files(folder: Path) -> Iterator[tuple[Path, Signature]]:
    """Model files by name, each with a signature that changes with the file; a file counts as its own folder."""
    # os.path, because Path raises on missing permissions.
    single = os.path.isfile(folder)  # noqa: PTH113
    paths = [folder] if single else sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    for path in paths:
        try:
            status = path.stat()
        except OSError:  # a dangling link, or just removed
            continue
        if stat.S_ISREG(status.st_mode) and not path.name.startswith("."):
            # ctime too: a change of permissions, or an editor that preserves size and date, changes nothing else.
            yield path, (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev)


def _unread(parsed: list[ParsedFile]) -> bool:
    return any(isinstance(outcome, Broken) and outcome.may_recover for outcome in parsed)


def _is_source(name: str) -> bool:
    return "/" in name or Path(name).exists()


def _warn(parsed: list[ParsedFile]) -> None:
    for outcome in parsed:
        if isinstance(outcome, ModelConfig):
            for key, reason in outcome.ignored:
                log.warning("%s: %s has no effect: %s", outcome.file, key, reason)
        elif isinstance(outcome, Skipped):
            log.info("%s skipped: %s", outcome.file, outcome.reason)
