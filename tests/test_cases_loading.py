"""What models are made of: classes, variants, VAEs, LoRAs, predictions. Numbers are those of the list of cases."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from gguf import GGUFWriter
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from sfumato import schedulers
from sfumato.checkpoints import (
    descriptions,
    download,
    pipeline_class,
    processor_packages,
    static_capabilities,
    variants,
)
from sfumato.commands.check import check
from sfumato.config import Adapter, ModelConfig
from sfumato.drawing import arguments, draw
from sfumato.errors import LoadError, ModelFileError, SfumatoError
from sfumato.models import device, load, parts
from sfumato.serving.catalog import Catalog
from support import tiny
from support.here import asked, config, cut, drawn, quiet, use
from support.hub import Hub
from support.tiny_checkpoint import single_file


@pytest.fixture(scope="module")
def folder(repositories: dict[str, Path]) -> Path:
    return repositories["nitrosocke/Ghibli-Diffusion"]


@pytest.fixture(scope="module")
def xl(repositories: dict[str, Path]) -> Path:
    return repositories["Linaqruf/animagine-xl"]


# Rows 1, 19 and 20: LoRAs.


def kohya(pipeline: Any, encoders: dict[str, str], *, unet: bool = True, seed: int = 5) -> dict[str, torch.Tensor]:
    """A LoRA as kohya's scripts name one; `encoders`: component → prefix."""
    tensors: dict[str, torch.Tensor] = {}
    parts = [("unet", "lora_unet", ("to_q", "to_v"))] if unet else []
    parts += [(part, prefix, ("q_proj", "fc1")) for part, prefix in encoders.items()]
    with tiny.seeded(seed):
        for part, prefix, ends in parts:
            for name, module in getattr(pipeline, part).named_modules():
                if name.endswith(ends) and isinstance(module, torch.nn.Linear):
                    path = name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
                    key = f"{prefix}_{path.replace('.', '_')}"
                    tensors[f"{key}.lora_down.weight"] = torch.randn(2, module.in_features) * 0.5
                    tensors[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 2) * 0.5
                    tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return tensors


ENCODERS = [
    ("sd", {"text_encoder": "lora_te"}),
    ("sd", {"text_encoder": "lora_te1"}),
    ("xl", {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}),
]


@pytest.fixture(scope="module")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Stable Diffusion 1, with a part for its text encoder."""
    path = tmp_path_factory.mktemp("lora") / "one.safetensors"
    save_file(kohya(StableDiffusionPipeline.from_pretrained(folder), {"text_encoder": "lora_te"}), path)
    return path


@pytest.mark.parametrize(("family", "encoders"), ENCODERS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_row_1_a_lora_with_a_text_encoder_part(
    family: str, encoders: dict[str, str], scale: float, folder: Path, xl: Path, tmp_path: Path
) -> None:
    kind, weights = {"sd": (StableDiffusionPipeline, folder), "xl": (StableDiffusionXLPipeline, xl)}[family]
    own = kind.from_pretrained(weights, safety_checker=None) if family == "sd" else kind.from_pretrained(weights)
    own.set_progress_bar_config(disable=True)
    save_file(kohya(own, encoders), tmp_path / "lora.safetensors")
    own.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="a")
    own.set_adapters(["a"], [scale])
    wanted = own(
        "a cat", num_inference_steps=2, width=64, height=64, guidance_scale=8.0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    made = config(tmp_path, weights, adapters=(Adapter("lora.safetensors", scale),))
    assert np.abs(drawn(made) - np.asarray(wanted).astype(int)).max() <= 1
    assert np.abs(drawn(made) - drawn(config(tmp_path, weights))).max() > 1
    assert np.abs(drawn(made, clip_skip=2) - drawn(made)).max() > 1
    alone = {key: value for key, value in load_file(tmp_path / "lora.safetensors").items() if "lora_unet" in key}
    save_file(alone, tmp_path / "unet.safetensors")
    assert (
        np.abs(drawn(config(tmp_path, weights, adapters=(Adapter("unet.safetensors", scale),))) - drawn(made)).max() > 1
    )


def test_row_1_two_of_which_one_has_no_text_encoder_part(folder: Path, lora: Path, tmp_path: Path) -> None:
    save_file({k: v for k, v in load_file(lora).items() if "unet" in k}, tmp_path / "unet.safetensors")
    save_file({k: v for k, v in load_file(lora).items() if "unet" not in k}, tmp_path / "text.safetensors")
    both = (Adapter(str(tmp_path / "unet.safetensors"), 1.0), Adapter(str(tmp_path / "text.safetensors"), 1.0))
    whole = drawn(config(tmp_path, folder, adapters=(Adapter(str(lora)),)))
    assert np.abs(drawn(config(tmp_path, folder, adapters=both)) - whole).max() <= 1


def test_row_1_a_lora_of_another_kind_is_said(folder: Path, tmp_path: Path) -> None:
    save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "other.safetensors")
    with pytest.raises(LoadError, match="other"):
        load.load(config(tmp_path, folder, adapters=(Adapter("other.safetensors"),)), "cpu", quiet)


SOURCES = ["tiny/lora1", "tiny/lora1@main", "tiny/lora1/one.safetensors", "huggingface://tiny/lora1/one.safetensors",
           "hf://tiny/lora1",
           "{hub}/tiny/lora1/resolve/main/one.safetensors", "tiny/lora1/one.safetensors@main"]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_rows_19_and_20_lora_sources_with_and_without_a_network(
    source: str, here: Hub, folder: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.add("tiny/lora1", lora.parent)
    made = config(tmp_path, folder, adapters=(Adapter(source.format(hub=here.url)),))
    wanted = drawn(config(tmp_path, folder, adapters=(Adapter(str(lora)),)))
    assert np.array_equal(drawn(made), wanted)
    cut(monkeypatch)
    before = len(here.requests)
    assert np.array_equal(drawn(made), wanted)
    assert len(here.requests) == before


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers passes it
@pytest.mark.parametrize("how", ["offline", "dead"])
def test_row_19_what_was_pulled_loads_without_a_network(
    how: str, here: Hub, folder: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a model file may name; with HF_HUB_OFFLINE, and with a hub that nobody reaches."""
    base = StableDiffusionPipeline.from_pretrained(folder)
    for name, module in {
        "control": diffusers.ControlNetModel.from_unet(base.unet),
        "vae": base.vae,
        "preview": diffusers.AutoencoderTiny(latent_channels=4, encoder_block_out_channels=(8,) * 4,
                                             decoder_block_out_channels=(8,) * 4),
    }.items():  # fmt: skip
        module.save_pretrained(tmp_path / name)
        here.add(f"tiny/{name}-of-row-19", tmp_path / name)
    base.text_encoder.save_pretrained(tmp_path / "clip" / "encoder")
    here.add("tiny/clip-of-row-19", tmp_path / "clip")
    here.add("tiny/lora1", lora.parent)
    made = config(
        tmp_path, folder, pipeline_type="StableDiffusionControlNetPipeline", control_net="tiny/control-of-row-19",
        vae="tiny/vae-of-row-19", preview_vae="tiny/preview-of-row-19", adapters=(Adapter("tiny/lora1"),),
        clip_model="tiny/clip-of-row-19", clip_subfolder="encoder",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(diffusers.ModelMixin, "from_pretrained", None)  # nothing is loaded
        patch.setattr(CLIPTextModel, "from_pretrained", None)
        parts.fetch(made, tmp_path, quiet)
    if how == "offline":
        cut(monkeypatch)
    else:
        with Hub() as gone:
            pass
        use(gone, Path(constants.HF_HUB_CACHE), monkeypatch)
    before = len(here.requests)
    assert type(load.load(made, "cpu", quiet).preview_decoder).__name__ == "AutoencoderTiny"
    assert len(here.requests) == before


def test_row_20_what_is_no_lora_source_is_said(here: Hub, folder: Path, tmp_path: Path) -> None:
    for source in ("gone.safetensors", "tiny/none", "tiny/lora1/none.safetensors", "a/b/c", "x.ckpt", "tiny/flux"):
        with pytest.raises(SfumatoError) as caught:
            load.load(config(tmp_path, folder, adapters=(Adapter(source),)), "cpu", quiet)
        assert "HFValidationError" not in caught.value.message
        assert source.split("@")[0].split("/")[0] in caught.value.message


# Row 4: what a checkpoint predicts.


def marked(checkpoint: Path, path: Path, *keys: str, metadata: dict[str, str] | None = None) -> Path:
    save_file(load_file(checkpoint) | {key: torch.tensor([]) for key in keys}, path, metadata=metadata)
    return path


MARKS: list[tuple[tuple[str, ...], dict[str, str] | None, dict[str, Any], str, bool]] = [
    (("v_pred", "ztsnr"), None, {}, "v_prediction", True),
    (("v_pred",), None, {}, "v_prediction", False),
    ((), {"modelspec.prediction_type": "v"}, {}, "v_prediction", False),
    ((), None, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "v_prediction", True),
    (("v_pred", "ztsnr"), None, {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}, "epsilon", False),
    ((), None, {}, "epsilon", False),
]


@pytest.mark.parametrize(("keys", "metadata", "fields", "predicts", "zero"), MARKS)
def test_row_4_marks_of_a_single_file(
    keys: tuple[str, ...], metadata: dict[str, str] | None, fields: dict[str, Any], predicts: str, zero: bool,
    here: Hub, checkpoint: Path, tmp_path: Path,
) -> None:  # fmt: skip
    made = config(tmp_path, marked(checkpoint, tmp_path / "x.safetensors", *keys, metadata=metadata), **fields)
    told = load.load(made, "cpu", quiet).pipeline.scheduler.config
    assert told["prediction_type"] == predicts
    assert bool(told.get("rescale_betas_zero_snr")) == zero
    assert (told["timestep_spacing"] == "trailing") == zero


def test_row_4_the_picture_is_the_one_of_diffusers(here: Hub, checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    own = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    own.scheduler = EulerDiscreteScheduler.from_config(
        own.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    own.set_progress_bar_config(disable=True)
    wanted = own(
        "a cat", num_inference_steps=4, width=64, height=64, guidance_scale=8.0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    made = config(tmp_path, marked(checkpoint, tmp_path / "x.safetensors", "v_pred", "ztsnr"))
    for scheduler in (None, "euler"):
        assert np.abs(drawn(made, steps=4, scheduler=scheduler) - np.asarray(wanted).astype(int)).max() <= 1
    assert np.abs(drawn(config(tmp_path, checkpoint), steps=4) - np.asarray(wanted).astype(int)).max() > 1
    for name in ("ddim", "k_dpmpp_2m", "unipc"):
        assert schedulers.parse(name)
        assert (
            np.abs(
                drawn(made, steps=4, scheduler=name) - drawn(config(tmp_path, checkpoint), steps=4, scheduler=name)
            ).max()
            > 1
        )


def test_row_4_a_pickle_has_no_marks_and_is_drawn(here: Hub, checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": load_file(checkpoint)}, tmp_path / "x.ckpt")
    pickled = drawn(config(tmp_path, tmp_path / "x.ckpt", allow_pickle=True))
    assert (pickled == drawn(config(tmp_path, checkpoint))).all()


def test_row_4_keys_hold_for_repositories_too_and_not_for_flow_models(
    folder: Path, repositories: dict[str, Path], tmp_path: Path
) -> None:
    made = config(tmp_path, folder, prediction_type="v_prediction", timestep_spacing="linspace")
    told = load.load(made, "cpu", quiet).pipeline.scheduler.config
    assert (told["prediction_type"], told["timestep_spacing"]) == ("v_prediction", "linspace")
    with pytest.raises(ModelFileError, match="flow model"):
        load.load(config(tmp_path, repositories["tiny/flux"], prediction_type="v_prediction"), "cpu", quiet)


# Row 10: classes that read the repository.


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("AutoPipelineForText2Image", ""),
        ("AutoPipelineForImage2Image", "Img2Img"),
        ("AutoPipelineForInpainting", "Inpaint"),
    ],
)
@pytest.mark.parametrize("where", ["folder", "file", "xl", "tiny/flux"])
def test_row_10_auto_pipelines(
    kind: str, task: str, where: str, here: Hub, folder: Path, xl: Path, checkpoint: Path, tmp_path: Path
) -> None:
    model, family = {"folder": (folder, "StableDiffusion"), "file": (checkpoint, "StableDiffusion"),
                     "xl": (xl, "StableDiffusionXL"), "tiny/flux": ("tiny/flux", "Flux")}[where]  # fmt: skip
    made = config(tmp_path, model, pipeline_type=kind)
    assert type(load.load(made, "cpu", quiet).pipeline).__name__ == f"{family}{task}Pipeline"
    if where != "tiny/flux":
        assert static_capabilities.static_capabilities(made).pipeline == f"{family}{task}Pipeline"


# Row 27: a class that does not fit.

UNFIT = [
    ("xl", "StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    ("xl", "StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"),
    ("xl", "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"),
    ("sd", "StableDiffusionXLPipeline", "StableDiffusionPipeline"),
    ("flux", "StableDiffusionPipeline", "FluxPipeline"),
    ("sd3", "StableDiffusionPipeline", "StableDiffusion3Pipeline"),
    ("sd", "StableDiffusionPipeline", "StableDiffusionPipeline"),
    ("sd", "StableDiffusionImg2ImgPipeline", "StableDiffusionImg2ImgPipeline"),
]
NAMES = {"xl": "Linaqruf/animagine-xl", "sd": "nitrosocke/Ghibli-Diffusion", "flux": "tiny/flux", "sd3": "tiny/sd3"}


@pytest.mark.parametrize(("where", "kind", "used"), UNFIT)
def test_row_27_the_class_that_localai_s_importer_writes_always(
    where: str, kind: str, used: str, repositories: dict[str, Path], tmp_path: Path
) -> None:
    made = config(tmp_path, repositories[NAMES[where]], pipeline_type=kind)
    assert type(load.load(made, "cpu", quiet).pipeline).__name__ == used
    assert static_capabilities.static_capabilities(made).pipeline == used


@pytest.mark.parametrize(
    ("where", "kind"),
    [("sd", "FluxPipeline"), ("flux", "QwenImagePipeline"), ("sd", "StableDiffusionDepth2ImgPipelin")],
)
def test_row_27_another_is_named_before_anything_is_fetched(where: str, kind: str, here: Hub, tmp_path: Path) -> None:
    before = here.downloads(NAMES[where])
    with pytest.raises(SfumatoError, match=r"[lL]eave it out"):
        load.load(config(tmp_path, NAMES[where], pipeline_type=kind), "cpu", quiet)
    fetched = {path for path, count in here.downloads(NAMES[where]).items() if count > before.get(path, 0)}
    assert fetched <= {"model_index.json"}


# Row 22: variants.

UNET, VAE = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"
FILES = [
    ([f"{UNET}.fp16.safetensors", f"{VAE}.fp16.safetensors"], (None,), "fp16"),
    ([f"{UNET}.bf16.safetensors", f"{VAE}.bf16.safetensors"], ("fp16", None), "bf16"),
    ([f"{UNET}.non_ema.safetensors"], (None,), "non_ema"),
    ([f"{UNET}.fp16.safetensors", f"{VAE}.safetensors"], (None,), "fp16"),
    ([f"{UNET}.fp16-00001-of-00002.safetensors", f"{UNET}.safetensors.index.fp16.json"], (None,), "fp16"),
    ([f"{UNET}-00001-of-00002.fp16.safetensors"], (None,), "fp16"),
    ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], (None,), None),
    ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], ("fp16", None), "fp16"),
    ([f"{UNET}-00001-of-00002.safetensors"], ("fp16", None), None),
    ([], ("fp16", None), None),
]


@pytest.mark.parametrize(("files", "wanted", "picked"), FILES)
def test_row_22_which_variant_is_picked(files: list[str], wanted: tuple[str | None, ...], picked: str | None) -> None:
    assert variants.pick(files, wanted) == picked


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_row_22_a_repository_with_one_variant_alone(
    variant: str, dtype: str, here: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    tiny.save(tiny.stable_diffusion().to(kind), tmp_path / "half", variant=variant)
    here.add(f"tiny/{variant}", tmp_path / "half")
    for model in (tmp_path / "half", f"tiny/{variant}"):
        caplog.clear()
        loaded = load.load(config(tmp_path, model, dtype=dtype, f16=True), "cpu", quiet)
        assert loaded.pipeline.unet.dtype == device.DTYPES[dtype]
        assert ("weights; the variant" in caplog.text) == ((variant, dtype) != ("fp16", "bf16"))


# Row 28: another VAE.


@pytest.mark.parametrize("key", ["vae", "sd_vae", "diffusers.vae"])
@pytest.mark.parametrize(
    "where", ["file", "folder", "tiny/vae", "tiny/other", "tiny/vae/diffusion_pytorch_model.safetensors"]
)
def test_row_28_another_vae(key: str, where: str, here: Hub, folder: Path, tmp_path: Path) -> None:
    if key != "vae" and where != "file":
        pytest.skip("the keys differ in their names alone")
    other = tiny.stable_diffusion(seed=9)
    other.vae.save_pretrained(tmp_path / "vae")
    tiny.save(other, tmp_path / "whole")
    here.add("tiny/vae", tmp_path / "vae")
    here.add("tiny/other", tmp_path / "whole")
    shutil.copy(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "my.safetensors")
    name = {"file": "my.safetensors", "folder": "vae"}.get(where, where)
    text = f"diffusers: {{vae: {name}}}" if key == "diffusers.vae" else f"{key}: {name}"
    (tmp_path / "m.yaml").write_text(f"parameters: {{model: {folder}}}\ndtype: fp32\n{text}\n")
    model = load.load(Catalog([tmp_path / "m.yaml"]).get("m"), "cpu", quiet)
    assert isinstance(model.pipeline.vae, AutoencoderKL)
    for name, tensor in other.vae.state_dict().items():
        assert torch.equal(model.pipeline.vae.state_dict()[name], tensor)


def test_row_28_one_of_other_latents_is_refused_and_none_is_the_model_s_own(
    repositories: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(latent_channels=8, block_out_channels=(8,) * 4, norm_num_groups=4, **blocks).save_pretrained(
        tmp_path / "v"
    )
    with pytest.raises(ModelFileError, match="8 channels"):
        load.load(config(tmp_path, folder, vae="v"), "cpu", quiet)
    for word in ("None", "Automatic"):
        (tmp_path / "m.yaml").write_text(f"parameters: {{model: {folder}}}\nsd_vae: {word}\n")
        assert Catalog([tmp_path]).get("m").vae is None


# Rows 31 and 39: what `check` says beforehand.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("diffusers: {control_net: a/b}", ""),
        ("diffusers: {control_net: [a/b, c/d], img2img: true}", ""),
        ("diffusers: {control_net: a/b, pipeline_type: StableDiffusionPipeline}", ""),
        ("diffusers: {control_net: a/b, pipeline_type: FluxPipeline}", "FluxControlNetPipeline does not fit"),
        ("diffusers: {control_net: a/b, pipeline_type: ChromaPipeline}", "control_net: ChromaPipeline takes no"),
        ("diffusers: {control_net: a/b, pipeline_type: StableDiffusionControlNetPipeline}", ""),
        ("diffusers: {pipeline_type: NoSuchPipeline}", "NoSuchPipeline"),
        ("vae: a/b\ndiffusers: {pipeline_type: DDPMPipeline}", "vae"),
    ],
)
def test_row_31_a_part_that_the_class_does_not_take_is_said_at_check(
    fields: str, words: str, here: Hub, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.yaml").write_text(f"parameters: {{model: {folder}}}\n{fields}\n")
    (report,) = check(Catalog([tmp_path]))
    assert report.ok == (not words)
    assert words in str(report)
    if words:
        with pytest.raises(SfumatoError) as caught:
            load.load(Catalog([tmp_path]).get("m"), "cpu", quiet)
        assert caught.value.message in str(report)
        assert not [request for request in here.requests if "/a/b/" in request.path]


MODULAR = {"type_hint": ["transformers", "Qwen3VLProcessor"], "pretrained_model_name_or_path": "o/r"}


@pytest.mark.parametrize(
    ("kind", "file", "part"),
    [
        ("QwenImageEditPipeline", "model_index.json", ["transformers", "Qwen2VLProcessor"]),
        ("QwenImage21ModularPipeline", "modular_model_index.json", [None, None, MODULAR]),
    ],
)
def test_row_39_a_processor_that_reads_videos_needs_torchvision(
    kind: str, file: str, part: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: find(name) if name != "torchvision" else None)
    index = {"_class_name": kind, "processor": part}
    assert processor_packages.of(index) == ("torchvision",)
    assert processor_packages.of(index | {"processor": ["transformers", "CLIPImageProcessor"]}) == ()
    with pytest.raises(LoadError, match="needs what is not installed: torchvision"):
        pipeline_class.choose(ModelConfig(name="m", model="o/r"), index)


@pytest.mark.parametrize(("kind", "package"), [("PRXPipeline", "ftfy"), ("ConsisIDPipeline", "opencv-python-headless")])
def test_row_39_a_missing_package_is_named_at_check(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    gone: Callable[..., Any] = lambda name, *rest: None if name in ("ftfy", "cv2") else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    for text in ("parameters: {model: w}", f"parameters: {{model: o/r}}\ndiffusers: {{pipeline_type: {kind}}}"):
        (tmp_path / "m.yaml").write_text(text)
        (report,) = check(Catalog([tmp_path]))
        assert not report.ok
        assert f"pip install {package}" in str(report)
    with pytest.raises(LoadError, match=package):
        load.load(ModelConfig(name="m", model="o/r", pipeline_type=kind), "cpu", quiet)


def test_row_39_no_class_of_stable_diffusion_needs_more_than_is_here() -> None:
    for name in (
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "FluxPipeline",
        "DDPMPipeline",
        "DiffusionPipeline",
    ):
        assert pipeline_class.packages(name) == ()


# Row 25: a lone single file.

SIZES = [
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", {"unet": 859_520_964, "text_encoder": 123_060_480}),
    ("stable-diffusion-v1-5/stable-diffusion-inpainting", {"unet": 859_535_364, "text_encoder": 123_060_480}),
    ("stabilityai/stable-diffusion-2-1", {"unet": 865_910_724, "text_encoder": 340_387_840}),
    ("stabilityai/stable-diffusion-2-inpainting", {"unet": 865_925_124, "text_encoder": 340_387_840}),
    (
        "stabilityai/stable-diffusion-xl-base-1.0",
        {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    ),
    ("diffusers/stable-diffusion-xl-1.0-inpainting-0.1", {"unet": 2_567_478_084, "text_encoder_2": 694_659_840}),
    ("stabilityai/stable-diffusion-xl-refiner-1.0", {"text_encoder_2": 694_659_840}),
]


@pytest.mark.parametrize(("repo", "sizes"), SIZES)
def test_row_25_what_is_shipped_describes_the_real_models(repo: str, sizes: dict[str, int]) -> None:
    folder = descriptions.of(repo)
    assert folder
    index = pipeline_class.index_of(folder)
    for part, size in {**sizes, "vae": 83_653_863}.items():
        library, kind = index[part]
        with torch.device("meta"):
            if library == "diffusers":
                made = getattr(diffusers, kind).from_config(json.loads((folder / part / "config.json").read_text()))
            else:
                made = getattr(transformers, kind)(transformers.CLIPTextConfig.from_pretrained(folder / part))
        assert sum(tensor.numel() for tensor in made.parameters()) == size, part
    getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    assert pipeline_class.choose(ModelConfig(name="m", model="m"), index) == index["_class_name"]


def test_row_25_the_tokenizer_is_clip_s() -> None:
    folder = descriptions.of("stabilityai/stable-diffusion-xl-base-1.0")
    assert folder
    with descriptions.whole(folder) as whole:
        one, other = (CLIPTokenizer.from_pretrained(whole / part) for part in ("tokenizer", "tokenizer_2"))
    assert len(one) == 49408
    assert one("a photo of a Cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (one.pad_token_id, other.pad_token_id, one.model_max_length) == (49407, 0, 77)


def test_row_25_without_network_and_cache_it_is_used(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub() as hub:
        use(hub, tmp_path / "cache", monkeypatch)  # which has no such repository
        described = download.description_of(checkpoint, "m")
    assert described == descriptions.of("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert download.description_of(checkpoint, "m") == described  # the hub is gone
    cut(monkeypatch)
    assert download.description_of(checkpoint, "m") == described
    made = config(tmp_path, checkpoint)
    told = static_capabilities.static_capabilities(made)
    assert (told.pipeline, told.size_multiple, told.prompt_tokens) == ("StableDiffusionPipeline", 8, 77)


ORIGINAL = """
model:
  params:
    unet_config:
      params: {in_channels: 4, out_channels: 4, model_channels: 32, attention_resolutions: [1], num_res_blocks: 1,
               channel_mult: [1, 2], num_heads: 4, transformer_depth: 1, context_dim: 32, use_spatial_transformer: true}
    first_stage_config:
      params:
        ddconfig: {z_channels: 4, ch: 32, ch_mult: [1, 1, 1, 1], num_res_blocks: 1, in_channels: 3, out_ch: 3}
"""


def test_row_25_the_original_configuration_is_heard(here: Hub, tmp_path: Path) -> None:
    pipeline = tiny.stable_diffusion()
    with tiny.seeded(1):
        pipeline.register_modules(
            unet=tiny._unet(block_out_channels=(32, 64), norm_num_groups=32),
            vae=tiny._vae(block_out_channels=(32,) * 4, norm_num_groups=32),
        )
    single_file(pipeline, tmp_path / "x.safetensors")
    (tmp_path / "v1.yaml.txt").write_text(ORIGINAL)
    made = config(tmp_path, "x.safetensors", original_config="v1.yaml.txt")
    loaded = load.load(made, "cpu", quiet).pipeline
    for part in ("unet", "vae"):
        for name, tensor in getattr(pipeline, part).state_dict().items():
            assert torch.equal(getattr(loaded, part).state_dict()[name], tensor), name
    with pytest.raises(LoadError, match="original_config_file"):
        load.load(config(tmp_path, "x.safetensors", original_config="gone.yaml"), "cpu", quiet)


# Rows 14 and 15: the file's values and the request's.


@pytest.fixture(scope="module")
def loaded(folder: Path) -> load.Loaded:
    return load.load(config(folder.parent, folder), "cpu", quiet)


VALUES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # 14: the file's own values hold whatever requests may set
    ("step: 4\nclip_skip: 2", {}, {"num_inference_steps": 4, "clip_skip": 2}),
    ("step: 4\nparameters: {negative_prompt: bad}", {}, {"num_inference_steps": 4, "negative_prompt": "bad"}),
    ("", {}, {"num_inference_steps": 30}),
    ("step: 4\nclip_skip: 2", {"quality": "high"}, {"num_inference_steps": 4}),
    # 15: a request's value wins over options
    ("options: ['num_inference_steps:6']", {}, {"num_inference_steps": 6}),
    ("options: ['num_inference_steps:6']", {"steps": 3}, {"num_inference_steps": 3}),
    ("step: 5\noptions: ['num_inference_steps:6']", {}, {"num_inference_steps": 6}),
    ("options: ['guidance_scale:2', 'eta:0.5']", {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "eta": 0.5}),
    ("options: ['clip_skip:3', 'negative_prompt:x']", {"clip_skip": 1, "negative_prompt": "y"},
     {"clip_skip": 1, "negative_prompt": "y"}),
    ("options: ['num_inference_steps:6']\nlocked: num_inference_steps", {"steps": 3}, {"num_inference_steps": 6}),
    ("options: ['num_inference_steps:6', 'guidance_scale:2']\nlocked: true", {"steps": 3, "guidance_scale": 5.0},
     {"num_inference_steps": 6, "guidance_scale": 2}),
    ("options: ['num_inference_steps:6', 'guidance_scale:2']\nlocked: [step]", {"steps": 3, "guidance_scale": 5.0},
     {"num_inference_steps": 6, "guidance_scale": 5.0}),
    ("step: 4\nclip_skip: 2\nlocked: [step, clip_skip]", {"steps": 3, "clip_skip": 1, "quality": "max"},
     {"num_inference_steps": 4, "clip_skip": 2}),
    # locked without a value: the class's own
    ("locked: [eta, clip_skip]", {"eta": 0.5, "clip_skip": 1}, {"eta": None, "clip_skip": None}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "requested", "wanted"), VALUES)
@pytest.mark.parametrize("enabled", ["num_inference_steps,clip_skip", "none", "negative_prompt"])
def test_rows_14_and_15_whose_value_is_used(
    text: str, requested: dict[str, Any], wanted: dict[str, Any], enabled: str, loaded: load.Loaded, tmp_path: Path
) -> None:
    if "quality" in requested and "num_inference_steps" in enabled and "locked" not in text:
        pytest.skip("where requests may choose the steps, quality does")
    parameters = "" if "parameters:" in text else "parameters: {model: o/r}\n"
    text = text.replace("parameters: {", "parameters: {model: o/r, ")
    (tmp_path / "m.yaml").write_text(f"{parameters}{text}\ndiffusers: {{enable_parameters: '{enabled}'}}\n")
    model = replace(loaded, config=Catalog([tmp_path]).get("m"))
    generation = asked(**{"steps": None, **requested})
    filled = arguments.fill(model, model.pipeline, generation)
    canvas = arguments.canvas(model, model.pipeline, filled)
    given = arguments.arguments(model, model.pipeline, generation, filled, canvas)
    assert {key: given.get(key) for key in wanted} == wanted


def test_row_15_a_value_that_is_locked_is_told(loaded: load.Loaded, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("parameters: {model: o/r}\nstep: 2\nlocked: [step]\n")
    model = replace(loaded, config=Catalog([tmp_path]).get("m"))
    done = draw.draw(model, asked(steps=3), quiet)
    assert done.recipe.sampling.steps == 2
    assert done.warnings == ("steps: 3 was not used: m locks it",)


@pytest.mark.parametrize("name", ["size", "seed", "scheduler", "scheduler_type"])
def test_row_15_what_cannot_be_locked_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(f"parameters: {{model: o/r}}\nlocked: [{name}]\n")
    (problem,) = Catalog([tmp_path]).problems()
    assert f"{name} cannot be locked" in str(problem)


def test_row_15_strength_is_for_the_steps_that_are_drawn(
    repositories: dict[str, Path], tmp_path: Path, loaded: load.Loaded
) -> None:
    (tmp_path / "m.yaml").write_text("parameters: {model: o/r}\noptions: ['num_inference_steps:1']\n")
    model = replace(loaded, config=Catalog([tmp_path]).get("m"), task_pipelines={})
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "navy").save(picture, "PNG")
    done = draw.draw(model, asked(steps=None, images=(picture.getvalue(),), strength=0.5), quiet)
    assert done.recipe.sampling.steps == 1


def test_row_15_quality_counts_as_a_request_s_value(loaded: load.Loaded, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("parameters: {model: o/r}\noptions: ['num_inference_steps:6']\n")
    model = replace(loaded, config=Catalog([tmp_path]).get("m"))
    generation = asked(steps=None, quality="high")
    filled = arguments.fill(model, model.pipeline, generation)
    canvas = arguments.canvas(model, model.pipeline, filled)
    assert arguments.arguments(model, model.pipeline, generation, filled, canvas)["num_inference_steps"] == 9


# Row 24: GGUF.


def as_gguf(module: torch.nn.Module, path: Path) -> Path:
    """The tensors of a module as they are, F16 and F32, under their own names."""
    writer = GGUFWriter(path, "flux")
    for name, tensor in module.state_dict().items():
        writer.add_tensor(name, tensor.half().numpy() if tensor.dim() > 1 else tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_row_24_a_denoiser_takes_all_else_from_its_base(
    here: Hub, repositories: dict[str, Path], tmp_path: Path
) -> None:
    as_gguf(tiny.flux(seed=9).transformer, tmp_path / "X.GGUF")
    shutil.copytree(repositories["tiny/flux"], tmp_path / "base")
    here.add("tiny/base", tmp_path / "base")
    for where in ("base", "tiny/base"):
        made = config(tmp_path, "X.GGUF", base_model=where)
        model = load.load(made, "cpu", quiet)
        assert type(model.pipeline).__name__ == "FluxPipeline"
        assert np.abs(drawn(made) - drawn(config(tmp_path, tmp_path / "base"))).max() > 1
        assert static_capabilities.static_capabilities(made).pipeline == "FluxPipeline"
    fetched = here.downloads("tiny/base")
    assert "transformer/config.json" in fetched
    assert not [path for path in fetched if path.startswith("transformer/") and path.endswith(".safetensors")]


@pytest.mark.parametrize("model", ["x.gguf", "huggingface://a/b/x.gguf", "https://h.example/x.gguf", "X.GGUF"])
def test_row_24_what_is_missing_is_said_at_check(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x.gguf", "X.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF")
    (tmp_path / "m.yaml").write_text(f"backend: diffusers\nparameters: {{model: '{model}'}}\n")
    (report,) = check(Catalog([tmp_path]))
    assert "base_model" in str(report)
    assert not report.ok
    with pytest.raises(ModelFileError, match="base_model"):
        load.load(Catalog([tmp_path]).get("m"), "cpu", quiet)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    (report,) = check(Catalog([tmp_path]))
    assert "sfumato[gguf]" in str(report)
