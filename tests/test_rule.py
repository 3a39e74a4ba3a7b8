"""What a signature says of a call, and which calls of real pipelines share a forward by it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils.peft_utils import apply_lora_scale
from torch import nn

from support.batches import called, noise, together

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import parity
from sfumato.batching import shipped_list, text_masks
from sfumato.batching.batcher import Batcher
from sfumato.batching.calls import differences_between
from sfumato.batching.concatenation import ConcatenationCache, join
from sfumato.batching.verification import Verification


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Unet(nn.Module):
    """The parameters of a UNet that pipelines leave out, pass as None, or pass."""

    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states=None,
        timestep_cond=None,
        added_cond_kwargs=None,
        down_block_additional_residuals=None,
        scale: float = 1.0,
        frames=None,
        guess_mode: bool = False,
        mode: str = "plain",
        return_dict: bool = True,
    ):
        return sample


def signature(**more: Any) -> str:
    return called(Unet(), noise(2, 4, 8, 8), 5, **more).signature()


# A signature speaks of structure.


@pytest.mark.parametrize("collection", [list, tuple, lambda items: dict(enumerate(items))])
def test_any_number_of_like_tensors_is_one_word(collection: Any) -> None:
    few = signature(down_block_additional_residuals=collection([noise(2, 4, 8, 8)] * 4))
    many = signature(down_block_additional_residuals=collection([noise(2, 4, 8 >> n, 8 >> n) for n in range(3)] * 4))
    assert few == many
    assert "down_block_additional_residuals.*=rows4" in few
    # What differs in kind still shows, and so does what a name says.
    mixed = signature(down_block_additional_residuals=collection([noise(2, 4, 8, 8), noise(2, 4)]))
    assert mixed not in (few, signature())
    assert signature(added_cond_kwargs={"text_embeds": noise(2, 4)}) != signature(
        added_cond_kwargs={"time_ids": noise(2, 4)}
    )


def test_one_word_is_not_one_key() -> None:
    module = Unet()
    keys = [
        called(module, noise(2, 4), 5, down_block_additional_residuals=[noise(2, 4)] * count).key for count in (4, 12)
    ]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    "same",
    [
        {"timestep_cond": None, "added_cond_kwargs": None},
        {"return_dict": False},
        {"return_dict": True},
        {"guess_mode": False},
        {"scale": 1.0},
        {"scale": 0.5},
        {"scale": 2},
        {"mode": "plain"},
        {"added_cond_kwargs": {"resolution": None}},
    ],
)
def test_left_out_none_and_default_are_one_signature(same: dict[str, Any]) -> None:
    assert signature(**same) == signature()


@pytest.mark.parametrize(
    "other",
    [
        {"guess_mode": True},
        {"mode": "other"},
        {"frames": 3},
        {"scale": None},
        {"timestep_cond": noise(2, 3)},
        {"encoder_hidden_states": noise(2, 7, 3)},
        {"added_cond_kwargs": {"switch": False}},
    ],
)
def test_what_may_switch_code_paths_stays(other: dict[str, Any]) -> None:
    assert signature(**other) != signature()


def test_an_argument_passed_as_its_default_is_one_left_out() -> None:
    module = Unet()
    plain = called(module, noise(2, 4), 5)
    for same in ({"scale": 1.0}, {"timestep_cond": None}, {"guess_mode": False, "mode": "plain"}):
        assert called(module, noise(2, 4), 5, **same).key == plain.key, same
    # Equal is not the same: True is no 1, and 1 no 1.0.
    for other in ({"scale": 2.0}, {"scale": 1}, {"scale": True}, {"guess_mode": 0}, {"mode": "other"}):
        assert called(module, noise(2, 4), 5, **other).key != plain.key, other
    joined = join([plain, called(module, noise(1, 4), 6, scale=1.0)], ConcatenationCache())
    assert joined.keys() == {"sample", "timestep"}


def test_a_foreign_decorator_may_tell_a_default_from_nothing() -> None:
    def noting(function: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return function(self, *args, **kwargs) * (2 if "scale" in kwargs else 1)

        forward.__wrapped__ = function  # type: ignore[attr-defined]
        return forward

    class Foreign(Unet):
        forward = noting(Unet.forward)

    class Own(Unet):
        forward = apply_lora_scale("added_cond_kwargs")(Unet.forward)

    foreign, own = Foreign(), Own()
    assert called(foreign, noise(2, 4), 5).key != called(foreign, noise(2, 4), 5, scale=1.0).key
    assert called(own, noise(2, 4), 5).key == called(own, noise(2, 4), 5, scale=1.0).key


@pytest.mark.parametrize(
    ("family", "signature"),
    [
        (
            "FluxTransformer2DModel+FluxAttnProcessor",
            "__call__(encoder_hidden_states=rows3 hidden_states=rows3 img_ids=equal2 pooled_projections=rows2 "
            "timestep=time txt_ids=equal2)",
        ),
        (
            "UNet2DConditionModel+AttnProcessor2_0",
            "__call__(down_block_additional_residuals.*=rows4 encoder_hidden_states=rows3 "
            "mid_block_additional_residual=rows4 sample=rows4 timestep=time)",
        ),
        (
            "UNet2DConditionModel+AttnProcessor2_0",
            "__call__(added_cond_kwargs.text_embeds=rows2 added_cond_kwargs.time_ids=rows2 "
            "down_block_additional_residuals.*=rows4 encoder_hidden_states=rows3 mid_block_additional_residual=rows4 "
            "sample=rows4 timestep=time)",
        ),
    ],
)
def test_the_list_has_what_published_models_pass(family: str, signature: str) -> None:

    assert f"{family}.{signature}" in shipped_list.shipped().signatures


# Text with a mask.


@pytest.mark.parametrize(
    ("kind", "pairs"),
    [
        ("QwenImageTransformer2DModel", {"encoder_hidden_states": "encoder_hidden_states_mask"}),
        ("QwenImageControlNetModel", {"encoder_hidden_states": "encoder_hidden_states_mask"}),
        ("LongCatAudioDiTTransformer", {"encoder_hidden_states": "encoder_attention_mask"}),
        ("PixArtTransformer2DModel", {"encoder_hidden_states": "encoder_attention_mask"}),
        ("CogView4Transformer2DModel", {"encoder_hidden_states": "attention_mask"}),
        ("LuminaNextDiT2DModel", {"encoder_hidden_states": "encoder_mask"}),
        (
            "HunyuanImageTransformer2DModel",
            {
                "encoder_hidden_states": "encoder_attention_mask",
                "encoder_hidden_states_2": "encoder_attention_mask_2",
            },
        ),
        (
            "HunyuanDiT2DModel",
            {
                "encoder_hidden_states": "text_embedding_mask",
                "encoder_hidden_states_t5": "text_embedding_mask_t5",
            },
        ),
        (
            "LTX2VideoTransformer3DModel",
            {
                "encoder_hidden_states": "encoder_attention_mask",
                "audio_encoder_hidden_states": "audio_encoder_attention_mask",
            },
        ),
        ("FluxTransformer2DModel", {}),
        ("WanTransformer3DModel", {}),
    ],
)
def test_text_and_mask_are_read_from_the_signature(kind: str, pairs: dict[str, str]) -> None:
    import inspect

    assert text_masks.pairs(inspect.signature(getattr(diffusers, kind).forward).parameters) == pairs


class Mean(nn.Module):
    """Adds the mean of its text to each row; whether padding counts is for `counts` to say."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts = counts
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, hidden_states, encoder_hidden_states, encoder_attention_mask=None):
        mask = encoder_attention_mask
        if mask is None or self.counts:
            return hidden_states + encoder_hidden_states.mean(1)
        mask = mask.to(hidden_states.dtype)[:, :, None]
        return hidden_states + (encoder_hidden_states * mask).sum(1) / mask.sum(1)


def talking(at: int, masked: bool) -> Any:
    text = noise(1, 3 + at, 4, seed=at)
    mask = {"encoder_attention_mask": torch.ones(1, 3 + at, dtype=torch.int64)} if masked else {}

    def run(module: Any) -> Any:
        value = noise(1, 4, seed=at + 10)
        for _ in range(3):
            value = module(value, text, **mask)
        return value

    return run


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("counts", [True, False])
def test_padded_text_is_joined_where_it_is_right(masked: bool, counts: bool) -> None:
    module = Mean(counts)
    runs = [talking(at, masked) for at in range(3)]
    results, batcher = together(module, runs)
    for run, result in zip(runs, results, strict=True):
        torch.testing.assert_close(result, run(module))
    refused = [signature for signature in batcher.verification.refused if signature.endswith("~text")]
    assert bool(refused) is counts
    # One batch to try, its three members alone; then two batches, or all alone.
    assert batcher.counts["module"].forwards == (1 + 9 if counts else 1 + 3 + 2)


def test_padding_that_is_right_for_zeros_alone_is_found_out() -> None:
    class Average(Mean):
        """As Kandinsky 3: the direction of a mean over all tokens, which zeros don't turn."""

        def forward(self, hidden_states, encoder_hidden_states, encoder_attention_mask=None):
            return hidden_states + torch.nn.functional.normalize(encoder_hidden_states.mean(1), dim=-1)

    module = Average(counts=True)
    runs = [talking(3 * at, masked=True) for at in range(3)]
    results, batcher = together(module, runs)
    for run, result in zip(runs, results, strict=True):
        torch.testing.assert_close(result, run(module))
    assert [signature for signature in batcher.verification.refused if signature.endswith("~text")]


def test_padding_is_a_looseness_of_its_own() -> None:
    class Timed(Mean):
        def forward(self, hidden_states, encoder_hidden_states, timestep, encoder_attention_mask=None):
            return super().forward(hidden_states, encoder_hidden_states, encoder_attention_mask)

    module = Timed(counts=True)
    first = called(module, noise(1, 4), noise(1, 3, 4), torch.tensor([1]))
    timed = called(module, noise(1, 4), noise(1, 3, 4), torch.tensor([1.0]))
    longer = called(module, noise(1, 4), noise(1, 5, 4), torch.tensor([1]))
    both = called(module, noise(1, 4), noise(1, 5, 4), torch.tensor([1.0]))
    assert first.key == timed.key == longer.key == both.key
    assert differences_between([first, timed]) == {"time"}
    assert differences_between([first, longer]) == {"text"}
    assert differences_between([first, both]) == {"text", "time"}
    tight, loose = (Verification("unlisted", frozenset()).signature(first, frozenset(some)) for some in ((), ("time",)))
    trust = Verification("unlisted", frozenset({tight, loose}))
    trust.refuse(first, trust.signature(first, frozenset({"text"})), "differs")
    # Refused when padded, other time steps may still be joined.
    assert trust.permitted(first) == {"time"}
    assert first.key_within({"time"}) == timed.key_within({"time"}) != longer.key_within({"time"})


def test_a_mask_of_another_shape_belongs_to_something_else() -> None:
    module = diffusers.ChromaTransformer2DModel
    made = type(module.__name__, (nn.Module,), {"forward": module.forward})()
    call = called(
        made, hidden_states=noise(1, 16, 4), encoder_hidden_states=noise(1, 5, 4), timestep=torch.tensor([1.0]),
        img_ids=noise(16, 3), txt_ids=noise(5, 3), attention_mask=torch.ones(1, 21),
    )  # fmt: skip
    assert not call.pairs
    assert call.differences == {"time"}


# Rows.


def test_a_padding_mask_of_one_row_belongs_to_all() -> None:
    class Padded(nn.Module):
        def forward(self, hidden_states, padding_mask):
            return hidden_states + padding_mask.repeat(len(hidden_states), 1)

    module = Padded()
    runs = [lambda m, n=n: m(m(noise(1, 4, seed=n), torch.ones(1, 4)), torch.ones(1, 4)) for n in range(3)]
    results, batcher = together(module, runs)
    assert all(torch.equal(result, noise(1, 4, seed=n) + 2) for n, result in enumerate(results))
    assert batcher.counts["module"].forwards == 1 + 3 + 1
    assert called(module, noise(1, 4), torch.ones(1, 4)).key != called(module, noise(1, 4), torch.zeros(1, 4)).key


def test_several_entries_of_a_row_stay_together() -> None:
    class Between(nn.Module):
        def forward(self, hidden_states, encoder_hidden_states_image):
            pairs = encoder_hidden_states_image.view(len(hidden_states), 2, -1)
            return hidden_states + pairs[:, 0] - pairs[:, 1]

    module = Between()
    runs = [
        lambda m, n=n: m(m(noise(n, 4, seed=n), noise(2 * n, 4, seed=n + 5)), noise(2 * n, 4, seed=n)) for n in (1, 2)
    ]
    results, batcher = together(module, runs)
    for run, result in zip(runs, results, strict=True):
        assert torch.equal(result, run(module))
    assert batcher.counts["module"].forwards == 1 + 2 + 1
    assert not batcher.verification.refused


def test_entries_that_go_by_their_place_in_all_rows_are_found_out() -> None:
    class Interleaved(nn.Module):
        def forward(self, hidden_states, image_embeds):
            first, last = image_embeds.chunk(2)
            return hidden_states + first - 2 * last

    module = Interleaved()
    runs = [lambda m, n=n: m(m(noise(1, 4, seed=n), noise(2, 4, seed=n + 5)), noise(2, 4, seed=n)) for n in (1, 2, 3)]
    results, batcher = together(module, runs)
    for run, result in zip(runs, results, strict=True):
        assert torch.equal(result, run(module))
    assert batcher.verification.refused


def test_a_list_of_pictures_is_no_list_of_rows() -> None:
    adapters = [diffusers.T2IAdapter(channels=[4, 8], num_res_blocks=1, downscale_factor=2).eval() for _ in range(2)]
    module = diffusers.MultiAdapter(adapters).eval()
    one = called(module, [noise(1, 3, 8, 8), noise(1, 3, 8, 8)], [1.0, 0.5])
    two = called(module, [noise(2, 3, 8, 8), noise(2, 3, 8, 8)], [1.0, 0.5])
    assert (one.rows, two.rows, one.listed) == (1, 2, False)
    assert one.key == two.key
    other = called(module, [noise(1, 3, 8, 8), noise(1, 3, 8, 8)], [1.0, 0.25])
    assert one.key != other.key
    runs = [lambda m, n=n: m([noise(1, 3, 8, 8, seed=n), noise(1, 3, 8, 8, seed=n + 9)], [1.0, 0.5]) for n in range(3)]
    results, batcher = together(module, runs)
    for run, result in zip(runs, results, strict=True):
        for part, expected in zip(result, run(module), strict=True):
            torch.testing.assert_close(part, expected)
    assert not batcher.verification.refused


# The real ones, at once and by the shipped list.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family",
    [
        "Flux (schnell)", "StableDiffusionControlNet (12 residuals)", "StableDiffusionXLControlNet (9 residuals)",
        "StableDiffusionAdapter (two)", "Cosmos2TextToImage", "WanImageToVideo (first and last)",
        "QwenImageControlNet", "SanaSprint",
    ],
)  # fmt: skip
def test_what_was_refused_or_unlisted_batches_in_half_precision(family: str) -> None:
    one = parity.recorded()[family]
    parity.halve(one, shipped_list.shipped().signatures)
    assert one.half[0] / one.half[1] > 1.2, one.broken


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "precision",
    [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in (torch.bfloat16, torch.float16))],
)
@pytest.mark.parametrize("family", ["Kandinsky3", "CogView4", "LongCatAudioDiT"])
def test_text_that_must_not_be_padded_is_drawn_right(family: str, precision: torch.dtype) -> None:
    calls = parity.FAMILIES[family].calls
    pipe = parity.FAMILIES[family].build().to(precision)
    pipe.set_progress_bar_config(disable=True)
    alone = [parity.draw(pipe, call) for call in parity.seeded(calls)]
    batcher = Batcher(max_rows=16)
    together = parity.together(batcher, pipe, calls)
    assert [signature for signature in batcher.verification.refused if signature.endswith("~text")]
    if precision == torch.float32:
        assert parity.difference(alone, together) <= parity.PIXEL
