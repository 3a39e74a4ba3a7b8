"""Models in several files, as ComfyUI keeps them, and what single files are: told from their headers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file

from sfumato.checkpoints import static_capabilities
from sfumato.commands.check import check
from sfumato.errors import LoadError, ModelFileError, SfumatoError, UnfitPipeline
from sfumato.models import fetch, footprint, load
from sfumato.serving.catalog import Catalog
from support import tiny
from support.here import config, drawn, quiet, use
from support.hub import Hub


def tensors(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor.contiguous() for name, tensor in module.state_dict().items()}


def comfy(pipe: Any, root: Path) -> Path:
    """The parts of a Flux as ComfyUI keeps them; the denoiser under diffusers' names, as many are."""
    for folder in ("diffusion_models", "text_encoders", "vae"):
        (root / folder).mkdir(parents=True)
    save_file(tensors(pipe.transformer), root / "diffusion_models" / "flux.safetensors")
    clip = {
        f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors(pipe.text_encoder).items()
    }
    save_file(clip, root / "text_encoders" / "clip_l.safetensors")
    t5 = {name: tensor for name, tensor in tensors(pipe.text_encoder_2).items() if "embed_tokens" not in name}
    save_file(t5, root / "text_encoders" / "t5xxl.safetensors")
    save_file(tensors(pipe.vae), root / "vae" / "ae.safetensors")
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flux whose encoders differ in width, so that their headers tell them apart."""
    return tiny.save(tiny.flux(), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of other weights."""
    return tiny.save(tiny.flux(seed=9), tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def split(other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comfy(FluxPipeline.from_pretrained(other), tmp_path_factory.mktemp("comfy") / "models")


KEYS: dict[str, tuple[str, dict[str, Any]]] = {
    "keys": ("diffusion_models/flux.safetensors", {
        "text_encoders": ("text_encoders/t5xxl.safetensors", "text_encoders/clip_l.safetensors"),
        "vae": "vae/ae.safetensors",
    }),
    "beside": ("diffusion_models/flux.safetensors", {}),
    "folder": ("", {}),
}  # fmt: skip


@pytest.mark.parametrize("way", KEYS)
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_model_in_several_files_draws_as_the_whole(
    way: str, where: str, here: Hub, base: Path, other: Path, split: Path, tmp_path: Path
) -> None:
    here.add("tiny/base", base)
    model, fields = KEYS[way]
    before = here.downloads("tiny/base")
    made = config(split, split / model, base_model=str(base) if where == "folder" else "tiny/base", **fields)
    assert np.abs(drawn(made) - drawn(config(tmp_path, other))).max() <= 1
    assert static_capabilities.static_capabilities(made).pipeline == "FluxPipeline"
    fetched = {path for path, count in here.downloads("tiny/base").items() if count > before.get(path, 0)}
    assert not [
        path for path in fetched if path.startswith(("transformer", "text_encoder")) and path.endswith("tensors")
    ]
    assert bool(fetched) == (where == "hub")


def test_what_the_files_lack_comes_from_the_base(base: Path, other: Path, split: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    shutil.copy(split / "diffusion_models" / "flux.safetensors", tmp_path / "x" / "flux.safetensors")
    made = config(tmp_path, "x/flux.safetensors", base_model=str(base))
    mixed = FluxPipeline.from_pretrained(base, transformer=FluxPipeline.from_pretrained(other).transformer)
    mixed.save_pretrained(tmp_path / "mixed")
    assert np.abs(drawn(made) - drawn(config(tmp_path, tmp_path / "mixed"))).max() <= 1


def write(root: Path, text: str) -> str:
    (root / "m.yaml").write_text(text)
    (report,) = check(Catalog([root / "m.yaml"]))
    return "" if report.ok else str(report)


def test_what_is_missing_or_too_much_is_said_at_check_and_load(base: Path, split: Path, tmp_path: Path) -> None:
    root = shutil.copytree(split, tmp_path / "models")
    shutil.copy(root / "text_encoders" / "t5xxl.safetensors", root / "t5.safetensors")
    source = "parameters: {model: diffusion_models/flux.safetensors}\n"
    cases = {
        source: "base_model",
        f"{source}diffusers: {{base_model: {base}, text_encoders: [vae/ae.safetensors]}}": "is no text encoder",
        f"{source}diffusers: {{base_model: {base}, text_encoders: [text_encoders/t5xxl.safetensors, "
        "t5.safetensors]}": "each once",
        f"{source}diffusers: {{base_model: {base}, pipeline_type: QwenImagePipeline}}": "pipeline_type: FluxPipeline`",
    }
    for text, words in cases.items():
        assert words in write(root, text), text
        with pytest.raises(SfumatoError, match=words.replace("`", ".")):
            load.load(Catalog([root / "m.yaml"]).get("m"), "cpu", quiet)
    assert write(root, f"{source}diffusers: {{base_model: {base}}}") == ""
    shutil.copy(root / "vae" / "ae.safetensors", root / "vae" / "other.safetensors")
    assert "vae/ae.safetensors, vae/other.safetensors all fit" in write(
        root, f"{source}diffusers: {{base_model: {base}}}"
    )
    shutil.copy(root / "diffusion_models" / "flux.safetensors", root / "diffusion_models" / "two.safetensors")
    assert "diffusion_models/two.safetensors" in write(root, "parameters: {model: .}\nbackend: diffusers")


def test_of_two_precisions_the_higher_is_taken(base: Path, split: Path, tmp_path: Path) -> None:
    root = shutil.copytree(split, tmp_path / "models")
    from safetensors.torch import load_file

    half = {name: tensor.half() for name, tensor in load_file(root / "text_encoders" / "t5xxl.safetensors").items()}
    save_file(half, root / "text_encoders" / "a_t5xxl_fp16.safetensors")
    made = config(root, "diffusion_models/flux.safetensors", base_model=str(base))
    assert str(fetch.fetch(made, "fp32", quiet).files["text_encoder_2"]).endswith("t5xxl.safetensors")
    assert "a_t5xxl" not in str(fetch.fetch(made, "fp32", quiet).files["text_encoder_2"])


# Quantised weights.


def fp8r(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Black Forest Labs' layout: a scale for each row."""
    quantised: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith(".weight") and tensor.dim() == 2 and "transformer_blocks" in name and "norm" not in name:
            scale = tensor.abs().amax(dim=1).clamp(min=1e-8) / 448
            quantised[name] = (tensor / scale[:, None]).to(torch.float8_e4m3fn)
            quantised[name.replace(".weight", ".weight_scale")] = scale.float()
        else:
            quantised[name] = tensor
    return quantised


def test_fp8_with_a_scale_for_each_row_is_read(base: Path, other: Path, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    weights = tensors(FluxPipeline.from_pretrained(other).transformer)
    save_file(fp8r(weights), tmp_path / "unet" / "flux.safetensors")
    save_file(weights, tmp_path / "plain.safetensors")
    quantised = drawn(config(tmp_path, "unet/flux.safetensors", base_model=str(base)))
    plain = drawn(config(tmp_path, "plain.safetensors", base_model=str(base)))
    assert np.abs(quantised - plain).max() > 0
    assert np.abs(quantised - plain).mean() < 4


def quantised(weights: Mapping[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """ComfyUI's layouts, and the plain one of others: a scale for each tensor, or row, and what says so."""
    made: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if layout == "old" else {}
    for name, tensor in weights.items():
        if not name.endswith(".weight") or tensor.dim() != 2 or "embed_tokens" in name or "shared" in name:
            made[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        scale = (tensor.abs().amax(dim=1, keepdim=True) if layout == "rows" else tensor.abs().amax()) / 448
        made[name] = (tensor / scale).to(torch.float8_e4m3fn)
        made[f"{layer}.{'scale_weight' if layout == 'old' else 'weight_scale'}"] = scale.float()
        made[f"{layer}.{'scale_input' if layout == 'old' else 'input_scale'}"] = torch.tensor(1.0)
        if layout in ("new", "rows"):
            said = b'{"format": "float8_e4m3fn"}'
            made[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    return made


@pytest.mark.parametrize("layout", ["old", "new", "rows", "plain"])
def test_scaled_fp8_is_read_into_the_models_dtype(layout: str, base: Path, other: Path, tmp_path: Path) -> None:
    pipe = FluxPipeline.from_pretrained(other)
    for name, module in (("flux", pipe.transformer), ("t5", pipe.text_encoder_2)):
        folder = tmp_path / ("unet" if name == "flux" else "text_encoders")
        folder.mkdir()
        weights = {key: value for key, value in tensors(module).items() if "encoder.embed_tokens" not in key}
        save_file(quantised(weights, layout), folder / f"{name}.sft")
    made = config(tmp_path, "unet/flux.sft", base_model=str(base))
    model = load.load(made, "cpu", quiet).pipeline
    for loaded, original in ((model.transformer, pipe.transformer), (model.text_encoder_2, pipe.text_encoder_2)):
        assert loaded.dtype == torch.float32
        expected = quantised(tensors(original), layout)
        for key, value in loaded.state_dict().items():
            scale = expected.get(f"{key}_scale", expected.get(f"{key.removesuffix('weight')}scale_weight"))
            wanted = expected[key].float() * (1 if scale is None else scale)
            assert torch.equal(value, wanted), key
    assert np.ptp(drawn(made)) > 0
    # Its footprint is that of the dtype in which it is in memory.
    size = sum(tensor.nbytes for tensor in model.transformer.parameters())
    counted = sum(footprint.of_files(tmp_path / "unet" / "flux.sft", {}, "fp32", None).values())
    assert 0 <= counted - size < size / 10
    assert sum(footprint.of_files(tmp_path / "unet" / "flux.sft", {}, "bf16", None).values()) < counted / 1.9


def test_comfy_quant_of_another_format_is_refused(base: Path, other: Path, tmp_path: Path) -> None:
    weights = quantised(tensors(FluxPipeline.from_pretrained(other).transformer), "new")
    name = next(name for name in weights if name.endswith("comfy_quant"))
    weights[name] = torch.tensor(list(b'{"format": "rotated"}'), dtype=torch.uint8)
    save_file(weights, tmp_path / "f.safetensors")
    with pytest.raises(LoadError, match=r"says rotated; float8_e4m3fn and float8_e5m2 are read.*\.gguf"):
        load.load(config(tmp_path, "f.safetensors", base_model=str(base)), "cpu", quiet)


def test_plain_fp8_is_cast(base: Path, other: Path, tmp_path: Path) -> None:
    weights = tensors(FluxPipeline.from_pretrained(other).transformer)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}, tmp_path / "f.safetensors")
    made = load.load(config(tmp_path, "f.safetensors", base_model=str(base)), "cpu", quiet)
    assert made.pipeline.transformer.dtype == torch.float32


UNREADABLE = [
    ({"x_embedder.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "x_embedder.comfy_quant": torch.zeros(4).byte(),
      "x_embedder.weight_scale": torch.ones(4, 4, dtype=torch.uint8)}, "ComfyUI's scaled fp8"),  # mxfp8
    ({"x_embedder.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "x_embedder.weight_scale": torch.ones(2)},
     "scaled fp8"),
    ({"x_embedder.weight": torch.ones(4, 4, dtype=torch.uint8), "x_embedder.comfy_quant": torch.zeros(4).byte(),
      "x_embedder.weight_scale": torch.ones(4, 1).to(torch.float8_e4m3fn),
      "x_embedder.weight_scale_2": torch.tensor(1.0)}, "ComfyUI's nvfp4"),
    ({"x_embedder.weight": torch.ones(4, 4, dtype=torch.int8), "x_embedder.comfy_quant": torch.zeros(4).byte(),
      "x_embedder.weight_scale": torch.tensor(1.0)}, "ComfyUI's scaled int8"),
    ({"x_embedder.weight": torch.ones(4, 4, dtype=torch.int8), "x_embedder.weight_scale": torch.ones(4)},
     "scaled int8"),
    ({"x_embedder.weight": torch.ones(4, 4, dtype=torch.int8)}, "int8"),
    ({"x_embedder.weight": torch.ones(4, dtype=torch.uint8), "x_embedder.weight.quant_state.bitsandbytes__nf4":
      torch.ones(4, dtype=torch.uint8)}, "bitsandbytes"),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "words"), UNREADABLE)
@pytest.mark.parametrize("where", ["file", "url"])
def test_a_layout_that_nothing_reads_is_named_before_the_download(
    weights: dict[str, torch.Tensor], words: str, where: str, here: Hub, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "repository").mkdir()
    save_file(weights, tmp_path / "repository" / "x.safetensors")
    here.add("acme/quantised", tmp_path / "repository")
    model = "repository/x.safetensors" if where == "file" else "huggingface://acme/quantised/x.safetensors"
    (tmp_path / "m.yaml").write_text(f"parameters: {{model: '{model}'}}\ndiffusers: {{base_model: {base}}}\n")
    catalog = Catalog([tmp_path / "m.yaml"])
    (report,) = check(catalog, ask=True)
    assert words in str(report)
    assert ".gguf" in str(report)
    with pytest.raises(LoadError, match=words):
        load.load(catalog.get("m"), "cpu", quiet)
    assert not list(tmp_path.glob("x-*"))


# Files that are no models.

PARTS = [
    ({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, "LoRA", "lora_adapter"),
    ({"transformer.x.lora_A.weight": torch.ones(2, 2)}, "LoRA", "lora_adapter"),
    ({"decoder.conv_in.weight": torch.ones(8, 4, 3, 3)}, "VAE", "`vae`"),
    ({"text_model.embeddings.token_embedding.weight": torch.ones(8, 4)}, "text encoder", "text_encoders"),
    ({"shared.weight": torch.ones(8, 4)}, "text encoder", "text_encoders"),
    ({"control_model.input_blocks.0.0.weight": torch.ones(8, 4)}, "ControlNet", "control_net"),
    ({"emb_params": torch.ones(2, 4)}, "textual inversion", "embeddings"),
]


@pytest.mark.parametrize(("weights", "kind", "remedy"), PARTS)
def test_a_file_that_is_no_model_is_named(
    weights: dict[str, torch.Tensor], kind: str, remedy: str, tmp_path: Path
) -> None:
    save_file(weights, tmp_path / "x.safetensors")
    said = write(tmp_path, "parameters: {model: x.safetensors}")
    assert f"is a {kind}" in said
    assert remedy in said
    with pytest.raises(LoadError, match=f"is a {kind}"):
        load.load(config(tmp_path, "x.safetensors"), "cpu", quiet)


@pytest.mark.parametrize("content", [b"", b"0" * 1000, b"\xff" * 64, (2**60).to_bytes(8, "little") + b"{}", b"GGUF",
                                     b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16,
                                     (13).to_bytes(8, "little") + b'{"a":{"b":1}}', "cut"])  # fmt: skip
def test_a_damaged_file_is_told(content: bytes | str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(checkpoint.read_bytes()[:-100] if isinstance(content, str) else content)
    assert "Download it again" in write(tmp_path, "parameters: {model: x.safetensors}")
    with pytest.raises(LoadError, match="ownload it again"):
        load.load(config(tmp_path, "x.safetensors"), "cpu", quiet)


# Row 27: a class that fits nothing.

DDPM = {
    "_class_name": "DDPMPipeline",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
}


@pytest.mark.parametrize(
    ("index", "kind", "words"),
    [
        ({"_class_name": "NoSuchPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}, None, "NoSuchPipeline"),
        ({"_class_name": ["pipeline_own", "OwnPipeline"]}, None, "OwnPipeline"),
        (DDPM, "StableDiffusionPipeline", "Write `pipeline_type: DDPMPipeline`"),
        (DDPM, "AutoPipelineForText2Image", "Write `pipeline_type: DDPMPipeline`"),
        ({"_class_name": "NoSuchPipeline", "unet": ["diffusers", "UNet2DModel"]}, "FluxPipeline", "Name a class of"),
        ({"_class_name": "DDPMPipeline"}, "StableDifusionPipeline", "Did you mean"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("base_only", [False, True])
def test_row_27_a_class_that_fits_nothing_is_a_4xx_before_anything_is_downloaded(
    index: dict[str, Any], kind: str | None, words: str, base_only: bool, here: Hub, tmp_path: Path
) -> None:
    (tmp_path / "repository" / "unet").mkdir(parents=True)
    (tmp_path / "repository" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "repository" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"0")
    here.add("acme/odd", tmp_path / "repository")
    model = "acme/odd"
    if base_only:  # as the base of a denoiser alone
        save_file({"double_blocks.0.img_mod.lin.weight": torch.ones(2, 2)}, tmp_path / "d.safetensors")
        model = "d.safetensors"
    text = f"parameters: {{model: {model}}}\ndiffusers: {{base_model: acme/odd, pipeline_type: {kind or ''}}}\n"
    (tmp_path / "m.yaml").write_text(text)
    (report,) = check(Catalog([tmp_path / "m.yaml"]), ask=True)
    assert not report.ok
    assert words in str(report)
    with pytest.raises(UnfitPipeline) as raised:
        load.load(Catalog([tmp_path / "m.yaml"]).get("m"), "cpu", quiet)
    assert words in raised.value.message
    assert 400 <= raised.value.status < 500
    assert not [path for path in here.downloads("acme/odd") if path.endswith(".safetensors")]


def test_row_27_the_class_is_looked_at_before_download_files_and_a_url(
    here: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "repository").mkdir()
    shutil.copy(checkpoint, tmp_path / "repository" / "one.safetensors")
    here.add("acme/one", tmp_path / "repository")
    (tmp_path / "m.yaml").write_text(
        "parameters: {model: 'huggingface://acme/one/one.safetensors'}\ndiffusers: {pipeline_type: FluxPipeline}\n"
        "download_files: [{uri: 'huggingface://acme/one/one.safetensors', filename: other.safetensors}]\n"
    )
    with pytest.raises(UnfitPipeline, match="StableDiffusionPipeline"):
        load.load(Catalog([tmp_path]).get("m"), "cpu", quiet)
    assert {path.name for path in tmp_path.iterdir()} == {"repository", "m.yaml"}


def test_check_asks_no_further_once_a_hub_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as away:
        pass
    use(away, tmp_path / "cache", monkeypatch)
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"parameters: {{model: acme/{name}}}\n")
    reports = check(Catalog([tmp_path]), ask=True)
    assert [report.ok for report in reports] == [True, True]
    assert ["not asked" in str(report) for report in reports] == [True, False]
    assert issubclass(UnfitPipeline, ModelFileError)
