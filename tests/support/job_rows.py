"""The jobs of a database, read by another program than the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sql


def sqlite(folder: Path) -> str:
    """URL of the database of a server whose data folder is `data` in this folder."""
    return f"sqlite:///{folder / 'data' / 'jobs.db'}"


def rows(url: str) -> list[dict[str, Any]]:
    """Oldest first."""
    engine = sql.create_engine(url)
    try:
        with engine.connect() as connection:
            return [dict(row) for row in connection.execute(sql.text("SELECT * FROM jobs ORDER BY created")).mappings()]
    finally:
        engine.dispose()


def all_ended(url: str) -> bool:
    return all(row["state"] != "open" for row in rows(url))


def execute(url: str, statement: str, **values: Any) -> None:
    engine = sql.create_engine(url)
    try:
        with engine.begin() as connection:
            connection.execute(sql.text(statement), values)
    finally:
        engine.dispose()
