"""The GPU's benchmark works before there is a GPU: toy shapes on the CPU, and the versions that we pin."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_models import SHAPES

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_measured(name: str) -> None:
    torch._dynamo.reset()  # others have compiled the same functions in this process: torch counts how often
    shape = SHAPES[name].tiny()
    found = gpu.measure(shape, "cpu", 1, gpu.Clock(math.inf), 1e12, concurrent=(2,))
    assert found["batched against solo, dB"] > 40
    assert found["at once"].keys() == {2}
    assert found["variants"].keys() == set(shape.variants)
    assert found["variants"]["compile"]["against plain, dB"] > 40
    assert [name for name, each in found["variants"].items() if "not possible" in each] in ([], ["fp8"])


def test_what_there_is_no_time_for_is_named() -> None:
    clock = gpu.Clock(-math.inf)
    assert not clock.allows("flux x16")
    assert clock.left_out == ["flux x16"]


def test_a_bare_machine_gets_the_versions_that_we_pin() -> None:
    def pins(file: str) -> dict[str, str]:
        lines = (ROOT / file).read_text().splitlines()
        return dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)

    ours, theirs = pins("requirements.txt"), pins("benchmarks/gpu-wheels.txt")
    assert theirs
    assert {name: (version, ours.get(name)) for name, version in theirs.items() if ours.get(name) != version} == {}
