"""The key `cache`: pictures are those of plain diffusers with the same cache, also beside neighbours."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

import sfumato
from sfumato.batching import views
from sfumato.batching.batcher import Batcher
from sfumato.checkpoints import feature_caches as reading
from sfumato.commands.check import check
from sfumato.config import ModelConfig, readers
from sfumato.core import Control
from sfumato.drawing.draw import draw
from sfumato.drawing.info import model_info
from sfumato.drawing.steps import watch
from sfumato.errors import InvalidRequest, ModelFileError
from sfumato.loras import Lora
from sfumato.models import feature_caches, load
from sfumato.models.adapters import Adapters
from sfumato.pictures.images import decoded
from sfumato.sampling import nested
from sfumato.serving.catalog import Catalog
from support import families_moving, families_transformers, tiny
from support.batches import noise
from support.drawing import loaded, quiet, source, wanted
from support.families import half_mask, picture
from support.model_files import read

CACHES: dict[str, dict[str, Any]] = {
    "first_block": {"threshold": 2.0},
    "taylorseer": {"cache_interval": 3, "disable_cache_before_step": 2},
    "magcache": {"threshold": 1.0, "max_skip_steps": 2, "mag_ratios": [1.0, 1.2, 1.1, 1.05, 1.0, 0.95, 0.9]},
}
OF_DIFFUSERS: dict[str, Any] = {**feature_caches.CONFIGURATIONS, "magcache": diffusers.MagCacheConfig}
STEPS = 8
SIZE = {"width": 64, "height": 64}
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "flux": (tiny.flux, {}, {}),
    # Two calls a step: each has a state of its own.
    "qwen": (
        families_transformers.qwen_image,
        {"negative_prompt": "a dog", "true_cfg_scale": 3.0},
        {"negative_prompt": "a dog", "guidance_scale": 3.0},
    ),
}
"""Family → its pipeline, arguments of its call, and the same as fields of a request."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    made = {name: make for name, (make, *_) in FAMILIES.items()}
    return {name: tiny.save(make(), root / name) for name, make in {**made, "sd": tiny.stable_diffusion}.items()}


def config_of(folder: Path, kind: str, **fields: Any) -> ModelConfig:
    cache = readers.cache({"type": kind, **CACHES[kind]})
    return ModelConfig(**nested({"name": "m", "model": str(folder), "dtype": "fp32", "cache": cache, **fields}))


def plain(folder: Path, kind: str | None) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if kind:
        more = {"taylorseer": {"taylor_factors_dtype": torch.float32}, "magcache": {"num_inference_steps": STEPS}}
        pipe.transformer.enable_cache(OF_DIFFUSERS[kind](**CACHES[kind], **more.get(kind, {})))
    return pipe


def call(family: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    fields = {"prompt": "a cat", "num_inference_steps": steps, "output_type": "np", "generator": generator}
    return {**fields, **SIZE, **FAMILIES[family][1]}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_those_of_diffusers_with_the_same_cache(family: str, kind: str, folders: dict[str, Path]) -> None:
    expected = plain(folders[family], kind)(**call(family, 5)).images[0]
    assert np.abs(expected - plain(folders[family], None)(**call(family, 5)).images[0]).max() > 1e-4  # layers skipped
    model = load.load(config_of(folders[family], kind), "cpu", quiet)
    for _ in range(2):  # of the first nothing is left
        request = wanted(prompt="a cat", seed=5, steps=STEPS, **SIZE, **FAMILIES[family][2])
        done = draw(model, request, quiet)
        assert np.abs(np.asarray(decoded(done.file)).astype(int) - np.round(expected * 255)).max() <= 1
        assert done.recipe.savings == (f"cache:{model.config.cache}",)
    assert model_info(model).savings == (f"cache:{model.config.cache}",)


@pytest.mark.parametrize("kind", CACHES)
def test_neighbours_keep_their_own_states(kind: str, folders: dict[str, Path]) -> None:
    pipe = plain(folders["qwen"], kind)
    calls = [(seed, steps) for seed, steps in zip((5, 6, 7), (STEPS, STEPS - 2, STEPS + 1), strict=True)]
    alone = [pipe(**call("qwen", *each)).images[0] for each in calls]
    together = sfumato.gather(pipe, [call("qwen", *each) for each in calls])
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other.images[0], one, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
def test_a_class_that_does_not_say_which_call_is_which_has_none(folders: dict[str, Path]) -> None:
    assert reading.says_its_calls("FluxPipeline")
    assert not reading.says_its_calls("FluxImg2ImgPipeline")
    model = load.load(config_of(folders["flux"], "first_block"), "cpu", quiet)
    assert model_info(model).tasks == ("text-to-image",)
    with pytest.raises(InvalidRequest, match="image"):
        draw(model, wanted(images=(source(64, 64),), **SIZE), quiet)
    under_control = loaded(families_transformers.flux_controlled(), cache=readers.cache("first_block"))
    with pytest.raises(InvalidRequest, match="m has a feature cache"):
        draw(under_control, wanted(controls=(Control(source(64, 64)),), **SIZE), quiet)


def test_loras_of_requests_are_refused(folders: dict[str, Path]) -> None:
    model = load.load(config_of(folders["flux"], "first_block"), "cpu", quiet)
    lora = Lora("style", 1.0, None, "style.safetensors", "0" * 64, "0" * 10)
    with pytest.raises(InvalidRequest, match="feature cache"), Adapters().use(model.pipeline, "cpu", "m", [lora]):
        pass


@pytest.mark.parametrize("kind", CACHES)
def test_a_model_without_such_a_transformer_is_refused(kind: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ModelFileError, match=f"cache: {kind}.*leave it out") as caught:
        load.load(config_of(folders["sd"], kind), "cpu", quiet)
    assert caught.value.param == "cache"


def test_a_cache_that_fails_while_it_draws_is_named() -> None:
    pipe = tiny.flux()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=cast(float, "0.1")))  # fails in its hook
    with pytest.raises(ModelFileError, match=r"cache: first_block: .*TypeError.*leave it out") as caught:
        draw(loaded(pipe, cache=readers.cache("first_block")), wanted(**SIZE), quiet)
    assert caught.value.param == "cache"


def test_check_tells(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("flux", "sd"):
        text = f"parameters: {{model: {folders[name]}}}\ncache: {{type: first_block, threshold: 0.1}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    told = "\n".join(map(str, check(Catalog([tmp_path]))))
    assert "cache: first_block:threshold=0.1" in told
    assert "diffusers caches no features of StableDiffusionPipeline" in told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cache: first_block", "first_block"),
        ("cache: {type: first_block, threshold: 0.08}", "first_block:threshold=0.08"),
        ("cache: {type: magcache, mag_ratios: [1, 1.25]}", "magcache:mag_ratios=1/1.25"),
        ("cache: {type: TaylorSeer, max_order: 2, use_lite_mode: true}", "taylorseer:max_order=2:use_lite_mode=True"),
    ],
)
def test_values(text: str, expected: str, tmp_path: Path) -> None:
    assert str(read(tmp_path, f"parameters: {{model: a/b}}\n{text}\n").cache) == expected


@pytest.mark.parametrize("text", ["cache: none", "cache: false", "cache:"])
def test_none(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, f"parameters: {{model: a/b}}\n{text}\n").cache is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("deep", "is not one of first_block, taylorseer, magcache"),
        ("true", "is not one of"),
        ("{threshold: 0.1}", "is not one of"),
        ("{type: first_block, treshold: 0.1}", "first_block has no setting .treshold.; it has threshold"),
        ("{type: first_block, threshold: -1}", "needs a number from 0"),
        ("{type: taylorseer, cache_interval: 0}", "needs a whole number from 1"),
        ("{type: taylorseer, 3: 0}", "has no setting"),
        ("[first_block]", "is not one of"),
        ("{type: magcache, mag_ratios: [1]}", "mag_ratios|needs a list of 2 to 1000 numbers"),
        ("{type: magcache, mag_ratios: [1, -1]}", "needs a number from 0 to 100"),
        ("{type: magcache, num_inference_steps: 20}", "magcache has no setting"),
        ("faster_cache", "diffusers' faster_cache is not offered: it has one state for all requests"),
        ("{type: Pyramid_Attention_Broadcast}", "is not offered: .* Use first_block, taylorseer, magcache"),
        ("sea_cache", "it is for films"),
        ("text_kv_cache", "Nucleus-MoE alone"),
    ],
)
def test_values_that_are_refused(value: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=words):
        read(tmp_path, f"parameters: {{model: a/b}}\ncache: {value}\n")


def test_settings_are_those_of_diffusers() -> None:
    assert readers.CACHES.keys() == feature_caches.CONFIGURATIONS.keys()
    for kind, settings in readers.CACHES.items():
        assert settings.keys() <= feature_caches.CONFIGURATIONS[kind].__dataclass_fields__.keys()
    hooks = {path.stem for path in (Path(diffusers.__file__).parent / "hooks").glob("*_cache.py")}
    known = {"taylorseer_cache": "taylorseer", "mag_cache": "magcache", "first_block_cache": "first_block"}
    assert {known.get(name, name) for name in hooks} | {"pyramid_attention_broadcast"} == (
        readers.CACHES.keys() | readers.NO_CACHES.keys()
    )


def test_magcache_follows_the_number_of_steps(folders: dict[str, Path]) -> None:
    """diffusers' configuration is for one number of steps; here two requests of other numbers are drawn in turns."""
    expected = {}
    for steps in (STEPS, 2 * STEPS):
        pipe = diffusers.DiffusionPipeline.from_pretrained(folders["flux"])
        pipe.set_progress_bar_config(disable=True)
        pipe.transformer.enable_cache(diffusers.MagCacheConfig(**CACHES["magcache"], num_inference_steps=steps))
        expected[steps] = pipe(**call("flux", 5, steps)).images[0]
    model = load.load(config_of(folders["flux"], "magcache"), "cpu", quiet)
    batcher = Batcher()
    tasks = {
        steps: batcher.submit(
            functools.partial(draw, model, wanted(prompt="a cat", seed=5, steps=steps, **SIZE), quiet)
        )
        for steps in expected
    }
    with torch.no_grad():
        while batcher.step():
            pass
    for steps, task in tasks.items():
        assert task.outcome is not None
        drawn = np.asarray(decoded(task.outcome.value.file)).astype(int)
        assert np.abs(drawn - np.round(expected[steps] * 255)).max() <= 1


def klein_inpaint() -> Any:
    return diffusers.Flux2KleinInpaintPipeline(**families_transformers.flux2_klein().components)


def qwen(cls: type[Any]) -> Any:
    parts = families_transformers.qwen_image().components
    return cls(**parts, **({"processor": None} if "processor" in inspect.signature(cls).parameters else {}))


IN_PART: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "QwenImageImg2ImgPipeline": (lambda: qwen(diffusers.QwenImageImg2ImgPipeline), {}),
    "QwenImageInpaintPipeline": (lambda: qwen(diffusers.QwenImageInpaintPipeline), {"mask_image": half_mask()}),
    "QwenImageEditInpaintPipeline": (
        lambda: qwen(diffusers.QwenImageEditInpaintPipeline),
        {"mask_image": half_mask(), "prompt": None, "prompt_embeds": noise(1, 7, tiny.WIDTH, seed=1),
         "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.int64)},
    ),
    "Flux2KleinInpaintPipeline": (
        klein_inpaint,
        {"mask_image": half_mask(), "guidance_scale": 1.0, "text_encoder_out_layers": (1,)},
    ),
    "CogVideoXVideoToVideoPipeline": (
        lambda: diffusers.CogVideoXVideoToVideoPipeline(**families_moving.cogvideox().components),
        {"image": None, "video": [picture(at, 32) for at in range(9)], "height": 32, "width": 32,
         "max_sequence_length": 64, "guidance_scale": 1.0},
    ),
}  # fmt: skip
"""Classes whose transformer can have a cache and whose `strength` leaves steps out, with more arguments for a call."""


def test_these_are_all_that_leave_out_steps() -> None:
    classes = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")}
    taking = {
        name
        for name, cls in classes.items()
        if "strength" in inspect.signature(cls.__call__).parameters and reading.says_its_calls(name)
    }
    assert taking - {"LTXConditionPipeline"} == IN_PART.keys()  # there it is how much a picture given counts


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", IN_PART)
def test_a_cache_is_told_the_steps_that_the_class_runs(name: str, strength: float) -> None:
    """Of 7 steps at 0.6 these classes run 5, others 4."""
    make, more = IN_PART[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": "a cat", "image": picture(1), "strength": strength, "num_inference_steps": 7, **SIZE, **more}
    given = {argument: value for argument, value in given.items() if argument != "image" or value is not None}
    told: list[int] = []
    with torch.no_grad():
        own = views.view(pipe)
        pipe.transformer.register_forward_hook(lambda *_: told.append(own.transformer._sfumato_view.steps()))
        watch(own, given, quiet, None)
        own(**given, output_type="latent", generator=torch.Generator().manual_seed(1))
    assert len(told) > 1
    assert set(told) == {len(told)}


def test_attention_broadcast_gives_the_second_call_of_a_step_that_of_the_first() -> None:
    """Why it is not offered. Qwen-Image computes the rows with and without the prompt in two calls, here of 4 steps."""
    pipe = families_transformers.qwen_image()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )
    outputs: list[Any] = []
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    pipe(**call("qwen", 5, steps=4))
    assert len(outputs) == 8
    assert all(second is first for first, second in zip(outputs[::2], outputs[1::2], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_faster_cache_fails_where_a_call_has_one_row(family: str) -> None:
    """Why it is not offered: it leaves out the second row of a call, and these have none."""
    pipe = FAMILIES[family][0]()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.enable_cache(
        diffusers.FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 1001),
            unconditional_batch_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: pipe.current_timestep,
            attention_weight_callback=lambda module: 0.3,
            tensor_format="BCHW",
        )
    )
    with pytest.raises(IndexError):
        pipe(**call(family, 5))


def test_magcache_needs_ratios_of_the_model(folders: dict[str, Path]) -> None:
    """diffusers has those of Flux.1."""
    model = load.load(replace(config_of(folders["flux"], "magcache"), cache=readers.cache("magcache")), "cpu", quiet)
    assert len(model.pipeline.transformer._cache_config.mag_ratios) == len(FLUX_MAG_RATIOS)
    with pytest.raises(ModelFileError, match=r"cache: magcache: QwenImageTransformer2DModel needs `mag_ratios`"):
        load.load(replace(config_of(folders["qwen"], "magcache"), cache=readers.cache("magcache")), "cpu", quiet)
