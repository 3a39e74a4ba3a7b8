"""LoRAs of requests beside a loaded model: the same pictures as plain diffusers, and nothing stays."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from sfumato.batching import adapted, adapter_rows, views
from sfumato.batching.batcher import Batcher
from sfumato.batching.verification import Verification
from sfumato.errors import InvalidRequest, ModelTooLarge
from sfumato.loras import Lora
from sfumato.models.adapters import KEPT_WEIGHTS, Adapters
from support import families_transformers, loras, tiny
from support.tensor_memory import held, tensors

CALL: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "np"}

SMALL: dict[str, Any] = {"num_inference_steps": 1, "width": 32, "height": 32}

FAMILIES: Mapping[str, tuple[Callable[[], Any], dict[str, str], dict[str, Any]]] = {
    "sd": (tiny.stable_diffusion, {"text_encoder": "lora_te"}, {}),
    "sd, te1": (tiny.stable_diffusion, {"text_encoder": "lora_te1"}, {}),
    "xl": (tiny.stable_diffusion_xl, {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}, {}),
    "xl, unet alone": (tiny.stable_diffusion_xl, {}, {}),
    "kohya's dora": (tiny.stable_diffusion, {}, {"dora": True}),
    "locon": (tiny.stable_diffusion, {}, {"conv": True}),
}
"""A pipeline, the parts for its text encoders, and what is special about the file."""


@pytest.fixture(scope="module")
def sd() -> Any:
    return quiet(tiny.stable_diffusion())


@pytest.fixture(scope="module")
def files(sd: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four LoRAs of Stable Diffusion 1, with a part for its text encoder; a DoRA; one for convolutions too."""
    folder = tmp_path_factory.mktemp("loras")
    parts = {"text_encoder": "lora_te"}
    made = [loras.saved(loras.kohya(sd, parts, seed=at), folder / f"l{at}.safetensors") for at in range(4)]
    made.append(loras.diffusers(tiny.stable_diffusion(), folder, "dora.safetensors", part="unet", dora=True))
    made.append(loras.saved(loras.kohya(sd, seed=10, conv=True), folder / "conv.safetensors"))
    return made


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain(pipeline: Any, **call: Any) -> Any:
    """What diffusers itself draws."""
    return pipeline(**{"prompt": "a cat", **CALL, **call}, generator=torch.Generator().manual_seed(1)).images[0]


def using(adapters: Adapters, pipeline: Any, chosen: Sequence[Lora] = (), replace: bool = False, **call: Any) -> Any:
    """What a request with these LoRAs draws."""
    with adapters.use(pipeline, "cpu", "m", chosen, replace_defaults=replace) as selections:
        view = views.view(pipeline, adapters=selections)
        try:
            return plain(view, **call)
        finally:
            views.close(view)


def differ(one: Any, other: Any) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_is_the_same_as_in_plain_diffusers(family: str, tmp_path: Path) -> None:
    make, encoders, special = FAMILIES[family]
    ours, theirs = quiet(make()), quiet(make())
    path = loras.saved(loras.kohya(ours, encoders, **special), tmp_path / "x.safetensors")
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    adapters, before = Adapters(), plain(ours)
    for weight, text in ((1.0, 1.0), (0.6, 0.6), (0.6, 1.4), (-0.5, -0.5)):
        theirs.set_adapters(["a"], [{"unet": weight, **dict.fromkeys(encoders, text)}])
        expected = plain(theirs)
        assert differ(using(adapters, ours, [loras.of(path, weight, text)]), expected) < 1e-5
        assert differ(expected, before) > 1e-2
    assert differ(plain(ours), before) == 0 == differ(using(adapters, ours), before)


@pytest.mark.parametrize(
    ("make", "part", "dora"),
    [(tiny.flux, "transformer", False), (tiny.stable_diffusion_3, "transformer", False),
     (tiny.stable_diffusion, "unet", True), (tiny.flux, "transformer", True)],
    ids=["flux", "sd3", "dora of sd", "dora of flux"],
)  # fmt: skip
def test_a_lora_as_diffusers_saves_it(make: Callable[[], Any], part: str, dora: bool, tmp_path: Path) -> None:
    ours, theirs = quiet(make()), quiet(make())
    path = loras.diffusers(make(), tmp_path, "x.safetensors", part=part, dora=dora)
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    adapters = Adapters()
    for weight in (1.0, 0.5):
        theirs.set_adapters(["a"], [weight])
        assert differ(using(adapters, ours, [loras.of(path, weight)]), plain(theirs)) < 1e-5
        assert differ(plain(ours), plain(theirs)) > 1e-3
    assert any(layer.lora_variant for each in adapters.modules for layer in each.modules()
               if isinstance(layer, BaseTunerLayer)) == dora  # fmt: skip


def test_a_lokr_of_lycoris_where_diffusers_reads_it(tmp_path: Path) -> None:
    """Beside a LoRA, whose layers are wrapped around its own."""
    ours, theirs = quiet(families_transformers.flux2_klein()), quiet(families_transformers.flux2_klein())
    lokr = loras.saved(loras.lokr(ours), tmp_path / "lokr.safetensors")
    lora = loras.diffusers(families_transformers.flux2_klein(), tmp_path, "lora.safetensors")
    theirs.load_lora_weights(tmp_path, weight_name=lokr.name, adapter_name="a")
    call = {"text_encoder_out_layers": (1,)}
    adapters = Adapters()
    for weight in (1.0, 0.5):
        theirs.set_adapters(["a"], [weight])
        expected = plain(theirs, **call)
        assert differ(using(adapters, ours, [loras.of(lokr, weight)], **call), expected) < 1e-5
        assert differ(plain(ours, **call), expected) > 1e-3
    with pytest.warns(UserWarning):
        theirs.load_lora_weights(tmp_path, weight_name=lora.name, adapter_name="b")
    theirs.set_adapters(["a", "b"], [0.5, 0.7])
    both = [loras.of(lokr, 0.5), loras.of(lora, 0.7)]
    assert differ(using(adapters, ours, both, **call), plain(theirs, **call)) < 1e-5
    theirs.set_adapters(["b"], [0.7])
    assert differ(using(adapters, ours, both[1:], **call), plain(theirs, **call)) < 1e-5


def test_several_of_one_request(sd: Any, files: list[Path]) -> None:
    theirs = quiet(tiny.stable_diffusion())
    for name, path in (("a", files[0]), ("b", files[4])):
        with pytest.warns(UserWarning) if name == "b" else no_warning():
            theirs.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    theirs.set_adapters(["a", "b"], [0.7, 0.5])
    chosen = [loras.of(files[0], 0.7), loras.of(files[4], 0.5)]
    assert differ(using(Adapters(), sd, chosen), plain(theirs)) < 1e-5


def no_warning() -> Any:
    return contextlib.nullcontext()


# Nothing stays.


def test_no_shared_weight_and_no_module_changes(sd: Any, files: list[Path]) -> None:
    parts = {name: getattr(sd, name) for name in ("unet", "text_encoder")}
    weights = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}
    modules = {name: [(key, id(each)) for key, each in part.named_modules()] for name, part in parts.items()}
    flags = [parameter.requires_grad for part in parts.values() for parameter in part.parameters()]
    adapters = Adapters()
    using(adapters, sd, [loras.of(path) for path in files])
    for name, part in parts.items():
        assert [(key, id(each)) for key, each in part.named_modules()] == modules[name]
        assert all(torch.equal(value, weights[name][key]) for key, value in part.state_dict().items())
        assert not hasattr(part, "peft_config")
    assert [parameter.requires_grad for part in parts.values() for parameter in part.parameters()] == flags


def test_off_and_on_fifty_times(sd: Any, files: list[Path]) -> None:
    adapters = Adapters()
    without, plainly = using(adapters, sd, **SMALL), held()
    each = [using(adapters, sd, [loras.of(path)], **SMALL) for path in files[:3]]
    for at in range(50):
        assert differ(using(adapters, sd, [loras.of(files[at % 3])], **SMALL), each[at % 3]) == 0
        assert differ(using(adapters, sd, **SMALL), without) == 0
        if at == 2:
            with_three = held()
    assert plainly < with_three < 2 * plainly
    assert abs(held() - with_three) <= 0.05 * with_three
    adapters.drop()
    assert abs(held() - plainly) <= 0.05 * plainly


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_many_pass_through_a_few_places(count: int, sd: Any, tmp_path: Path) -> None:
    """Of different layers and weights; what is left is what eight take."""
    state = loras.kohya(sd)
    adapters = Adapters()
    adapters.limit = 8
    keys = [key for key in state if key.endswith("lora_up.weight")]

    def draw(at: int) -> None:
        own = {key: value for key, value in state.items() if key.split(".")[0] == keys[at % len(keys)].split(".")[0]}
        own = {key: value + at if key.endswith("alpha") else value for key, value in own.items()}
        path = loras.saved(own, tmp_path / f"{at}.safetensors")
        with adapters.use(sd, "cpu", "m", [loras.of(path, 1 + at / 1000)]) as selections:
            assert len(adapters) <= 8 and selections
        path.unlink()

    empty = held()
    for at in range(20):
        draw(at)
    before, layers = len(tensors()), len(list(adapters.modules[0].modules()))
    for at in range(20, count):
        draw(at)
    assert abs(len(tensors()) - before) <= 0.05 * before
    assert len(list(adapters.modules[0].modules())) <= 1.5 * layers
    assert len(adapters) == 8
    assert adapters.drop() > 0
    assert len(adapters) == 0 == len(adapters.modules)
    assert abs(held() - empty) <= 0.05 * empty


@pytest.mark.parametrize("own", [False, True])
def test_many_weights_leave_nothing(own: bool, files: list[Path]) -> None:
    """A weight is a name in the tables of every layer."""
    served, adapters = quiet(tiny.stable_diffusion()), Adapters()
    if own:
        served.load_lora_weights(files[0].parent, weight_name=files[0].name, adapter_name="adapter_0")

    def chosen(weight: float) -> Lora:
        return Lora("l0", weight, default=0) if own else loras.of(files[0], weight)

    first = using(adapters, served, [chosen(0.5)])
    with adapters.use(served, "cpu", "m", [chosen(0.25)]):
        for at in range(100):
            with adapters.use(served, "cpu", "m", [chosen(1 + at / 1000)]):
                pass
        layers = [layer for module in adapters.modules for layer in module.modules() if hasattr(layer, "scaling")]
        assert layers
        assert max(len(layer.scaling) for layer in layers) < 3 * KEPT_WEIGHTS
        assert all("adapter_0@0,25" in layer.scaling or not own for layer in layers), "one in use stays"
    assert differ(using(adapters, served, [chosen(0.5)]), first) == 0


def test_a_model_that_casts_its_layers_takes_none(files: list[Path]) -> None:
    served = quiet(tiny.stable_diffusion())
    served.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = plain(served)
    with pytest.raises(InvalidRequest, match="layerwise_casting"):
        using(Adapters(), served, [loras.of(files[0])])
    assert differ(plain(served), before) == 0


def test_one_in_use_stays(sd: Any, files: list[Path]) -> None:
    adapters = Adapters()
    adapters.limit = 1
    with adapters.use(sd, "cpu", "m", [loras.of(files[0])]), adapters.use(sd, "cpu", "m", [loras.of(files[1])]):
        assert len(adapters) == 2
    assert len(adapters) == 1


def test_the_budget_bounds_them(sd: Any, files: list[Path]) -> None:
    adapters = Adapters()
    room = [True]
    adapters.make_room = lambda needed: room[0] or len(adapters) == 0
    with adapters.use(sd, "cpu", "m", [loras.of(files[0])]):
        pass
    room[0] = False
    with adapters.use(sd, "cpu", "m", [loras.of(files[1])]):
        assert len(adapters) == 1, "the older one made room"
        with pytest.raises(ModelTooLarge, match="memory_mb"), adapters.use(sd, "cpu", "m", [loras.of(files[0])]):
            pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_nothing(sd: Any, files: list[Path], error: type[BaseException]) -> None:
    adapters, without = Adapters(), plain(sd)

    def fail(*args: Any) -> Any:
        raise error

    with pytest.raises(error):
        using(adapters, sd, [loras.of(files[0]), loras.of(files[4])], callback_on_step_end=fail)
    assert differ(using(adapters, sd), without) == 0


# What does not fit.


def test_what_does_not_fit_is_refused_with_its_keys(sd: Any, tmp_path: Path) -> None:
    whole = loras.kohya(sd)
    other = loras.kohya(tiny.stable_diffusion_xl(), {"text_encoder_2": "lora_te2"})
    some = next(iter(whole)).split(".")[0]
    cases: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "nothing": ({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, "transformer.x"),
        "a layer more": (
            whole | {f"{some.replace('blocks_0', 'blocks_7', 1)}.lora_{way}.weight": torch.ones(2, 2)
                     for way in ("up", "down")}, "unet.down_blocks.7.attentions",
        ),
        "another family": (other, "lora_te2|text_encoder_2|size mismatch"),
        "other tensors": ({"encoder.weight": torch.zeros(2, 2)}, "encoder.weight"),
        "LoHa": ({f"{some}.hada_w1_a": torch.zeros(2, 2), f"{some}.hada_w1_b": torch.zeros(2, 2)}, "hada_w1_a"),
        "other sizes": ({key: torch.zeros(3, 3) if value.dim() else value for key, value in whole.items()}, "size"),
    }  # fmt: skip
    adapters, without = Adapters(), plain(sd)
    for name, (state, words) in cases.items():
        path = loras.saved(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(InvalidRequest, match=words) as refused, adapters.use(sd, "cpu", "m", [loras.of(path)]):
            pass
        assert refused.value.param == "loras"
        assert name in refused.value.message
        assert len(adapters) == 0 == len(adapters.modules)
        assert differ(using(adapters, sd), without) == 0


def test_a_norm_of_flux_is_never_overwritten(tmp_path: Path) -> None:
    flux = quiet(tiny.flux())
    name = next(key for key in flux.transformer.state_dict() if "norm_q" in key)
    path = loras.saved({f"transformer.{name}": flux.transformer.state_dict()[name] * 9}, tmp_path / "x.safetensors")
    before = flux.transformer.state_dict()[name].clone()
    with pytest.raises(InvalidRequest, match="norm_q"), Adapters().use(flux, "cpu", "m", [loras.of(path)]):
        pass
    assert torch.equal(flux.transformer.state_dict()[name], before)


def test_a_pipeline_that_takes_none(files: list[Path]) -> None:
    with (
        pytest.raises(InvalidRequest, match="takes no LoRA"),
        Adapters().use(tiny.ddpm(), "cpu", "m", [loras.of(files[0])]),
    ):
        pass


# The model file's own.


def test_a_model_files_own_are_added_to_changed_or_replaced(files: list[Path]) -> None:
    def own(weights: dict[str, float]) -> Any:
        pipeline = quiet(tiny.stable_diffusion())
        for at, name in enumerate(weights):
            with pytest.warns(UserWarning) if at else no_warning():
                pipeline.load_lora_weights(files[at].parent, weight_name=files[at].name, adapter_name=name)
        if weights:
            pipeline.set_adapters(list(weights), list(weights.values()))
        return pipeline

    served, adapters = own({"adapter_0": 0.8}), Adapters()
    default = Lora("l0", 0.4, default=0)
    assert differ(using(adapters, served), plain(own({"a": 0.8}))) == 0
    assert differ(using(adapters, served, [loras.of(files[1], 0.5)]), plain(own({"a": 0.8, "b": 0.5}))) < 1e-5
    assert differ(using(adapters, served, [loras.of(files[0], 0.5)], True), plain(own({"a": 0.5}))) < 1e-5
    assert differ(using(adapters, served, [default]), plain(own({"a": 0.4}))) < 1e-5
    twice = [Lora("l0", 0.1, default=0), Lora("l0.safetensors", 0.3, default=0)]
    assert differ(using(adapters, served, twice), plain(own({"a": 0.4}))) < 1e-5
    assert differ(using(adapters, served, [Lora("l0", 0.0, default=0)]), plain(own({}))) < 1e-5
    assert differ(using(adapters, served, replace=True), plain(own({}))) < 1e-5
    assert differ(using(adapters, served), plain(own({"a": 0.8}))) == 0


# Requests with different ones share forward passes.

REQUESTS: list[list[int]] = [[0], [1], [2], [3], [], [0], [1], []]


def together(
    pipeline: Any, adapters: Adapters, chosen: Sequence[Sequence[Lora]], max_rows: int = 32
) -> tuple[list[Any], Batcher]:
    batcher = Batcher(max_rows=max_rows, verification=Verification())

    def request(at: int) -> Any:
        call = {"num_inference_steps": 4 + at % 3, "guidance_scale": 2.0 + at}
        return using(adapters, pipeline, chosen[at], **call)

    tasks = [batcher.submit(lambda at=at: request(at)) for at in range(len(chosen))]  # type: ignore[misc]
    with torch.no_grad():
        while batcher.step():
            pass
    for task in tasks:
        assert task.outcome is not None
        if task.outcome.error:
            raise task.outcome.error
    return [task.outcome.value for task in tasks if task.outcome], batcher


def test_eight_requests_with_four_and_none_share_forwards(sd: Any, files: list[Path]) -> None:
    chosen = [[loras.of(files[each], 0.5 + at / 10) for each in which] for at, which in enumerate(REQUESTS)]
    adapters = Adapters()
    with adapters.use(sd, "cpu", "m", [loras.of(files[each]) for each in range(4)]):
        pictures, batcher = together(sd, adapters, chosen)
    for at, picture in enumerate(pictures):
        call = {"num_inference_steps": 4 + at % 3, "guidance_scale": 2.0 + at}
        assert differ(using(Adapters(), sd, chosen[at], **call), picture) < 1e-4
    count = batcher.counts["unet"]
    assert not batcher.counts.unbatched
    together_again, batcher = together(sd, adapters, chosen)
    count = batcher.counts["unet"]
    assert count.calls / (count.forwards - count.proving) >= 3
    assert len({picture.tobytes() for picture in together_again}) == len(REQUESTS)


def test_a_file_that_is_replaced_while_its_request_waits_is_not_drawn_with(
    sd: Any, files: list[Path], tmp_path: Path
) -> None:
    """The recipe would have the hash of another file."""
    path = Path(shutil.copy(files[0], tmp_path / "style.safetensors"))
    waiting, adapters = loras.of(path, 0.7), Adapters()
    shutil.copy(files[1], tmp_path / "new")
    (tmp_path / "new").replace(path)
    with pytest.raises(InvalidRequest, match="replaced while the request waited; send it again"):
        using(adapters, sd, [waiting])
    assert not len(adapters) and not adapters.modules
    assert differ(using(adapters, sd, [loras.of(path, 0.7)]), using(Adapters(), sd, [loras.of(files[1], 0.7)])) == 0
    path.unlink()
    with pytest.raises(InvalidRequest, match="cannot be read"):
        using(Adapters(), sd, [dataclasses.replace(waiting, sha256="0" * 64)])


def test_one_cancelled_and_one_broken_of_a_mixed_batch_leave_nothing(sd: Any, files: list[Path]) -> None:
    """In the middle of shared forwards: the neighbours draw what they draw alone, and all that was loaded goes."""
    call = {"num_inference_steps": 6}
    before, chosen = plain(sd, **call), [[loras.of(files[at], 0.7)] for at in range(4)]
    alone = {at: using(Adapters(), sd, chosen[at], **call) for at in (1, 3)}
    adapters, batcher, ended = Adapters(), Batcher(max_rows=32, verification=Verification()), []

    class Cancelled(BaseException):
        pass

    def request(at: int) -> Any:
        def at_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if at == 2 and step == 3:
                ended.append(at)
                raise RuntimeError("broken")
            if at == 0 and step == 2:
                ended.append(at)
                batcher.cancel(tasks[0], Cancelled())
            return tensors

        return using(adapters, sd, chosen[at], **call, callback_on_step_end=at_step)

    tasks = [batcher.submit(lambda at=at: request(at)) for at in range(4)]  # type: ignore[misc]
    with torch.no_grad():
        while batcher.step():
            pass
    outcomes = [task.outcome for task in tasks]
    assert ended == [0, 2] and all(outcomes)
    assert [type(each.error) for each in outcomes if each] == [Cancelled, type(None), RuntimeError, type(None)]
    for at, picture in alone.items():
        assert differ(outcomes[at].value, picture) < 1e-4  # type: ignore[union-attr]
    count = batcher.counts["unet"]
    assert count.calls > 1.5 * (count.forwards - count.proving), "they shared forwards"
    assert all(not entry.users for entry in adapters._entries.values()) and not any(adapters._weighted.values())
    assert np.array_equal(using(adapters, sd, **call), before)
    adapters.drop()
    assert not len(adapters) and not adapters.modules
    assert np.array_equal(plain(sd, **call), before)


def test_a_dora_and_several_run_apart_and_right(sd: Any, files: list[Path]) -> None:
    chosen = [[loras.of(files[4])], [loras.of(files[0])], [loras.of(files[4])],
              [loras.of(files[0]), loras.of(files[1])], [], [loras.of(files[5])]]  # fmt: skip
    pictures, _ = together(sd, Adapters(), chosen)
    for at, picture in enumerate(pictures):
        call = {"num_inference_steps": 4 + at % 3, "guidance_scale": 2.0 + at}
        assert differ(using(Adapters(), sd, chosen[at], **call), picture) < 1e-4


def test_flux_like_requests_share_forwards(tmp_path: Path) -> None:
    flux = quiet(tiny.flux())
    paths = [loras.diffusers(tiny.flux(), tmp_path, f"{seed}.safetensors", seed=seed) for seed in (1, 2)]
    chosen: list[list[Lora]] = [[loras.of(paths[0])], [loras.of(paths[1], 0.5)], [], [loras.of(paths[0])]]
    adapters = Adapters()
    with adapters.use(flux, "cpu", "m", [loras.of(path) for path in paths]):
        pictures, batcher = together(flux, adapters, chosen)
    for at, picture in enumerate(pictures):
        call = {"num_inference_steps": 4 + at % 3, "guidance_scale": 2.0 + at}
        assert differ(using(Adapters(), flux, chosen[at], **call), picture) < 1e-4
    count = batcher.counts["transformer"]
    assert count.calls > 1.4 * (count.forwards - count.proving), "only the proof computes each alone"


def test_rows_that_a_layer_cannot_tell_apart_run_alone() -> None:
    """A layer that sees all rows at once fails in a batch of different adapters, whose members then run alone."""

    class Mixing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return sample + self.inner["to_q"](sample.mean(0, keepdim=True))

    module = adapted.AdaptedModule(Mixing())
    for name in ("a", "b"):
        if name == "b":
            del module.module.peft_config
        inject_adapter_in_model(LoraConfig(r=1, target_modules=["to_q"]), module.module, name)
    module.refresh()
    rows = [adapted.Selection(module, (name,)) for name in ("a", "b")]
    with pytest.raises(ValueError, match="gets 1 rows for the 2"):
        module.run("__call__", rows, (torch.ones(2, 4),), {})
    assert module.run("__call__", rows[:1], (torch.ones(2, 4),), {}).shape == (2, 4)


class Several(torch.nn.Module):
    """Kinds of layers that LoRAs have a part for; each row of the input has two entries inside, like frames."""

    def __init__(self) -> None:
        super().__init__()
        layers = {"embedding": torch.nn.Embedding(5, 6), "linear": torch.nn.Linear(6, 6)}
        self.inner = torch.nn.ModuleDict({**layers, "conv": torch.nn.Conv2d(6, 4, 3), "line": torch.nn.Conv1d(4, 4, 1)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found = self.inner["linear"](self.inner["embedding"](tokens.repeat_interleave(2, dim=0)))
        pictures = self.inner["conv"](found.transpose(1, 2).unflatten(2, (3, 3)))
        return self.inner["line"](pictures.flatten(2)).unflatten(0, (-1, 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", ["a--b", "abab", "-", "bbbb", "aabb-a"])
def test_each_row_has_its_adapter_in_every_kind_of_layer(order: str) -> None:
    with tiny.seeded(0):
        module = adapted.AdaptedModule(Several())
        for name, rank in (("a", 1), ("b", 3)):
            module.module.__dict__.pop("peft_config", None)
            targets = ["embedding", "linear", "conv", *(["line"] if name == "a" else [])]
            inject_adapter_in_model(
                LoraConfig(r=rank, target_modules=targets, init_lora_weights=False), module.module, name
            )
        module.refresh()
        tokens = torch.randint(0, 5, (len(order), 9))
    rows = [adapted.Selection(module, () if name == "-" else (name,)) for name in order]
    with torch.no_grad():
        batch = module.run("__call__", rows, (tokens,), {})
        alone = [module.run("__call__", [row], (tokens[at : at + 1],), {}) for at, row in enumerate(rows)]
        assert torch.allclose(batch, torch.cat(alone), atol=1e-6)
        assert not torch.allclose(batch, module.original(tokens)) or order == "-"


def test_rows_with_the_same_adapters_lie_together() -> None:
    assert adapter_rows.together("baabcb", lambda item: item) == ["b", "b", "b", "a", "a", "c"]
    assert adapter_rows.Rows.of(["a", "a", adapter_rows.BASE, "b"]).slices == (("a", 0, 2), ("b", 3, 4))


def test_a_textual_inversion_reaches_the_twin(sd: Any, files: list[Path]) -> None:
    pipeline, adapters = quiet(tiny.stable_diffusion()), Adapters()
    using(adapters, pipeline, [loras.of(files[0])])
    pipeline.text_encoder.resize_token_embeddings(
        pipeline.text_encoder.get_input_embeddings().weight.shape[0] + 1, mean_resizing=False
    )
    using(adapters, pipeline, [loras.of(files[0])])
    twin = next(each for each in adapters.modules if hasattr(each, "get_input_embeddings"))
    assert twin.get_input_embeddings() is pipeline.text_encoder.get_input_embeddings()


def test_modules_that_were_replaced_get_twins_of_their_own(files: list[Path]) -> None:
    """As when memory ran out, and what models share was given to each to be offloaded."""
    pipeline, adapters = quiet(tiny.stable_diffusion()), Adapters()
    before = using(adapters, pipeline, [loras.of(files[0])], **SMALL)
    pipeline.register_modules(unet=tiny.stable_diffusion().unet)
    assert differ(using(adapters, pipeline, [loras.of(files[0])], **SMALL), before) < 1e-5
    assert differ(using(adapters, pipeline, **SMALL), before) > 1e-3


def test_a_file_that_is_written_over_changes_nothing_in_memory(sd: Any, files: list[Path], tmp_path: Path) -> None:
    """As `cp` and trainers do: into the same file, which weights that are only mapped would follow."""
    path, adapters = tmp_path / "l.safetensors", Adapters()
    path.write_bytes(files[0].read_bytes())
    chosen = [loras.of(path)]
    with adapters.use(sd, "cpu", "m", chosen):
        pass
    with path.open("r+b") as file:
        file.seek(-2000, os.SEEK_END)
        file.write(b"\x3f" * 2000)
    changed = using(adapters, sd, chosen)
    assert differ(changed, using(Adapters(), sd, [loras.of(files[0])])) == 0


def test_a_file_that_is_gone_is_told(sd: Any, files: list[Path]) -> None:
    gone = dataclasses.replace(loras.of(files[0]), file="/nowhere/x.safetensors")
    with pytest.raises(InvalidRequest, match="cannot be read"), Adapters().use(sd, "cpu", "m", [gone]):
        pass


def test_a_twin_shares_every_tensor_and_follows_its_module(sd: Any) -> None:
    module = tiny.stable_diffusion().unet
    twin = adapted.twin(module)
    assert twin is not module and type(twin) is type(module)
    assert all(one is other for one, other in zip(module.parameters(), twin.parameters(), strict=True))
    module.to(torch.float64)
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float64}
    assert not any(isinstance(each, BaseTunerLayer) for each in twin.modules())
    assert isinstance(twin, diffusers.UNet2DConditionModel)
