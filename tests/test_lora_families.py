"""LoRAs of every kind that people have, from the model file and per request: the pictures of plain diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.batching import views
from sfumato.config.model import Adapter
from sfumato.models import load
from support import families_transformers, here, loras, tiny

CALL: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "np"}
WEIGHT = 0.7


@dataclass(frozen=True)
class Kind:
    make: Callable[[], Any]
    write: Callable[[Path], Path]
    """Puts the file into a folder."""
    call: Mapping[str, Any] = field(default_factory=dict)


def kohya(make: Callable[[], Any], encoders: dict[str, str], **special: Any) -> Kind:
    return Kind(make, lambda folder: loras.saved(loras.kohya(make(), encoders, **special), folder / "x.safetensors"))


def diffusers(make: Callable[[], Any], part: str, dora: bool = False) -> Kind:
    return Kind(make, lambda folder: loras.diffusers(make(), folder, "x.safetensors", part=part, dora=dora))


KLEIN = families_transformers.flux2_klein

KINDS: Mapping[str, Kind] = {
    "kohya, lora_te": kohya(tiny.stable_diffusion, {"text_encoder": "lora_te"}),
    "kohya, XL, lora_te1 and lora_te2": kohya(
        tiny.stable_diffusion_xl, {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    ),
    "flux": diffusers(tiny.flux, "transformer"),
    "DoRA": diffusers(tiny.stable_diffusion, "unet", dora=True),
    "LyCORIS, LoCon": kohya(tiny.stable_diffusion, {}, conv=True),
    "LyCORIS, LoKr": Kind(
        KLEIN,
        lambda folder: loras.saved(loras.lokr(KLEIN()), folder / "x.safetensors"),
        {"text_encoder_out_layers": (1,)},
    ),
}


def drawn(pipeline: Any, call: Mapping[str, Any]) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt="a cat", **CALL, **call, generator=torch.Generator().manual_seed(1)).images[0]


def differ(one: Any, other: Any) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some about toy sizes
def test_from_the_model_file_and_per_request(kind: str, tmp_path: Path) -> None:
    made = KINDS[kind]
    tiny.save(made.make(), tmp_path / "base")
    path = made.write(tmp_path)
    theirs = made.make()
    before = drawn(theirs, made.call)
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    theirs.set_adapters(["a"], [WEIGHT])
    expected = drawn(theirs, made.call)
    assert differ(expected, before) > 1e-3
    of_file = here.config(tmp_path, tmp_path / "base", adapters=(Adapter(path.name, WEIGHT),))
    assert differ(drawn(load.load(of_file, "cpu", here.quiet).pipeline, made.call), expected) < 1e-5
    model = load.load(here.config(tmp_path, tmp_path / "base"), "cpu", here.quiet)
    without = drawn(model.pipeline, made.call)
    with model.state.adapters.use(model.pipeline, "cpu", "m", [loras.of(path, WEIGHT)]) as selections:
        view = views.view(model.pipeline, adapters=selections)
        try:
            assert differ(drawn(view, made.call), expected) < 1e-5
        finally:
            views.close(view)
    assert differ(drawn(model.pipeline, made.call), without) == 0, "and nothing stays"
