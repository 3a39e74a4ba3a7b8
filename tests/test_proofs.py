"""What is remembered of proofs between processes, and what it belongs to."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch import nn

from sfumato.batching import proof_store, shipped_list
from sfumato.batching.proof_store import Proofs
from sfumato.batching.verification import Verification
from sfumato.pipelines import source_digest
from support import tiny
from support.batches import NOTHING, PROOF, Coupled, noise, together


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / proof_store.NAME


def trusting(path: Path) -> Verification:
    """As a new process would."""
    return Verification("unlisted", NOTHING, Proofs(path))


def half_unet(**changes: Any) -> Any:
    with tiny.seeded(0):
        return tiny._unet(**changes).to(torch.bfloat16).requires_grad_(False)


def halved(seed: int) -> Any:
    def steps(unet: Any) -> Any:
        value, text = noise(1, 4, 8, 8, seed=seed).bfloat16(), noise(1, 7, tiny.WIDTH, seed=seed).bfloat16()
        for step in range(2):
            value = unet(value, step, encoder_hidden_states=text, return_dict=False)[0]
        return value

    return steps


RUNS = [halved(1), halved(2)]


def forwards(path: Path, module: nn.Module) -> int:
    _, batcher = together(module, RUNS, verification=trusting(path))
    return batcher.counts["module"].forwards + batcher.counts["module"].proving


def test_the_next_process_batches_from_its_first_step_on(path: Path) -> None:
    assert forwards(path, half_unet()) == 1 + PROOF + 2 + 1
    assert forwards(path, half_unet()) == 2


def test_a_refusal_is_remembered_and_logged_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = [lambda m, n=n: m(m(m(noise(1, 4, seed=n)))) for n in range(3)]
    module = Coupled().eval()
    for again in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            results, batcher = together(module, runs, verification=trusting(path))
        assert all(torch.equal(result, run(module)) for run, result in zip(runs, results, strict=True))
        assert batcher.counts["module"].forwards == (9 if again else 9 + 1)
        assert batcher.counts.unbatched == {("module", "refused"): 9}
        lines = [record.message for record in caplog.records if "not batched" in record.message]
        assert len(lines) == 1
        assert "Coupled" in lines[0]
        assert "beside it" in lines[0]


def test_a_proof_belongs_to_what_was_run(path: Path) -> None:
    proved = 1 + PROOF + 2 + 1
    forwards(path, half_unet())
    assert forwards(path, half_unet(layers_per_block=2)) == proved  # another configuration
    with tiny.seeded(0):
        float16 = tiny._unet().to(torch.float16).requires_grad_(False)
    _, batcher = together(float16, [lambda m, run=run: run(Cast(m)) for run in RUNS], verification=trusting(path))
    assert batcher.counts["module"].proving == PROOF  # another precision
    patched = half_unet()
    patched.mid_block.resnets[0].forward = lambda *args, **kwargs: args[0]  # another source
    assert forwards(path, patched) == proved
    assert forwards(path, half_unet()) == 2


class Cast:
    """Gives a module what its weights are."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, sample: torch.Tensor, step: int, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return self._module(sample.half(), step, encoder_hidden_states=encoder_hidden_states.half(), **kwargs)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff\xfe", b'{"format": 0, "proofs": {}}', b'{"format": 1}', b'{"format": 1, "proofs": []}',
        b'{"format": 1, "proofs": {"a": {}, "b": 3, "c": {"signature": 1, "refused": "", "shown": ""}}}',
        b"[" * 100_000,
        b'{"format": 1, "proofs": {}}' + b" " * (proof_store.MAX_BYTES + 1),
    ],
    ids=range(10),
)  # fmt: skip
def test_a_file_that_is_broken_is_made_anew(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    module = nn.Linear(2, 2)
    assert Proofs(path).get(module, "signature") is None
    Proofs(path).put(module, "signature", "why")
    found = Proofs(path).get(module, "signature")
    assert found is not None
    assert found.refused == "why"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_two_processes_keep_what_each_has_found(path: Path) -> None:
    module = nn.Linear(2, 2)
    one, other = Proofs(path), Proofs(path)
    assert one.get(module, "a") is other.get(module, "b") is None
    one.put(module, "a", "")
    other.put(module, "b", "")
    assert {entry["signature"] for entry in json.loads(path.read_text())["proofs"].values()} == {"a", "b"}


def test_the_file_does_not_grow_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_store, "MAX_VERDICTS", 3)
    module = nn.Linear(2, 2)
    held = Proofs(path)
    for number in range(5):
        held.put(module, str(number), "")
    assert [entry["signature"] for entry in json.loads(path.read_text())["proofs"].values()] == ["2", "3", "4"]


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    held = Proofs(tmp_path / "file" / proof_store.NAME)
    held.put(nn.Linear(2, 2), "signature", "why")
    verdict = held.get(nn.Linear(2, 2), "signature")
    assert verdict is not None
    assert verdict.refused == "why"


def test_without_a_server_the_file_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setenv(proof_store.ENVIRONMENT_VARIABLE, str(path))
    assert proof_store.of_user() == path
    monkeypatch.delenv(proof_store.ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(path.parent))
    assert proof_store.of_user() == path.parent / "sfumato" / proof_store.NAME
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert proof_store.of_user() == Path.home() / ".cache/sfumato" / proof_store.NAME


# The list that comes with Sfumato.


def listed_forwards(module: nn.Module, path: Path) -> tuple[int, int]:
    """Forwards and those of proofs among them, of two runs of two calls with the shipped list."""
    runs = [lambda m, seed=seed: denoised(m, seed) for seed in (1, 2)]
    _, batcher = together(module, runs, verification=Verification(proofs=Proofs(path)))
    return batcher.counts["module"].forwards, batcher.counts["module"].proving


def denoised(unet: Any, seed: int) -> Any:
    return unet(noise(1, 4, 8, 8, seed=seed), 3, encoder_hidden_states=noise(1, 7, tiny.WIDTH, seed=seed)).sample


def whole_unet() -> Any:
    with tiny.seeded(0):
        return tiny._unet().requires_grad_(False)


@pytest.fixture
def other_source(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the next release of diffusers had changed one block of the UNet."""

    def forward(self, *args, **kwargs):
        return before(self, *args, **kwargs)

    before = ResnetBlock2D.forward
    for known in (source_digest.class_digest, source_digest._texts):
        known.cache_clear()
    monkeypatch.setattr(ResnetBlock2D, "forward", forward)
    yield
    monkeypatch.undo()
    for known in (source_digest.class_digest, source_digest._texts):
        known.cache_clear()


def test_a_class_on_the_list_is_proved_whatever_the_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (diffusers, transformers):
        monkeypatch.setattr(package, "__version__", "99.0")
    assert listed_forwards(whole_unet(), path) == (1, 0)
    assert not path.exists()


def test_a_changed_class_is_proved_again_at_first_use(
    path: Path, other_source: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert listed_forwards(whole_unet(), path)[1] > 0
    lines = [record.message for record in caplog.records if "at first use" in record.message]
    assert len(lines) == 1
    assert "ResnetBlock2D" in lines[0]
    assert "Transformer2DModel" not in lines[0]
    assert listed_forwards(whole_unet(), path) == (1, 0)  # and that is kept
    text = tiny.stable_diffusion().text_encoder
    assert shipped_list.shipped().unproven(text) == ()  # what has none of it is as it was


def test_what_has_changed_in_the_installed_packages_is_told(other_source: None) -> None:
    changed = shipped_list.shipped().changed()
    assert "diffusers.models.resnet.ResnetBlock2D" in changed
    assert "diffusers.models.transformers.transformer_flux.FluxTransformer2DModel" not in changed
    gone = shipped_list.ShippedList({"diffusers.models.gone.Gone": "0", "no.such.Module": "0"}, frozenset())
    assert set(gone.changed()) == set(gone.sources)


def test_a_class_that_was_moved_is_known_by_its_source() -> None:
    known = shipped_list.shipped()
    moved = {path.replace("diffusers.", "diffusers.moved."): digest for path, digest in known.sources.items()}
    assert shipped_list.ShippedList(moved, known.signatures).unproven(whole_unet()) == ()


def test_what_others_put_into_a_module_is_not_looked_at() -> None:
    unet = whole_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert shipped_list.shipped().unproven(unet) == ()
    unet.conv_in.forward = lambda value: value  # its own source is
    assert shipped_list.shipped().unproven(unet) == ()
    unet.mid_block.resnets[0].forward = ResnetBlock2D.forward.__get__(unet.mid_block.resnets[0])
    assert shipped_list.shipped().unproven(unet) == ("diffusers.models.resnet.ResnetBlock2D.forward",)


# The source of a module.


class Block(nn.Module):
    def forward(self, value):
        return helped(value)


def helped(value):
    return value * 2


class Other(nn.Module):
    def forward(self, value):
        return value * 2


def test_a_digest_is_of_the_source_and_of_nothing_else() -> None:
    flux = tiny.flux()
    digest = source_digest.source_digest(flux.transformer)
    assert source_digest.source_digest(tiny.flux(seed=1).transformer.half()) == digest
    assert source_digest.source_digest(flux.vae) != digest
    assert source_digest.source_digest(nn.Sequential(Block())) == source_digest.source_digest(
        nn.Sequential(Block(), Block())
    )
    assert source_digest.source_digest(nn.Sequential(Block())) != source_digest.source_digest(nn.Sequential(Other()))
    flux.transformer.transformer_blocks[0].attn.processor = Processor()
    assert source_digest.source_digest(flux.transformer) != digest


class Processor:
    def __call__(self, attention, *args, **kwargs):
        raise NotImplementedError


def test_functions_that_a_class_calls_belong_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_digest.source_digest(Block())
    source_digest._texts.cache_clear()

    def another(value):
        return value * 3

    monkeypatch.setitem(globals(), "helped", another)
    assert source_digest.source_digest(Block()) != before
    source_digest._texts.cache_clear()


def test_a_class_without_a_file_has_a_digest_too() -> None:
    made: dict[str, Any] = {"nn": nn, "__name__": "made"}
    for name, method in (("One", "sin"), ("Two", "cos")):
        exec(f"class {name}(nn.Module):\n    def forward(self, value):\n        return value.{method}()", made)
    assert source_digest.source_digest(made["One"]()) != source_digest.source_digest(made["Two"]())
    assert source_digest.source_digest(made["One"]()) == source_digest.source_digest(made["One"]())
