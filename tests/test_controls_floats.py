"""ControlNets of requests equal diffusers' in floats, before they are rounded to pixels; beside a LoRA, too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from sfumato.core import Control, Done, Generation
from sfumato.pictures.images import decoded
from support import loras, nets
from support.control_engine import requested, save
from support.drawing import source
from support.engines import Engine

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some about toy sizes

FAMILIES = ("sd", "xl", "flux")
FIRST, SECOND = source(64, 64), source(64, 32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """What pipelines have decoded, -1 .. 1, in their order."""
    seen: list[torch.Tensor] = []
    original = VaeImageProcessor.postprocess

    def recorded(self: Any, image: torch.Tensor, *others: Any, **named: Any) -> Any:
        seen.append(image.detach().clone())
        return original(self, image, *others, **named)

    monkeypatch.setattr(VaeImageProcessor, "postprocess", recorded)
    yield seen


def of_diffusers(seen: list[torch.Tensor], pipeline: Any, family: str, pictures: list[bytes], **call: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    images = [decoded(png).convert("RGB").resize((64, 64), 1) for png in pictures]
    longest = {"max_sequence_length": 64} if family == "flux" else {}
    pipeline(
        **{
            "prompt": "a cat 1", "num_inference_steps": 4, "width": 64, "height": 64, "guidance_scale": 5.0, **longest,
            nets.CONTROLLED[family][2]: images if len(images) > 1 else images[0], **call,
        },
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    return seen.pop()


def both(family: str) -> Any:
    whole = nets.whole(family)
    return type(whole)(**{**whole.components, "controlnet": [whole.controlnet, nets.another(family)]})


def wanted(family: str, *controls: Control, **fields: Any) -> Generation:
    longest = {"max_sequence_length": 64} if family == "flux" else {}
    return replace(requested("1", guidance_scale=5.0, **longest, **fields), controls=controls)


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_and_two_nets_with_start_and_end_equal_diffusers(
    family: str, folders: Any, decodings: list[torch.Tensor]
) -> None:
    engine = Engine(folders(family))
    one = wanted(family, Control(FIRST, weight=0.7, start=0.25, end=0.75, name=f"{family}/canny"))
    assert isinstance(engine.draw(one)["1"], Done)
    drawn = decodings.pop()
    alone = {"controlnet_conditioning_scale": 0.7, "control_guidance_start": 0.25, "control_guidance_end": 0.75}
    assert largest(drawn, of_diffusers(decodings, nets.whole(family), family, [FIRST], **alone)) < 1e-5
    assert largest(drawn, of_diffusers(decodings, nets.whole(family), family, [FIRST])) > 1e-3
    two = wanted(
        family,
        Control(FIRST, weight=0.7, end=0.5, name=f"{family}/canny"),
        Control(FIRST, start=0.5, name=f"{family}/depth"),
    )
    assert isinstance(engine.draw(two)["1"], Done)
    drawn = decodings.pop()
    call = {"controlnet_conditioning_scale": [0.7, 1.0], "control_guidance_start": [0.0, 0.5],
            "control_guidance_end": [0.5, 1.0]}  # fmt: skip
    assert largest(drawn, of_diffusers(decodings, both(family), family, [FIRST, FIRST], **call)) < 1e-5


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_guess_mode_of_a_model_file_equals_diffusers(family: str, folders: Any, decodings: list[torch.Tensor]) -> None:
    engine = Engine(folders(family))
    net = f"controlnets/{family}/canny"
    engine.config = replace(engine.config, control_net=net, option_lines=(("guess_mode", "true"),))
    assert isinstance(engine.draw(wanted(family, Control(FIRST, weight=1.0)))["1"], Done)
    drawn = decodings.pop()
    assert largest(drawn, of_diffusers(decodings, nets.whole(family), family, [FIRST], guess_mode=True)) < 1e-5
    assert largest(drawn, of_diffusers(decodings, nets.whole(family), family, [FIRST])) > 1e-3


def lora(family: str, folder: Path, seed: int) -> Path:
    if family == "flux":
        return loras.diffusers(copy.deepcopy(nets.plain(family)), folder, f"l{seed}.safetensors", part="transformer")
    return loras.saved(loras.kohya(nets.plain(family), seed=seed), folder / f"l{seed}.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_and_a_net_in_one_request_equal_diffusers_also_in_a_mixed_batch(
    family: str, folders: Any, decodings: list[torch.Tensor], tmp_path: Path
) -> None:
    file = lora(family, tmp_path, 3)
    net = Control(FIRST, weight=0.7, name=f"{family}/canny")
    chosen = (loras.of(file, 0.8),)
    requests = {
        "both": replace(wanted(family, net), id="both", loras=chosen),
        "net": replace(wanted(family, net), id="net"),
        "lora": replace(wanted(family), id="lora", loras=chosen),
        "plain": replace(wanted(family), id="plain"),
        "again": replace(wanted(family, net), id="again", loras=chosen, seed=2),
    }
    fresh = copy.deepcopy(nets.whole(family))
    call = {"controlnet_conditioning_scale": 0.7}
    expected = {"net": of_diffusers(decodings, fresh, family, [FIRST], **call)}
    fresh.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="a")
    fresh.set_adapters(["a"], [0.8])
    expected["both"] = of_diffusers(decodings, fresh, family, [FIRST], **call)
    assert largest(expected["both"], expected["net"]) > 1e-3
    engine = Engine(folders(family), max_batch=16)
    solo = {}
    for id, request in requests.items():
        assert isinstance(engine.draw(request)[id], Done)
        solo[id] = decodings.pop()
    for id, picture in expected.items():
        assert largest(solo[id], picture) < 1e-5, id
    events = engine.draw(*requests.values())
    assert all(isinstance(events[id], Done) for id in requests)
    for id, alone in solo.items():
        assert min(largest(each, alone) for each in decodings) < 1e-4, id
    calls = engine.loop._batcher.counts.batch_sizes
    assert max(count for name, count in calls if name == "controlnet") >= 2
