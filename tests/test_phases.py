"""Requests stay in step with each other: a known text costs no turn, and several kinds of calls no company."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import sfumato
from sfumato.batching.batcher import Batcher
from sfumato.batching.verification import Verification
from sfumato.batching.views import View, view
from support.families import FAMILIES as PICTURES
from support.families import seeded as built
from support.families_transformers import FAMILIES as TRANSFORMERS

FAMILIES = {**PICTURES, **TRANSFORMERS}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family", ["StableDiffusion", "StableDiffusion3", "ZImage", "AuraFlow", "PixArtSigma", "Lumina2"]
)
def test_a_text_that_is_known_costs_no_turn(family: str) -> None:
    """Two of three requests have one negative prompt, the empty one; 3, 4 and 5 steps can share 2.4 calls a forward."""
    one = FAMILIES[family]
    stats: dict[str, dict[str, float]] = {}
    calls = [{**call, "generator": torch.Generator().manual_seed(seed)} for seed, call in enumerate(one.calls)]
    sfumato.gather(one.build(), calls, max_batch=16, stats=stats)
    assert stats[one.denoiser]["mean_batch"] >= 2.4
    assert stats["text_encoder"]["forwards"] == 2


def test_who_has_the_same_text_goes_on_in_the_same_turn() -> None:
    pipe = FAMILIES["StableDiffusion"].build()
    pipe.set_progress_bar_config(disable=True)
    batcher = Batcher()
    for steps in (2, 3, 4):
        batcher.submit(lambda steps=steps: view(pipe)(prompt="", negative_prompt="", num_inference_steps=steps))
    with torch.no_grad():
        batcher.step()
        assert batcher.counts["text_encoder"].forwards == 1
        batcher.step()  # the text again, known by now, and on to the denoiser
    assert batcher.counts["text_encoder"].calls == 6
    assert batcher.counts["text_encoder"].forwards == 1
    assert batcher.counts["unet"].calls == 3
    assert batcher.counts["unet"].forwards == 1


STEPS = 12
COMES = ((0, 0, 2, 2), (0, 2, 4, 6), (0, 1, 2, 3), (0, 5, 9, 13))
"""At which forward each of four requests comes."""


@pytest.mark.parametrize("comes", COMES)
def test_three_kinds_of_calls_in_a_step_find_together(comes: tuple[int, ...]) -> None:
    """ControlNet with split guidance on real modules: the condition alone goes through the ControlNet."""
    with built(0):
        pipe = FAMILIES["StableDiffusionControlNet"].build()
    width = pipe.unet.config.cross_attention_dim

    def draw(seed: int) -> Any:
        shared = View("")
        unet, controlnet = shared.stand_in(pipe.unet, "unet"), shared.stand_in(pipe.controlnet, "controlnet")
        dice = torch.Generator().manual_seed(seed)
        sample = torch.randn(1, 4, 8, 8, generator=dice)
        text, none = (torch.randn(1, 7, width, generator=dice) for _ in range(2))
        condition = torch.rand(1, 3, 64, 64, generator=dice)
        for time in range(STEPS):
            down, middle = controlnet(sample, time, text, condition, return_dict=False)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            wanted = unet(sample, time, text, return_dict=False, **more)[0]
            unwanted = unet(sample, time, none, return_dict=False)[0]
            sample = sample - 0.1 * (unwanted + 3.0 * (wanted - unwanted))
        return sample

    with torch.no_grad():
        alone = [draw(seed) for seed in range(4)]
        batcher = Batcher(verification=Verification("unlisted"))
        for seed in range(2):  # what is not on the list is computed twice the first time
            batcher.submit(functools.partial(draw, seed))
        while batcher.step():
            pass
        batcher.counts.clear()
        start = batcher.now
        tasks: list[Any] = []
        while len(tasks) < 4 or batcher.step():
            while len(tasks) < 4 and comes[len(tasks)] <= batcher.now - start:
                tasks.append(batcher.submit(functools.partial(draw, len(tasks))))
            if len(tasks) < 4:
                batcher.step()
    for task, expected in zip(tasks, alone, strict=True):
        torch.testing.assert_close(task.outcome.value, expected, rtol=1e-4, atol=1e-4)
    calls = sum(count.calls for count in batcher.counts.values())
    forwards = sum(count.forwards for count in batcher.counts.values())
    assert calls == 4 * 3 * STEPS
    assert forwards <= 3 * STEPS + max(comes) + 2
