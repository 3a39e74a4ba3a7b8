"""IP-Adapters of transformers, in floats and in the engine: exact, shared with neighbours, and nothing copied."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sfumato.checkpoints import ip_adapters as files
from sfumato.core import Control, Done, Generation
from sfumato.models import ip_adapters
from sfumato.models.picture_prompt import Adapter, PicturePrompt, Prompted, Weights
from support import loras, nets, prompted, tiny
from support.drawing import loaded, source
from support.engines import Engine, generation, pixels
from support.families_moving import animate_diff
from support.families_transformers import chroma

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")


def saved(folder: Path, family: str, seed: int = 31) -> Path:
    make = {"flux": prompted.flux, "sd3": prompted.sd3}[family]
    tensors = make(nets.plain(family).transformer, torch.Generator().manual_seed(seed))
    return loras.saved(tensors, folder / f"adapter-{seed}.safetensors")


def adapter(file: Path) -> Adapter:
    return Adapter(Weights(load_file(file)), file.stem, files.encoder_of(file), None)


def inputs(family: str, transformer: Any, count: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = transformer.config
    made = {
        "encoder_hidden_states": torch.randn(2, 5, config.joint_attention_dim),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim),
    }
    if family == "sd3":
        seen = {"ip_adapter_image_embeds": torch.randn(2, 16, prompted.SEEN)}
        size = config.sample_size
        return {
            **made, "hidden_states": torch.randn(2, config.in_channels, size, size), "joint_attention_kwargs": seen,
            "timestep": torch.tensor([700.0, 700.0]),
        }  # fmt: skip
    seen = {"ip_adapter_image_embeds": [torch.randn(2, 1, prompted.VISION.projection_dim) for _ in range(count)]}
    guidance = {"guidance": torch.tensor([3.0, 3.0])} if config.guidance_embeds else {}
    return {
        **made, "hidden_states": torch.randn(2, 16, config.in_channels), "joint_attention_kwargs": seen,
        "timestep": torch.tensor([0.7, 0.7]), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3), **guidance,
    }  # fmt: skip


@pytest.mark.parametrize(("family", "scales"), [("flux", (0.3,)), ("flux", (0.3, 0.8)), ("sd3", (0.6,))])
def test_the_twin_computes_what_diffusers_computes(tmp_path: Path, family: str, scales: tuple[float, ...]) -> None:
    pipeline = nets.plain(family)
    own = copy.deepcopy(pipeline.transformer)
    adapters = [adapter(saved(tmp_path, family, seed)) for seed in range(len(scales))]
    used = tuple(Prompted(each, (at,), scales[at]) for at, each in enumerate(adapters))
    model = loaded(pipeline)
    model.prompt = PicturePrompt(used, "controls[0].name")
    selected, attending = ip_adapters.selections(model, {})
    assert attending is not None
    selection = selected[id(pipeline.transformer)]
    states = [{"image_proj": each.weights.of("image_proj."), "ip_adapter": each.weights.of("ip_adapter.")}
              for each in adapters]  # fmt: skip
    own._load_ip_adapter_weights(states if family == "flux" else states[0])
    for processor in own.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = list(scales) if family == "flux" else scales[0]
    with torch.no_grad():
        expected = own(**inputs(family, own, len(scales))).sample
        given = inputs(family, own, len(scales))
        assert torch.allclose(selection.run("__call__", [selection], (), given).sample, expected, atol=1e-5)
        attending.strengths = (0.0,) * len(scales)
        without = selection.run("__call__", [selection], (), inputs(family, own, len(scales))).sample
        plain = inputs(family, own, len(scales)) | {"joint_attention_kwargs": None}
        assert torch.allclose(without, pipeline.transformer(**plain).sample, atol=1e-5)
    assert not torch.allclose(without, expected, atol=1e-3)
    if family == "sd3":  # its pipeline asks the twin, which other requests have, too
        another = copy.copy(pipeline)
        vars(another)["transformer"] = selection.module
        assert another.is_ip_adapter_active
    shared = {tensor.data_ptr() for tensor in selection.module.parameters()}
    assert {tensor.data_ptr() for tensor in pipeline.transformer.parameters()} <= shared
    weights = adapters[0].weights
    attention = {tensor.data_ptr() for name, tensor in zip(weights.names, weights.tensors, strict=True)
                 if name.startswith("ip_adapter.")}  # fmt: skip
    assert attention <= shared, "the adapter's tensors are not in memory twice"


def kolors() -> Any:
    """Whose UNet has a projection for its text where others have none."""
    plain = nets.plain("sd")
    config = {name: value for name, value in plain.unet.config.items() if not name.startswith("_")}
    config |= {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"}
    with tiny.seeded(5):
        return type(plain)(**{**plain.components, "unet": type(plain.unet).from_config(config).eval()},
                           requires_safety_checker=False)  # fmt: skip


@pytest.mark.parametrize(
    ("build", "text"), [(animate_diff, None), (chroma, None), (kolors, 20)], ids=["animatediff", "chroma", "kolors"]
)
def test_other_families_of_diffusers_with_adapters(tmp_path: Path, build: Any, text: int | None) -> None:
    pipeline = build()
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    denoiser = getattr(pipeline, name)
    own, config, file = copy.deepcopy(denoiser), denoiser.config, tmp_path / "adapter.safetensors"
    if name == "unet":
        prompted.save_adapter(file, denoiser)
    else:
        loras.saved(prompted.flux(denoiser, torch.Generator().manual_seed(1)), file)
    assert files.taken_by(type(pipeline).__name__)
    made = adapter(file)
    model = loaded(pipeline)
    model.prompt = PicturePrompt((Prompted(made, (0,), 0.6),), "controls[0].name")
    selected, attending = ip_adapters.selections(model, {})
    assert attending is not None
    selection = selected[id(denoiser)]
    own._load_ip_adapter_weights(
        [{"image_proj": made.weights.of("image_proj."), "ip_adapter": made.weights.of("ip_adapter.")}]
    )
    for processor in own.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [0.6]

    def given() -> dict[str, Any]:
        torch.manual_seed(0)
        seen = [torch.randn(1, 1, prompted.VISION.projection_dim)]
        if name == "transformer":
            return {
                "hidden_states": torch.randn(1, 16, config.in_channels), "timestep": torch.tensor([0.7]),
                "encoder_hidden_states": torch.randn(1, 5, config.joint_attention_dim), "img_ids": torch.zeros(16, 3),
                "txt_ids": torch.zeros(5, 3), "joint_attention_kwargs": {"ip_adapter_image_embeds": seen},
            }  # fmt: skip
        frames = (2,) if build is animate_diff else ()
        width = text or config.cross_attention_dim
        return {
            "sample": torch.randn(1, config.in_channels, *frames, 8, 8), "timestep": torch.tensor(7),
            "encoder_hidden_states": torch.randn(*(frames or (1,)), 5, width),
            "added_cond_kwargs": {"image_embeds": seen},
        }  # fmt: skip

    with torch.no_grad():
        answer = selection.run("__call__", [selection], (), given()).sample
        assert torch.allclose(answer, own(**given()).sample, atol=1e-5)
        attending.strengths = (0.0,)
        assert not torch.allclose(answer, selection.run("__call__", [selection], (), given()).sample, atol=1e-3)


@pytest.fixture(scope="module", params=["flux", "sd3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model, and its adapter with the image encoder."""
    folder = tmp_path_factory.mktemp(request.param)
    # A ControlNet made of a transformer changes the configuration of that.
    tiny.save(tiny.stable_diffusion_3() if request.param == "sd3" else nets.plain("flux"), folder / "base")
    (folder / "ip_adapters").mkdir()
    saved(folder / "ip_adapters", request.param).rename(folder / "ip_adapters" / "mine.safetensors")
    {"flux": prompted.save_encoder, "sd3": prompted.save_siglip}[request.param](folder / "ip_adapters" / "encoder")
    return folder


def requested(id: str, picture: int = 64, weight: float | None = None, **fields: Any) -> Generation:
    control = Control(source(picture, 64), name="mine", weight=weight)
    return generation(id, controls=(control,), max_sequence_length=64, **fields)


def test_requests_share_forward_passes_and_draw_what_each_draws_alone(folder: Path) -> None:
    """Also beside one whose adapter does not act: what a pipeline reads of the twin is not another request's."""
    engine = Engine(folder, max_batch=16)
    wanted = [
        requested("0"), requested("1", picture=96, steps=5), generation("2", max_sequence_length=64),
        requested("3", weight=0.0),
    ]  # fmt: skip
    engine.draw(*wanted)  # then nothing waits for a load or a proof
    events = engine.draw(*wanted)
    assert all(isinstance(event, Done) for event in events.values()), events
    assert engine.shared("transformer") >= 2
    assert engine.shared("image_encoder") >= 2
    for each in wanted:
        alone = Engine(folder, max_batch=1).draw(each)[each.id]
        assert np.abs(pixels(alone) - pixels(events[each.id])).max() <= 1, each.id
    assert np.abs(pixels(events["0"]) - pixels(events["3"])).max() > 1
    assert not any(engine.loop._pool._users.values())
    assert not ip_adapters._EXTENDED, "no twin stays in memory"
    assert {name.partition("/")[0] for name in engine.in_memory} >= {"m", "ip_adapters"}
    engine.loop._pool.unload(None)
    assert engine.in_memory == set()
