"""What the proof at first use finds: every kind of wrong batch, and nothing against right ones, in each precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import diffusers as d
import pytest
import torch
from torch import nn

from benchmarks import parity
from sfumato.batching import calls as rule
from sfumato.batching import concatenation, proof
from sfumato.batching.batcher import Batcher, Task
from sfumato.batching.calls import Call, Fingerprints, describe
from sfumato.batching.concatenation import ConcatenationCache
from sfumato.batching.proof import examine, prove
from sfumato.batching.views import view
from support import families_transformers as ft
from support import tiny
from support.families import FLOW, PICTURES, SD, controlled, guided_by_perturbation, lively, negative, numbers, without

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some of them about toy sizes

PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]
HALVES = PRECISIONS[1:]

each_precision = pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: str(precision)[6:])


class Recording(Batcher):
    """Computes every call alone, and keeps the first that each request makes of each method of each module."""

    def __init__(self) -> None:
        super().__init__(max_rows=1)
        self.first: dict[tuple[str, str], dict[int, Call]] = {}

    def computed(self, task: Task, call: Call, value: Any, by: str) -> None:
        self.first.setdefault((call.name, call.method), {}).setdefault(task.number, call)
        super().computed(task, call, value, by)


def recorded(pipe: Any, requests: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[Call]]:
    """The first call of each method of each module, one per request, as the pipeline makes it in one step."""
    batcher = Recording()
    pipe.set_progress_bar_config(disable=True)
    drawn = [{**request, "num_inference_steps": 2} for request in requests]
    tasks = [batcher.submit(lambda call=call: view(pipe)(**call, output_type="pt")) for call in parity.seeded(drawn)]
    with torch.no_grad():
        while batcher.step():
            pass
    for task in tasks:
        if task.outcome and task.outcome.error:
            raise task.outcome.error
    return {module: list(calls.values()) for module, calls in batcher.first.items()}


def joined(calls: Sequence[Call]) -> dict[str, Any]:
    return concatenation.join(calls, ConcatenationCache())


def shown(calls: Sequence[Call], join: Callable[[Sequence[Call]], dict[str, Any]] = joined) -> str:
    with torch.no_grad():
        return prove(calls, join)


# What is right.


def equal_lengths(requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with prompts of one length, and so texts that need no padding."""
    return [{**one, "prompt": f"a {word}"} for one, word in zip(requests, ("cat", "dog", "hen"), strict=True)]


def flux_schnell() -> Any:
    return ft.flux_with(d.FluxPipeline, guidance_embeds=False)()


def stable_diffusion_xl() -> Any:
    pipe = tiny.stable_diffusion_xl()
    pipe.vae.register_to_config(force_upcast=False)  # in fp16 it would be cast, and so run alone
    return pipe


RIGHT: dict[str, tuple[Callable[[], Any], list[dict[str, Any]]]] = {
    "StableDiffusion": (tiny.stable_diffusion, SD),
    "StableDiffusionXL": (stable_diffusion_xl, negative(FLOW)),
    "StableDiffusionControlNet": (controlled(d.StableDiffusionControlNetPipeline), PICTURES),
    "Flux": (tiny.flux, FLOW),
    "Flux (no guidance embedding)": (flux_schnell, FLOW),
    "StableDiffusion3": (tiny.stable_diffusion_3, negative(FLOW)),
    "PixArt": (tiny.pixart, [{**call, "use_resolution_binning": False} for call in FLOW]),
    "Sana": (
        ft.sana,
        [{**c, "use_resolution_binning": False, "complex_human_instruction": None} for c in ft.FAMILIES["Sana"].calls],
    ),
    "ZImage": (ft.z_image, FLOW),
    "QwenImage": (ft.qwen_image, without(FLOW, "guidance_scale")),
    "QwenImage (equal lengths)": (ft.qwen_image, equal_lengths(without(FLOW, "guidance_scale"))),
    "HiDreamImage": (ft.hidream, FLOW),
}


@each_precision
@pytest.mark.parametrize("family", RIGHT)
def test_nothing_is_held_against_independent_rows(family: str, precision: torch.dtype) -> None:
    build, requests = RIGHT[family]
    modules = recorded(build().to(precision), requests)
    proved = []
    for (name, method), calls in modules.items():
        groups: dict[Any, list[Call]] = {}
        for call in calls:
            groups.setdefault(call.key, []).append(call)
        group = max(groups.values(), key=len)
        if len(group) > 1 and group[0].key is not None:
            assert not shown(group), (name, method)
            proved.append(name)
    assert {"unet", "transformer"} & set(proved)
    assert "vae" in proved
    assert any(name.startswith("text_encoder") for name in proved) or family in ("QwenImage", "ZImage")


# What is wrong when it is joined naively: each was met, and by shapes alone each looks right.

SIZES = ((64, 128), (128, 64), (64, 128))
"""Pictures of two shapes with equally many tokens."""


def of_mixed_sizes(name: str, precision: torch.dtype) -> list[Call]:
    family = parity.FAMILIES[name]
    requests = [
        {**call, "prompt": "a cat", "height": height, "width": width}
        for call, (height, width) in zip(family.calls, SIZES, strict=True)
    ]
    return recorded(family.build().to(precision), requests)[family.denoiser, "__call__"]


@pytest.fixture
def naive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule without what its tables know."""
    for table in ("EQUAL", "EACH", "ROWS_SECOND"):
        monkeypatch.setattr(rule, table, frozenset())


@each_precision
@pytest.mark.parametrize("family", ["QwenImage", "Flux2"])
@pytest.mark.usefixtures("naive")
def test_pictures_of_two_shapes_that_are_joined_by_their_sizes(family: str, precision: torch.dtype) -> None:
    assert shown(of_mixed_sizes(family, precision)[:2])


@each_precision
@pytest.mark.usefixtures("naive")
def test_layers_that_are_taken_for_rows(precision: torch.dtype) -> None:
    """HiDream's text has its layers first; here there are as many as rows, and the module reshapes what it gets."""
    calls = recorded(ft.hidream().to(precision), FLOW)["transformer", "__call__"][:2]
    assert len({call.key for call in calls}) == 1
    assert "beside it" in shown(calls)


@each_precision
@pytest.mark.usefixtures("naive")
def test_ids_of_which_the_first_row_is_read_are_found_where_all_rows_agree(precision: torch.dtype) -> None:
    """The first batch may be one of equal sizes; the verdict is about all that follow."""
    flux2 = parity.FAMILIES["Flux2"]
    calls = recorded(flux2.build().to(precision), equal_lengths(flux2.calls))["transformer", "__call__"]
    assert len({call.key for call in calls}) == 1
    assert "beside it" in shown(calls)


@each_precision
@pytest.mark.parametrize("guided", [False, True])
def test_attention_that_goes_by_the_place_in_the_batch(guided: bool, precision: torch.dtype) -> None:
    pipe = guided_by_perturbation().to(precision)
    pipe._set_pag_attn_processor(pag_applied_layers="mid", do_classifier_free_guidance=guided)
    rows = 3 if guided else 2
    calls = [
        describe(
            pipe.unet, "__call__", (numbers(seed, rows, 4, 8, 8).to(precision), 10 * seed),
            {"encoder_hidden_states": numbers(seed + 9, rows, 7, tiny.WIDTH).to(precision)}, Fingerprints(),
        )
        for seed in range(2)
    ]  # fmt: skip
    assert "place" in shown(calls)


TEXT = "encoder_hidden_states"


def padded_text(calls: Sequence[Call], *masks: str) -> list[Call]:
    """The calls as they would be if text were padded wherever there is a text; their masks have the padding already."""
    longest = max(leaf.value.shape[1] for call in calls for leaf in call.leaves if leaf.path == "encoder_hidden_states")

    def padded(leaf: rule.Leaf) -> rule.Leaf:
        if leaf.path == "encoder_hidden_states":
            return dataclasses.replace(leaf, kind="ragged")
        if leaf.path in masks and leaf.kind != "mask":
            missing = longest - leaf.value.shape[1]
            return dataclasses.replace(leaf, kind="rows", value=nn.functional.pad(leaf.value, (0, missing)))
        return leaf

    return [dataclasses.replace(call, leaves=[padded(leaf) for leaf in call.leaves]) for call in calls]


@each_precision
def test_text_that_is_padded_without_a_mask(precision: torch.dtype) -> None:
    cogview = parity.FAMILIES["CogView4"]
    requests = [{**call, "prompt": "long " * 12 * n} for n, call in enumerate(cogview.calls, 1)]
    calls = recorded(cogview.build().to(precision), requests)["transformer", "__call__"]
    assert len({leaf.value.shape[1] for call in calls for leaf in call.leaves if leaf.path == TEXT}) > 1
    unmasked = [dataclasses.replace(call, pairs={}) for call in padded_text(calls)]
    assert "padding" in shown(unmasked)


@each_precision
def test_text_that_is_padded_with_a_mask_that_is_not_always_read(precision: torch.dtype) -> None:
    """Kandinsky 3 attends with it, and asks with the mean of all."""
    with tiny.seeded(0):
        unet = d.Kandinsky3UNet(
            in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3,
            block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=WIDE,
        )  # fmt: skip
        unet = lively(unet.eval()).to(precision)
    calls = [
        describe(
            unet, "__call__", (numbers(seed, 2, 4, 8, 8).to(precision), 10 * seed),
            {
                "encoder_hidden_states": numbers(seed + 9, 2, length, WIDE).to(precision),
                "encoder_attention_mask": torch.ones(2, length, dtype=torch.long),
            },
            Fingerprints(),
        )
        for seed, length in enumerate((5, 9))
    ]  # fmt: skip
    assert "padding" in shown(padded_text(calls, "encoder_attention_mask"))


WIDE = 32


@each_precision
def test_padding_that_is_read_where_everything_is_masked(precision: torch.dtype) -> None:
    """Without guidance Kandinsky 3 masks all of a text of zeros, so that attention averages over all there is."""

    class Attending(Layer):
        def forward(self, sample, text, mask):
            bias = (1 - mask.to(sample.dtype)) * -10000.0
            found = nn.functional.scaled_dot_product_attention(sample, text, text, bias[:, None])
            return self.outer(found)

    module = Attending().to(precision).eval()
    calls = []
    for seed, length in enumerate((3, 5)):
        text = numbers(seed, 2, length, 8).to(precision)
        text[0] = 0
        mask = torch.ones(2, length)
        mask[0] = 0
        given = {"text": text, "mask": mask}
        made = describe(module, "__call__", (numbers(seed, 2, 6, 8).to(precision),), given, Fingerprints())
        leaves = [dataclasses.replace(leaf, kind="ragged") if leaf.path == "text" else leaf for leaf in made.leaves]
        calls.append(dataclasses.replace(made, leaves=leaves))
    for call in calls:
        for leaf in call.leaves:
            if leaf.path == "mask":
                leaf.value = nn.functional.pad(leaf.value, (0, 5 - leaf.value.shape[1]))
    assert "padding" in shown(calls)


# Small modules, each wrong in a way of its own.


class Layer(nn.Module):
    """Right by itself; those below are wrong around it."""

    def __init__(self) -> None:
        super().__init__()
        with tiny.seeded(0):
            self.inner = nn.Linear(8, 8)
            self.outer = nn.Linear(8, 8)

    def forward(self, sample, mask=None, ids=None, timestep=None):
        return self.after(self.outer(nn.functional.gelu(self.inner(sample))), mask, ids, timestep)

    def after(self, value, mask, ids, timestep):
        return value


class OfTheMean(Layer):
    def after(self, value, mask, ids, timestep):
        return value - 1e-3 * value.mean()


class OfTheSpread(Layer):
    def after(self, value, mask, ids, timestep):
        return value / value.std()


class OfTheLargest(Layer):
    """As a quantised layer with one scale for a whole tensor."""

    def after(self, value, mask, ids, timestep):
        scale = value.abs().max() / 127
        return (value / scale).round() * scale


class OfTheNumber(Layer):
    def after(self, value, mask, ids, timestep):
        return value / len(value)


class OfThePlace(Layer):
    def after(self, value, mask, ids, timestep):
        return torch.cat([value[: len(value) // 2], 1.1 * value[len(value) // 2 :]])


class OfTheFirstMask(Layer):
    def after(self, value, mask, ids, timestep):
        return value * mask[:1, :, None]


class OfTheFirstId(Layer):
    def after(self, value, mask, ids, timestep):
        return value + ids[:1].to(value.dtype).sum(-1, keepdim=True) / 50


class OfTheFirstTime(Layer):
    def after(self, value, mask, ids, timestep):
        return value * (1 + timestep[0] / 1000)


class OfTheType(Layer):
    def after(self, value, mask, ids, timestep):
        return value + (0.01 if timestep.dtype.is_floating_point else 0)


class Random(Layer):
    def after(self, value, mask, ids, timestep):
        return value + torch.randn_like(value)


def layered(kind: type[Layer], precision: torch.dtype, *, times: Sequence[torch.dtype] = (torch.int64,)) -> list[Call]:
    module = kind().to(precision).eval()
    return [
        describe(
            module, "__call__", (numbers(seed, 2, 6, 8).to(precision),),
            {
                "mask": torch.ones(2, 6, dtype=torch.bool),
                "ids": torch.arange(12).reshape(1, 6, 2).repeat(2, 1, 1),
                "timestep": torch.tensor(7, dtype=times[seed % len(times)]),
            },
            Fingerprints(),
        )
        for seed in range(3)
    ]  # fmt: skip


WRONG: dict[type[Layer], str] = {
    OfTheMean: "beside it",
    OfTheSpread: "beside it",
    OfTheLargest: "beside it",
    OfTheNumber: "call alone",
    OfThePlace: "place",
    OfTheFirstMask: "beside it",
    OfTheFirstId: "beside it",
    OfTheFirstTime: "beside it",
    Random: "place",
}


@each_precision
@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_every_way_in_which_rows_depend_on_one_another(kind: type[Layer], precision: torch.dtype) -> None:
    assert WRONG[kind] in shown(layered(kind, precision))


@each_precision
def test_independent_rows_and_times_of_two_types(precision: torch.dtype) -> None:
    assert not shown(layered(Layer, precision))
    assert not shown(layered(Layer, precision, times=(torch.int64, torch.float32)))


@each_precision
def test_a_time_that_means_another_thing_as_another_number(precision: torch.dtype) -> None:
    assert not shown(layered(OfTheType, precision))
    assert "32-bit" in shown(layered(OfTheType, precision, times=(torch.int64, torch.float32)))


@each_precision
def test_a_mask_without_a_hole_may_be_left_out(precision: torch.dtype) -> None:
    """As attention does: another kernel, other rounding, and the neighbours' masks decide."""

    class Choosing(Layer):
        def after(self, value, mask, ids, timestep):
            if mask.all():
                return value
            return (value.double() * mask[..., None] * (1 + torch.finfo(value.dtype).eps)).to(value.dtype)

    assert not shown(layered(Choosing, precision))


# The floor: what this device makes of the same numbers.


class ByPlace(Layer):
    """As a kernel whose order of adding depends on where a row stands: off by one unit in the last place."""

    def after(self, value, mask, ids, timestep):
        off = torch.arange(len(value)) % 3 == 0
        return torch.where(off[:, None, None], value * (1 + torch.finfo(value.dtype).eps), value)


class Unsteady(Layer):
    """As a kernel that adds in whatever order its threads come."""

    order = torch.Generator()

    def after(self, value, mask, ids, timestep):
        up = torch.rand(value.shape, generator=self.order) < 0.1
        return torch.where(up, value * (1 + torch.finfo(value.dtype).eps), value)


@each_precision
@pytest.mark.parametrize("kind", [ByPlace, Unsteady])
def test_the_devices_own_rounding_is_not_held_against_a_module(kind: type[Layer], precision: torch.dtype) -> None:
    assert not shown(layered(kind, precision))


@pytest.mark.parametrize("precision", HALVES)
def test_what_rounding_would_hide_is_found_where_the_device_is_exact(precision: torch.dtype) -> None:
    class Slightly(Layer):
        """One unit in the last place, and only beside certain rows."""

        def after(self, value, mask, ids, timestep):
            return value * (1 + torch.finfo(value.dtype).eps) if value[0, 0, 0] > 0 else value

    calls = layered(Slightly, precision)
    assert {bool(call.run()[0, 0, 0] > 0) for call in calls} == {True, False}
    assert shown(calls)


def test_a_proof_is_a_handful_of_forwards_and_leaves_no_trace() -> None:
    calls = layered(Layer, torch.bfloat16)
    module = calls[0].module
    with torch.no_grad():
        before = [call.run() for call in calls]
        evidence = examine(calls, joined)
    assert evidence.forwards <= 6
    assert not module.inner._forward_hooks
    assert all(torch.equal(call.run(), value) for call, value in zip(calls, before, strict=True))


def test_numbers_that_choose_from_a_table_stay_in_it() -> None:
    values = [
        torch.tensor([[3, 1, 2], [0, 5, 4]]), torch.zeros(2, 3, dtype=torch.long), torch.full((2,), 999),
        torch.tensor([[[0, 7], [1, 9]]]), torch.zeros(2, 3), torch.full((2, 3), 4.0),
    ]  # fmt: skip
    for value in values:
        other = proof._different_contents(value)
        assert other.shape == value.shape
        assert set(other.long().flatten().tolist()) <= {*value.long().flatten().tolist(), 0}
    ids = proof._different_contents(torch.tensor([[[0, 70], [1, 9]]]))
    assert ids[..., 0].max() <= 1  # each axis of a position has a table of its own
    assert proof._different_contents(torch.zeros(2, 3)).any()
    assert not proof._different_contents(torch.ones(2, 4, dtype=torch.bool)).all()
