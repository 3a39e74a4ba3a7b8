"""Every family draws together what it draws alone, and the list of what may be batched says so."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import parity
from sfumato.batching import shipped_list, verification
from sfumato.batching.batcher import Batcher

SHIPPED = json.loads(resources.files("sfumato.batching").joinpath(shipped_list.FILE).read_text())
RECORD = parity.recorded()
REMEDY = "run `python -m benchmarks.parity --write` and look at what changed"


def test_the_record_says_which_installed_classes_are_not_proved(capsys: pytest.CaptureFixture[str]) -> None:
    """They are proved at first use. After an upgrade: `python -m benchmarks.parity --unproven` writes them down."""
    unproven = sorted(shipped_list.shipped().changed())
    with capsys.disabled():
        for path in unproven:
            print(f"\n{path}: its source is not the one that the shipped list was made with", end="")
    assert unproven == json.loads(parity.RECORD.read_text())["unproven"], (
        f"run `python -m benchmarks.parity --unproven` to write down {unproven}, or measure their families again"
    )


def test_every_family_has_the_classes_that_it_has_shown() -> None:
    for name, one in RECORD.items():
        assert bool(one.sources) == bool(one.shown), name
        listed = {kind.partition("+")[0] for kind in (signature.partition(".")[0] for signature in one.shown)}
        assert listed <= {path.rpartition(".")[2] for path in one.sources}, name


def test_an_unchanged_family_builds_the_classes_of_the_record() -> None:
    """`--sources` would write what is there."""
    for name in ("StableDiffusion", "Flux"):
        one = RECORD[name]
        assert parity.sources(parity.FAMILIES[name].build(), one.shown) == one.sources


def test_every_family_is_in_the_record() -> None:
    assert RECORD.keys() == parity.FAMILIES.keys(), REMEDY


def test_the_list_is_what_the_record_has_shown() -> None:
    made = parity.signatures(RECORD.values())
    assert json.loads(json.dumps(made)) == SHIPPED, REMEDY
    assert shipped_list.shipped().signatures == parity.shipped(RECORD.values())


def test_the_table_in_the_docs_is_the_record() -> None:
    ordered = [RECORD[name] for name in parity.FAMILIES]
    assert parity.page(ordered) in parity.PAGE.read_text(), REMEDY


def test_what_was_wrong_anywhere_is_not_on_the_list() -> None:
    wrong = {signature for one in RECORD.values() for signature in (one.refused | one.wrong)}
    assert wrong, "padded text is wrong in some families"
    assert not wrong & shipped_list.shipped().signatures


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
    assert parity.signatures([one])["calls"] == parity.signatures([known])["calls"], REMEDY
    assert one.refused.keys() == known.refused.keys(), REMEDY
    parity.halve(one, shipped_list.shipped().signatures)
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
    batcher = Batcher(max_rows=16, verification=verification.Verification("unlisted"))
    assert parity.difference(alone, parity.together(batcher, pipe, calls)) <= parity.PIXEL
