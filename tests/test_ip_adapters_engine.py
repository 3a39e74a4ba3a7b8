"""IP-Adapters that requests name, in the engine: batched, shared, within the budget, from a hub, and made again."""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sfumato.commands.generate import generate
from sfumato.core import Control, Done, Failed, Generation
from sfumato.errors import InvalidRequest
from sfumato.models import ip_adapters
from sfumato.models.picture_prompt import Adapter, PicturePrompt, Prompted, Weights
from sfumato.pictures import recipe
from sfumato.sampling import Sampling
from sfumato.settings import Settings
from support import loras, nets, prompted, tiny
from support.drawing import loaded, source
from support.engines import Engine, generation, pixels
from support.here import cut
from support.hub import Hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model, its adapters with their image encoder, and a LoRA."""
    folder = tmp_path_factory.mktemp("models")
    plain = nets.plain("sd")
    tiny.save(plain, folder / "base")
    prompted.save_encoder(folder / "ip_adapters" / "image_encoder")
    for form in ("base", "plus"):
        prompted.save_adapter(folder / "ip_adapters" / f"{form}.safetensors", plain.unet, form)
    loras.saved(loras.kohya(plain), folder / "style.safetensors")
    return folder


def requested(id: str, name: str = "plus", picture: int = 64, weight: float | None = None, **fields: Any) -> Generation:
    return generation(id, controls=(Control(source(picture, 64), name=name, weight=weight),), **fields)


@pytest.mark.parametrize("family", ["sd", "xl"])
@pytest.mark.parametrize("forms", [("base",), ("plus",), ("full",), ("base", "plus")])
def test_the_twin_computes_what_diffusers_computes(tmp_path: Path, family: str, forms: tuple[str, ...]) -> None:
    pipeline = nets.plain(family)
    own, scales = copy.deepcopy(pipeline.unet), [0.3, 0.8][: len(forms)]
    adapters = []
    for seed, form in enumerate(forms):
        file = tmp_path / f"{form}.safetensors"
        prompted.save_adapter(file, own, form, seed=seed)
        encoder = ip_adapters.ip_adapters.encoder_of(file)
        adapters.append(Prompted(Adapter(Weights(load_file(file)), form, encoder, None), (seed,), scales[seed]))
    prompt = PicturePrompt(tuple(adapters), "controls[0].name")
    model = loaded(pipeline)
    model.prompt = prompt
    selected, attending = ip_adapters.selections(model, {})
    assert attending is not None
    selection = selected[id(pipeline.unet)]
    states = [
        {"image_proj": each.adapter.weights.of("image_proj."), "ip_adapter": each.adapter.weights.of("ip_adapter.")}
        for each in adapters
    ]
    own._load_ip_adapter_weights(states)
    for processor in own.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = list(scales)
    torch.manual_seed(0)
    width = own.config.cross_attention_dim
    shapes = {"base": (2, 1, 48), "plus": (2, 1, 17, 64), "full": (2, 1, 257, 64)}
    added = {"image_embeds": [torch.randn(shapes[form]) for form in forms]}
    if family == "xl":
        ids = own.config.projection_class_embeddings_input_dim - 6 * own.config.addition_time_embed_dim
        added |= {"text_embeds": torch.randn(2, ids), "time_ids": torch.ones(2, 6)}
    given = {
        "sample": torch.randn(2, own.config.in_channels, 8, 8), "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2, 5, width), "added_cond_kwargs": added,
    }  # fmt: skip
    with torch.no_grad():
        expected = own(**given).sample
        answer = selection.run("__call__", [selection], (), given).sample
        assert torch.allclose(answer, expected, atol=1e-5)
        attending.strengths = (0.0,) * len(forms)
        without = selection.run("__call__", [selection], (), given).sample
    assert not torch.allclose(without, expected, atol=1e-3)
    twin, weights = selection.module, adapters[0].adapter.weights
    shared = {tensor.data_ptr() for tensor in twin.parameters()}
    assert {tensor.data_ptr() for tensor in pipeline.unet.parameters()} <= shared
    attention = [tensor.data_ptr() for name, tensor in zip(weights.names, weights.tensors, strict=True)
                 if name.startswith("ip_adapter.")]  # fmt: skip
    assert set(attention) <= shared, "the adapter's tensors are not in memory twice"


def test_requests_with_one_adapter_share_forward_passes_and_draw_what_each_draws_alone(folder: Path) -> None:
    engine = Engine(folder, max_batch=16)
    engine.draw(requested("first"))  # then nothing waits for a load
    wanted = [
        requested("0"), requested("1", picture=96, steps=6), requested("2", guidance_scale=3.0),
        generation("3"), generation("4", steps=5), requested("5", weight=0.3), requested("6", "base"),
    ]  # fmt: skip
    events = engine.draw(*wanted)
    assert engine.shared("unet") == 3
    assert engine.shared("image_encoder") >= 3
    assert engine.shared("text_encoder") >= 5  # with the plain ones
    for each in wanted:
        alone = Engine(folder, max_batch=1).draw(each)[each.id]
        assert np.abs(pixels(alone) - pixels(events[each.id])).max() <= 1, each.id
    assert engine.in_memory == {
        "m", "ip_adapters/plus", "ip_adapters/base", f"image encoder {(folder / 'ip_adapters/image_encoder').resolve()}"
    }  # fmt: skip


def test_requests_with_one_adapter_and_different_loras_share_forward_passes(folder: Path) -> None:
    style = loras.of(folder / "style.safetensors")
    wanted = [requested("0", loras=(style,)), requested("1"), requested("2", loras=(style,)), generation("3")]
    engine = Engine(folder, max_batch=16)
    engine.draw(requested("first", loras=(style,)))
    events = engine.draw(*wanted)
    assert engine.shared("unet") == 3
    for each in wanted:
        alone = Engine(folder, max_batch=1).draw(each)[each.id]
        assert np.abs(pixels(alone) - pixels(events[each.id])).max() <= 1, each.id


def test_a_request_that_is_cancelled_or_fails_leaves_the_model_as_it_was(folder: Path) -> None:
    plain = pixels(Engine(folder).draw(generation("1"))["1"])
    engine = Engine(folder)
    engine.cancel_at_its_first_step("2")
    failing = requested("3", clip_skip=60)
    events = engine.draw(requested("2"), failing, generation("1"))
    assert [type(events[id]) for id in "23"] == [Failed, Failed]
    assert np.abs(pixels(events["1"]) - plain).max() <= 1
    pool = engine.loop._pool
    pipeline = pool._loaded["m"].pipeline
    assert pipeline.image_encoder is None
    assert pipeline.unet.encoder_hid_proj is None
    assert not any(hasattr(each, "to_k_ip") for each in pipeline.unet.attn_processors.values())
    assert not any(pool._users.values())
    assert not ip_adapters._EXTENDED, "no twin stays in memory"


def test_an_idle_adapter_leaves_when_another_needs_the_memory_or_all_is_unloaded(folder: Path) -> None:
    both = Engine(folder)
    both.draw(requested("1", "base"), requested("2", "plus"))
    sizes = both.loop._pool.sizes
    engine = Engine(folder, max_active=1)
    smaller = min(size for name, size in sizes.items() if name.startswith("ip_adapters/"))
    engine.loop._pool._budget.size = sum(sizes.values()) - smaller // 2
    events = engine.draw(requested("1", "base"), requested("2", "plus"))
    assert all(isinstance(event, Done) for event in events.values()), events
    assert "ip_adapters/base" not in engine.in_memory
    engine.loop._pool.unload(None)
    assert engine.in_memory == set()


def test_an_adapter_of_a_hub_is_fetched_once_with_the_encoder_that_fits(
    folder: Path, here: Hub, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    for place in ("models", "sdxl_models"):  # as in h94/IP-Adapter
        (repository / place).mkdir(parents=True)
        shutil.copy(folder / "ip_adapters" / "plus.safetensors", repository / place / "ip-adapter-plus.safetensors")
    shutil.copytree(folder / "ip_adapters" / "image_encoder", repository / "models" / "image_encoder")
    prompted.save_encoder(repository / "sdxl_models" / "image_encoder", hidden_size=32)
    (repository / "models" / "ip-adapter-plus.bin").write_bytes(b"a pickle")
    here.add("some/adapters", repository)
    local = pixels(Engine(folder).draw(requested("1"))["1"])
    for place in ("models", "sdxl_models"):
        events = Engine(folder).draw(requested("1", f"some/adapters/{place}/ip-adapter-plus.safetensors"))
        assert np.array_equal(pixels(events["1"]), local), place
    before = here.downloads("some/adapters")
    assert not any(name.endswith(".bin") or name == "sdxl_models/image_encoder/model.safetensors" for name in before)
    again = requested("1", "some/adapters@main/models/ip-adapter-plus.safetensors")
    assert isinstance(Engine(folder).draw(again)["1"], Done)
    assert here.downloads("some/adapters") == before
    missing = Engine(folder).draw(requested("1", "some/adapters/other.safetensors"))["1"]
    assert isinstance(missing, Failed)
    assert (missing.error.status, missing.error.param) == (400, "controls[0].name")


def test_what_a_model_file_names_on_a_hub_is_pulled(
    folder: Path, here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter and its image encoder, so that the first request needs no network."""
    repository = tmp_path / "repository"
    (repository / "models").mkdir(parents=True)
    shutil.copy(folder / "ip_adapters" / "plus.safetensors", repository / "models" / "ip-adapter-plus.safetensors")
    shutil.copytree(folder / "ip_adapters" / "image_encoder", repository / "models" / "image_encoder")
    here.add("some/ip-adapters", repository)
    named = "some/ip-adapters/models/ip-adapter-plus.safetensors"
    ip_adapters.fetch(Engine(folder, ip_adapters=(named,)).config)
    assert here.downloads("some/ip-adapters").keys() >= {
        "models/ip-adapter-plus.safetensors", "models/image_encoder/model.safetensors",
    }  # fmt: skip
    cut(monkeypatch)
    follows = generation("1", controls=(Control(source(64, 64)),))
    drawn = Engine(folder, ip_adapters=(named,)).draw(follows)["1"]
    local = Engine(folder, ip_adapters=("plus",)).draw(follows)["1"]
    assert np.array_equal(pixels(drawn), pixels(local))


def test_a_picture_is_made_again_from_its_recipe_and_the_references(folder: Path, tmp_path: Path) -> None:
    (folder / "sd.yaml").write_text("parameters: {model: base}\ndtype: fp32\nsize: 64x64\n")
    settings = Settings(models=folder, data=tmp_path / "data", device="cpu")
    one, two = source(64, 64), source(64, 32)
    controls = [
        Control(one, name="plus", weight=0.7, end=0.5), Control(two, joins=True), Control(two, name="base", weight=0.4),
    ]  # fmt: skip
    fields = {"prompts": ["a cat"], "model": "sd", "seed": 7, "sampling": Sampling(steps=2)}
    (like,) = generate({**fields, "controls": controls}, None, tmp_path / "like.png", settings)
    told = recipe.read(like)
    digest = hashlib.sha256((folder / "ip_adapters" / "plus.safetensors").read_bytes()).hexdigest()
    assert [(each.name, each.weight, each.end, each.joins) for each in told.controls] == [
        ("plus", 0.7, 0.5, False), (None, None, None, True), ("base", 0.4, None, False),
    ]  # fmt: skip
    assert told.controls[0].net_sha256 == digest
    bare = [Control(one), Control(two), Control(two)]
    (again,) = generate({"controls": bare}, like, tmp_path / "again.png", settings)
    assert recipe.read(again).controls == told.controls
    assert again.read_bytes() == like.read_bytes()
    with pytest.raises(InvalidRequest, match="--control: not the picture"):
        generate({"controls": bare[::-1]}, like, None, settings)
