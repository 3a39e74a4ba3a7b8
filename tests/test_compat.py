"""What mends disagreements between diffusers and transformers: it works, touches nothing, and is still needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sfumato.batching.views import close, view
from sfumato.pipelines import compat
from support import tiny


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = tiny.stable_diffusion()
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipeline: Any, **call: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=2, output_type="np", generator=generator, **call).images


def test_every_shim_says_what_it_is_for() -> None:
    assert all(shim.needed_by and shim.reason for shim in compat.ITSELF.values())
    assert set(compat.ITSELF) == {("CLIPTextModel", "text_model")}, "a shim without a test here that it is needed"


def test_the_name_of_a_merged_part_is_still_needed(pipeline: Any) -> None:
    with pytest.raises(AttributeError, match="text_model"):
        drawn(pipeline, clip_skip=1)
        pytest.fail("plain diffusers draws with clip_skip: take `text_model` out of src/sfumato/pipelines/compat.py")


def test_a_merged_part_is_found_in_the_module_and_the_module_stays_as_it_is(pipeline: Any) -> None:
    encoder = pipeline.text_encoder
    before = [*encoder.state_dict()], [name for name, _ in encoder.named_modules()], [*vars(encoder)]
    viewed = view(pipeline)
    assert viewed.text_encoder.text_model is viewed.text_encoder
    assert np.abs(drawn(viewed, clip_skip=1) - drawn(viewed)).max() > 0
    assert close(viewed) == []
    # A LoRA's keys are looked up by these names, and by whether the encoder has such a part (diffusers' lora_base).
    assert before == ([*encoder.state_dict()], [name for name, _ in encoder.named_modules()], [*vars(encoder)])
    assert not hasattr(encoder, "text_model")


def test_other_names_are_refused_as_ever(pipeline: Any) -> None:
    viewed = view(pipeline)
    for module, name in ((viewed.text_encoder, "vision_model"), (viewed.unet, "text_model")):
        with pytest.raises(AttributeError, match=name):
            getattr(module, name)
