"""A real server with two workers on the CPU, and the built-in model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.answerable import within
from support.answers import image_of, pixels
from support.held import LONG, Held
from support.serving import TIMEOUT_S, Server

MODEL = "sfumato-tiny"
MISSING = "cuda:99"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("two")
    (folder / "models").mkdir()
    with Server(folder / "models", folder / "data", "--devices", "cpu,cpu") as server:
        within(TIMEOUT_S, lambda: all(each["ready"] for each in devices(server)))
        yield server


def devices(server: Server) -> list[dict[str, Any]]:
    return list(server.client.get("/v1/status").json()["devices"])


def loaded(server: Server) -> list[bool]:
    """Whether each device has the model."""
    return [each["models"].get(MODEL) == "ready" for each in devices(server)]


def unload(server: Server) -> None:
    """A request that was cancelled may still be in its last step."""
    server.client.post("/v1/models/unload")
    within(TIMEOUT_S, lambda: loaded(server) == [False, False])


def restarts(server: Server) -> list[float]:
    """Of each device's worker."""
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    of = {each.labels["device"]: each.value for each in samples if each.name == "sfumato_worker_restarts_total"}
    return [of["cpu:0"], of["cpu:1"]]


def pid_of(server: Server, device: str) -> int:
    """Of its latest worker."""
    return int(re.findall(rf"worker (\d+) is up: {device},", server.log)[-1])


def picture(server: Server, seed: int, id: str = "") -> np.ndarray[Any, Any]:
    body = {"prompt": "a red fox", "seed": seed, "size": "64x64", "step": 4, "response_format": "b64_json"}
    headers = {"x-request-id": id} if id else {}
    return pixels(image_of(server.client.post("/v1/images/generations", json=body, headers=headers)))


def test_each_device_draws_the_pictures_of_one_worker(two: Server, server: Server) -> None:
    expected = [picture(server, seed) for seed in range(3)]

    def drawn_by(busy: str, free: str) -> None:
        for seed, want in enumerate(expected):
            assert np.array_equal(picture(two, seed, id=f"{free}-{seed}"), want)
            assert two.client.get(f"/v1/images/progress/{free}-{seed}").json()["devices"] == [free], busy

    with Held(two) as first:
        assert first.drawing()["devices"] == ["cpu:0"]
        drawn_by("cpu:0", "cpu:1")
        with Held(two) as second:
            assert second.drawing()["devices"] == ["cpu:1"]
            first.cancel()
            drawn_by("cpu:1", "cpu:0")


def test_a_killed_worker_takes_nothing_with_it_from_the_other(two: Server) -> None:
    body = {"prompt": "a red fox", "seed": 5, "size": "64x64", "step": 100, "response_format": "b64_json"}
    undisturbed = pixels(image_of(two.client.post("/v1/images/generations", json=body)))

    def killed() -> bool:
        """Whether the kill came while the picture was drawn: where others compute too, it may be done before."""
        since, before = len(two.lines), restarts(two)
        with Held(two) as other:
            (device,) = other.drawing()["devices"]
            with Held(two, body) as own:
                (lost,) = own.drawing()["devices"]
                assert {device, lost} == {"cpu:0", "cpu:1"}
                step = other.progress()["step"]
                os.kill(pid_of(two, lost), signal.SIGKILL)
                assert np.array_equal(pixels(image_of(own.answer())), undisturbed)
            assert other.progress()["step"] >= step
            assert other.progress()["devices"] == [device]
        two.wait_for(rf"worker \d+ is up: {lost},", since)
        more = [int(lost == "cpu:0"), int(lost == "cpu:1")]
        assert restarts(two) == [was + now for was, now in zip(before, more, strict=True)]
        begun = Counter(re.findall(r"request (\S+) starts", "".join(two.lines[since:])))
        assert sum(begun.values()) - len(begun) <= 1  # nothing but that picture was drawn again
        return sum(begun.values()) > len(begun)

    assert any(killed() for _ in range(5))


def test_a_burst_on_one_model_loads_it_on_both_and_unload_frees_both(two: Server) -> None:
    unload(two)
    with Held(two, {**LONG, "n": 4}) as burst:
        assert burst.until(lambda seen: len(seen["devices"]) == 2)
        within(TIMEOUT_S, lambda: loaded(two) == [True, True])
        of_model = two.client.get(f"/v1/models/{MODEL}").json()["sfumato"]
        assert of_model["devices"] == {"cpu:0": "ready", "cpu:1": "ready"}
        answer = two.client.post("/v1/models/unload")
        assert MODEL in answer.headers["x-sfumato-warning"]  # in use, on both
    within(TIMEOUT_S, lambda: loaded(two) == [False, False])


def test_an_order_to_load_brings_a_model_to_one_device(two: Server) -> None:
    unload(two)
    for _ in range(2):
        assert two.client.post("/v1/models/load", json={"model": MODEL}).status_code == 200
    within(TIMEOUT_S, lambda: any(loaded(two)))
    assert two.client.post("/api/generate", json={"model": MODEL}).status_code == 200  # answered when it is loaded
    assert sum(loaded(two)) == 1
    assert [each["name"].partition(":")[0] for each in two.client.get("/api/ps").json()["models"]] == [MODEL]
    for pinned in (True, False):
        assert two.client.post("/v1/models/pin", json={"model": MODEL, "pinned": pinned}).status_code == 200


def test_places_are_those_of_all_devices(two: Server) -> None:
    assert two.client.get("/v1/status").json()["line"]["places"] == 32
    assert two.client.get("/readyz").status_code == 200


def test_a_device_that_is_not_there_is_told_and_the_other_serves(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with Server(tmp_path / "models", tmp_path / "data", "--devices", f"cpu,{MISSING}") as server:
        assert f"this machine has no {MISSING}" in server.log
        assert server.draw(prompt="a cat", size="64x64", step=1).status_code == 200
        within(TIMEOUT_S, lambda: f"the device {MISSING} is not usable" in devices(server)[1]["problem"])
        assert [each["ready"] for each in devices(server)] == [True, False]
        within(TIMEOUT_S, lambda: server.client.get("/v1/status").json()["line"]["places"] == 16)
        assert server.client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (MISSING, f"devices='{MISSING}': this machine has no {MISSING}"),
        ("cuda:0,cuda:0", "cuda:0 is named 2 times"),
        (",", "'' is no device"),
    ],
)
def test_a_bad_list_ends_the_start_with_what_is_wrong(tmp_path: Path, devices: str, words: str) -> None:
    command = [sys.executable, "-m", "sfumato.cli", "serve", "--port", "0", "--devices", devices]
    command += ["--models", str(tmp_path), "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode in (1, 2)
    assert words in re.sub(r"[\s│]+", " ", done.stderr)
    assert "Traceback" not in done.stderr
