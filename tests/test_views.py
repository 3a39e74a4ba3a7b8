"""What a request does to a model that it shares, and that nothing of it is left when the request has ended."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

import sfumato
from sfumato import schedulers
from sfumato.batching import adapter_state, offload, torch_state, views
from sfumato.batching.batcher import Batcher
from sfumato.config import ModelConfig
from sfumato.core import Generation
from sfumato.drawing import draw as generation
from sfumato.drawing import steps
from sfumato.drawing.info import model_info
from sfumato.errors import DrawError
from sfumato.models import device
from sfumato.models.load import Loaded
from sfumato.pipelines import request_scheduler
from sfumato.sampling import Sampling, nested
from support import loads, tiny
from support.drawing import quiet

SQUARE = {"width": 64, "height": 64}


def loaded(pipeline: Any) -> Loaded:
    pipeline.set_progress_bar_config(disable=True)
    return Loaded(ModelConfig(name="m", model="m"), pipeline, "here", "cpu", "fp32")


def wanted(**fields: Any) -> Generation:
    return Generation(**nested({"id": "1", "prompt": "a cat", "seed": 1, "steps": 3, **SQUARE, **fields}))


def finish(batcher: Batcher) -> None:
    with torch.no_grad():
        while batcher.step():
            pass


def in_a_hub(draw: Callable[[], Any]) -> Any:
    batcher = Batcher()
    task = batcher.submit(draw)
    finish(batcher)
    return task


# Adapters.


@pytest.fixture(scope="module")
def tuned() -> Any:
    """Stable Diffusion with a LoRA in every attention layer of its UNet and its text encoder."""
    pipe = tiny.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    for part, layers in ((pipe.unet, ["to_q", "to_k", "to_v", "to_out.0"]), (pipe.text_encoder, ["q_proj", "v_proj"])):
        with tiny.seeded(5):
            part.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=layers, init_lora_weights=False))
    return pipe


def layers_of(module: Any) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


def scales(module: Any) -> list[dict[str, float]]:
    return [dict(layer.scaling) for layer in layers_of(module)]


class Looked:
    """How many parts of modules were walked over, and how many layers were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts = self.layers = 0
        modules, state = torch.nn.Module.modules, adapter_state._state

        def walked(module: Any) -> Iterator[Any]:
            for part in modules(module):
                self.parts += 1
                yield part

        def read(layer: Any) -> adapter_state.State:
            self.layers += 1
            return state(layer)

        monkeypatch.setattr(torch.nn.Module, "modules", walked)
        monkeypatch.setattr(adapter_state, "_state", read)


def test_a_loaded_adapter_costs_a_request_nothing(tuned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    views.view(tuned)
    looked = Looked(monkeypatch)
    view = views.view(tuned)
    assert looked.parts == 0, "a view walks through a module"
    batcher = Batcher()
    batcher.submit(lambda: view(prompt="a cat", num_inference_steps=3, **SQUARE))
    finish(batcher)
    assert batcher.counts["unet"].calls == 4
    assert looked.layers == 0, "a call looks at layers"


def test_only_what_was_handed_out_is_looked_at(tuned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    view = views.view(tuned)
    looked = Looked(monkeypatch)
    scale_lora_layers(view.text_encoder, 0.5)
    assert view.unet._sfumato_view.why_no_switch() == "adapters are scaled for this request"
    unscale_lora_layers(view.text_encoder, 0.5)
    assert view.unet._sfumato_view.why_no_switch() == ""
    assert looked.layers <= 3 * len(layers_of(tuned.text_encoder))


HANDS: dict[str, Callable[[Any], Any]] = {
    "modules": lambda unet: next(part for part in unet.modules() if isinstance(part, BaseTunerLayer)),
    "named_modules": lambda unet: next(part for _, part in unet.named_modules() if isinstance(part, BaseTunerLayer)),
    "children": lambda unet: next(layers_of(part)[0] for part in unet.children() if layers_of(part)),
    "named_children": lambda unet: next(layers_of(part)[0] for _, part in unet.named_children() if layers_of(part)),
    "an attribute": lambda unet: layers_of(unet.mid_block)[0],
    "a part by name": lambda unet: layers_of(unet.get_submodule("mid_block"))[0],
    "_modules": lambda unet: layers_of(unet._modules["mid_block"])[0],
}


@pytest.mark.parametrize("hand", HANDS)
@pytest.mark.parametrize("change", ["scale_layer", "set_scale", "enable_adapters", "a number"])
def test_a_layer_that_was_changed_keeps_its_request_apart_until_it_is_put_back(
    tuned: Any, hand: str, change: str
) -> None:
    before = scales(tuned.unet)
    view = views.view(tuned)
    shared = view.unet._sfumato_view
    layer = HANDS[hand](view.unet)
    assert shared.why_no_switch() == ""
    {
        "scale_layer": lambda: layer.scale_layer(0.5),
        "set_scale": lambda: layer.set_scale("default", 0.25),
        "enable_adapters": lambda: layer.enable_adapters(False),
        "a number": lambda: layer.scaling.update(default=7.0),
    }[change]()
    assert shared.why_no_switch()
    assert views.close(view) == []
    assert scales(tuned.unet) == before
    assert not layer.disable_adapters


def test_a_request_that_fails_while_adapters_are_scaled_leaves_none_scaled(
    tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = scales(tuned.text_encoder)
    batcher = Batcher()

    def failing() -> None:
        view = views.view(tuned)
        scale_lora_layers(view.text_encoder, 0.3)
        view.text_encoder(torch.ones(1, 77, dtype=torch.long))
        raise ValueError("in the middle")

    task = batcher.submit(failing)
    finish(batcher)
    assert isinstance(task.outcome.error, ValueError)
    assert scales(tuned.text_encoder) == before


def test_scaling_back_is_exact_in_the_end(tuned: Any) -> None:
    """In between a rounding error is no reason to run alone."""
    before = scales(tuned.text_encoder)
    for weight in (0.3, 0.7, 1 / 3, 1.1):
        view = views.view(tuned)
        for _ in range(5):
            scale_lora_layers(view.text_encoder, weight)
            unscale_lora_layers(view.text_encoder, weight)
        assert view.unet._sfumato_view.why_no_switch() == ""
        views.close(view)
        assert scales(tuned.text_encoder) == before


# The end of a request.


def test_a_view_that_cannot_be_closed_takes_nobody_along() -> None:
    pipe = tiny.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    batcher = Batcher()

    def stubborn(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room to cast it back")

    def guilty() -> str:
        made = views.view(pipe)
        made.vae.to(torch.float64)
        made.unet.to(torch.float64)
        made.unet(torch.zeros(1, 4, 8, 8).double(), 1, torch.zeros(1, 77, tiny.WIDTH).double())
        pipe.vae.to = stubborn
        return "drawn"

    first = batcher.submit(guilty)
    second = batcher.submit(lambda: views.view(pipe)(prompt="a cat", num_inference_steps=2, **SQUARE).images[0])
    view = views.view(pipe)
    finish(batcher)
    assert first.outcome.value == "drawn"
    assert second.outcome is not None
    assert pipe.unet.dtype == torch.float32, "what could be put back was not"
    del pipe.vae.to
    assert views.close(view) == []


def test_a_model_that_could_not_be_put_back_is_loaded_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = loads.pool(1, quiet)
    made = ModelConfig(name="m", model=str(folder), file=folder / "m.yaml", dtype="fp32")
    restore, failures = views.StandIn._sfumato_restore, ["once"]

    def restored(self: Any) -> None:
        if failures and self._sfumato_name == "vae":
            raise RuntimeError(f"it fails {failures.pop()}")
        restore(self)

    with pool.use(made, loads.turn) as model:
        expected = generation.draw(model, wanted(), quiet).file
    with pool.use(made, loads.turn) as model, pool.use(made, loads.turn) as neighbour:
        steps: list[int] = []

        def on_step(step: int, total: int) -> None:
            steps.append(step)
            if step == 1:  # in the middle of the neighbour's picture
                monkeypatch.setattr(views.StandIn, "_sfumato_restore", restored)
                assert generation.draw(model, wanted(), quiet).file == expected

        with pytest.raises(generation.Disturbed):
            generation.draw(neighbour, wanted(), on_step)
        assert "it fails once" in neighbour.state.broken
    with pool.use(made, loads.turn) as model:
        assert model.pipeline is not neighbour.pipeline
        assert generation.draw(model, wanted(), quiet).file == expected
    assert pool.loads == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.stable_diffusion().save_pretrained(path)
    return path


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Stop(BaseException):
    pass


def fails(step: int, total: int) -> None:
    if step == 2:
        raise ValueError("in the middle")


def stops(step: int, total: int) -> None:
    if step == 2:
        raise Stop


@pytest.mark.parametrize("on_step", [quiet, fails, stops])
@pytest.mark.parametrize(("build", "scheduler"), [(tiny.stable_diffusion, "dpmpp_2m"), (tiny.flux, "lcm")])
def test_nothing_of_a_run_waits_for_the_collector(
    build: Callable[[], Any], scheduler: str, on_step: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch,
    uncollected: None,
) -> None:  # fmt: skip
    model = loaded(build())
    held: list[weakref.ref[Any]] = []
    make = request_scheduler.make

    def made(*args: Any) -> Any:
        scheduler = make(*args)
        held.append(weakref.ref(scheduler))
        return scheduler

    monkeypatch.setattr(request_scheduler, "make", made)
    denoiser = getattr(model.pipeline, "unet", None) or model.pipeline.transformer
    denoiser.register_forward_hook(lambda module, args, output: held.append(weakref.ref(output[0])))
    batcher = Batcher()
    task = batcher.submit(
        lambda: generation.draw(model, wanted(scheduler=scheduler, previews=1), on_step, quiet), caller="me"
    )
    finish(batcher)
    assert task.outcome is not None
    assert (task.outcome.error is None) == (on_step is quiet)
    assert len(held) > 2
    assert [ref() for ref in held if ref() is not None] == []


def test_gather_leaves_nothing_to_the_collector_either(uncollected: None) -> None:
    pipe = tiny.stable_diffusion()
    held: list[weakref.ref[Any]] = []
    pipe.unet.register_forward_hook(lambda module, args, output: held.append(weakref.ref(output[0])))
    calls = [{"prompt": "a cat", "num_inference_steps": 2, "output_type": "np", **SQUARE} for _ in range(2)]
    sfumato.gather(pipe, calls)
    assert held
    assert [ref() for ref in held if ref() is not None] == []


# Schedulers that are watched.


def test_a_watched_scheduler_looks_like_its_class_and_can_be_copied() -> None:
    pipe = tiny.flux()
    seen: list[int] = []
    made = request_scheduler.make(pipe, schedulers.parse("lcm"), 1)
    cls = type(made)
    watched = made
    steps._observe(watched, lambda step, total: seen.append(step), steps.Finite(), None)
    assert isinstance(watched, cls)
    assert type(watched).__name__ == cls.__name__
    assert "generator" in inspect.signature(watched.step).parameters
    watched.set_timesteps(3, mu=0.8)
    other = copy.deepcopy(watched)
    sample = torch.zeros(1, 4, 8)
    for timestep in watched.timesteps:
        watched.step(sample, timestep, sample, return_dict=False)
        other.step(sample, timestep, sample, return_dict=False)
    assert seen == [1, 2, 3]
    assert other.step_index == watched.step_index == 3


# Modules that wait in main memory.


def test_when_nobody_draws_every_module_is_put_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = loads.pool(1, quiet)
    made = ModelConfig(name="m", model=str(folder), file=folder / "m.yaml", dtype="fp32")
    out: list[str] = []
    with pool.use(made, loads.turn) as model:
        pipe = model.pipeline
        pipe._all_hooks, hook = [], None
        for name in ("text_encoder", "unet", "vae"):
            _, hook = accelerate.cpu_offload_with_hook(getattr(pipe, name), "cpu", prev_module_hook=hook)
            monkeypatch.setattr(hook.hook, "init_hook", lambda module, name=name: out.append(name) or module)
            pipe._all_hooks.append(hook)
        with pool.use(made, loads.turn) as neighbour:
            task = in_a_hub(lambda: generation.draw(neighbour, wanted(), quiet))
            assert task.outcome.error is None
        assert "vae" not in out, "somebody draws still"
        task = in_a_hub(lambda: generation.draw(model, wanted(), fails))
        assert isinstance(task.outcome.error, DrawError)
    assert {"text_encoder", "unet", "vae"} <= set(out)


def test_a_module_that_is_called_puts_out_every_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order requests call them: accelerate itself puts out the one before, and the last never."""
    pipe = tiny.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    model = loaded(pipe)
    expected = in_a_hub(lambda: generation.draw(model, wanted(), quiet)).outcome.value
    offload.enable(pipe, "cpu")
    assert offload.enabled(pipe)
    assert in_a_hub(lambda: generation.draw(model, wanted(), quiet)).outcome.value.file == expected.file
    out: list[str] = []
    names = {id(module): name for name, module in pipe.components.items()}
    for hook in pipe._all_hooks:
        monkeypatch.setattr(hook.hook, "init_hook", lambda module: out.append(names[id(module)]))
    monkeypatch.setattr(offload, "_on_device", lambda module: True)
    in_order = {"text_encoder", "unet", "vae"}
    for name in in_order:
        out.clear()
        getattr(pipe, name)._hf_hook.prev_module_hook.offload()
        assert set(out) == in_order - {name}
    out.clear()
    offload.offload_all(pipe)
    assert set(out) == {names[id(hook.model)] for hook in pipe._all_hooks}


def test_gather_puts_the_last_module_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.stable_diffusion()
    out: list[str] = []
    _, hook = accelerate.cpu_offload_with_hook(pipe.vae, "cpu")
    pipe._all_hooks = [hook]
    monkeypatch.setattr(hook.hook, "init_hook", lambda module: out.append("vae") or module)
    sfumato.gather(pipe, [{"prompt": "a cat", "num_inference_steps": 1, "output_type": "np", **SQUARE}])
    assert out == ["vae"]


# The model file of a request.


def test_a_request_keeps_the_file_that_it_was_made_with(folder: Path) -> None:
    told: list[Any] = []
    pool = loads.pool(1, lambda name, status: told.append(status.info), describe=model_info)
    first = ModelConfig(name="m", model=str(folder), file=folder / "m.yaml", dtype="fp32", sampling=Sampling(steps=3))
    with pool.use(first, loads.turn) as model:
        with pool.use(replace(first, sampling=Sampling(steps=5), pinned=True), loads.turn) as newer:
            assert newer.config.sampling.steps == 5
            assert newer.pipeline is model.pipeline
            assert newer.task_pipelines is model.task_pipelines
            assert model.config.sampling.steps == 3
            assert generation.draw(model, wanted(steps=None), quiet).recipe.sampling.steps == 3
            assert generation.draw(newer, wanted(steps=None), quiet).recipe.sampling.steps == 5
        assert model.config.sampling.steps == 3
    assert [facts.sampling.steps for facts in told if facts] == [3, 5]
    assert pool._loaded["m"].config.pinned, "the newest file is forgotten"


# The thread.


@pytest.mark.parametrize("kind", torch_state.AUTOCAST)
def test_autocast_of_every_device_is_a_state_of_the_thread(kind: str) -> None:
    before = torch_state.ambient()
    torch.set_autocast_enabled(kind, True)
    changed = torch_state.ambient()
    torch_state.restore(before)
    assert changed != before
    assert not torch.is_autocast_enabled(kind)
    assert torch_state.ambient() == before


def test_the_dtype_of_autocast_is_a_state_too() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        one = torch_state.ambient()
    with torch.autocast("cpu", torch.float16):
        assert torch_state.ambient() != one


def test_there_is_autocast_for_all_that_device_takes() -> None:
    assert {"cpu", "cuda", "mps", "xpu"} <= set(torch_state.AUTOCAST)


def test_each_device_has_its_own_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generators stand for the devices of a machine with two: what torch offers for each kind has this form."""
    dice = [torch.Generator().manual_seed(at) for at in range(2)]
    module = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: len(dice),
        get_rng_state=lambda device: dice[device].get_state(),
        set_rng_state=lambda state, device: dice[device].set_state(state),
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: {"xpu": module}[kind])
    assert torch_state.devices() == (("xpu", 0), ("xpu", 1))
    before = torch_state.random()
    expected = [float(torch.rand(1, generator=each)) for each in dice]
    torch_state.set_random(before)
    assert [float(torch.rand(1, generator=each)) for each in dice] == expected
    module.is_initialized = lambda: False  # and is not started by looking
    assert torch_state.devices() == ()


def test_no_device_is_started_by_looking() -> None:
    assert set(torch_state.random()) >= {torch_state.CPU}
    assert device.choose_device(ModelConfig(name="m", model="m", cuda=False), "auto") == "cpu"
