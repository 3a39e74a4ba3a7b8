"""Loading: every source, every component that a model file can bring, and the rules of device and dtype."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from sfumato.checkpoints import download
from sfumato.config import Download, ModelConfig
from sfumato.core import Generation
from sfumato.drawing.draw import draw
from sfumato.errors import DeviceUnavailable, DownloadError, LoadError, ModelFileError
from sfumato.models import device, load
from sfumato.pictures.images import decoded
from sfumato.sampling import Sampling, nested
from sfumato.serving.catalog import Catalog
from support import loads, tiny
from support.drawing import quiet


@pytest.fixture(scope="module")
def folder(repositories: dict[str, Path]) -> Path:
    return repositories["nitrosocke/Ghibli-Diffusion"]


def config(model: Path | str, **fields: Any) -> ModelConfig:
    return ModelConfig(**nested({"name": "m", "model": str(model), "dtype": "fp32", **fields}))


def drawn(made: ModelConfig, **fields: Any) -> Any:
    model = load.load(made, "cpu", quiet)
    asked = Generation(
        **nested({"id": "1", "prompt": "a cat", "seed": 1, "steps": 2, "width": 64, "height": 64, **fields})
    )
    return np.asarray(decoded(draw(model, asked, quiet).file)).astype(int)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A plain web server on localhost over a folder."""
    root = tmp_path / "site"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", root
        server.shutdown()


def test_a_url_is_fetched_once_and_whole(site: tuple[str, Path], tmp_path: Path) -> None:
    url, root = site
    (root / "w.safetensors").write_bytes(b"x" * 3_000_000)
    digest = hashlib.sha256(b"x" * 3_000_000).hexdigest()
    told: list[float | None] = []
    fetched = download.from_url(
        f"{url}/w.safetensors", tmp_path / "w.safetensors", sha256=digest, report=lambda part, what: told.append(part)
    )
    assert fetched.stat().st_size == 3_000_000
    assert told[-1] == 1.0
    assert told == sorted(told, key=lambda part: part or 0.0)
    (root / "w.safetensors").unlink()
    download.from_url(f"{url}/w.safetensors", tmp_path / "w.safetensors", sha256=digest, report=quiet)


@pytest.mark.parametrize(("name", "sha256", "words"), [("no.bin", None, "404"), ("w", "0" * 64, "sha256")])
def test_a_download_that_fails_leaves_nothing(
    site: tuple[str, Path], tmp_path: Path, name: str, sha256: str | None, words: str
) -> None:
    url, root = site
    (root / "w").write_bytes(b"x")
    with pytest.raises(DownloadError, match=words):
        download.from_url(f"{url}/{name}", tmp_path / "kept" / name, sha256=sha256, report=quiet)
    assert not list((tmp_path / "kept").glob("*"))


def test_download_files_come_before_the_model(site: tuple[str, Path], tmp_path: Path, folder: Path) -> None:
    url, root = site
    (root / "note.txt").write_text("hello")
    made = config(folder, folder=tmp_path, downloads=(Download(f"{url}/note.txt", "sub/note.txt"),))
    load.load(made, "cpu", quiet)
    assert (tmp_path / "sub" / "note.txt").read_text() == "hello"


def test_lora_adapters_change_the_picture_by_their_scale(folder: Path, tmp_path: Path) -> None:
    pipeline = tiny.stable_diffusion()
    with tiny.seeded(3):
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        pipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    (tmp_path / "m.yaml").write_text(
        f"name: m\nparameters:\n  model: {folder}\ndtype: fp32\nlora_adapter: pytorch_lora_weights.safetensors\n"
        "lora_scale: 2.0\n"
    )
    full = Catalog([tmp_path]).get("m")
    none = replace(full, adapters=(replace(full.adapters[0], scale=0.0),))
    plain = drawn(config(folder))
    assert np.abs(drawn(none) - plain).max() <= 1
    assert np.abs(drawn(full) - plain).max() > 1


def test_a_control_net_takes_the_picture(folder: Path, tmp_path: Path) -> None:
    with tiny.seeded(4):
        net = ControlNetModel.from_unet(tiny.stable_diffusion().unet)
        for layer in net.controlnet_down_blocks:  # zero at first, as trained ones are not
            torch.nn.init.normal_(layer.weight, std=0.5)
    net.save_pretrained(tmp_path / "control")
    made = config(folder, control_net=str(tmp_path / "control"), pipeline_type="StableDiffusionControlNetPipeline")
    file = tmp_path / "x.png"
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save(file)
    assert np.abs(drawn(made, images=(file.read_bytes(),)) - drawn(config(folder))).max() > 1


def test_another_text_encoder(folder: Path, tmp_path: Path) -> None:
    tiny.stable_diffusion(seed=9).text_encoder.save_pretrained(tmp_path / "clip")
    assert np.abs(drawn(config(folder, clip_model=str(tmp_path / "clip"))) - drawn(config(folder))).max() > 1


def test_clip_skip_skips(folder: Path) -> None:
    assert np.abs(drawn(config(folder, clip_skip=2)) - drawn(config(folder))).max() > 1
    with pytest.raises(ModelFileError, match="0 to 12"):
        load.load(config(folder, clip_skip=13), "cpu", quiet)


def test_a_half_precision_variant_is_found(tmp_path: Path) -> None:
    tiny.save(tiny.stable_diffusion().to(torch.float16), tmp_path / "half", variant="fp16")
    model = load.load(config(tmp_path / "half", dtype="bf16"), "cpu", quiet)
    assert model.pipeline.unet.dtype == torch.bfloat16
    assert load.load(config(tmp_path / "half", variant="fp16"), "cpu", quiet).pipeline.unet.dtype == torch.float32


def test_device_and_dtype_rules(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = config(folder, dtype=None)
    cpu = device.choose_dtype(made, "cpu")
    assert cpu in ("bf16", "fp32")
    assert device.choose_dtype(made, "cuda") == "bf16"
    assert device.choose_dtype(made, "mps") == "fp32"
    assert device.choose_dtype(replace(made, f16=True), "cuda:1") == "fp16"
    assert device.choose_dtype(replace(made, f16=True), "cpu") == cpu
    assert "f16: true" in caplog.text
    assert device.choose_dtype(replace(made, f16=True, dtype="fp32"), "cuda") == "fp32"
    assert device.choose_device(replace(made, cuda=False), "auto") == "cpu"
    assert device.choose_device(replace(made, cuda=True), "cpu") == "cpu"
    if not torch.cuda.is_available():
        for setting in ("auto", "cuda"):
            with pytest.raises(DeviceUnavailable, match="cuda: false"):
                device.choose_device(replace(made, cuda=True), setting)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"pipeline_type": "StableDifusionPipeline"}, ModelFileError, "Did you mean 'StableDiffusionPipeline'"),
        ({"pipeline_type": "AutoencoderKL"}, ModelFileError, "not a pipeline class"),
        ({"model": "no-such-folder/"}, LoadError, "no-such-folder"),
        ({"pipeline_type": "FluxPipeline"}, LoadError, "m: "),
        ({"sampling": Sampling(scheduler="lcm"), "pipeline_type": "StableDiffusionPipeline"}, None, ""),
    ],
)
def test_what_cannot_be_loaded_is_said(
    folder: Path, fields: dict[str, Any], error: type[Exception] | None, words: str
) -> None:
    made = config(**{"model": folder, **fields})
    if error is None:
        load.load(made, "cpu", quiet)
        return
    with pytest.raises(error, match=words):
        load.load(made, "cpu", quiet)


def test_residency_keeps_the_last_used_and_the_pinned(folder: Path) -> None:
    states: list[tuple[str, str]] = []
    pool = loads.pool(2, lambda name, status: states.append((name, status.state)))

    def got(made: ModelConfig) -> load.Loaded:
        with pool.use(made, turn=loads.turn) as model:
            return model

    a, b, c = (config(folder, name=name) for name in "abc")
    first = got(replace(a, pinned=True))
    got(b)
    got(c)
    assert ("b", "unloaded") in states
    assert got(replace(a, pinned=True)) is first
    # What each request reads anew loads nothing; what was loaded does.
    assert got(replace(a, pinned=True, sampling=Sampling(steps=5, guidance_scale=1.0))) is first
    assert got(replace(a, pinned=True, dtype="bf16")) is not first


def test_a_model_in_use_never_leaves(folder: Path) -> None:
    pool = loads.pool(1, quiet)
    waited = []

    def free() -> None:
        loads.turn()  # until it is known what it needs
        if not waited:
            pool.tend()
            waited.extend(pool.sizes)
            held.close()

    held = ExitStack()
    held.enter_context(pool.use(config(folder, name="a"), loads.turn))
    with pool.use(config(folder, name="b"), free) as model:
        assert model.config.name == "b"
    assert waited == ["a"]
