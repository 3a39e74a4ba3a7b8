"""Every low-memory mode draws the resident picture, to its own rounding, also beside neighbours; and is told of."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import sfumato
from sfumato.batching import offload, views
from sfumato.checkpoints import download
from sfumato.commands.check import check
from sfumato.config import ModelConfig
from sfumato.config.model import Adapter
from sfumato.core import Done
from sfumato.drawing.draw import draw
from sfumato.drawing.info import model_info
from sfumato.errors import InvalidRequest, ModelFileError
from sfumato.models import load, low_memory, precision, quantizers
from sfumato.models.adapters import Adapters
from sfumato.pictures.images import decoded
from sfumato.sampling import nested
from sfumato.serving.catalog import Catalog
from support import loras, modular, tiny
from support.drawing import loaded, quiet, source, wanted
from support.model_files import read

FAMILIES: dict[str, Callable[[], Any]] = {
    "sd": tiny.stable_diffusion, "sdxl": tiny.stable_diffusion_xl, "sd3": tiny.stable_diffusion_3, "flux": tiny.flux,
}  # fmt: skip
FAMILY = pytest.mark.parametrize("family", FAMILIES)
HAS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="the extra torchao is missing")
GiB = 1024**3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    others = {"ddpm": tiny.ddpm, "pixart": tiny.pixart}
    return {name: tiny.save(make(), root / name) for name, make in {**FAMILIES, **others}.items()}


def requests(*steps: int) -> list[dict[str, Any]]:
    """Three that differ in prompt, seed and steps."""
    return [
        {"prompt": prompt, "num_inference_steps": number, "width": 64, "height": 64, "output_type": "np",
         "generator": torch.Generator().manual_seed(len(prompt))}
        for prompt, number in zip(("a cat", "a red dog", "two birds in rain"), steps or (3, 4, 5), strict=True)
    ]  # fmt: skip


def together(pipe: Any, *steps: int) -> tuple[list[Any], dict[str, dict[str, Any]]]:
    pipe.set_progress_bar_config(disable=True)
    stats: dict[str, dict[str, Any]] = {}
    return [each.images[0] for each in sfumato.gather(pipe, requests(*steps), stats=stats)], stats


def batched(stats: dict[str, dict[str, Any]]) -> bool:
    denoiser = stats.get("unet") or stats["transformer"]
    return bool(denoiser["forwards"] < denoiser["calls"])


def drawn(config: ModelConfig, **fields: Any) -> tuple[Any, Done]:
    done = draw(load.load(config, "cpu", quiet), wanted(prompt="a cat", **{"width": 64, "height": 64, **fields}), quiet)
    return np.asarray(decoded(done.file)).astype(int), done


def config_of(folder: Path, **fields: Any) -> ModelConfig:
    return ModelConfig(**nested({"name": "m", "model": str(folder), "dtype": "fp32", **fields}))


# Weights that wait elsewhere. There is no second device here, so weights that are away are NaN until they come back: a
# layer that computed with them would spoil the picture.


class Away:
    """The tensors that are away."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.moves = 0

    def send(self, tensors: Iterator[torch.Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) not in self.kept and tensor.is_floating_point():
                self.kept[id(tensor)] = (tensor, tensor.data)
                tensor.data = torch.full_like(tensor.data, float("nan"))
                self.moves += 1

    def fetch(self, tensors: Iterator[torch.Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in self.kept:
                tensor.data = self.kept.pop(id(tensor))[1]


def tensors_of(*modules: torch.nn.Module) -> Iterator[torch.Tensor]:
    return (tensor for module in modules for tensor in [*module.parameters(), *module.buffers()])


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Away:
    away = Away()

    def of_group(group: ModuleGroup) -> Iterator[torch.Tensor]:
        yield from tensors_of(*group.modules)
        yield from [*group.parameters, *group.buffers]

    def init_hook(hook: Any, module: torch.nn.Module) -> torch.nn.Module:
        away.send(tensors_of(module))
        return module

    def pre_forward(hook: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if hook.prev_module_hook is not None:
            hook.prev_module_hook.offload()
        away.fetch(tensors_of(module))
        return args, kwargs

    monkeypatch.setattr(ModuleGroup, "offload_", lambda group: away.send(of_group(group)))
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: away.fetch(of_group(group)))
    monkeypatch.setattr(accelerate.hooks.CpuOffload, "init_hook", init_hook)
    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", pre_forward)
    monkeypatch.setattr(
        offload, "_on_device", lambda module: any(id(each) not in away.kept for each in module.parameters())
    )
    return away


def enable(pipe: Any, mode: str) -> None:
    if mode == "model":
        offload.enable(pipe, "cpu")
    else:
        offload.enable_groups(pipe, "cpu", precision.is_denoiser)


@FAMILY
@pytest.mark.parametrize("mode", ["model", "group", "model, then group"])
def test_offloaded_pictures_are_the_resident_ones(family: str, mode: str, away: Away) -> None:
    """Beside neighbours; and what waits is away at the end."""
    expected, resident_stats = together(FAMILIES[family]())
    pipe = FAMILIES[family]()
    for each in mode.split(", then "):
        enable(pipe, each)
    assert away.moves > 0
    weights = len(list(tensors_of(*(part for part in pipe.components.values() if isinstance(part, torch.nn.Module)))))
    assert len(away.kept) > weights / 2
    images, stats = together(pipe)
    for image, other in zip(images, expected, strict=True):
        assert np.isfinite(image).all()
        assert np.abs(image - other).max() < 1e-5
    assert batched(stats) and batched(resident_stats)
    assert away.moves > weights, "nothing went away again"
    if "group" in mode:
        assert len(away.kept) > weights / 2


@pytest.mark.parametrize("family", ["sd", "sd, DoRA", "flux"])
def test_loras_of_requests_act_on_layers_that_wait_in_main_memory(family: str, away: Away, tmp_path: Path) -> None:
    """Also on those that went there while a LoRA was in memory; and they go away again."""
    make: Any = tiny.flux if family == "flux" else tiny.stable_diffusion
    if family == "sd":
        path = loras.saved(loras.kohya(make(), {"text_encoder": "lora_te"}), tmp_path / "x.safetensors")
    else:
        part = "transformer" if family == "flux" else "unet"
        path = loras.diffusers(make(), tmp_path, "x.safetensors", part=part, dora="DoRA" in family)
    theirs, ours, adapters = make(), make(), Adapters()
    resident = once(ours)
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    expected = once(theirs)
    assert np.abs(once(ours, adapters, loras.of(path)) - expected).max() < 1e-5
    enable(ours, "group")
    kept = len(away.kept)
    assert kept
    for _ in range(2):
        assert np.abs(once(ours, adapters, loras.of(path)) - expected).max() < 1e-5
        assert len(away.kept) == kept, "they are away again"
        assert np.abs(once(ours) - resident).max() < 1e-5
        adapters.drop()


def test_a_dora_on_weights_that_come_layer_by_layer_is_refused(away: Away, tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion()
    with tiny.seeded(1):
        layer = dict(pipe.text_encoder.named_modules())["encoder.layers.0.self_attn.q_proj"].weight
        key = "text_encoder.encoder.layers.0.self_attn.q_proj"
        state = {
            f"{key}.lora_A.weight": torch.randn(2, layer.shape[1]), f"{key}.lora_B.weight": torch.randn(len(layer), 2),
            f"{key}.lora_magnitude_vector": torch.ones(len(layer)),
        }  # fmt: skip
    path = loras.saved(state, tmp_path / "x.safetensors")
    enable(pipe, "group")
    with pytest.raises(InvalidRequest, match=r"x is a DoRA, .* wait in main memory"):
        once(pipe, Adapters(), loras.of(path))


def once(pipe: Any, adapters: Adapters | None = None, *chosen: Any) -> Any:
    """The picture of one request; with `adapters`, as a request with LoRAs draws it."""
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "np"}

    def draw(pipeline: Any) -> Any:
        return pipeline("a cat", **call, generator=torch.Generator().manual_seed(1)).images[0]

    if adapters is None:
        return draw(pipe)
    with adapters.use(pipe, "cpu", "m", chosen) as selections:
        view = views.view(pipe, adapters=selections)
        try:
            return draw(view)
        finally:
            views.close(view)


def test_an_offloaded_layer_that_is_not_fetched_would_be_seen(away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    pipe = tiny.stable_diffusion()
    enable(pipe, "group")
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: None)
    assert not np.isfinite(together(pipe)[0][0]).all()


# What is chosen.

SIZES = {"unet": 5 * GiB, "text_encoder": 2 * GiB, "vae": GiB}
CHOICES: list[tuple[dict[str, Any], int | None, bool, str]] = [
    ({}, None, True, "none"),
    ({}, 80 * GiB, True, "none"),
    ({}, 10 * GiB, True, "none"),
    ({}, 9 * GiB, True, "model"),
    ({}, 7 * GiB, True, "model"),
    ({}, 6 * GiB, True, "group"),
    ({}, 9 * GiB, False, "group"),
    ({"low_vram": True}, 80 * GiB, True, "model"),
    ({"low_vram": True}, 80 * GiB, False, "group"),
    ({"low_vram": True}, 4 * GiB, True, "group"),
    ({"low_vram": True}, None, True, "model"),
    ({"low_vram": True, "offload": "none"}, 4 * GiB, True, "none"),
    ({"offload": "none"}, 4 * GiB, True, "none"),
    ({"offload": "group"}, 80 * GiB, True, "group"),
    ({"offload": "model"}, 80 * GiB, True, "model"),
]


@pytest.mark.parametrize(("fields", "free", "ordered", "mode"), CHOICES)
def test_offload_is_chosen_by_what_fits(fields: dict[str, Any], free: int | None, ordered: bool, mode: str) -> None:
    config = ModelConfig(name="m", model="m", **fields)
    assert low_memory.choose_offload(config, SIZES, free, ordered=ordered) == mode


def test_the_sizes_are_those_of_the_weights() -> None:
    pipe = tiny.stable_diffusion()
    sizes = low_memory.sizes(pipe)
    assert set(sizes) == {"unet", "text_encoder", "vae"}
    assert sizes["unet"] == sum(parameter.numel() for parameter in pipe.unet.parameters()) * 4
    pipe.to(torch.float16)
    assert abs(low_memory.sizes(pipe)["unet"] - sizes["unet"] / 2) < 100


@pytest.mark.parametrize(
    ("free", "mode"), [(100 * GiB, "none"), (low_memory.ACTIVATIONS + 1_000_000, "model"), (1000, "group")]
)
def test_a_model_goes_where_it_fits(
    free: int, mode: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, away: Away
) -> None:
    """On a device that is none: what is free there is said for it."""
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (free, 100 * GiB))
    monkeypatch.setattr(load, "choose_device", lambda config, setting: "xpu")
    monkeypatch.setattr(load, "_load_preview_decoder", lambda *args: None)
    engaged: list[str] = []
    monkeypatch.setattr(offload, "enable", lambda pipe, device: engaged.append("model"))
    monkeypatch.setattr(offload, "enable_groups", lambda pipe, device, by_block: engaged.append("group"))
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "to", lambda pipe, device: engaged.append("none"))
    model = load.load(config_of(folders["sd"]), "xpu", quiet)
    assert engaged == [mode] == [model.state.offload]
    assert model.savings == {"none": (), "model": ("offload",), "group": ("group_offload",)}[mode]
    assert model_info(model).savings == model.savings


# On any device.


def plain(folder: Path, change: Callable[[Any], object] = lambda pipe: None, **fields: Any) -> Any:
    """The picture of diffusers alone, without Sfumato, as `drawn` has it."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **fields)
    change(pipe)
    model = load.Loaded(config_of(folder), pipe, "m", "cpu", "fp32")
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(decoded(draw(model, wanted(prompt="a cat", width=64, height=64), quiet).file)).astype(int)


@FAMILY
def test_a_sliced_vae_draws_the_same(family: str, folders: dict[str, Path]) -> None:
    config = config_of(folders[family], vae_slicing=True)
    model = load.load(config, "cpu", quiet)
    assert model.pipeline.vae.use_slicing
    images, stats = together(model.pipeline, 3, 3, 3)
    expected, _ = together(FAMILIES[family](), 3, 3, 3)
    assert max(np.abs(one - other).max() for one, other in zip(images, expected, strict=True)) < 1e-5
    assert stats["vae"]["forwards"] < stats["vae"]["calls"] == 3, "decoded alone"
    assert drawn(config)[1].recipe.savings == ("vae_slicing",)


@FAMILY
def test_a_tiled_vae_draws_the_same_where_one_tile_is_enough(family: str, folders: dict[str, Path]) -> None:
    config = config_of(folders[family], vae_tiling=True)
    tiled, done = drawn(config)
    assert np.array_equal(tiled, drawn(config_of(folders[family]))[0])
    assert done.recipe.savings == ("vae_tiling",)
    large, _ = drawn(config, width=128, height=128)
    untiled, none = drawn(config_of(folders[family]), width=128, height=128)
    assert none.recipe.savings == ()
    assert np.abs(large - untiled).max() > 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[family])
    pipe.vae.enable_tiling()
    model = load.Loaded(config_of(folders[family]), pipe, "m", "cpu", "fp32")
    pipe.set_progress_bar_config(disable=True)
    by_diffusers = draw(model, wanted(prompt="a cat", width=128, height=128), quiet)
    assert np.array_equal(large, np.asarray(decoded(by_diffusers.file)).astype(int))


@pytest.mark.parametrize(("family", "stored"), [*((family, "fp8") for family in FAMILIES), ("sd", "fp8_e5m2")])
def test_cast_layers_draw_what_diffusers_draws(family: str, stored: str, folders: dict[str, Path]) -> None:
    torch_name = getattr(torch, low_memory.STORED[stored])

    def cast(pipe: Any) -> None:
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        denoiser.enable_layerwise_casting(storage_dtype=torch_name, compute_dtype=torch.float32)

    config = config_of(folders[family], layerwise_casting=stored)
    picture, done = drawn(config)
    assert np.array_equal(picture, plain(folders[family], cast))
    assert np.abs(picture - drawn(config_of(folders[family]))[0]).max() > 0, "nothing was cast"
    assert done.recipe.savings == (f"layerwise_casting:{stored}",)
    model = load.load(config, "cpu", quiet)
    denoiser = getattr(model.pipeline, "unet", None) or model.pipeline.transformer
    assert denoiser.dtype == torch.float32
    resident = low_memory.sizes(FAMILIES[family]())
    name = "unet" if hasattr(model.pipeline, "unet") else "transformer"
    assert low_memory.sizes(model.pipeline)[name] < 0.7 * resident[name]
    neighbours_are_right(model.pipeline)


@HAS_TORCHAO
@pytest.mark.parametrize(("family", "name"), [*((family, "int8") for family in FAMILIES), ("flux", "fp8")])
def test_quantised_weights_draw_what_diffusers_draws(family: str, name: str, folders: dict[str, Path]) -> None:
    config = config_of(folders[family], quantization=name)
    model = load.load(config, "cpu", quiet)
    index = {part: list(value) for part, value in model.pipeline.config.items() if isinstance(value, list | tuple)}
    mapping = quantizers.for_pipeline(config, index, torch.float32)
    denoiser = "unet" if "unet" in index else "transformer"
    assert set(quantizers.parts(index)) == {denoiser} | {
        part for part, value in index.items() if value[-1] == "T5EncoderModel"
    }
    picture, done = drawn(config)
    assert np.array_equal(picture, plain(folders[family], **mapping))
    assert np.abs(picture - drawn(config_of(folders[family]))[0]).max() > 0, "nothing was quantised"
    assert done.recipe.savings == (f"quantization:{name}",)
    sizes, resident = low_memory.sizes(model.pipeline), low_memory.sizes(FAMILIES[family]())
    assert sizes[denoiser] < 0.85 * resident[denoiser]
    assert sizes["text_encoder"] == resident["text_encoder"]
    neighbours_are_right(model.pipeline)


def neighbours_are_right(pipe: Any) -> None:
    """Three at once share forwards, and each is what it is alone."""
    images, stats = together(pipe)
    assert batched(stats)
    for request, image in zip(requests(), images, strict=True):
        (alone,) = sfumato.gather(pipe, [request])
        assert np.abs(image - alone.images[0]).max() < 1e-4


# Other sources, adapters and tasks.


def lora(folder: Path) -> Path:
    pipeline = tiny.stable_diffusion()
    with tiny.seeded(3):
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    return folder / "pytorch_lora_weights.safetensors"


MODES = [
    pytest.param({"layerwise_casting": "fp8"}, id="cast"),
    pytest.param({"quantization": "int8"}, id="int8", marks=HAS_TORCHAO),
    pytest.param({"quantization": "fp8"}, id="fp8", marks=HAS_TORCHAO),
]


@pytest.mark.parametrize("fields", MODES)
def test_a_lora_acts_on_smaller_weights(fields: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    """As much as on whole ones."""
    adapters = (Adapter(str(lora(tmp_path)), 2.0),)
    with_lora, _ = drawn(config_of(folders["sd"], adapters=adapters))
    without, _ = drawn(config_of(folders["sd"]))
    small, _ = drawn(config_of(folders["sd"], adapters=adapters, **fields))
    assert np.abs(small - with_lora).mean() < np.abs(with_lora - without).mean() / 2


@pytest.mark.parametrize("fields", MODES)
def test_a_single_file_is_stored_in_less(
    fields: dict[str, Any], checkpoint: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "description_of", lambda path, name: folders["sd"])
    model = load.load(config_of(checkpoint, **fields), "cpu", quiet)
    whole = load.load(config_of(checkpoint), "cpu", quiet)
    assert low_memory.sizes(model.pipeline)["unet"] < 0.85 * low_memory.sizes(whole.pipeline)["unet"]
    assert model.savings == tuple(f"{key}:{value}" for key, value in fields.items())
    small, _ = drawn(config_of(checkpoint, **fields))
    of_folder, _ = drawn(config_of(folders["sd"], **fields))
    assert np.abs(small - of_folder).max() <= 1


@pytest.mark.parametrize("fields", MODES)
def test_a_denoiser_beside_its_base_is_stored_in_less(
    fields: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """And so is a text encoder beside it."""
    pipe, files = tiny.flux(), {"flux": tmp_path / "flux.safetensors", "t5": tmp_path / "t5.safetensors"}
    save_file({name: tensor.contiguous() for name, tensor in pipe.transformer.state_dict().items()}, files["flux"])
    t5 = {name: tensor for name, tensor in pipe.text_encoder_2.state_dict().items() if "embed_tokens" not in name}
    save_file({name: tensor.contiguous() for name, tensor in t5.items()}, files["t5"])
    config = config_of(files["flux"], base_model=str(folders["flux"]), text_encoders=(str(files["t5"]),), **fields)
    small, done = drawn(config)
    of_folder, _ = drawn(config_of(folders["flux"], **fields))
    assert np.array_equal(small, of_folder)
    assert done.recipe.savings == tuple(f"{key}:{value}" for key, value in fields.items())
    sizes = low_memory.sizes(load.load(config, "cpu", quiet).pipeline)
    assert sizes == low_memory.sizes(load.load(config_of(folders["flux"], **fields), "cpu", quiet).pipeline)


@pytest.mark.parametrize("mode", ["model", "group"])
def test_other_tasks_on_the_same_weights_wait_too(mode: str, away: Away) -> None:
    """Image-to-image runs on a pipeline of its own, of the same modules."""
    asked = wanted(prompt="a cat", images=(source(64, 64),), strength=0.8, steps=4)
    expected = draw(loaded(tiny.stable_diffusion()), asked, quiet)
    pipe = tiny.stable_diffusion()
    enable(pipe, mode)
    for generation in (asked, wanted(prompt="a cat", width=64, height=64), asked):
        done = draw(loaded(pipe), generation, quiet)
    assert np.array_equal(np.asarray(decoded(done.file)), np.asarray(decoded(expected.file)))


def test_what_a_model_needs_is_what_it_keeps(folders: dict[str, Path]) -> None:
    """The estimate before the weights are read; smaller weights and layers that wait need less."""
    seen: list[Any] = []
    for fields in ({}, {"layerwise_casting": "fp8"}, {"offload": "group"}):
        load.load(config_of(folders["sd"], **fields), "cpu", quiet, seen.append)
    whole, cast, grouped = seen
    assert cast.components["unet"] == -(-whole.components["unet"] // 4)
    assert cast.components["vae"] == whole.components["vae"]
    assert grouped.total == whole.total
    assert grouped.largest < 0.3 * whole.largest


@pytest.mark.parametrize("fields", MODES)
def test_a_modular_model_is_stored_in_less(fields: dict[str, Any], tmp_path: Path) -> None:
    modular.save(modular.BUILD["Flux"](), tmp_path / "flux")
    whole = load.load(config_of(tmp_path / "flux"), "cpu", quiet)
    model = load.load(config_of(tmp_path / "flux", **fields), "cpu", quiet)
    assert low_memory.sizes(model.pipeline)["transformer"] < 0.85 * low_memory.sizes(whole.pipeline)["transformer"]
    small, plain = (draw(each, wanted(prompt="a cat", width=64, height=64), quiet) for each in (model, whole))
    assert small.recipe.savings == tuple(f"{key}:{value}" for key, value in fields.items())
    difference = np.abs(np.asarray(decoded(small.file)).astype(int) - np.asarray(decoded(plain.file)).astype(int))
    assert 0 < difference.mean() < 10


@pytest.mark.parametrize("mode", ["model", "group", "model, then group"])
def test_modules_and_layers_of_a_modular_model_wait(mode: str, away: Away, tmp_path: Path) -> None:
    config = config_of(modular.save(modular.BUILD["Flux"](), tmp_path / "flux"))
    expected, _ = drawn(config)
    model = load.load(config, "cpu", quiet)
    for each in mode.split(", then "):
        enable(model.pipeline, each)
    assert away.kept
    done = draw(model, wanted(prompt="a cat", width=64, height=64), quiet)
    assert np.array_equal(np.asarray(decoded(done.file)), expected)


# On a GPU, where there is one.

ON_GPU: list[dict[str, Any]] = [
    {"offload": "model"},
    {"offload": "group"},
    {"vae_slicing": True},
    {"vae_tiling": True},
    {"layerwise_casting": "fp8"},
    {"layerwise_casting": "fp8", "offload": "group"},
    {"quantization": "int8"},
    {"quantization": "int8", "offload": "model"},
    {"quantization": "int8", "offload": "group"},
    {"quantization": "fp8"},
    {"quantization": "nf4"},
    {"quantization": "nf4", "offload": "model"},
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@FAMILY
@pytest.mark.parametrize("fields", ON_GPU, ids=lambda fields: ",".join(map(str, fields.values())))
def test_on_a_gpu(family: str, fields: dict[str, Any], folders: dict[str, Path]) -> None:
    """Each mode beside neighbours; weights that wait are in main memory when nobody draws."""
    name = fields.get("quantization")
    if name and importlib.util.find_spec(quantizers.QUANTIZERS[name].package) is None:
        pytest.skip(f"the extra {quantizers.QUANTIZERS[name].package} is missing")
    config = config_of(folders[family], **{**fields, "dtype": "bf16"})
    resident = load.load(replace(config_of(folders[family]), dtype="bf16", offload="none"), "cuda", quiet)
    expected, _ = together(resident.pipeline)
    model = load.load(config, "cuda", quiet)
    images, stats = together(model.pipeline)
    assert batched(stats)
    exact = not fields.keys() & {"layerwise_casting", "quantization"}
    for image, other in zip(images, expected, strict=True):
        assert np.abs(image - other).mean() < (2e-3 if exact else 5e-2)
    if "offload" in fields:
        offload.offload_all(model.pipeline)
        denoiser = getattr(model.pipeline, "unet", None) or model.pipeline.transformer
        assert {parameter.device.type for parameter in denoiser.parameters()} == {"cpu"}


# What cannot work is said, by `check` and by load.

REFUSED: list[tuple[str, str, str, str]] = [
    ("sd", "quantization: nf4", "quantization", "works on cuda and xpu only"),
    ("sd", "quantization: fp4", "quantization", "int8, fp8"),
    ("sd", "quantization: int8\nlayerwise_casting: true", "quantization", "write one of them"),
    ("ddpm", "vae_slicing: true", "vae_slicing", "no VAE"),
    ("ddpm", "vae_tiling: true", "vae_tiling", "no VAE"),
]


@pytest.mark.parametrize(("family", "text", "key", "words"), REFUSED)
def test_a_key_that_cannot_work_is_refused(
    family: str, text: str, key: str, words: str, folders: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By `check` and by load, in the same words."""
    monkeypatch.setattr(importlib.util, "find_spec", known(torchao=True, bitsandbytes=True))
    config = read(tmp_path, f"parameters: {{model: {folders[family]}}}\ncuda: false\n{text}\n")
    with pytest.raises(ModelFileError, match=words) as caught:
        load.load(config, "cpu", quiet)
    assert caught.value.param == key
    (report,) = check(Catalog([tmp_path]))
    assert not report.ok
    assert report.problems == (caught.value.message,)


def known(**packages: bool) -> Callable[..., Any]:
    """`find_spec` for a machine that has these packages, or lacks them."""
    real = importlib.util.find_spec
    return lambda name, *more: (packages[name] or None) if name in packages else real(name, *more)


@pytest.mark.parametrize("name", quantizers.QUANTIZERS)
def test_a_missing_package_is_named(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", known(torchao=False, bitsandbytes=False))
    read(tmp_path, f"parameters: {{model: {folders['sd']}}}\nquantization: {name}\n")
    (report,) = check(Catalog([tmp_path]))
    package = quantizers.QUANTIZERS[name].package
    assert f"pip install 'sfumato[{package}]'" in "".join(report.problems)


def test_a_class_without_a_sequence(tmp_path: Path) -> None:
    """Its modules cannot wait one by one, its layers can."""
    config = read(tmp_path, "parameters: {model: o/r}\ndiffusers: {pipeline_type: DDPMPipeline}\noffload: model\n")
    assert diffusers.LDMPipeline.model_cpu_offload_seq is None
    low_memory.check(config, "DDPMPipeline", {}, None)
    with pytest.raises(ModelFileError, match="offload: group") as caught:
        low_memory.check(config, "LDMPipeline", {}, None)
    assert caught.value.param == "offload"


NO_EFFECT = [("low_vram: true", "low_vram"), ("offload: model", "offload: model"), ("offload: group", "offload: group")]


@pytest.mark.parametrize(("text", "words"), NO_EFFECT)
def test_what_has_no_effect_on_a_cpu_is_told(
    text: str, words: str, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One file serves machines with and without a GPU."""
    config = read(tmp_path, f"parameters: {{model: {folders['sd']}}}\ncuda: false\ndtype: fp32\n{text}\n")
    _, done = drawn(config)
    assert done.recipe.savings == ()
    assert f"{words} has no effect on a CPU" in caplog.text
    (report,) = check(Catalog([tmp_path]))
    assert report.ok
    assert f"{words} has no effect on a CPU" in str(report)


VALUES: list[tuple[str, str, Any]] = [
    ("offload: auto", "offload", None),
    ("offload: Group", "offload", "group"),
    ("vae_tiling: false", "vae_tiling", False),
    ("layerwise_casting: true", "layerwise_casting", "fp8"),
    ("layerwise_casting: false", "layerwise_casting", None),
    ("layerwise_casting: float8_e5m2", "layerwise_casting", "fp8_e5m2"),
    ("quantization: none", "quantization", None),
    ("quantization: INT8", "quantization", "int8"),
    ("quantization: awq", "quantization", None),
    ("quantization: bitsandbytes", "quantization", None),
]


@pytest.mark.parametrize(("text", "field", "value"), VALUES)
def test_values(text: str, field: str, value: Any, tmp_path: Path) -> None:
    config = read(tmp_path, f"parameters: {{model: o/r}}\n{text}\n")
    assert getattr(config, field) == value
    assert bool(config.ignored) == ("awq" in text or "bitsandbytes" in text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("offload: disk", "auto, none, model, group"),
        ("quantization: int9", "Did you mean 'int8'"),
        ("quantization: true", "int8, fp8, nf4, fp4"),
        ("layerwise_casting: int8", "fp8"),
        ("vae_tiling: 1", "true or false"),
    ],
)
def test_values_that_are_none(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=words):
        read(tmp_path, f"parameters: {{model: o/r}}\n{text}\n")
