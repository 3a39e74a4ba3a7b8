"""Kill a server again and again, at random moments, while clients draw; then count what came of their requests.

PYTHONPATH=src:tests python -m support.killing 1000              # kills of the API process, pictures at once
PYTHONPATH=src:tests python -m support.killing 1000 embedded     # the built-in model; also its worker, and both
"""

from __future__ import annotations

import base64
import io
import json
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image, ImageChops

from support import seeded, serving
from support.answerable import within
from support.seeded import colour

CLIENTS = 6
LONGEST_LIFE_S = {"seeded": 2.0, "embedded": 4.0}
"""Of a server, from its first answer on."""

GENERATIONS = "/v1/images/generations"
MODELS = {"seeded": "m", "embedded": None}


@dataclass
class Wanted:
    """One request of a client, who sends it until it is answered."""

    prompt: str
    kind: str
    """plain: may be lost; keyed, streamed; later: with Prefer; later without a key: may be lost until its 202."""
    key: str = ""
    location: str = ""
    answers: list[Any] = field(default_factory=list)
    """Seed and picture, for each time that it was answered."""

    @property
    def accepted(self) -> bool:
        return bool(self.key or self.location)


class Killing:
    """`server`: makes one; it is killed `kills` times."""

    def __init__(self, make: Callable[[], serving.Server], engine: str, kills: int, dice: random.Random) -> None:
        self._make, self._engine, self._kills, self._dice = make, engine, kills, dice
        self._url = ""
        self._up = threading.Event()
        self._over = False
        self._lock = threading.Lock()
        self.wanted: list[Wanted] = []
        self.killed: Counter[str] = Counter()

    def run(self) -> serving.Server:
        """Returns the last server, which lives; everything that was accepted has been answered."""
        clients = [threading.Thread(target=self._draw, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        left = self._kills
        while True:
            server = self._make()
            server.__enter__()
            self._url = server.url
            self._up.set()
            died = False
            while left and not died:
                time.sleep(self._dice.random() * LONGEST_LIFE_S[self._engine])  # the moment is what is random here
                left -= 1
                if left % 25 == 0:
                    print(f"{self._kills - left} kills, {len(self.wanted)} requests", flush=True)
                died = self._kill(server)
            if not died:
                break
        self._over = True
        for client in clients:
            client.join()
        return server

    def _kill(self, server: serving.Server) -> bool:
        """Whether the API process has died."""
        who = self._dice.choice(("server", "worker", "both")) if self._engine == "embedded" else "server"
        self.killed[who] += 1
        process = psutil.Process(server.pid)
        children = process.children() if who != "server" else []
        if who != "worker":
            self._up.clear()
            server.signal(signal.SIGKILL)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        if who == "worker":
            return False
        server.wait()
        server.client.close()
        return True

    def _draw(self, number: int) -> None:
        dice = random.Random(number)
        while not self._over:
            kind = dice.choice(("plain", "keyed", "streamed", "later", "later, keyed"))
            key = f"{number}-{dice.random()}" if "keyed" in kind or kind == "streamed" else ""
            with self._lock:
                wanted = Wanted(f"item {len(self.wanted)}", kind, key)
                self.wanted.append(wanted)
            while not wanted.answers:
                self._up.wait()
                try:
                    with httpx.Client(base_url=self._url, timeout=serving.TIMEOUT_S) as client:
                        self._ask(client, wanted)
                except httpx.TransportError:
                    if not wanted.accepted:
                        break

    def _ask(self, client: httpx.Client, wanted: Wanted) -> None:
        body = {"prompt": wanted.prompt, "response_format": "b64_json", "size": "64x64", "steps": 3}
        body |= {"stream": True} if wanted.kind == "streamed" else {}
        headers = {"idempotency-key": wanted.key} if wanted.key else {}
        headers |= {"prefer": "respond-async"} if wanted.kind.startswith("later") else {}
        if not wanted.location:
            answer = client.post(GENERATIONS, json=body, headers=headers)
            if answer.status_code in (429, 503):  # nothing was accepted
                time.sleep(0.1)
                return
            assert answer.status_code in (200, 202), answer.text
            if answer.status_code == 200:
                wanted.answers.append(picture_of(answer))
                return
            wanted.location = answer.headers["location"]
        while (job := client.get(wanted.location).json())["ended"] is None:
            time.sleep(0.02)
        assert job["status"] == "completed", job
        (item,) = job["response"]["body"]["data"]
        wanted.answers.append((item["seed"], item["b64_json"]))


def picture_of(answer: httpx.Response) -> tuple[int, str]:
    """Seed and picture, base64."""
    if answer.headers["content-type"] == "application/json":
        (item,) = answer.json()["data"]
        return item["seed"], item["b64_json"]
    (line,) = [line for line in answer.text.splitlines() if line.startswith("data:")]
    event = json.loads(line.removeprefix("data:"))
    assert event["type"] == "image_generation.completed", event
    return event["seed"], event["b64_json"]


def check(killing: Killing, server: serving.Server, folder: Path, engine: str) -> None:
    """Every accepted request is answered once, stored once, and has the pixels of an undisturbed run."""
    data = folder / "data"
    within(serving.TIMEOUT_S, lambda: not jobs(data, "state = 'open'"))
    stored = jobs(data, "1 = 1")
    accepted = [each for each in killing.wanted if each.accepted]
    keys = [row["key"] for row in stored if row["key"]]
    assert len(set(keys)) == len(keys) == sum(bool(each.key) for each in accepted)
    assert {row["state"] for row in stored} <= {"completed"}
    assert not any(row["body"] for row in stored)
    in_gallery = pictures_of(server)
    for wanted in accepted:
        seed, picture = wanted.answers[0]
        assert in_gallery[wanted.prompt, seed] == 1, wanted
        assert sum(prompt == wanted.prompt for prompt, _ in in_gallery) == 1, wanted
        same(picture, undisturbed(server, wanted.prompt, seed, engine))


def pictures_of(server: serving.Server) -> Counter[tuple[str, int]]:
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


def jobs(data: Path, where: str) -> list[dict[str, Any]]:
    with sqlite3.connect(data / "jobs.db", timeout=60) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f"SELECT * FROM jobs WHERE {where}")]


def undisturbed(server: serving.Server, prompt: str, seed: int, engine: str) -> Image.Image:
    if engine == "seeded":
        return Image.new("RGB", (8, 8), colour(seed))
    body = {"prompt": prompt, "seed": seed, "response_format": "b64_json", "size": "64x64", "steps": 3}
    return opened(server.client.post(GENERATIONS, json=body).json()["data"][0]["b64_json"])


def opened(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB")


def same(b64_json: str, expected: Image.Image) -> None:
    """At most the last bit of a channel differs: forward passes are shared with others."""
    difference = ImageChops.difference(opened(b64_json), expected)
    assert max(high for _, high in difference.getextrema()) <= 1


def main(kills: int, engine: str = "seeded", folder: Path | None = None) -> Killing:
    folder = folder or Path(tempfile.mkdtemp())
    (folder / "models").mkdir(exist_ok=True)

    def make() -> serving.Server:
        if engine == "seeded":
            return seeded.Server(folder)
        return serving.Server(folder / "models", folder / "data")

    killing = Killing(make, engine, kills, random.Random(kills))
    server = killing.run()
    try:
        check(killing, server, folder, engine)
    finally:
        server.__exit__(None, None, None)
    return killing


if __name__ == "__main__":
    began = time.monotonic()
    done = main(int(sys.argv[1]), *sys.argv[2:3])
    kinds = Counter(f"{each.kind}{'' if each.answers else ' (lost)'}" for each in done.wanted)
    print(f"kills {dict(done.killed)}, requests {dict(kinds)}, {time.monotonic() - began:.0f} s")
