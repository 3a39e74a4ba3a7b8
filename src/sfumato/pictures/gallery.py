"""The gallery: a searchable index of the pictures, clips and sounds in the store.

Except for the star, a row's contents come from the file's own recipe and name; so the index can be rebuilt
from the folder (`rebuild`), and a file that was deleted by hand is dropped from it without an error.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import RowMapping

from sfumato.config.addresses import database_fault
from sfumato.core import Recipe
from sfumato.errors import InvalidPicture, SfumatoError, StorageError
from sfumato.pictures import recipe as recipes
from sfumato.pictures.store import Store, owner_of
from sfumato.pictures.thumbnails import thumbnail
from sfumato.settings import Settings

log = logging.getLogger(__name__)

MAX_PAGE = 200
"""Maximum pictures per page."""

BATCH = 500
"""Rows per SQL statement."""

TABLES = sql.MetaData()

PICTURES = sql.Table(
    "pictures",
    TABLES,
    sql.Column("name", sql.String(48), primary_key=True),
    sql.Column("created", sql.Double, nullable=False),
    sql.Column("caller", sql.String(255), nullable=False),
    sql.Column("model", sql.Text, nullable=False),
    sql.Column("words", sql.Text, nullable=False),
    sql.Column("starred", sql.Boolean, nullable=False),
    sql.Column("recipe", sql.Text),
    sql.Index("pictures_newest", "created", "name"),
    sql.Index("pictures_of", "caller", "created", "name"),
)
"""`created` in seconds since 1970; `words` are prompt and negative prompt in lower case; `recipe` is JSON."""


@dataclass(frozen=True, slots=True)
class GalleryEntry:
    """One picture in the gallery."""

    name: str
    created: float
    """Seconds since 1970."""
    model: str
    starred: bool
    recipe: Mapping[str, Any] | None
    """Fields of `core.Recipe`; None for a file without one."""


@dataclass(frozen=True, slots=True)
class GalleryQuery:
    """Filter of the pictures to list."""

    caller: str | None = None
    """None: everybody's."""
    words: str = ""
    """Each word must occur in the prompt or the negative prompt."""
    model: str | None = None
    starred: bool = False


class Gallery:
    """Blocks: call it from a thread. `url` is an SQLAlchemy URL; tables are created on first use.

    `callers` are the names that can own pictures; without any, all pictures are shared.
    """

    def __init__(self, store: Store, url: str, callers: Iterable[str] = (), *, keeps_all: bool = True) -> None:
        self.store = store
        self.keeps_all = keeps_all
        """Whether to keep pictures whose requests did not ask for it."""
        self._callers = tuple(callers)
        self._lock = threading.Lock()
        self._ready = False
        try:
            self._engine = sql.create_engine(url)
        except (sql.exc.ArgumentError, sql.exc.NoSuchModuleError, ModuleNotFoundError, ValueError) as error:
            raise ValueError(f"gallery_url: {database_fault(error)}") from None
        if self._engine.dialect.name == "sqlite":
            sql.event.listen(self._engine, "connect", _sqlite)

    @classmethod
    def of(cls, settings: Settings, store: Store, callers: Iterable[str] = ()) -> Gallery:
        """From the settings. Raises ValueError for a URL that SQLAlchemy does not accept."""
        url = settings.gallery_url or f"sqlite:///{(settings.data / 'gallery.db').absolute()}"
        return cls(store, url, callers, keeps_all=settings.keep_pictures)

    def keep(
        self, data: bytes, extension: str, caller: str, recipe: Recipe, created: float, *, random: str = ""
    ) -> str:
        """Add a picture to the store and the index; returns its name. Raises the store's StorageError.

        `random`: as in `Store.put`.
        """
        name = self.store.put(data, extension, owner=caller if self._callers else "", random=random)
        row = _row(name, created, caller if self._callers else "", recipes.as_json(recipe))
        try:
            with self._begin() as connection:
                # `reconcile` may have listed the file in the meantime, without what only this call knows.
                connection.execute(sql.delete(PICTURES).where(PICTURES.c.name == name))
                connection.execute(sql.insert(PICTURES), [row])
        except StorageError as error:
            log.warning("%s is stored but not listed yet: %s", name, error)  # `reconcile` finds it
        return name

    def page(
        self, query: GalleryQuery, *, before: tuple[float, str] | None = None, limit: int = 60
    ) -> tuple[list[GalleryEntry], bool]:
        """The newest matching pictures older than `before` (time and name), and whether there are more."""
        statement = sql.select(PICTURES).where(*_matching(query))
        if before is not None:
            statement = statement.where(sql.tuple_(PICTURES.c.created, PICTURES.c.name) < sql.tuple_(*before))
        statement = statement.order_by(PICTURES.c.created.desc(), PICTURES.c.name.desc()).limit(limit + 1)
        with self._begin() as connection:
            rows = [dict(row) for row in connection.execute(statement).mappings()]
        missing = [row["name"] for row in rows if self.store.near and not self.store.has(row["name"])]
        if missing:
            with self._begin() as connection:
                _forget(connection, missing)
        entries = [_entry(row) for row in rows[:limit] if row["name"] not in missing]
        return entries, len(rows) > limit

    def count(self, query: GalleryQuery) -> int:
        with self._begin() as connection:
            return connection.execute(
                sql.select(sql.func.count()).select_from(PICTURES).where(*_matching(query))
            ).scalar_one()

    def get(self, name: str, caller: str | None = None) -> GalleryEntry | None:
        """The picture of that name and caller (None: any caller); None if there is none."""
        with self._begin() as connection:
            row = connection.execute(sql.select(PICTURES).where(*_by_name(name, caller))).mappings().first()
        if row is not None and not self.store.has(name):
            with self._begin() as connection:
                _forget(connection, [name])
            row = None
        return _entry(row) if row is not None else None

    def star(self, name: str, starred: bool, caller: str | None = None) -> None:
        with self._begin() as connection:
            connection.execute(sql.update(PICTURES).where(*_by_name(name, caller)).values(starred=starred))

    def delete(self, name: str) -> None:
        """Delete the file and its row. Raises StorageError if the file cannot be deleted."""
        self.store.delete(name)
        with self._begin() as connection:
            _forget(connection, [name])

    def starred(self) -> set[str]:
        """Names of all pictures with a star."""
        with self._begin() as connection:
            return set(connection.execute(sql.select(PICTURES.c.name).where(PICTURES.c.starred)).scalars())

    def reconcile(self) -> tuple[int, int]:
        """Add unlisted files of the folder, drop rows without a file; returns how many of each."""
        with self._begin() as connection:  # before the files: a picture that is kept meanwhile has one
            listed = set(connection.execute(sql.select(PICTURES.c.name)).scalars())
        files = self.store.names()
        with self._begin() as connection:
            _forget(connection, sorted(listed - files.keys()))
        added = 0
        for names in _batches(sorted(files.keys() - listed)):
            rows = [self._read_row(name, files[name]) for name in names]
            with self._begin() as connection:
                present = set(
                    connection.execute(sql.select(PICTURES.c.name).where(PICTURES.c.name.in_(names))).scalars()
                )  # a picture that was stored in the meantime
                if rows := [row for row in rows if row["name"] not in present]:
                    connection.execute(sql.insert(PICTURES), rows)
            added += len(rows)
        return added, len(listed - files.keys())

    def rebuild(self) -> int:
        """Read every picture's recipe again; stars are kept. Returns the number of pictures listed."""
        stars = self.starred()
        with self._begin() as connection:
            connection.execute(sql.delete(PICTURES))
        added, _ = self.reconcile()
        for names in _batches(sorted(stars)):
            with self._begin() as connection:
                connection.execute(sql.update(PICTURES).where(PICTURES.c.name.in_(names)).values(starred=True))
        return added

    def thumbnail(self, name: str, side: int) -> bytes | None:
        """A stored file as WebP, at most `side` pixels per side; None if it is missing, unreadable or a sound."""
        stored = self.store.get(name)
        return thumbnail(stored.data, name, side) if stored else None

    def close(self) -> None:
        self._engine.dispose()

    def _read_row(self, name: str, modified: float) -> dict[str, Any]:
        try:
            with self.store.open(name) as file:
                recipe = recipes.as_json(recipes.read_open(file, name))
        except (InvalidPicture, OSError):
            recipe = None
        return _row(name, modified, owner_of(name, self._callers) or "", recipe)

    def _begin(self) -> _Transaction:
        with self._lock:
            if not self._ready:
                self._create_tables()
                self._ready = True
        return _Transaction(self._engine)

    def _create_tables(self) -> None:
        """Create the tables. A damaged SQLite file is renamed: everything but the stars can be read from the folder."""
        file = Path(self._engine.url.database or "") if self._engine.dialect.name == "sqlite" else None
        try:
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
            try:
                TABLES.create_all(self._engine)
            except sql.exc.DatabaseError as error:
                if file is None or "not a database" not in str(error):
                    raise
                log.warning("%s is damaged and was renamed to %s.damaged; rebuilding the gallery", file, file.name)
                self._engine.dispose()
                file.replace(file.with_name(file.name + ".damaged"))
                TABLES.create_all(self._engine)
        except (OSError, sql.exc.SQLAlchemyError) as error:
            raise _failed(error) from error


class _Transaction:
    """`with` a connection whose errors are StorageError."""

    def __init__(self, engine: sql.Engine) -> None:
        self._context = engine.begin()

    def __enter__(self) -> sql.Connection:
        try:
            return self._context.__enter__()
        except sql.exc.SQLAlchemyError as error:
            raise _failed(error) from error

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._context.__exit__(kind, error, trace)
        except sql.exc.SQLAlchemyError as failed:
            raise _failed(failed) from failed
        if isinstance(error, sql.exc.SQLAlchemyError):
            raise _failed(error) from error


def _failed(error: Exception) -> SfumatoError:
    cause = getattr(error, "orig", None) or error
    return StorageError(
        f"the gallery's index cannot be used ({cause}); check the setting gallery_url, or the permissions of its folder"
    )


def _sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # readers do not wait for a writer
    cursor.execute("PRAGMA synchronous=NORMAL")  # `reconcile` restores what a power failure loses
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.close()


def _row(name: str, created: float, caller: str, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    texts = (str(recipe.get(key) or "") for key in ("prompt", "negative_prompt")) if recipe else ()
    return {
        "name": name,
        "created": created,
        "caller": caller,
        "model": str(recipe["model"]) if recipe else "",
        "words": _folded("\n".join(texts)),
        "starred": False,
        "recipe": json.dumps(recipe) if recipe else None,
    }


def _folded(text: str) -> str:
    return text.casefold().replace("\0", " ")  # PostgreSQL does not accept NUL


def _entry(row: Mapping[str, Any] | RowMapping) -> GalleryEntry:
    return GalleryEntry(
        name=row["name"],
        created=row["created"],
        model=row["model"],
        starred=bool(row["starred"]),
        recipe=json.loads(row["recipe"]) if row["recipe"] else None,
    )


def _matching(query: GalleryQuery) -> list[sql.ColumnElement[bool]]:
    clauses = [PICTURES.c.words.contains(word, autoescape=True) for word in _folded(query.words).split()]
    if query.caller is not None:
        clauses.append(PICTURES.c.caller == query.caller)
    if query.model is not None:
        clauses.append(PICTURES.c.model == query.model)
    if query.starred:
        clauses.append(PICTURES.c.starred)
    return clauses


def _by_name(name: str, caller: str | None) -> list[sql.ColumnElement[bool]]:
    return [PICTURES.c.name == name] + ([] if caller is None else [PICTURES.c.caller == caller])


def _forget(connection: sql.Connection, names: Sequence[str]) -> None:
    for some in _batches(names):
        connection.execute(sql.delete(PICTURES).where(PICTURES.c.name.in_(some)))


def _batches(names: Sequence[str]) -> list[Sequence[str]]:
    return [names[start : start + BATCH] for start in range(0, len(names), BATCH)]
