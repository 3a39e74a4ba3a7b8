"""When memory runs out: what is tried, in which order, what stands in the recipe, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from starlette.testclient import TestClient

from sfumato.batching import offload
from sfumato.core import Done, Generation
from sfumato.drawing import out_of_memory, two_passes
from sfumato.drawing.draw import draw
from sfumato.drawing.info import model_info
from sfumato.engine.local import Local
from sfumato.errors import OutOfMemory
from sfumato.models.adapters import Adapters
from sfumato.models.load import Loaded
from sfumato.pictures.images import decoded
from sfumato.pipelines.tiling import can_tile, tiled
from sfumato.sampling import Hires, Sampling
from sfumato.settings import Settings
from support import clip_classes, tiny
from support.drawing import loaded, quiet, wanted
from support.families_moving import FAMILIES
from support.inside import Inside

MORE_THAN_THERE_IS = 1 << 50
"""Bytes: torch's allocator fails as it does when memory is short."""


@contextmanager
def short_of_memory(module: Any, fits: Callable[[Any], bool] = lambda sample: False) -> Iterator[list[bool]]:
    """While entered, `module` allocates more than there is before it computes on what does not fit."""
    tried: list[bool] = []

    def before(module: Any, args: Any) -> None:
        tried.append(fits(args[0]))
        if not tried[-1]:
            torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)

    hook = module.register_forward_pre_hook(before)
    try:
        yield tried
    finally:
        hook.remove()


def small(sample: torch.Tensor) -> bool:
    return sample.shape[-1] <= 8


def asked(side: int = 128) -> Generation:
    return wanted(prompt="a cat", width=side, height=side)


def drawn(model: Loaded, generation: Generation) -> Done:
    return out_of_memory.with_less(model, generation, lambda each: draw(model, each, quiet))


def test_a_real_shortage_is_met_with_tiles_and_is_in_the_recipe() -> None:
    model = loaded(tiny.stable_diffusion())
    with short_of_memory(model.pipeline.vae.decoder, small) as tried:
        done = drawn(model, asked())
    assert not all(tried)
    assert done.recipe.savings == ("vae_tiling",)
    assert drawn(model, asked(64)).recipe.savings == ()


def test_the_size_of_a_second_pass_is_what_tiles_are_remembered_for() -> None:
    model = loaded(tiny.stable_diffusion())
    second = Sampling(width=128, height=128, steps=2, strength=0.5)
    generation = replace(asked(64), hires=Hires(upscaler="Lanczos", sampling=second))
    with short_of_memory(model.pipeline.vae.decoder, small):
        done = out_of_memory.with_less(model, generation, lambda each: two_passes.picture(model, each, quiet))
    assert done.recipe.savings == ("vae_tiling",)
    assert model.state.tiled_from == 128 * 128
    assert drawn(model, asked(64)).recipe.savings == ()


# Clips


def film(frames: int) -> Generation:
    return wanted(prompt="a cat", width=32, height=32, num_frames=frames, format="webp", max_sequence_length=16)


def few_frames(latents: torch.Tensor) -> bool:
    return latents.shape[2] <= 9


CLIPS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "LTX": (FAMILIES["LTX"].build, 49, 9),
    "LTX-2": (clip_classes.ltx2, 33, 9),
    "Mochi": (FAMILIES["Mochi"].build, 73, 7),
}
"""Classes whose VAE decodes all frames at once: how many do not fit, and how many do."""


@pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, about toy sizes
@pytest.mark.parametrize(
    "family", ["LTX", *(pytest.param(name, marks=pytest.mark.slow) for name in ("LTX-2", "Mochi"))]
)
def test_a_long_clip_is_decoded_a_few_frames_at_a_time(family: str) -> None:
    build, long, short = CLIPS[family]
    model = loaded(build())
    with short_of_memory(model.pipeline.vae.decoder, few_frames) as tried:
        done = drawn(model, film(long))
        assert not tried[0] and all(tried[1:])
        assert done.recipe.savings == ("vae_tiling",)
        assert done.recipe.sampling.num_frames == long and done.warnings == ()
        tried.clear()
        assert drawn(model, film(short)).recipe.savings == ()  # as it was
        assert drawn(model, film(long)).file == done.file  # in tiles from the start
        assert all(tried)
    with short_of_memory(model.pipeline.vae.decoder), pytest.raises(OutOfMemory, match="smaller size or fewer frames"):
        drawn(model, film(short))


@pytest.mark.parametrize("family", CLIPS)
def test_tiles_in_time_have_all_frames(family: str) -> None:
    vae = CLIPS[family][0]().vae.eval()
    for frames in range(1, 16):
        latents = torch.zeros(1, vae.config.latent_channels, frames, 4, 4)
        with torch.no_grad():
            whole, parts = (each.decode(latents, return_dict=False)[0] for each in (vae, tiled(vae)))
        assert whole.shape == parts.shape
    assert not vae.use_framewise_decoding


@pytest.mark.parametrize("family", [tiny.stable_diffusion, tiny.flux])
def test_tiles_that_the_file_forbids_are_not_used(family: Callable[[], Any]) -> None:
    model = loaded(family(), vae_tiling=False)
    with short_of_memory(model.pipeline.vae.decoder, small), pytest.raises(OutOfMemory, match="Request a smaller size"):
        drawn(model, asked())
    assert drawn(model, asked()).recipe.savings == ()


def test_a_class_without_tiles_is_not_asked_for_them() -> None:
    """Every autoencoder of diffusers inherits the methods, and those without tiles raise in them."""
    model = loaded(tiny.stable_diffusion())
    assert can_tile(model.pipeline)
    model.pipeline.register_modules(vae=VQModel(block_out_channels=(32,), norm_num_groups=32, latent_channels=4))
    assert hasattr(model.pipeline.vae, "enable_tiling")
    assert not can_tile(model.pipeline)

    def attempt(generation: Generation) -> Done:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemory, match=r"m: out of memory\. Request"):
        out_of_memory.with_less(model, asked(), attempt)


# On a GPU. There is none here: what would move weights is put into effect on the CPU.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    engaged: list[str] = []
    enable, enable_groups = offload.enable, offload.enable_groups

    def modules(pipe: Any, device: str) -> None:
        engaged.append(f"modules on {device}")
        enable(pipe, "cpu")

    def layers(pipe: Any, device: str, by_block: Callable[[str], bool]) -> None:
        engaged.append(f"layers on {device}")
        enable_groups(pipe, "cpu", by_block)

    monkeypatch.setattr(offload, "enable", modules)
    monkeypatch.setattr(offload, "enable_groups", layers)
    return engaged


def test_the_ladder_of_a_gpu(gpu: list[str]) -> None:
    """Tiles, modules, layers; each picture says which, and it is the resident one."""
    pipe = tiny.stable_diffusion()
    expected = draw(loaded(pipe), asked(64), quiet)
    model = replace(loaded(pipe), device="cuda")
    left = [0]

    def attempt(generation: Generation) -> Done:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draw(model, generation, quiet)

    for failures, savings in (
        (0, ()),
        (2, ("offload", "vae_tiling")),
        (0, ("offload", "vae_tiling")),
        (1, ("group_offload", "vae_tiling")),
        (0, ("group_offload", "vae_tiling")),
    ):
        left[0] = failures
        done = out_of_memory.with_less(model, asked(64), attempt)
        assert done.recipe.savings == savings
        assert np.array_equal(np.asarray(decoded(done.file)), np.asarray(decoded(expected.file)))
        assert model_info(model).savings == tuple(name for name in savings if name != "vae_tiling")
    assert gpu == ["modules on cuda", "layers on cuda"]
    left[0] = 1
    with pytest.raises(OutOfMemory, match="even with group_offload, vae_tiling"):
        out_of_memory.with_less(model, asked(64), attempt)
    assert (model.state.tiled_from is not None, model.state.offload) == (True, "group")


@pytest.mark.parametrize(("written", "engaged"), [("none", []), ("group", []), ("model", ["layers on cuda"])])
def test_the_ladder_begins_where_the_file_is(written: str, engaged: list[str], gpu: list[str]) -> None:
    model = replace(loaded(tiny.stable_diffusion(), offload=written), device="cuda")
    model.state.offload = written  # type: ignore[assignment]

    def attempt(generation: Generation) -> Done:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemory):
        out_of_memory.with_less(model, asked(64), attempt)
    assert gpu == engaged


def test_a_class_without_a_sequence_goes_on_to_layers(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(loaded(tiny.stable_diffusion()), device="cuda")
    monkeypatch.setattr(type(model.pipeline), "model_cpu_offload_seq", None)

    def attempt(generation: Generation) -> Done:
        if model.state.offload == "none":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draw(model, generation, quiet)

    assert out_of_memory.with_less(model, asked(64), attempt).recipe.savings == ("group_offload", "vae_tiling")
    assert gpu == ["layers on cuda"]


# Over HTTP.


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, repositories: dict[str, Path]) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("short")
    inside = Inside(folder)
    (folder / "models" / "m.yaml").write_text(
        f"name: m\nparameters: {{model: {repositories['nitrosocke/Ghibli-Diffusion']}}}\ndtype: fp32\ncuda: false\n"
        "step: 2\nvae_slicing: true\n"
    )
    inside.engine = inside.service.engine = Local(Settings(device="cpu", log_level="critical"))  # type: ignore[assignment]
    with inside.client() as client:
        yield client


def posted(client: TestClient, size: str = "64x64") -> Any:
    return client.post("/v1/images/generations", json={"prompt": "a cat", "model": "m", "size": size})


def test_it_ends_in_an_error_that_is_not_worth_trying_again(client: TestClient) -> None:
    """And the next request works."""
    assert posted(client).status_code == 200
    engine = client.app.state.service.engine  # type: ignore[attr-defined]
    model = engine._loop._pool._loaded["m"]
    with short_of_memory(model.pipeline.unet):
        answer = posted(client)
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("out_of_memory", "server_error")
    assert "out of memory, even with vae_slicing, vae_tiling" in error["message"]
    assert posted(client).status_code == 200


def test_the_list_has_what_is_in_effect(client: TestClient) -> None:
    assert posted(client).status_code == 200
    assert client.get("/v1/models/m").json()["sfumato"]["savings"] == ["vae_slicing"]
    engine = client.app.state.service.engine  # type: ignore[attr-defined]
    pool = engine._loop._pool
    model = pool._loaded["m"]
    hook = model.pipeline.unet.register_forward_pre_hook(lambda *args: setattr(model.state, "offload", "group"))
    try:
        assert posted(client).status_code == 200
    finally:
        hook.remove()
    assert client.get("/v1/models/m").json()["sfumato"]["savings"] == ["group_offload", "vae_slicing"]
    model.state.offload = "none"


def test_loras_that_no_request_uses_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tiny.stable_diffusion())
    dropped: list[bool] = []
    monkeypatch.setattr(Adapters, "drop", lambda adapters: dropped.append(adapters is model.state.adapters) or 1)
    with short_of_memory(model.pipeline.vae.decoder, small), pytest.raises(OutOfMemory):
        drawn(replace(model, config=replace(model.config, vae_tiling=False)), asked())
    assert dropped
    assert all(dropped)
