"""Every family draws together what it draws alone, and the list of what may be batched says so."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import parity
from sfumato.batching import verification
from sfumato.batching.batcher import Batcher

SHIPPED = json.loads(resources.files("sfumato.batching").joinpath(verification.FILE).read_text())
RECORD = parity.recorded()
REMEDY = "run `python -m benchmarks.parity --write` and look at what changed"


def test_the_record_is_of_the_installed_versions() -> None:
    assert json.loads(parity.RECORD.read_text())["versions"] == parity.versions(), REMEDY
    assert {name: part["version"] for name, part in SHIPPED.items()} == parity.versions(), REMEDY


def test_every_family_is_in_the_record() -> None:
    assert RECORD.keys() == parity.FAMILIES.keys(), REMEDY


def test_the_list_is_what_the_record_has_shown() -> None:
    made = parity.signatures(RECORD.values())
    assert json.loads(json.dumps(made)) == SHIPPED, REMEDY
    assert verification.listed() == parity.shipped(RECORD.values())


def test_the_table_in_the_docs_is_the_record() -> None:
    ordered = [RECORD[name] for name in parity.FAMILIES]
    assert parity.page(ordered) in parity.PAGE.read_text(), REMEDY


def test_what_was_wrong_anywhere_is_not_on_the_list() -> None:
    wrong = {signature for one in RECORD.values() for signature in (one.refused | one.wrong)}
    assert wrong, "padded text is wrong in some families"
    assert not wrong & verification.listed()


def test_nothing_that_a_pipeline_passes_is_wrong_but_padding() -> None:
    assert all(signature.endswith("~text") for one in RECORD.values() for signature in one.refused)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some of them about toy sizes
@pytest.mark.parametrize("family", parity.FAMILIES)
def test_together_equals_alone(family: str) -> None:
    one = parity.measure(family)
    assert one.same, f"worst pixel {one.error:.1e}, jitter {one.jitter}"
    assert all(signature.endswith("~text") for signature in one.refused), one.refused
    assert (one.mean_batch > 1.2) != bool(parity.FAMILIES[family].alone), one.alone
    known = RECORD[family]
    assert parity.signatures([one]) == parity.signatures([known]), REMEDY
    assert one.refused.keys() == known.refused.keys(), REMEDY
    parity.halve(one, verification.listed())
    assert (_mean(one.half) > 1.2) == (_mean(known.half) > 1.2), REMEDY


def _mean(counts: tuple[int, int]) -> float:
    return counts[0] / max(1, counts[1])


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
    hub = Batcher(max_rows=16, trust=verification.Verification("unlisted"))
    assert parity.difference(alone, parity.together(hub, pipe, calls)) <= parity.PIXEL
