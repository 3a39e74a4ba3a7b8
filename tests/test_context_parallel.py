"""`context_parallel`: one forward pass by several processes, here two on the CPU, through diffusers' own hooks."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from prometheus_client.parser import text_string_to_metric_families

from sfumato.config import ModelConfig
from sfumato.config.parse import load
from sfumato.core import Done, Failed, Generation
from sfumato.drawing.draw import draw
from sfumato.engine.local import Local
from sfumato.errors import ModelFileError
from sfumato.models import context_parallel
from sfumato.models.load import Loaded
from sfumato.pictures.images import decoded
from sfumato.runners.choice import Runners
from sfumato.runners.parallel import Parallel
from sfumato.settings import Settings, device_names
from support import families_moving, families_transformers, tiny
from support.answerable import within
from support.answers import image_of, pixels
from support.drawing import loaded, quiet, wanted
from support.held import Held
from support.serving import TIMEOUT_S, Server

SIZE = {"width": 64, "height": 64}
DEVICES = ("cpu", "cpu")


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runners]:
    """A process has one group at a time: the tests of this module share it."""
    made = Runners("eager", tmp_path_factory.mktemp("runners"), devices=DEVICES)
    yield made
    made.close()


def as_floats(done: Done) -> Any:
    return np.asarray(decoded(done.file)).astype(float)


def by_both(model: Loaded, runners: Runners, generation: Generation) -> Done:
    """In this thread: what has to be sent is, at the first call."""
    chosen = runners.of(model.computing(), model.state.runners, None, None, divide=True)
    return draw(model, generation, quiet, None, chosen)


def runner_of(model: Loaded, component: str = "transformer") -> Parallel:
    runner = model.state.runners[component]
    assert isinstance(runner, Parallel)
    return runner


def qwen_image() -> Any:
    """With heads that two can share."""
    pipeline = families_transformers.qwen_image()
    config = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    with tiny.seeded(2):
        pipeline.transformer = QwenImageTransformer2DModel(**{**config, "num_attention_heads": 2}).eval()
    return pipeline


def test_a_picture_of_two_is_that_of_one(runners: Runners) -> None:
    model = loaded(tiny.flux(), **SIZE)
    generation = wanted(**SIZE, steps=3)
    alone = draw(model, generation, quiet)
    together = by_both(model, runners, generation)
    assert np.abs(as_floats(together) - as_floats(alone)).max() <= 1
    assert together.recipe.runner == "text_encoder eager, text_encoder_2 eager, transformer parallel-2, vae eager"
    assert runner_of(model).sizes == dict.fromkeys(runner_of(model).sizes, "")
    (state,) = [each for each in runners.states(model.computing(), model.state.runners, None, divide=True)
                if each.module == "transformer"]  # fmt: skip
    assert state.runner == "parallel-2"
    assert "on each of cpu, cpu" in state.detail
    weights = sum(each.nbytes for each in model.pipeline.transformer.parameters())
    assert runner_of(model).bytes >= weights
    assert sum(model.blocks().values()) >= weights + sum(
        each.nbytes for each in model.pipeline.transformer.parameters()
    )


@pytest.mark.parametrize("build", [tiny.flux, qwen_image, families_moving.wan])
def test_what_both_compute_is_what_one_computes(runners: Runners, build: Any) -> None:
    model = loaded(build(), **SIZE)
    module = model.pipeline.transformer
    runner = runners.of(model.computing(), model.state.runners, None, None, divide=True)[id(module)]
    assert isinstance(runner, Parallel)
    for rows in (1, 2):
        call = call_of(module, rows)
        own = module(**call, return_dict=False)[0]
        assert runner.prepare("__call__", (), call, wait=True)
        outputs = [runner.run("__call__", (), {**call, "return_dict": False}) for _ in range(2)]
        assert [by for _, by in outputs] == ["parallel-2"] * 2, runner.sizes
        for output, _ in outputs:
            assert torch.max(torch.abs(output[0] - own)) <= 1e-4 * torch.max(torch.abs(own))
        if rows == 2:  # each row of a batch is the row alone
            for row in range(2):
                (one,), _ = runner.run("__call__", (), {**row_of(call, row), "return_dict": False})
                assert torch.max(torch.abs(one[0] - outputs[0][0][0][row])) <= 1e-4 * torch.max(torch.abs(one))


def call_of(module: Any, rows: int) -> dict[str, Any]:
    """Arguments of a transformer, as its pipeline has them."""
    torch.manual_seed(rows)
    name, width = type(module).__name__, module.config.in_channels
    text = {"FluxTransformer2DModel": "joint_attention_dim", "QwenImageTransformer2DModel": "joint_attention_dim"}
    encoded = torch.randn(rows, 8, module.config[text.get(name, "text_dim")])
    time = torch.linspace(0.9, 0.4, rows)
    if name == "WanTransformer3DModel":
        return {"hidden_states": torch.randn(rows, width, 1, 8, 8), "timestep": time * 1000,
                "encoder_hidden_states": encoded}  # fmt: skip
    call = {"hidden_states": torch.randn(rows, 16, width), "timestep": time, "encoder_hidden_states": encoded}
    if name == "QwenImageTransformer2DModel":
        return {**call, "encoder_hidden_states_mask": torch.ones(rows, 8, dtype=torch.bool),
                "img_shapes": [[(1, 4, 4)]] * rows}  # fmt: skip
    return {**call, "pooled_projections": torch.randn(rows, module.config.pooled_projection_dim),
            "guidance": torch.full((rows,), 3.5), "img_ids": torch.arange(48).reshape(16, 3) % 4,
            "txt_ids": torch.zeros(8, 3)}  # fmt: skip


def row_of(call: dict[str, Any], row: int) -> dict[str, Any]:
    return {name: value if name in ("img_ids", "txt_ids") else value[row : row + 1] for name, value in call.items()}


def test_tensors_in_main_memory_go_with_the_message(runners: Runners, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here all of them, as if the first device were an accelerator: a GPU's pipelines leave some on the host."""
    model = loaded(tiny.flux(), **SIZE)
    module = model.pipeline.transformer
    runner = runners.of(model.computing(), model.state.runners, None, None, divide=True)[id(module)]
    assert isinstance(runner, Parallel)
    call = {**call_of(module, 1), "return_dict": False}
    assert runner.prepare("__call__", (), call, wait=True)
    monkeypatch.setattr(runner._group, "devices", ("meta", "cpu"))
    pool = ThreadPoolExecutor(1)  # its thread waits for ever if the other process cannot read the message
    output = pool.submit(runner._group.forward, runner.number, runner._divided, (), call).result(TIMEOUT_S)
    own = module(**call)[0]
    assert torch.max(torch.abs(output[0] - own)) <= 1e-4 * torch.max(torch.abs(own))


def test_a_group_that_ends_leaves_no_folder(tmp_path: Path) -> None:
    """In a process of its own: one has one group at a time."""
    code = "from sfumato.runners.group import Group; g = Group(('cpu', 'cpu'))\nwith g._lock: g._start()\ng.close()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert not list(tmp_path.glob("sfumato-group-*"))


def test_a_sequence_that_cannot_be_divided_is_one_devices_own(runners: Runners) -> None:
    model = loaded(tiny.flux(), **SIZE)
    module = model.pipeline.transformer
    runner = runners.of(model.computing(), model.state.runners, None, None, divide=True)[id(module)]
    assert isinstance(runner, Parallel)
    even = {**call_of(module, 1), "return_dict": False}
    odd = {**even, "hidden_states": even["hidden_states"][:, :15], "img_ids": even["img_ids"][:15]}
    runner.prepare("__call__", (), odd, wait=True)
    output, by = runner.run("__call__", (), odd)
    assert by == "eager"
    assert torch.equal(output[0], module(**odd)[0])
    assert not runner.serves("__call__", (), odd)
    assert "1 of 1 sizes are computed without it: AssertionError" in runner.state("transformer").detail
    assert runner.run("__call__", (), even)[1] == "parallel-2", runner.sizes  # the other process has not lost its place


def test_a_module_that_has_changed_is_computed_alone(runners: Runners) -> None:
    model = loaded(tiny.flux(), **SIZE)
    by_both(model, runners, wanted(**SIZE))
    with torch.no_grad():
        model.pipeline.transformer.proj_out.weight.add_(1)
    assert by_both(model, runners, wanted(**SIZE)).recipe.runner == "eager"


# A server.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save(tiny.flux(), folder / "flux")
    (folder / "divided.yaml").write_text("parameters: {model: flux}\ndtype: fp32\ndiffusers: {context_parallel: 2}\n")
    (folder / "whole.yaml").write_text("parameters: {model: flux}\ndtype: fp32\n")
    return folder


BODY = {"prompt": "a red fox", "seed": 5, "size": "64x64", "response_format": "b64_json"}


def followers(server: Server) -> list[int]:
    return [int(pid) for pid in re.findall(r"process (\d+) computes with this one, on cpu", server.log)]


def ended(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


@pytest.fixture(scope="module")
def both(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(models, tmp_path_factory.mktemp("data"), "--devices", "cpu,cpu+cpu") as server:
        within(TIMEOUT_S, lambda: all(each["ready"] for each in server.client.get("/v1/status").json()["devices"]))
        yield server


def test_a_model_is_drawn_where_there_are_as_many_devices_and_a_death_is_replayed(both: Server) -> None:
    assert [each["name"] for each in both.client.get("/v1/status").json()["devices"]] == ["cpu", "cpu+cpu"]
    whole = pixels(image_of(both.draw(**BODY, model="whole", step=60)))
    answer = both.draw(**BODY, model="divided", step=60)
    assert np.abs(pixels(image_of(answer)).astype(int) - whole.astype(int)).max() <= 1
    undisturbed = pixels(image_of(answer))
    facts = both.client.get("/v1/models/divided").json()["sfumato"]
    assert next(each for each in facts["runners"] if each["module"] == "transformer")["runner"] == "parallel-2"
    assert facts["devices"]["cpu+cpu"] == "ready"
    (follower,) = followers(both)

    def killed() -> bool:
        """Whether the kill came while the picture was drawn."""
        since = len(both.lines)
        with Held(both, {**BODY, "model": "divided", "step": 60}) as held:
            assert held.drawing()["devices"] == ["cpu+cpu"]
            os.kill(followers(both)[-1], signal.SIGKILL)
            assert np.array_equal(pixels(image_of(held.answer())), undisturbed)
        both.wait_for(r"worker \d+ is up: cpu\+cpu,", since)
        return len(re.findall(r"request \S+ starts", "".join(both.lines[since:]))) > 1

    assert any(killed() for _ in range(5))
    assert "the process that computes on cpu has died, and so this one ends" in both.log
    assert ended(follower)


def batches(server: Server) -> float:
    """Forward passes of more than one row."""
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    return sum(each.value for family in families for each in family.samples
               if each.name == "sfumato_batch_size_forwards_total" and each.labels["size"] != "1"
               and each.labels["device"] == "cpu+cpu")  # fmt: skip


def test_pictures_that_are_batched_are_divided_together(both: Server) -> None:
    """And each is the one that is drawn alone."""
    body = {**BODY, "model": "divided", "step": 12}
    alone = [pixels(image_of(both.draw(**{**body, "seed": seed}))).astype(int) for seed in (5, 6, 7)]
    before = batches(both)
    answer = both.draw(**body, n=3)
    assert batches(both) > before
    for at, one in enumerate(alone):
        assert np.abs(pixels(image_of(answer, at)).astype(int) - one).max() <= 1


def test_a_workers_death_ends_its_followers(both: Server) -> None:
    both.draw(**BODY, model="divided", step=1)
    last = followers(both)[-1]
    assert not ended(last)
    os.kill(int(re.findall(r"worker (\d+) is up: cpu\+cpu,", both.log)[-1]), signal.SIGKILL)
    within(TIMEOUT_S, lambda: ended(last))


def test_a_server_without_so_many_devices_says_how_to_start_it(tmp_path: Path) -> None:
    folder = tiny.save(tiny.flux(), tmp_path / "m")
    config = ModelConfig(name="m", model=str(folder), folder=tmp_path, context_parallel=2)

    async def failed() -> Any:
        engine = Local(Settings(device="cpu", data=tmp_path))
        await engine.start()
        try:
            async for event in engine.submit(config, wanted(**SIZE)):
                last = event
            return last
        finally:
            await engine.stop()

    last = asyncio.run(failed())
    assert isinstance(last, Failed)
    assert last.error.code == "device_unavailable"
    assert "this one has cpu. Start the server with, for example, --devices cuda:0+cuda:1" in last.error.message


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.filterwarnings("ignore")
def test_two_gpus_draw_the_picture_of_one(models: Path, tmp_path: Path) -> None:
    with Server(models, tmp_path / "data", "--devices", "cuda:0+cuda:1") as server:
        whole = pixels(image_of(server.draw(**BODY, model="whole", step=12))).astype(int)
        assert np.abs(pixels(image_of(server.draw(**BODY, model="divided", step=12))) - whole).max() <= 2
        facts = server.client.get("/v1/models/divided").json()["sfumato"]
        assert next(each for each in facts["runners"] if each["module"] == "transformer")["runner"] == "parallel-2"


# What is refused.


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("offload: group", "does not go together with offload"),
        ("low_vram: true", "does not go together with offload"),
        ("quantization: int8", "does not go together with quantization"),
        ("layerwise_casting: fp8", "does not go together with layerwise_casting"),
        ("cache: first_block", "does not go together with cache"),
    ],
)
def test_a_file_with_a_key_that_changes_the_weights_is_refused(tmp_path: Path, lines: str, words: str) -> None:
    (tmp_path / "m.yaml").write_text(f"parameters: {{model: m}}\n{lines}\ndiffusers: {{context_parallel: 2}}\n")
    (config,) = load(tmp_path / "m.yaml")
    assert isinstance(config, ModelConfig)
    with pytest.raises(ModelFileError, match=words) as raised:
        context_parallel.check(config, {})
    assert raised.value.param == "diffusers.context_parallel"


@pytest.mark.parametrize(
    ("part", "name", "can"),
    [
        ("unet", "UNet2DConditionModel", False), ("transformer", "SD3Transformer2DModel", False),
        ("transformer", "FluxTransformer2DModel", True), ("transformer", "WanTransformer3DModel", True),
        ("transformer", "QwenImageTransformer2DModel", True), ("transformer", "SomebodysOwn", True),
    ],
)  # fmt: skip
def test_a_class_without_a_plan_is_refused_before_anything_is_loaded(part: str, name: str, can: bool) -> None:
    config = ModelConfig(name="m", model="m", context_parallel=2)
    index = {part: ["diffusers", name], "vae": ["diffusers", "AutoencoderKL"]}
    if can:
        context_parallel.check(config, index)
        return
    with pytest.raises(ModelFileError, match=f"no plan to divide its {part} {name}; leave the key out"):
        context_parallel.check(config, index)


def test_a_loaded_pipeline_without_a_plan_or_with_too_few_heads_is_refused() -> None:
    config = ModelConfig(name="m", model="m", context_parallel=2)
    with pytest.raises(ModelFileError, match="no plan to divide its unet UNet2DConditionModel"):
        context_parallel.check_loaded(config, tiny.stable_diffusion())
    flux = tiny.flux()
    context_parallel.check_loaded(config, flux)
    with pytest.raises(ModelFileError, match="the 2 attention heads of its transformer"):
        context_parallel.check_loaded(replace(config, context_parallel=4), flux)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cuda:0+cuda:1, cuda:2", ["cuda:0+cuda:1", "cuda:2"]),
        ("cpu + cpu,cpu", ["cpu+cpu", "cpu"]),
        ("cuda+cuda:1", ["cuda:0+cuda:1"]),
    ],
)
def test_devices_that_draw_one_picture_are_joined_by_a_plus(text: str, names: list[str]) -> None:
    assert device_names(text) == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cuda:0+cpu", "are of one kind"), ("mps+mps", "are of one kind, not mps"), ("cuda:0+", "'' is no device"),
        ("cuda:0+cuda:1,cuda:1", "cuda:1 is named 2 times"), ("auto+cpu", "'auto' is no device"),
    ],
)  # fmt: skip
def test_a_group_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        device_names(text)
