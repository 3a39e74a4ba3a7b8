"""What came of a server that was killed again and again: of its requests, and of what it left behind."""

from __future__ import annotations

import base64
import io
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from PIL import Image, ImageChops

from sfumato.api.batches.tables import FILES
from support import seeded, serving
from support.answerable import descriptors, memory_mb, within
from support.batching_client import GENERATIONS
from support.seeded import colour

if TYPE_CHECKING:
    from support.killing import Wanted

YEAR_S = 365 * 86_400

MORE_MEMORY = 1.25
"""How much of an undisturbed server's memory one takes at most that lost its worker often."""

MORE_DESCRIPTORS = 20
"""Two pools of five connections to SQLite, of two files each, are filled as they are needed."""

AGE = (
    "UPDATE jobs SET created = created - :s, ended = ended - :s",
    "UPDATE files SET created = created - :s, expires = expires - :s",
    "UPDATE batches SET created = created - :s, expires = expires - :s, ended = ended - :s",
)


@dataclass(frozen=True)
class Footprint:
    """Of the processes of a server that has nothing to do."""

    processes: int
    memory_mb: int
    descriptors: int
    """Of the API process."""

    def require_as_little_as(self, other: Footprint) -> None:
        assert self.processes <= other.processes
        assert self.descriptors <= other.descriptors + MORE_DESCRIPTORS
        assert self.memory_mb <= MORE_MEMORY * other.memory_mb


class Home:
    """Where the servers of one run keep everything: models, data and temporary files."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder, self.engine = folder, engine
        self.data, self._temporary = folder / "data", folder / "tmp"
        for each in (folder / "models", self._temporary):
            each.mkdir(parents=True)

    def server(self) -> serving.Server:
        server = (
            seeded.Server(self.folder)
            if self.engine == "seeded"
            else serving.Server(self.folder / "models", self.data, "--loaded-models", "1")
        )
        server._env["TMPDIR"] = str(self._temporary)
        return server

    def rows(self, query: str) -> list[dict[str, Any]]:
        with sqlite3.connect(self.data / "jobs.db", timeout=60) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute(query)]

    def footprint(self, server: serving.Server) -> Footprint:
        """Once every connection of the clients is closed."""
        server.client.close()
        least = descriptors(server.pid)
        end = time.monotonic() + 5
        while time.monotonic() < end:  # connections of others are closed a little later
            least = min(least, descriptors(server.pid))
            time.sleep(0.1)
        processes = [server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))]
        return Footprint(len(processes), round(sum(map(memory_mb, processes))), least)

    def leftovers(self) -> dict[str, Any]:
        """What a server leaves once all that it was sent has expired: rows, files and processes. It is stopped."""
        database = sqlite3.connect(self.data / "jobs.db")
        with database:
            for statement in AGE:
                database.execute(statement, {"s": YEAR_S})
        database.close()
        for path in (self.data / "generated-images").iterdir():
            os.utime(path, (time.time() - YEAR_S,) * 2)
        tables = [row["name"] for row in self.rows("SELECT name FROM sqlite_master WHERE type = 'table'")]
        assert {"jobs", "batches", "lines", FILES.name, "servers"} <= set(tables)
        with self.server() as server:
            within(serving.TIMEOUT_S, lambda: not any(self._pictures()) and not self._counts(tables, "servers"))
            assert server.client.get("/v1/images/gallery").json()["total"] == 0
        return {
            "rows": self._counts(tables, ""),
            "files": {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()},
            "processes": sum(self._is_ours(process) for process in psutil.process_iter()),
        }

    def _pictures(self) -> Iterable[Path]:
        return (self.data / "generated-images").iterdir()

    def _counts(self, tables: list[str], but: str) -> dict[str, int]:
        """Tables that have rows."""
        counts = {name: self.rows(f"SELECT count(*) AS n FROM {name}")[0]["n"] for name in tables if name != but}
        return {name: count for name, count in counts.items() if count}

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("TMPDIR") == str(self._temporary)
        except psutil.Error:
            return False


def check(wanted: list[Wanted], server: serving.Server, home: Home) -> None:
    """Every accepted request is answered once, stored once, and has the pixels of an undisturbed run."""
    within(serving.TIMEOUT_S, lambda: not home.rows("SELECT id FROM jobs WHERE state = 'open'"))
    accepted = [each for each in wanted if each.accepted]
    _check_rows(accepted, home)
    in_gallery = _gallery(server)
    times = Counter(prompt for prompt, _ in in_gallery.elements())
    for each in accepted:
        (answers,) = each.answers
        assert list(answers) == each.prompts
        for prompt, (seed, picture) in answers.items():
            assert in_gallery[prompt, seed] == times[prompt] == 1, each
            _same(picture, _undisturbed(server, prompt, seed, home.engine))


def _check_rows(accepted: list[Wanted], home: Home) -> None:
    jobs = home.rows("SELECT * FROM jobs")
    keys = [row["key"] for row in jobs if row["key"]]
    assert len(set(keys)) == len(keys) == sum(bool(each.key) for each in accepted)
    assert {row["state"] for row in jobs} <= {"completed"}
    assert not any(row["body"] for row in jobs)
    batches = [each for each in accepted if each.kind == "batch"]
    begun = home.rows("SELECT input_file, state FROM batches")
    assert sorted(row["input_file"] for row in begun) == sorted(each.file for each in batches)
    assert {row["state"] for row in begun} <= {"completed"}
    (lines,) = home.rows("SELECT count(*) AS n, sum(failed = 0 AND body IS NULL) AS done FROM lines")
    assert lines["n"] == (lines["done"] or 0) == sum(len(each.prompts) for each in batches)


def _gallery(server: serving.Server) -> Counter[tuple[str, int]]:
    """Prompt and seed of every picture in the gallery.

    One that was stored and not listed when its server died has no recipe in its file here; it is of a request that was
    not accepted, or the picture would have been drawn and listed again.
    """
    found: Counter[tuple[str, int]] = Counter()
    before = ""
    while True:
        page = server.client.get("/v1/images/gallery", params={"limit": 200, "before": before}).json()
        recipes = [each["recipe"] for each in page["data"] if each["recipe"]]
        found.update((recipe["prompt"], recipe["seed"]) for recipe in recipes)
        if not (before := page["next"] or ""):
            return found


def _undisturbed(server: serving.Server, prompt: str, seed: int, engine: str) -> Image.Image:
    if engine == "seeded":
        return Image.new("RGB", (8, 8), colour(seed))
    body = {"prompt": prompt, "seed": seed, "response_format": "b64_json", "size": "64x64", "steps": 3}
    return _opened(server.client.post(GENERATIONS, json=body).json()["data"][0]["b64_json"])


def _opened(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB")


def _same(b64_json: str, expected: Image.Image) -> None:
    """At most the last bit of a channel differs: forward passes are shared with others."""
    difference = ImageChops.difference(_opened(b64_json), expected)
    assert max(high for _, high in difference.getextrema()) <= 1
