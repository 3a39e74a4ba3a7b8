"""The embedded model over HTTP, judged by what the pictures show. `make evaluate` measures the same at length."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.pictures import uri
from support.serving import Server
from training.judge import Judge

ROOT = Path(__file__).parent.parent
PAIRS = [
    ("rocket", "blue"),
    ("cat", "green"),
    ("apple", "white"),
    ("ghost", "purple"),
    ("car", "yellow"),
    ("owl", "red"),
]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def drawn(server: Server, prompt: str, **fields: Any) -> list[Image.Image]:
    answer = server.draw(**{"prompt": prompt, "seed": 1, "response_format": "b64_json", **fields})
    assert answer.status_code == 200, answer.text
    items = answer.json()["data"]
    return [Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))).convert("RGB") for item in items]


def far(one: Image.Image, other: Image.Image) -> float:
    return float(np.sqrt(np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)))


def right(judge: Judge, image: Image.Image, thing: str, colour: str) -> tuple[bool, bool]:
    return judge.object(image) == thing, judge.background(image) == colour


@pytest.mark.parametrize(
    "fields", [{}, {"cfg_scale": 8, "scheduler": "k_dpmpp_sde", "step": 30}], ids=["its defaults", "the page's"]
)
def test_it_draws_what_is_asked(server: Server, judge: Judge, fields: dict[str, Any]) -> None:
    seen = [
        right(judge, drawn(server, f"a {thing} on a {colour} background", **fields)[0], thing, colour)
        for thing, colour in PAIRS
    ]
    assert sum(thing for thing, _ in seen) >= 5
    assert sum(colour for _, colour in seen) >= 5


def test_seeds_differ_and_the_object_stays(server: Server, judge: Judge) -> None:
    images = drawn(server, "a rocket on a blue background", n=8)
    spread = np.std([np.asarray(image, float) / 255 for image in images], axis=0).mean()
    assert spread >= 0.03
    assert sum(judge.object(image) == "rocket" for image in images) >= 7


def test_a_source_picture_is_kept_or_left_by_strength(server: Server, judge: Judge) -> None:
    source = drawn(server, "an alarm clock on a yellow background")[0]
    prompt = "a pig on a blue background"
    plain = drawn(server, prompt)[0]
    near = drawn(server, prompt, image=uri(source), strength=0.3)[0]
    assert far(near, source) < far(near, plain)
    assert right(judge, drawn(server, prompt, image=uri(source), strength=0.8)[0], "pig", "blue") == (True, True)


def test_a_negative_prompt_moves_the_background(server: Server, judge: Judge) -> None:
    moved = 0
    for seed in range(4):
        colour = judge.background(drawn(server, "a fox", seed=seed)[0])
        away = drawn(server, "a fox", seed=seed, negative_prompt=f"{colour} background")[0]
        moved += judge.background(away) != colour
    assert moved >= 3


def test_a_mask_redraws_inside_and_keeps_outside(server: Server) -> None:
    source = drawn(server, "a cat on a green background")[0]
    mask = Image.new("L", source.size, 0)
    mask.paste(255, (0, 0, 128, 40))
    edited = drawn(server, "a cat on a red background", image=uri(source), mask=uri(mask))[0]
    before, after = np.asarray(source, int), np.asarray(edited, int)
    assert np.array_equal(before[40:], after[40:])
    assert np.abs(before[:40] - after[:40]).mean() > 5


def test_the_documented_scores_are_the_measured_ones() -> None:
    rows = json.loads((ROOT / "training" / "results.json").read_text())
    page = (ROOT / "training" / "README.md").read_text()
    for row in rows:
        if row["section"] != "samplers":  # the page has the worst of nineteen
            assert f"| {row['section']} | {row['what']} | {row['value']:.3f} |" in page
    size = sum(file.stat().st_size for file in (ROOT / "src/sfumato/models").rglob("*") if file.is_file())
    assert size <= 25_000_000
