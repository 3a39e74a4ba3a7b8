"""Components that two models have in common: in memory once, in one batch, and changed for nobody else."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sfumato.batching import offload
from sfumato.config import ModelConfig
from sfumato.config.model import Adapter
from sfumato.core import Done
from sfumato.drawing import out_of_memory
from sfumato.drawing.draw import draw as drawn
from sfumato.engine.local import Local
from sfumato.models import footprint, load, low_memory, sharing
from sfumato.models.content_hashes import ContentHashes
from sfumato.models.sharing import Sharing, twin
from sfumato.residency.pool import ModelPool
from sfumato.settings import Settings
from support import here, loads, tiny
from support.drawing import quiet
from support.together import posted_together


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`one` and `two` differ in their UNet alone; `recast` has the VAE of another seed, of the same size."""
    root = tmp_path_factory.mktemp("shared")
    tiny.save(tiny.stable_diffusion(seed=1), root / "one")
    tiny.save(tiny.stable_diffusion(seed=2), root / "other")
    for name, part in (("two", "unet"), ("recast", "vae")):
        shutil.copytree(root / "one", root / name)
        shutil.rmtree(root / name / part)
        shutil.copytree(root / "other" / part, root / name / part)
    for seed in (3, 4):
        pipeline = tiny.stable_diffusion(seed=1)
        with tiny.seeded(seed):
            pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
            layers = get_peft_model_state_dict(pipeline.unet)
        pipeline.save_lora_weights(root, unet_lora_layers=layers, weight_name=f"lora{seed}.safetensors")
    return {path.name: path for path in root.iterdir()}


def config(folders: dict[str, Path], name: str, model: str | None = None, **fields: Any) -> ModelConfig:
    folder = folders[model or name]
    return here.config(folder.parent, folder, name=name, **fields)


def pool() -> ModelPool:
    return loads.pool(9, known=Sharing())


def loaded(pool: ModelPool, config: ModelConfig) -> load.Loaded:
    with pool.use(config, loads.turn) as model:
        return model


def together(*models: load.Loaded) -> int:
    return sum({block: size for model in models for block, size in model.blocks().items()}.values())


def size(module: Any) -> int:
    return sum(footprint.blocks([module]).values())


def picture(model: load.Loaded) -> bytes:
    return drawn(model, here.asked(), quiet).file


def alone(config: ModelConfig) -> bytes:
    """Its picture without any sharing."""
    return picture(load.load(config, "cpu", quiet))


def test_two_models_that_differ_in_their_unet_take_the_memory_of_one_and_one_unet(folders: dict[str, Path]) -> None:
    models = pool()
    one, two = (loaded(models, config(folders, name)) for name in ("one", "two"))
    assert two.pipeline.vae is one.pipeline.vae
    assert two.pipeline.text_encoder is one.pipeline.text_encoder
    assert two.pipeline.unet is not one.pipeline.unet
    assert together(one, two) == together(one) + size(two.pipeline.unet)
    assert models.sizes["two"] == together(two)
    for model in (one, two):
        assert picture(model) == alone(model.config)
    vae = one.pipeline.vae
    before = picture(two)
    models.unload("one")
    del one
    assert picture(two) == before, "what is left is whole"
    assert loaded(models, config(folders, "one")).pipeline.vae is vae


def test_what_is_shared_is_not_counted_again_for_the_budget(folders: dict[str, Path]) -> None:
    needs: list[footprint.Needs] = []
    known = Sharing()
    first = load.load(config(folders, "one"), "cpu", quiet, needs.append, known)
    load.load(config(folders, "two"), "cpu", quiet, needs.append, known)
    assert set(needs[0].components) == {"unet", "vae", "text_encoder"}
    assert set(needs[1].components) == {"unet"}
    del first
    load.load(config(folders, "two"), "cpu", quiet, needs.append, known)
    assert set(needs[2].components) == {"unet", "vae", "text_encoder"}, "it was kept though no model has it"


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_one_base_under_several_loras_is_in_memory_once(folders: dict[str, Path], scale: float) -> None:
    models = pool()
    plain = config(folders, "plain", "one")
    tuned = [
        config(folders, f"tuned{seed}", "one", adapters=(Adapter(f"lora{seed}.safetensors", scale),)) for seed in (3, 4)
    ]
    expected = [alone(each) for each in (*tuned, plain)]
    assert len(set(expected)) == 3
    a, b, c = (loaded(models, each) for each in (*tuned, plain))  # the plain one last: it finds the base under a LoRA
    assert a.pipeline.unet is not b.pipeline.unet
    assert not getattr(c.pipeline.unet, "peft_config", None)
    assert a.pipeline.text_encoder is b.pipeline.text_encoder is c.pipeline.text_encoder, "no LoRA touched it"
    extra = together(a, b, c) - together(c)
    assert 0 < extra < 0.1 * together(c)
    assert [picture(model) for model in (a, b, c)] == expected
    models.unload("tuned3")
    del a
    assert [picture(model) for model in (b, c)] == expected[1:]
    models.unload("plain")
    del c
    again = loaded(models, plain)
    assert together(again, b) - together(again) < 0.1 * together(again), "the base stayed with the LoRA's model"
    assert picture(again) == expected[2]


@pytest.mark.parametrize("why", ["content", "dtype", "configuration", "slices", "rewired"])
def test_what_differs_is_not_shared(folders: dict[str, Path], tmp_path: Path, why: str) -> None:
    models = pool()
    one = loaded(models, config(folders, "one"))
    if why == "content":
        other = config(folders, "recast")
    elif why == "dtype":
        other = config(folders, "half", "one", dtype="bf16")
    elif why == "rewired":
        other = config(folders, "guided", "one", pipeline_type="StableDiffusionPAGPipeline")
    elif why == "slices":
        other = config(folders, "low", "one", low_vram=True)
    else:
        shutil.copytree(folders["one"], tmp_path / "m")
        file = tmp_path / "m" / "vae" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.5}))
        other = here.config(tmp_path, tmp_path / "m", name="other")
    two = loaded(models, other)
    assert two.pipeline.vae is not one.pipeline.vae
    assert picture(two) == alone(two.config)


def test_two_names_for_one_single_file_share_all_of_it(tmp_path: Path) -> None:
    file = tiny.single_file(tiny.stable_diffusion(seed=1), tmp_path / "m.safetensors")
    shutil.copy(file, tmp_path / "copy.safetensors")
    description = tmp_path / "described"
    tiny.save(tiny.stable_diffusion(seed=1), description)
    index = json.loads((description / "model_index.json").read_text())
    known, found = Sharing(), []
    for name in ("m", "copy"):
        components = known.of(here.config(tmp_path, tmp_path / f"{name}.safetensors"))
        components.identify(tmp_path / f"{name}.safetensors", description, {}, index, None, ("cpu", "fp32"))
        found.append(components.find())
        pipeline = tiny.stable_diffusion(seed=1) if name == "m" else None
        if pipeline:
            components.make_known(pipeline)
            kept = pipeline
    assert found[0] == {}
    assert found[1] == {part: getattr(kept, part) for part in ("unet", "vae", "text_encoder")}


def test_requests_of_two_models_share_the_forward_passes_of_what_they_share(folders: dict[str, Path]) -> None:
    async def work() -> None:
        settings = Settings(device="cpu", log_level="error", loaded_models=2, data=folders["one"].parent / "data")
        engine = Local(settings)
        await engine.start()

        async def ask(name: str, id: str) -> Any:
            generation = here.asked(id=id, prompt=f"number {id}", seed=int(id))
            async with aclosing(engine.submit(config(folders, name), generation)) as events:
                return [event async for event in events][-1]

        try:
            assert engine._loop
            solo = [await ask(name, str(at)) for at, name in enumerate(["one", "two"])]
            assert all(isinstance(done, Done) for done in solo)
            counts = engine._loop._batcher.counts.batch_sizes
            counts.clear()
            engine._loop._batcher.prompt_cache.clear()
            with posted_together(engine, 4):
                done = await asyncio.gather(*(ask(("one", "two")[at % 2], str(at + 10)) for at in range(4)))
            assert all(isinstance(each, Done) for each in done)
            for name in ("text_encoder", "vae"):
                sizes = {calls: forwards for (part, calls), forwards in counts.items() if part == name}
                calls = sum(count * forwards for count, forwards in sizes.items())
                assert calls / sum(sizes.values()) > 1, (name, dict(counts))
            sizes = {calls: forwards for (part, calls), forwards in counts.items() if part == "unet"}
            assert max(sizes) <= 2, "different UNets are not mixed"
        finally:
            await engine.stop()

    asyncio.run(work())


def test_what_a_request_left_changed_is_loaded_anew_in_every_model_that_has_it(folders: dict[str, Path]) -> None:
    models = pool()
    one, two = (loaded(models, config(folders, name)) for name in ("one", "two"))
    vae = one.pipeline.vae
    with models.use(one.config, loads.turn) as model:
        model.state.broken = "a request changed its vae"
    assert two.state.broken
    again = loaded(models, two.config)
    assert again.pipeline.vae is not vae
    assert loaded(models, one.config).pipeline.vae is again.pipeline.vae


def test_a_twin_changes_alone() -> None:
    original = tiny.stable_diffusion().unet
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    other = twin(original)
    assert size(original) == together_of(original, other)
    other.to(torch.bfloat16)
    other.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    assert original.dtype == torch.float32
    assert not getattr(original, "peft_config", None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def together_of(*modules: Any) -> int:
    return sum(footprint.blocks(modules).values())


def test_a_pipeline_is_unshared_before_hooks_change_it(folders: dict[str, Path]) -> None:
    models = pool()
    one, two = (loaded(models, config(folders, name)) for name in ("one", "two"))
    sharing.unshare(two.pipeline)
    assert two.pipeline.vae is not one.pipeline.vae
    assert together(one, two) == together(one) + size(two.pipeline.unet), "moved apart, the tensors are still the same"
    assert picture(two) == alone(two.config)


@pytest.mark.parametrize("ordered", [True, False], ids=["modules", "layers"])
def test_out_of_memory_copies_no_module_that_another_model_has(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    """What would move weights is put into effect on the CPU."""
    monkeypatch.setattr(offload, "enable", lambda pipeline, device: None)
    monkeypatch.setattr(offload, "enable_groups", lambda pipeline, device, by_block: None)
    monkeypatch.setattr(low_memory, "is_ordered", lambda pipeline: ordered)
    models = pool()
    one, two = (loaded(models, config(folders, name)) for name in ("one", "two"))
    before, vae = together(one, two), one.pipeline.vae
    left = [2]

    def attempt(generation: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return drawn(one, generation, quiet)

    on_gpu = replace(one, device="cuda")
    assert out_of_memory.with_less(on_gpu, here.asked(), attempt).recipe.savings
    assert one.state.offload == ("model" if ordered else "group")
    assert together(one, two) == before, "it is in memory twice when it was to save memory"
    assert two.pipeline.vae is vae
    assert one.pipeline.vae is not vae, "its hooks would be the other model's"
    assert picture(two) == alone(two.config)


# Digests.


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that were read for their digest."""
    names: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, algorithm: str) -> Any:
        names.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    yield names


def test_each_file_is_read_once_and_again_when_it_has_changed(tmp_path: Path, read: list[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"same")
    two.write_bytes(b"same")
    kept = tmp_path / "kept" / "hashes.json"
    hashes = ContentHashes(kept)
    assert hashes.same(one, one)
    assert read == [], "it is the same file"
    assert hashes.same(one, two)
    assert hashes.same(one, two)
    assert ContentHashes(kept).same(one, two), "after a restart"
    assert sorted(read) == ["one", "two"]
    two.write_bytes(b"others")
    assert not hashes.same(one, two)
    assert sorted(read) == ["one", "two"], "another size is another content"
    two.write_bytes(b"emas")
    assert not hashes.same(one, two)
    assert sorted(read) == ["one", "two", "two"]
    kept.write_text("{broken")
    assert ContentHashes(kept).of(one) == hashlib.sha256(b"same").hexdigest()


def test_files_in_the_hubs_cache_are_known_by_their_names(tmp_path: Path, read: list[str]) -> None:
    digest = hashlib.sha256(b"same").hexdigest()
    for repo in ("a", "b"):
        (tmp_path / repo / "blobs").mkdir(parents=True)
        (tmp_path / repo / "blobs" / digest).write_bytes(b"same")
        (tmp_path / repo / "model.safetensors").symlink_to(tmp_path / repo / "blobs" / digest)
    hashes = ContentHashes()
    assert hashes.same(tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors")
    assert read == []


def test_a_model_loaded_twice_under_two_names_is_in_memory_once(folders: dict[str, Path]) -> None:
    models = pool()
    one, again = (
        loaded(models, config(folders, name, "one", **more)) for name, more in (("x", {}), ("y", {"seed": 3}))
    )
    assert together(one, again) == together(one)
    assert again.pipeline is not one.pipeline
    assert replace(again.config, name="x", seed=None) == one.config


def test_the_base_of_a_lora_goes_where_its_twin_was_moved(folders: dict[str, Path]) -> None:
    """As on an accelerator; here it is another dtype that makes the tensors others."""
    pipeline = tiny.stable_diffusion(seed=1)
    base, tuned = pipeline.unet, twin(pipeline.unet)
    tuned.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    adapters = size(tuned) - size(base)
    tuned.to(torch.bfloat16)
    assert together_of(base, tuned) > size(base)
    sharing._follow(base, tuned)
    assert together_of(base, tuned) == size(tuned)
    assert size(tuned) == size(base) + adapters // 2
    assert {tensor.dtype for tensor in base.parameters()} == {torch.bfloat16}
