"""Every family draws together what it draws alone, and the list of what may be batched says so."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path

import diffusers
import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import parity
from sfumato.engine import trust
from sfumato.engine.batching import Hub

SHIPPED = json.loads(resources.files("sfumato.engine").joinpath(trust.FILE).read_text())
REMEDY = "run `python -m benchmarks.parity --write` and look at what changed"

MEASURED: dict[str, parity.Measured] = {}


@pytest.mark.parametrize("package", [diffusers, transformers], ids=lambda package: package.__name__)
def test_the_list_is_for_the_installed_versions(package) -> None:
    assert SHIPPED[package.__name__]["version"] == package.__version__, REMEDY


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some of them about toy sizes
@pytest.mark.parametrize("family", parity.FAMILIES)
def test_together_equals_alone(family: str) -> None:
    one = MEASURED[family] = parity.measure(family)
    assert one.same, f"worst pixel {one.error:.1e}, jitter {one.jitter}"
    assert not one.refused
    assert (one.mean_batch > 1.2) != bool(parity.FAMILIES[family].alone), one.alone


SIZES = ((64, 128), (128, 64), (64, 64), (128, 64))
"""Pictures of two shapes with equally many tokens: only the content of position ids tells them apart."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["Flux", "Flux2", "QwenImage", "ZImage", "HiDreamImage", "Lumina2", "CogView4"])
def test_sizes_may_be_mixed(family: str) -> None:
    one = parity.FAMILIES[family]
    pipe = one.build()
    pipe.set_progress_bar_config(disable=True)
    calls = [{**one.calls[n % 3], "height": height, "width": width} for n, (height, width) in enumerate(SIZES)]
    alone = [parity.draw(pipe, call) for call in parity.seeded(calls)]
    hub = Hub(max_rows=16, trust=trust.Trust("unlisted"))
    assert parity.difference(alone, parity.together(hub, pipe, calls)) <= parity.PIXEL


@pytest.mark.slow
def test_the_list_is_what_was_shown() -> None:
    if MEASURED.keys() != parity.FAMILIES.keys():
        pytest.skip("needs the measurements of all families in the same run")
    made = json.loads(json.dumps(parity.signatures(MEASURED.values())))
    assert made == SHIPPED, REMEDY
