"""Calls for `sfumato.gather`, and the check that each gives together what it gives alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import sfumato

Calls = list[dict[str, Any]]


MIXED: Calls = [
    {"prompt": "a cat", "num_inference_steps": 3},
    {"prompt": "a dog on a long road in the rain", "num_inference_steps": 5, "guidance_scale": 3.0},
    {"prompt": "", "num_inference_steps": 4, "guidance_scale": 9.0, "negative_prompt": "bad, worse"},
    {"prompt": "two", "num_inference_steps": 2, "guidance_scale": 1.0, "num_images_per_prompt": 2},
]


def seeded(calls: Calls, **more: Any) -> Calls:
    """Each with a generator of its own and arrays for pictures."""
    return [
        {"output_type": "np", **call, **more, "generator": torch.Generator().manual_seed(seed)}
        for seed, call in enumerate(calls)
    ]


def alone(pipe: Any, calls: Calls) -> list[np.ndarray]:
    pipe.set_progress_bar_config(disable=True)
    return [pipe(**call).images for call in seeded(calls)]


def check(pipe: Any, calls: Calls, **options: Any) -> dict[str, dict[str, float]]:
    expected = alone(pipe, calls)
    stats: dict[str, dict[str, float]] = {}
    got = sfumato.gather(pipe, seeded(calls), stats=stats, **options)
    assert len(got) == len(calls)
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_allclose(other.images, one, atol=1e-4)
    return stats


SQUARE = {"height": 64, "width": 64}
