"""Failure cases from users' threads that need several requests at once, over HTTP, by the number of their row."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

from support import tiny
from support.answers import error_of, image_of, pixels
from support.held import Held, left
from support.serving import Server

MODEL = "name: {name}\nparameters:\n  model: {folder}\ndtype: fp32\ncuda: false\n"


@pytest.fixture(scope="module")
def models(repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    plain = repositories["nitrosocke/Ghibli-Diffusion"]
    (folder / "plain.yaml").write_text(MODEL.format(name="plain", folder=plain))

    broken = tiny.stable_diffusion()
    with torch.no_grad():
        broken.unet.conv_out.bias.fill_(float("nan"))
    (folder / "nan.yaml").write_text(MODEL.format(name="nan", folder=tiny.save(broken, folder / "nan")))

    strict = tiny.stable_diffusion()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0)  # a cosine is never below: everything is blocked
    strict.register_modules(
        safety_checker=checker.eval(),
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    (folder / "strict.yaml").write_text(MODEL.format(name="strict", folder=tiny.save(strict, folder / "strict")))
    return folder


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(models, tmp_path_factory.mktemp("data"), "--loaded-models", "3") as server:
        yield server


def at_once(server: Server, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    """Send all at the same moment."""
    barrier = threading.Barrier(len(bodies))

    def send(body: dict[str, Any]) -> httpx.Response:
        barrier.wait()
        return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=300)

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(send, bodies))


def same(one: httpx.Response, other: httpx.Response) -> bool:
    """Equal pictures: rounding at 1e-6 may move an 8-bit value by one, not more."""
    return bool(np.abs(pixels(image_of(one)).astype(int) - pixels(image_of(other)).astype(int)).max() <= 1)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "plain", "prompt": "a cat", "size": "64x64", "step": 6, "seed": 1, **fields}


def test_row_01_different_requests_at_once(server: Server) -> None:
    names = ["ddim", "euler", "euler_a", "k_dpmpp_2m", "heun", "unipc", "k_dpmpp_sde", "pndm"]
    words = ["a cat", "a dog on a hill", "x", "a very long prompt " * 6, "sea", "a red car", "snow", "a lamp"]
    bodies = [
        body(prompt=word, scheduler=name, seed=i, step=4 + i, cfg_scale=1.5 * i)
        for i, (word, name) in enumerate(zip(words, names, strict=True))
    ]
    for together, request in zip(at_once(server, bodies), bodies, strict=True):
        assert same(together, server.draw(**request))


def test_row_02_identical_requests_released_together(server: Server) -> None:
    answers = at_once(server, [body()] * 6)
    assert all(same(answer, answers[0]) for answer in answers)
    ids = {uuid.UUID(answer.headers["x-request-id"]) for answer in answers}
    assert len(ids) == 6


def test_row_03_alone_and_in_batches(server: Server) -> None:
    alone = server.draw(**body())
    for size in (2, 5):
        others = [body(seed=100 + i, prompt=f"thing {i}") for i in range(size - 1)]
        assert same(at_once(server, [body(), *others])[0], alone)


def test_row_04_mixed_guidance_and_negative_prompts(server: Server) -> None:
    bodies = [
        body(seed=i, cfg_scale=guidance, **negative)
        for i, (guidance, negative) in enumerate(
            [(1, {}), (7, {}), (1, {"negative_prompt": "dog"}), (7, {"negative_prompt": "dog"}), (7, {"prompt": "a|b"})]
        )
    ]
    *answers, bad = at_once(server, [*bodies, body(size="64x63")])
    assert bad.status_code == 400
    for answer, request in zip(answers, bodies, strict=True):
        assert same(answer, server.draw(**request))


def test_row_06_and_07_a_client_that_leaves_stops_its_own_work_only(server: Server) -> None:
    before = len(server.lines)
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(server.draw, **body(step=60))
        left(server, body(step=900, size="512x512", seed=3))
        assert int(server.wait_for(r"was cancelled with (\d+) steps left", before)[1]) > 0
        assert same(neighbour.result(), server.draw(**body(step=60)))
    # Nothing of the nine hundred steps is left: nobody waits behind them.
    assert server.draw(**body()).status_code == 200
    assert "".join(server.lines[before:]).count("was cancelled with") == 1


def test_row_08_health_and_models_during_a_generation(server: Server) -> None:
    with Held(server, body(step=900, size="512x512")) as running:
        running.drawing()
        for path in ("/healthz", "/v1/models", "/readyz"):
            assert server.client.get(path).status_code == 200
        assert not running.answered


def test_row_22_nan_and_safety_hits_are_errors(server: Server) -> None:
    broken = error_of(server.draw(**body(model="nan")), 500)
    assert broken["code"] == "generation_failed"
    assert "NaN" in broken["message"]
    blocked = error_of(server.draw(**body(model="strict")))
    assert blocked["code"] == "content_policy_violation"


def test_row_25_a_killed_worker_answers_all_the_same(models: Path, tmp_path: Path) -> None:
    with Server(models, tmp_path) as server:
        undisturbed = [server.draw(**body(seed=seed, step=200)) for seed in range(3)]

        def killed() -> bool:
            """Whether a request was drawn twice: where others compute too, all may be done before the kill."""
            before = len(server.lines)
            with ThreadPoolExecutor(3) as pool:
                answers = [pool.submit(server.draw, **body(seed=seed, step=200)) for seed in range(3)]
                running = server.wait_for(r"request (\w+) starts", before)[1]
                os.kill(int(re.findall(r"worker (\d+) is up", server.log)[-1]), signal.SIGKILL)
                for answer, expected in zip(answers, undisturbed, strict=True):
                    assert same(answer.result(), expected)
            server.wait_for(r"worker \d+ is up", before)
            return server.log.count(f"request {running} starts") == 2

        assert any(killed() for _ in range(5))


def test_row_26_sigterm_lets_what_runs_finish(models: Path, tmp_path: Path) -> None:
    with Server(models, tmp_path, "--grace-s", "300") as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.draw, **body(step=60))
        server.wait_for(r"plain: StableDiffusionPipeline from")
        assert server.stop() == 0
        assert running.result().status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)
        assert len(list((tmp_path / "generated-images").glob("*.png"))) == 1
        assert not list((tmp_path / "generated-images").glob("*.part"))


def test_random_mix_of_everything(server: Server) -> None:
    """What no row names: many kinds at once, each as alone."""
    dice = random.Random(7)
    bodies = []
    for seed in range(10):
        request = body(seed=seed, step=dice.randint(2, 12), cfg_scale=dice.choice([0, 1, 3, 8]))
        if dice.random() < 0.3:
            request |= {"scheduler": dice.choice(["ddim", "lms", "k_dpm_2_a", "dpmpp_2m_sde"])}
        if dice.random() < 0.3:
            request |= {"size": "96x64"}
        bodies.append(request)
    for together, request in zip(at_once(server, bodies), bodies, strict=True):
        assert same(together, server.draw(**request))
