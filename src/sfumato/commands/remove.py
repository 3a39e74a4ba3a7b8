"""`sfumato remove`: delete a model file, and what was downloaded for it alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sfumato.checkpoints import sources, stored
from sfumato.config import Broken, ModelConfig, ParsedFile, Redirect, Skipped
from sfumato.errors import InvalidRequest, ModelNotFound, SfumatoError, StorageError, did_you_mean
from sfumato.serving.catalog import EMBEDDED, Catalog
from sfumato.settings import Settings

RECORD = re.compile(r"\.(.+)\.(?:source|part|lock)")


@dataclass(frozen=True, slots=True)
class Removal:
    """What would be deleted, and what stays, each with its reason."""

    files: tuple[Path, ...]
    kept: tuple[tuple[Path, str], ...]

    @property
    def size(self) -> int:
        return sum(map(stored.size_of, self.files))

    def __str__(self) -> str:
        lines = [f"delete  {path}  {stored.readable(stored.size_of(path))}" for path in self.files]
        lines += [f"keep    {path}  {stored.readable(stored.size_of(path))}: {why}" for path, why in self.kept]
        return "\n".join(lines)


def plan(name: str, settings: Settings) -> Removal:
    """What `remove` of a model deletes. Raises ModelNotFound, and InvalidRequest where a person has to do it."""
    catalog = Catalog.of(settings)
    everything = [(file, outcome) for file, each in catalog.outcomes().items() for outcome in each]
    file, outcome = _find(name, everything)
    if file.parent == EMBEDDED:
        raise InvalidRequest(
            f"{name} comes with Sfumato and takes no room; write `disabled: true` into a file of its name"
        )
    others = [other for other_file, other in everything if other is not outcome and other_file == file]
    if others:
        raise InvalidRequest(
            f"{file} has {len(others) + 1} models, of which {name} is one; delete its lines there, or the file by hand"
        )
    if not isinstance(outcome, ModelConfig):
        return Removal((file,), ())
    found = stored.of(outcome)
    used = _Users(outcome, everything)
    files, kept = [file], []
    roots = [settings.models.resolve(), settings.data.resolve()]
    for path in dict.fromkeys((*found.files, *found.downloaded)):
        if path in found.cached:
            kept.append((path, "it is in the hub's cache, which other programs use too; `hf cache` cleans it"))
        elif path not in found.downloaded:
            kept.append((path, "Sfumato did not download it"))
        elif why := used(path):
            kept.append((path, why))
        elif not any(path.parent.resolve().is_relative_to(root) for root in roots):
            kept.append((path, "it is outside the folder of models"))
        else:
            files.append(path)
    return Removal(tuple(files), tuple(kept))


def carry_out(removal: Removal) -> None:
    """Delete the files: the model file first, so that no request asks for what is half gone. Raises StorageError."""
    for path in removal.files:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{path} could not be deleted: {error.strerror or error}") from error


def _find(name: str, everything: list[tuple[Path, ParsedFile]]) -> tuple[Path, ParsedFile]:
    names: dict[str, tuple[Path, ParsedFile]] = {}
    for of in (_names, _aliases):  # a name wins over an alias, as in the catalog
        for file, outcome in everything:
            for each in of(outcome):
                names.setdefault(each, (file, outcome))
    if name not in names:
        raise ModelNotFound(f"There is no model {name[:100]!r}.{did_you_mean(name, names)}", param="model")
    return names[name]


def _names(outcome: ParsedFile) -> tuple[str, ...]:
    match outcome:
        case ModelConfig(name=name):
            return (name,)
        case Broken(names=names):
            return names
        case Redirect(name=name):
            return (name,)
    return ()


def _aliases(outcome: ParsedFile) -> tuple[str, ...]:
    return outcome.aliases if isinstance(outcome, ModelConfig) else ()


class _Users:
    """Why a file has to stay: another model uses it, or may."""

    def __init__(self, removed: ModelConfig, everything: list[tuple[Path, ParsedFile]]) -> None:
        self._by: dict[Path, str] = {}
        self._others: list[tuple[Path, str, str]] = []
        """Files that are not read as a model's: path, text, and why."""
        for file, outcome in everything:
            if isinstance(outcome, ModelConfig) and outcome is not removed:
                for path in _all_files(outcome):
                    self._by.setdefault(path.resolve(), outcome.name)
            elif isinstance(outcome, Broken | Skipped):
                why = "has an error" if isinstance(outcome, Broken) else "is for another backend"
                self._others.append((file, file.read_text(encoding="utf-8", errors="replace"), why))

    def __call__(self, path: Path) -> str:
        inside = path.resolve()
        if RECORD.fullmatch(inside.name):  # what is kept beside a file stays with it
            inside = inside.with_name(RECORD.sub(r"\1", inside.name))
        if owner := next((self._by[each] for each in (inside, *inside.parents) if each in self._by), ""):
            return f"{owner} uses it"
        return next((f"{file} {why} and names it" for file, text, why in self._others if inside.name in text), "")


def _all_files(config: ModelConfig) -> Iterator[Path]:
    found = stored.of(config)
    yield from found.files
    yield from found.downloaded
    with suppress(SfumatoError):  # a source that is not there uses nothing
        source = sources.resolve(config)
        if isinstance(source, sources.Folder):
            yield source.path  # with all that is in it
