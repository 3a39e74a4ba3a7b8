"""The server on Ray Serve: a cluster of two nodes on this machine, the built-in model, real HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sqlalchemy as sql
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

import sfumato
from cluster import environment
from support import loras, postgresql, s3
from support.answerable import within
from support.answers import image_of, pixels
from support.held import LONG, Held, left
from support.ray_server import FILE, MODEL, RayServer
from support.serving import TIMEOUT_S, Server

pytestmark = pytest.mark.slow

BUILT_IN = Path(sfumato.__file__).parent / "models" / MODEL
OTHER: Mapping[str, Any] = {
    **yaml.safe_load(BUILT_IN.with_suffix(".yaml").read_text()), "name": "other", "aliases": [],
    "parameters": {"model": str(BUILT_IN)},
}  # fmt: skip
"""A second model file, of the same weights."""
ODD: Mapping[str, Any] = {"loras": [{"name": "odd", "weight": 0.8}]}
SMALL: Mapping[str, Any] = {"prompt": "a red circle", "size": "64x64", "step": 8}


@pytest.fixture(scope="module")
def bucket() -> Iterator[s3.S3]:
    environment.make()
    with s3.running() as server:
        yield server


@pytest.fixture(scope="module")
def database() -> Iterator[postgresql.PostgreSQL]:
    with postgresql.running("ray") as database:
        yield database


@pytest.fixture(scope="module")
def ray(
    tmp_path_factory: pytest.TempPathFactory, bucket: s3.S3, database: postgresql.PostgreSQL
) -> Iterator[RayServer]:
    """One node has room for the ingress and a replica, the other for a replica.

    Starting one takes ten seconds of two cores, so tests take the replicas that the one before has left.
    """
    places = {"outputs_url": f"s3://{s3.BUCKET}", "gallery_url": database.url, "database": database.url}
    scaling = {"max_replicas": 2, "upscale_delay_s": 0.5, "downscale_delay_s": 2, "downscale_to_zero_delay_s": 8}
    scaling |= {"look_back_period_s": 2, "steps": 2 * LONG["steps"]}  # while it is sent, a picture counts twice
    group = {"groups": {MODEL: [MODEL, "other"]}}
    with RayServer(
        tmp_path_factory.mktemp("ray"), {**places, **scaling, **group}, bucket.env, yaml.safe_dump(OTHER)
    ) as server:
        yield server


def replicas(server: Server) -> list[dict[str, Any]]:
    """Those whose worker is up."""
    return [each for each in server.client.get("/v1/status").json()["devices"] if each["ready"]]


def test_the_picture_is_that_of_a_single_process(ray: RayServer, server: Server) -> None:
    answers = [each.draw(**SMALL, seed=7) for each in (ray, server)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert np.array_equal(*(pixels(image_of(each)) for each in answers))
    ids = answers[0].headers.get_list("x-request-id")
    assert len(ids) == 1


def test_pictures_lie_in_s3_and_rows_in_postgresql(
    ray: RayServer, bucket: s3.S3, database: postgresql.PostgreSQL
) -> None:
    prompt = "a house in a bucket"
    body, headers = {**SMALL, "prompt": prompt}, {"prefer": "respond-async"}
    accepted = ray.client.post("/v1/images/generations", json=body, headers=headers)
    assert accepted.status_code == 202, accepted.text
    job = ray.client.base_url.join(accepted.headers["location"])
    within(TIMEOUT_S, lambda: ray.client.get(job).json()["ended"])
    (kept,) = ray.client.get("/v1/images/gallery", params={"q": prompt}).json()["data"]
    name = kept["name"]
    assert name in bucket.names()
    assert Image.open(io.BytesIO(ray.client.get(f"/generated-images/{name}").content)).size == (64, 64)
    engine = sql.create_engine(database.url)
    with engine.connect() as connection:
        rows = connection.execute(sql.text("select words from pictures where name = :name"), {"name": name}).all()
        assert prompt in rows[0][0]
        assert connection.execute(sql.text("select count(*) from jobs where ended is not null")).scalar_one() == 1
    engine.dispose()
    assert not (ray.folder / "data" / "generated-images").exists()


def test_a_lora_acts_in_a_replica(ray: RayServer) -> None:
    pipeline = DiffusionPipeline.from_pretrained(BUILT_IN, local_files_only=True)
    loras.saved(loras.kohya(pipeline), ray.folder / "models" / "loras" / "odd.safetensors")
    body = {**SMALL, "seed": 7}
    without, with_it, again = (ray.draw(**body, **more) for more in ({}, ODD, ODD))
    assert "x-sfumato-warning" not in with_it.headers
    assert not np.array_equal(pixels(image_of(without)), pixels(image_of(with_it)))
    assert np.array_equal(pixels(image_of(with_it)), pixels(image_of(again)))


def test_a_replica_draws_all_models_of_its_group(ray: RayServer) -> None:
    answers = [ray.draw(**SMALL, seed=7, model=model) for model in (MODEL, "other")]
    assert [answer.status_code for answer in answers] == [200, 200], answers[1].text
    assert np.array_equal(*(pixels(image_of(each)) for each in answers))
    within(TIMEOUT_S, lambda: len(replicas(ray)) == 1 and replicas(ray)[0]["models"].keys() >= {MODEL, "other"})


def events(server: Server, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    with server.client.stream("POST", "/v1/images/generations", json={**body, "stream": True}) as answer:
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]


def test_previews_are_streamed_and_are_those_of_a_single_process(ray: RayServer, server: Server) -> None:
    body = {**SMALL, "seed": 3, "partial_images": 3}
    here, there = events(ray, body), events(server, body)
    assert [each["type"] for each in here] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    for ours, theirs in zip(here, there, strict=True):
        assert np.array_equal(pixels_of(ours), pixels_of(theirs))


def pixels_of(event: Mapping[str, Any]) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))).convert("RGB"))


def pictures(server: Server) -> int:
    """That its replicas draw."""
    return sum(each["pictures"] for each in replicas(server))


def test_cancelling_ends_the_drawing_in_the_replica(ray: RayServer) -> None:
    with Held(ray) as held:
        held.drawing()
        within(TIMEOUT_S, lambda: pictures(ray) == 1)
        assert held.cancel().status_code == 499
    within(TIMEOUT_S, lambda: pictures(ray) == 0)


def test_so_does_a_client_that_hangs_up(ray: RayServer) -> None:
    left(ray)
    within(TIMEOUT_S, lambda: pictures(ray) == 0)


def test_a_replica_that_is_stuck_is_replaced_and_its_picture_drawn(ray: RayServer, server: Server) -> None:
    with Held(ray, {**LONG, "steps": 4, "size": "256x256", "seed": 5}) as held:
        held.until(lambda seen: seen.get("devices"))
        (stuck,) = ray.replicas(MODEL)
        stuck.send_signal(signal.SIGSTOP)
        answer = held.answer()
    assert not stuck.is_running()
    want = server.draw(**{**LONG, "steps": 4, "size": "256x256", "seed": 5})
    assert np.array_equal(pixels(image_of(answer)), pixels(image_of(want)))


def test_nothing_of_the_cluster_is_connected_to_another_machine(ray: RayServer) -> None:
    own = {each.address for of in psutil.net_if_addrs().values() for each in of}
    for process in ray.processes():
        with suppress(psutil.Error):
            assert {each.raddr.ip.removeprefix("::ffff:") for each in process.net_connections() if each.raddr} <= own, (
                process
            )


def test_a_second_replica_comes_and_goes_with_the_steps_to_do(ray: RayServer) -> None:
    with Held(ray) as one:
        one.drawing()
        within(TIMEOUT_S, lambda: len(replicas(ray)) == 1)
        with Held(ray, {**LONG, "n": 2}):
            within(TIMEOUT_S, lambda: len(replicas(ray)) == 2)
        within(TIMEOUT_S, lambda: len(replicas(ray)) == 1)


def test_no_request_is_lost_with_a_replica_or_a_node(ray: RayServer, server: Server) -> None:
    bodies = [{**SMALL, "prompt": f"a circle, {seed}", "seed": seed} for seed in range(50)]
    with ThreadPoolExecutor(50) as threads, Held(ray, {**LONG, "n": 3}) as held:
        within(TIMEOUT_S, lambda: len(replicas(ray)) == 2)
        on_head, on_second = (of_node(ray, number) for number in (0, 1))
        workers = [ray.worker(each) for each in (on_head, on_second)]
        for each in workers:  # so that they have pictures when they die, however quick they are
            each.suspend()
        answers = [threads.submit(ray.draw, **body) for body in bodies]
        within(TIMEOUT_S, lambda: min(each["pictures"] for each in replicas(ray)) > 10)
        on_head.kill()
        ray.kill_node(1)
        within(TIMEOUT_S, lambda: not on_second.is_running())
        with suppress(psutil.NoSuchProcess):  # Ray may have ended it
            workers[0].resume()
        within(TIMEOUT_S, lambda: not workers[0].is_running())  # else it ends, as its replica has
        assert not held.answered and not any(answer.done() for answer in answers)
        held.cancel()
        results = [answer.result() for answer in answers]
    assert [result.status_code for result in results] == [200] * 50, {result.text[:200] for result in results}
    for body, result in zip(bodies[::5], results[::5], strict=True):
        one, other = (pixels(image_of(each)).astype(int) for each in (result, server.draw(**body)))
        assert np.abs(one - other).max() <= 1  # how many share a forward pass changes the last digit


def of_node(server: RayServer, number: int) -> psutil.Process:
    """The process of the replica on a node."""
    (found,) = (each for each in server.replicas(MODEL) if each.ppid() == server.nodes[number])
    return found


SCHEMA = """
import sys, yaml
from ray.serve.schema import ServeDeploySchema
ServeDeploySchema.model_validate(yaml.safe_load(sys.stdin.read()))
"""


def test_the_application_on_kubernetes_is_that_of_the_other_file() -> None:
    service = yaml.safe_load((FILE.parent / "rayservice.yaml").read_text())
    text = service["spec"]["serveConfigV2"]
    environment.make()
    subprocess.run([environment.PYTHON, "-c", SCHEMA], input=text, text=True, check=True)
    (there,), (here,) = (yaml.safe_load(each)["applications"] for each in (text, FILE.read_text()))
    assert {name: there[name] for name in ("import_path", "args", "deployments")} == {
        name: here[name] for name in ("import_path", "args", "deployments")
    }
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["maxReplicas"] >= here["args"]["max_replicas"]


WRONG: Sequence[tuple[dict[str, Any], str]] = (
    ({"max_replica": 2}, "max_replica=2: no argument has that name. Did you mean 'max_replicas'?"),
    ({"num_gpus": "two"}, "num_gpus='two': must be a number"),
    ({"steps": 0}, "steps=0: must be at least 1"),
    ({"max_active": 0}, "max_active=0: must be at least 1"),
    ({"groups": "{a: b}"}, "groups='{a: b}': must be as {name: [model, model]}, without an empty name"),
    ({"groups": {"": [MODEL]}}, "groups={'': ['sfumato-tiny']}: must be as"),
    ({"groups": "{a"}, "groups='{a': must be as"),
    (
        {"groups": {"a": [MODEL], "b": [MODEL]}},
        f"groups: {MODEL!r} is in 'a' and in 'b'; a model is in one group, once",
    ),
    ({"groups": f"a: [{MODEL}]\na: [other]"}, "groups, line 2: a: duplicate key, also in line 1; remove one"),
    ({"groups": {"a": ["sfumato-tyni"]}}, "groups: a: no model file has 'sfumato-tyni'. Did you mean 'sfumato-tiny'?"),
    (
        {"groups": {"sfumato": [MODEL]}},
        "'sfumato' would be the name of two deployments: the server and the group 'sfumato' of groups; rename one",
    ),
    (
        {"groups": {"other ": [MODEL]}},
        "'other-' would be the name of two deployments: the model 'other-' and the group 'other ' of groups",
    ),
)
TRY = """
import json, sys
from sfumato.ray_serve import app
for arguments in json.load(sys.stdin):
    try:
        app(arguments)
    except ValueError as error:
        print(error)
"""


def test_a_wrong_argument_is_named(tmp_path: Path) -> None:
    environment.make()
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**OTHER, "name": "other-"}))
    arguments = json.dumps([{"models": str(tmp_path), "device": "cpu", **each} for each, _ in WRONG])
    env = {**os.environ, "PYTHONPATH": str(environment.FOLDER.parent / "src")}
    done = subprocess.run(
        [environment.PYTHON, "-c", TRY], env=env, input=arguments, stdout=subprocess.PIPE, text=True, check=True
    )
    for line, (_, words) in zip(done.stdout.splitlines(), WRONG, strict=True):
        assert line.startswith(words)


def test_what_replicas_answer_is_told_counted_and_has_room(tmp_path: Path) -> None:
    environment.make()
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nparameters:\n  model: builtin/{name}\n")
    script = environment.LIST.parent / "engine.py"
    path = os.pathsep.join(str(environment.FOLDER.parent / folder) for folder in ("src", "tests"))
    command = [environment.PYTHON, str(script), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_a_replica_starts_without_the_server() -> None:
    """Its modules take as long to import as all others of a replica together."""
    environment.make()
    code = "import sys, sfumato.ray_serve.replica; sys.exit('sfumato.api' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(environment.FOLDER.parent / "src")}
    subprocess.run([environment.PYTHON, "-c", code], env=env, check=True)


def test_the_last_replica_goes_with_the_requests_and_comes_again(ray: RayServer) -> None:
    assert ray.draw(**SMALL).status_code == 200
    assert ray.replicas(MODEL)
    within(TIMEOUT_S, lambda: not ray.replicas(MODEL))
    assert ray.client.get("/readyz").status_code == 200
    assert ray.draw(**SMALL).status_code == 200
