"""The rule on small real modules: what is joined, how it is cut again, and what runs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from transformers import DynamicCache, T5Config, T5EncoderModel

from sfumato.batching import outputs
from sfumato.batching.batcher import Batcher
from sfumato.batching.calls import Fingerprints, describe
from sfumato.batching.concatenation import ConcatenationCache, join
from sfumato.batching.prompt_cache import PromptCache
from sfumato.batching.verification import Verification
from sfumato.batching.views import View, exclusive, view
from support import tiny
from support.batches import NOTHING, PROOF, Coupled, called, noise, together


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return tiny.stable_diffusion().unet


class Any_(nn.Module):
    """Takes whatever it is given."""

    def forward(self, sample, timestep=None, ids=None, mask=None, generator=None, img_ids=None, **more):
        return sample


# What is alike.


def test_rows_may_differ_and_nothing_else() -> None:
    module = Any_()
    one = called(module, noise(2, 4, 8, 8), 5)
    assert one.rows == 2
    assert one.key == called(module, noise(1, 4, 8, 8), torch.tensor(9)).key
    assert one.key == called(module, sample=noise(3, 4, 8, 8), timestep=torch.arange(3)).key
    assert one.key != called(module, noise(2, 4, 8, 16), 5).key
    assert one.key != called(module, noise(2, 4, 8, 8).double(), 5).key
    assert one.key != called(Any_(), noise(2, 4, 8, 8), 5).key
    assert one.key != called(module, noise(2, 4, 8, 8), 5, extra=1.0).key
    assert called(module, noise(2, 4), extra=1.0).key != called(module, noise(2, 4), extra=2.0).key


def test_time_becomes_one_per_row_in_one_dtype() -> None:
    module = Any_()
    calls = [called(module, noise(2, 3), 7), called(module, noise(1, 3), torch.tensor([0.5]))]
    assert calls[0].exact != calls[1].exact
    joined = join(calls, ConcatenationCache())
    assert joined["timestep"].tolist() == [7.0, 7.0, 0.5]
    assert joined["sample"].shape == (3, 3)
    same = join(
        [called(module, noise(1, 3), torch.tensor(7)), called(module, noise(1, 3), torch.tensor([8]))],
        ConcatenationCache(),
    )
    assert same["timestep"].dtype == torch.int64


def test_small_tensors_for_all_rows_are_compared_by_content() -> None:
    module = Any_()
    table = noise(7, 3)
    assert called(module, noise(2, 4), ids=table).key == called(module, noise(3, 4), ids=table.clone()).key
    assert called(module, noise(2, 4), ids=table).key != called(module, noise(2, 4), ids=table + 1).key


def test_position_ids_of_images_belong_to_all_rows_even_with_a_row_each() -> None:
    module = Any_()
    wide, tall = torch.zeros(2, 9, 3), torch.ones(2, 9, 3)
    assert called(module, noise(2, 9, 4), img_ids=wide).key != called(module, noise(2, 9, 4), img_ids=tall).key


def test_what_cannot_be_joined_runs_alone_for_a_reason() -> None:
    module = Any_()
    assert "large tensor" in called(module, noise(2, 4), ids=torch.zeros(3, 1 << 21)).alone_because
    assert "function" in called(module, noise(2, 4), extra=lambda: 0).alone_because
    assert "DynamicCache" in called(module, noise(2, 4), extra=DynamicCache()).alone_because
    assert "no tensor" in called(module, None, 5).alone_because
    assert "gradients" in called(module, noise(2, 4), ids=noise(2, 4).requires_grad_()).alone_because
    assert called(module).alone_because


def test_a_generator_is_dropped_only_where_it_is_ignored() -> None:
    vae = tiny.stable_diffusion().vae
    generator = torch.Generator()
    ignored = called(vae, noise(1, 4, 8, 8), method="decode", generator=generator, return_dict=False)
    assert ignored.key is not None
    assert "generator" not in join([ignored], ConcatenationCache())

    class Drawing(nn.Module):
        def forward(self, sample, generator=None):
            return sample + torch.randn(sample.shape, generator=generator)

    assert "random" in called(Drawing(), noise(1, 4), generator=generator).alone_because


def test_ragged_text_is_padded_and_masked() -> None:
    QwenImageTransformer2DModel = type("QwenImageTransformer2DModel", (nn.Module,), {"forward": qwen_forward})
    module = QwenImageTransformer2DModel()
    shapes = [[(1, 4, 4)]]
    short = called(module, noise(1, 16, 8), noise(1, 3, 6), None, img_shapes=shapes)
    long = called(module, noise(1, 16, 8), noise(1, 5, 6), torch.ones(1, 5), img_shapes=shapes)
    assert short.key == long.key
    assert short.exact != long.exact
    joined = join([short, long], ConcatenationCache())
    assert joined["encoder_hidden_states"].shape == (2, 5, 6)
    assert joined["encoder_hidden_states_mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert joined["img_shapes"] == shapes * 2
    other = called(module, noise(1, 16, 8), noise(1, 3, 6), None, img_shapes=[[(1, 2, 8)]])
    assert other.key != short.key


def qwen_forward(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask=None, img_shapes=None):
    return hidden_states


def test_what_comes_again_is_joined_once() -> None:
    joins = ConcatenationCache()
    texts = [noise(1, 512, 256, seed=n) for n in range(2)]
    first, second, third = (joins.cat(texts) for _ in range(3))
    assert first is not second
    assert second is third
    texts[0].add_(1)
    assert torch.equal(joins.cat(texts), torch.cat(texts))
    joins.cat(texts).zero_()  # a module that writes to its input
    assert torch.equal(joins.cat(texts), torch.cat(texts))
    assert joins.cat(texts[::-1])[0, 0, 0] == texts[1][0, 0, 0]
    with torch.inference_mode():  # nothing would tell that they were written to
        unversioned = [noise(1, 512, 256), noise(1, 512, 256)]
        kept = [joins.cat(unversioned) for _ in range(3)]
    assert kept[1] is not kept[2]
    del texts
    assert not joins._entries


def test_lists_with_a_tensor_per_row_are_joined() -> None:
    class Listed(nn.Module):
        def forward(self, x, t, cap_feats):
            return [item * 2 for item in x]

    module = Listed()
    two = called(module, [noise(4, 1, 8, 8)] * 2, torch.tensor([0.1, 0.2]), [noise(5, 6), noise(7, 6)])
    one = called(module, [noise(4, 1, 8, 8)], torch.tensor([0.3]), [noise(9, 6)])
    assert two.key == one.key
    assert two.rows == 2
    joined = join([two, one], ConcatenationCache())
    assert len(joined["x"]) == len(joined["cap_feats"]) == len(joined["t"]) == 3
    parts = outputs.split((module(**joined),), [2, 1], listed=True)
    assert [len(part[0]) for part in parts] == [2, 1]


# What comes out.


def test_outputs_are_cut_by_rows_into_copies() -> None:
    whole = {"sample": noise(6, 4), "more": (noise(12, 2), None, 3)}
    parts = outputs.split(whole, [1, 2])
    assert torch.equal(parts[0]["sample"], whole["sample"][:2])
    assert torch.equal(parts[1]["more"][0], whole["more"][0][4:])
    assert parts[0]["sample"].untyped_storage().nbytes() == 2 * 4 * 4


def test_distributions_and_caches_are_cut_too() -> None:
    whole = DiagonalGaussianDistribution(noise(3, 8, 2, 2))
    parts = outputs.split((whole,), [1, 2])
    assert torch.equal(parts[1][0].mean, whole.mean[1:])
    cache = DynamicCache()
    cache.update(noise(3, 2, 5, 4), noise(3, 2, 5, 4), 0)
    first, _ = outputs.split({"past_key_values": cache}, [1, 2])
    assert torch.equal(first["past_key_values"].layers[0].keys, cache.layers[0].keys[:1])
    assert cache.layers[0].keys.shape[0] == 3


@pytest.mark.parametrize("whole", [torch.tensor(1.0), noise(5, 2), object(), (noise(2, 2), iter([]))])
def test_what_cannot_be_cut_is_never_dropped(whole: Any) -> None:
    with pytest.raises(outputs.Unsplittable):
        outputs.split(whole, [1, 1])


def test_a_difference_is_relative_and_infinite_across_shapes() -> None:
    assert outputs.difference((noise(2, 3),), (noise(2, 3),)) == 0.0
    assert outputs.difference(torch.tensor([1.0, 100.0]), torch.tensor([0.0, 100.0])) == pytest.approx(0.01)
    assert outputs.difference(noise(2, 3), noise(2, 4)) == float("inf")
    assert outputs.difference(torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0])) == 0.0
    assert outputs.difference(torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0])) == float("inf")


# One turn after another.


def denoise(seed: int, steps: int = 2, rows: int = 1) -> Callable[[Any], torch.Tensor]:
    def run(unet: Any) -> torch.Tensor:
        value, text = noise(rows, 4, 8, 8, seed=seed), noise(rows, 7, tiny.WIDTH, seed=seed)
        for step in range(steps):
            value = unet(value, 10 * step + seed, encoder_hidden_states=text, return_dict=False)[0]
        return value

    return run


def test_a_batch_gives_what_each_gets_alone(unet: UNet2DConditionModel) -> None:
    runs = [denoise(1, 2), denoise(2, 4), denoise(3, 3, rows=2)]
    results, batcher = together(unet, runs)
    for run, result in zip(runs, results, strict=True):
        torch.testing.assert_close(result, run(unet), rtol=1e-4, atol=1e-5)
    # The first of four forwards was proved: with other contents and places, and member by member.
    assert batcher.counts["module"].proving == PROOF
    assert batcher.counts["module"].calls == 9
    assert batcher.counts["module"].forwards == 4 + 3
    assert all(error < 1e-5 for error in batcher.verification.proved.values())


def test_a_listed_signature_needs_no_proof(unet: UNet2DConditionModel) -> None:
    _, batcher = together(unet, [denoise(1), denoise(2)])
    shipped = frozenset(batcher.verification.proved)
    _, batcher = together(unet.eval(), [denoise(1), denoise(2)], verification=Verification("unlisted", shipped))
    assert batcher.counts["module"].forwards == 2
    _, batcher = together(unet, [denoise(1), denoise(2)], verification=Verification("always", shipped))
    assert batcher.counts["module"].forwards == 2 + 2


def test_a_module_that_mixes_rows_is_found_out() -> None:
    runs = [lambda m, n=n: m(m(noise(1, 4, seed=n))) for n in range(3)]
    results, batcher = together(Coupled(), runs)
    for run, result in zip(runs, results, strict=True):
        assert torch.equal(result, run(Coupled()))
    assert batcher.counts["module"].forwards == 1 + 6
    (reason,) = batcher.verification.refused.values()
    assert "beside it" in reason


def test_half_precision_joins_what_is_listed_at_once_and_anything_else_after_a_proof() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(4, 4)

        def forward(self, sample):
            return self.scale(sample)

    module = Scaled().eval()
    runs = [lambda m, n=n: m(noise(1, 4, seed=n).to(m.scale.weight.dtype)) for n in range(3)]
    _, batcher = together(module, runs)
    shipped = frozenset(batcher.verification.proved)
    assert shipped
    half = module.to(torch.bfloat16)
    _, batcher = together(half, runs, verification=Verification("unlisted", shipped))
    assert batcher.counts["module"].forwards == 1
    _, batcher = together(half, runs)
    assert batcher.counts["module"].forwards == 1 + 3
    assert not batcher.verification.refused
    twice = [lambda m, run=run: m(run(m)) for run in runs]
    _, batcher = together(half, twice)
    assert batcher.counts["module"].forwards == 1 + 3 + 1
    # AnimateDiff's pipeline makes its denoiser anew, and leaves it in training mode.
    _, batcher = together(half.train(), runs, verification=Verification("unlisted", shipped))
    assert batcher.counts["module"].forwards == 1 + 3
    assert not batcher.verification.refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_active_dropout_is_refused_whatever_the_list_says(dtype: torch.dtype) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(64, 64)
            self.drop = nn.Dropout(0.5)

        def forward(self, sample):
            return self.drop(self.scale(sample))

    module = Dropping().eval().to(dtype)
    runs = [lambda m, n=n: m(noise(1, 64, seed=n).to(m.scale.weight.dtype)) for n in range(3)]
    _, batcher = together(module, runs)
    shipped = frozenset(batcher.verification.proved)
    assert shipped
    _, batcher = together(module.train(), runs, verification=Verification("unlisted", shipped))
    assert set(batcher.verification.refused) == shipped


def test_only_the_guilty_member_of_a_batch_fails() -> None:
    class Picky(nn.Module):
        def forward(self, sample):
            if (sample > 100).any():
                raise ValueError("too bright")
            return sample * 2

    runs = [lambda m, value=value: m(m(torch.full((1, 2), value))) for value in (1.0, 500.0, 2.0)]
    results, _ = together(Picky(), runs)
    assert torch.equal(results[0], torch.full((1, 2), 4.0))
    assert isinstance(results[1], ValueError)
    assert torch.equal(results[2], torch.full((1, 2), 8.0))


def test_out_of_memory_halves_what_is_remembered() -> None:
    class Small(nn.Module):
        rows: ClassVar[list[int]] = []

        def forward(self, sample):
            self.rows.append(len(sample))
            if len(sample) > 2:
                raise torch.OutOfMemoryError
            return sample * 2

    module = Small()
    results, batcher = together(
        module,
        [lambda m, n=n: m(m(noise(1, 4, seed=n))) for n in range(5)],
        verification=Verification("unlisted", NOTHING),
    )
    assert all(isinstance(result, torch.Tensor) for result in results)
    assert [rows for rows in module.rows if rows > 2] == [5]
    assert list(batcher.limits.lowered.values()) == [2]


def test_an_output_without_rows_makes_the_calls_run_alone() -> None:
    class Summed(nn.Module):
        def forward(self, sample):
            return sample.sum()

    results, batcher = together(Summed(), [lambda m, n=n: m(noise(1, 4, seed=n)) for n in range(2)])
    assert [float(result) for result in results] == [float(noise(1, 4, seed=n).sum()) for n in range(2)]
    assert "cannot be split" in next(iter(batcher.verification.refused.values()))


def test_a_request_in_another_state_of_torch_does_not_switch() -> None:
    module = nn.Linear(4, 4)

    def with_gradients(stand_in: Any) -> Any:
        with torch.enable_grad():
            return stand_in(noise(1, 4))

    def with_autocast(stand_in: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return stand_in(noise(1, 4))

    graded, cast, plain = together(module, [with_gradients, with_autocast, lambda m: m(noise(1, 4))])[0]
    assert graded.requires_grad
    assert cast.dtype == torch.bfloat16
    assert plain.dtype == torch.float32
    assert not plain.requires_grad


def test_random_numbers_belong_to_the_request() -> None:
    class Idle(nn.Module):
        def forward(self, sample):
            return sample

    def drawing(stand_in: Any) -> list[float]:
        torch.manual_seed(7)
        return [float(stand_in(torch.randn(1, 1))) for _ in range(3)]

    torch.manual_seed(7)
    expected = [float(torch.randn(1, 1)) for _ in range(3)]
    results, _ = together(Idle(), [drawing, drawing])
    assert results == [pytest.approx(expected)] * 2


def test_an_ended_request_keeps_no_random_state() -> None:
    batcher = Batcher()
    tasks = [batcher.submit(lambda: torch.randn(1)), batcher.submit(batcher.turn)]
    batcher.step()
    assert tasks[1]._random is not None
    batcher.cancel(tasks[1], RuntimeError("cancelled"))
    assert all(task.done and task._random is None for task in tasks)


def test_a_prompt_is_encoded_once() -> None:
    encoder = T5EncoderModel(
        T5Config(vocab_size=20, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1, dropout_rate=0.0)
    ).eval()
    same, other = torch.tensor([[3, 4, 1]]), torch.tensor([[5, 6, 1]])
    runs = [lambda m, t=tokens: m(t.clone())[0] for tokens in (same, other, same, same)]
    results, batcher = together(encoder, runs, prompt_cache=PromptCache())
    assert batcher.counts["module"].calls == 4
    assert batcher.counts["module"].forwards == 1 + 2  # one for both texts, and the proof
    for run, result in zip(runs, results, strict=True):
        torch.testing.assert_close(result, run(encoder))
    results[0].add_(1)
    torch.testing.assert_close(results[2], runs[2](encoder))


def test_a_full_memo_forgets_the_oldest() -> None:
    encoder = T5EncoderModel(T5Config(vocab_size=20, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)).eval()
    prints, memo = Fingerprints(), PromptCache(limit=4 * 8 * 4 * 4)
    keys = []
    for token in range(6):
        call = describe(encoder, "__call__", (torch.tensor([[token, 1, 1, 1]]),), {}, prints)
        keys.append(memo.key(call, prints))
        memo.put(keys[-1], encoder, {"last_hidden_state": noise(1, 4, 8)})
    assert [memo.get(key) is not None for key in keys] == [False, False, True, True, True, True]


# Stand-ins.


def test_a_stand_in_looks_like_its_module(unet: UNet2DConditionModel) -> None:
    stand_in = View("").stand_in(unet, "unet")
    assert isinstance(stand_in, UNet2DConditionModel)
    assert isinstance(stand_in, nn.Module)
    assert stand_in.config is unet.config
    assert stand_in.dtype == torch.float32
    assert hasattr(stand_in, "add_embedding") == hasattr(unet, "add_embedding")
    assert torch.equal(denoise(1)(stand_in), denoise(1)(unet))


def test_a_view_shares_weights_and_copies_schedulers() -> None:
    pipe = tiny.stable_diffusion()
    one = view(pipe)
    assert type(one) is type(pipe)
    assert one.scheduler is not pipe.scheduler
    assert one.unet.conv_in is pipe.unet.conv_in
    assert one.components.keys() == pipe.components.keys()
    one.scheduler.set_timesteps(3)
    assert pipe.scheduler.num_inference_steps is None
    again = view(one)
    assert isinstance(again.vae, AutoencoderKL)
    assert again.unet.conv_in is pipe.unet.conv_in


def test_changing_a_module_ends_switching_until_it_is_changed_back() -> None:
    vae = tiny.stable_diffusion().vae
    shared = View("")
    stand_in = shared.stand_in(vae, "vae")
    assert shared.why_no_switch() == ""
    stand_in.to(torch.float32)
    assert shared.why_no_switch() == ""
    stand_in.to(dtype=torch.float64)
    assert "vae" in shared.why_no_switch()
    stand_in.to(dtype=torch.float32)
    assert shared.why_no_switch() == ""
    stand_in.to(dtype=torch.float64)
    shared.close()
    assert vae.dtype == torch.float32
    assert shared.why_no_switch() == ""
    stand_in.enable_slicing()
    assert "slicing" in shared.why_no_switch()
    vae.disable_slicing()


def test_pipelines_that_rewire_modules_are_exclusive() -> None:
    from diffusers import StableDiffusionPAGPipeline

    pipe = tiny.stable_diffusion()
    assert exclusive(pipe) == ""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    assert "set_attn_processor" in exclusive(StableDiffusionPAGPipeline(**parts, requires_safety_checker=False))
