"""What pipelines do to modules that they share with other requests, and does not hurt anybody."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline, PyramidAttentionBroadcastConfig
from peft import LoraConfig

import sfumato
from sfumato.batching import shipped_list
from sfumato.batching.batcher import Batcher
from sfumato.batching.views import view
from support import tiny
from support.families import guided_by_perturbation
from support.families_transformers import flux_with
from support.gathered import MIXED, SQUARE, alone, check, seeded

PLAIN = [{**call, **SQUARE, "num_inference_steps": steps} for call, steps in zip(MIXED[:3], (3, 6, 4), strict=True)]
FLOW = [{key: value for key, value in call.items() if key != "negative_prompt"} for call in PLAIN]


@pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning")
def test_an_autoencoder_that_is_cast_for_one_request_is_cast_for_that_one() -> None:
    pipe = tiny.stable_diffusion_xl().to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    expected = alone(pipe, PLAIN)
    dtypes: set[torch.dtype] = set()
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda module, args: dtypes.add(args[0].dtype))
    got = sfumato.gather(pipe, seeded(PLAIN))
    hook.remove()
    assert pipe.vae.dtype == torch.float16
    assert dtypes == {torch.float32}
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_allclose(other.images, one, atol=2e-2)


def test_half_precision_is_batched_where_it_was_shown() -> None:
    pipe = tiny.stable_diffusion().to(torch.bfloat16)
    expected = alone(pipe, PLAIN)
    stats: dict[str, dict[str, float]] = {}
    got = sfumato.gather(pipe, seeded(PLAIN), stats=stats)
    assert stats["unet"]["mean_batch"] > 1.5
    assert stats["text_encoder"]["mean_batch"] > 1.0
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_allclose(other.images, one, atol=5e-2)


@pytest.mark.filterwarnings("ignore:.*number of channels:UserWarning")
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_is_proved_where_it_was_not_shown(precision: torch.dtype) -> None:
    """FLUX.1-schnell: no guidance embedding, so a signature of its own."""
    pipe = flux_with(FluxPipeline, guidance_embeds=False)().to(precision)
    calls = [{**call, "num_inference_steps": 6} for call in FLOW]
    expected = alone(pipe, calls)
    before: dict[str, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patch:  # whatever the shipped list has
        patch.setattr(shipped_list, "shipped", lambda: shipped_list.ShippedList({}, frozenset()))
        sfumato.gather(pipe, seeded(calls), stats=before)
        after: dict[str, dict[str, Any]] = {}
        got = sfumato.gather(pipe, seeded(calls), stats=after)
    assert before["transformer"]["proving"] > 0
    assert after["transformer"]["proving"] == 0
    assert after["transformer"]["mean_batch"] == 3.0
    assert after["vae"]["mean_batch"] == 3.0
    assert not after["transformer"]["unbatched"]
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_allclose(other.images, one, atol=5e-2)


def test_why_calls_share_no_forward_is_in_the_stats() -> None:
    pipe = guided_by_perturbation()
    stats = check(pipe, PLAIN)
    assert stats["unet"]["unbatched"] == {"exclusive": stats["unet"]["calls"]}
    stats = check(tiny.stable_diffusion(), [{**PLAIN[0], "num_images_per_prompt": 3}] * 2)
    assert stats["unet"]["unbatched"] == {"max_batch": stats["unet"]["calls"]}
    # Texts that differ in length and have no mask are alone by chance.
    assert not check(tiny.flux(), FLOW)["transformer"]["unbatched"]


def test_a_cache_inside_the_denoiser_keeps_requests_apart() -> None:
    pipe = tiny.flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    stats = check(pipe, FLOW)
    assert stats["transformer"]["mean_batch"] == 1.0
    assert stats["transformer"]["unbatched"] == {"cache": stats["transformer"]["calls"]}
    assert stats["vae"]["mean_batch"] > 1.0 or stats["text_encoder"]["mean_batch"] > 1.0
    states = [
        manager._state_cache
        for part in pipe.transformer.modules()
        if hasattr(part, "_diffusers_hook")
        for hook in part._diffusers_hook.hooks.values()
        for manager in vars(hook).values()
        if type(manager).__name__ == "StateManager"
    ]
    assert states
    assert not any(states)  # nothing of an ended request is kept


def test_a_cache_with_one_state_for_all_runs_requests_one_by_one() -> None:
    pipe = tiny.flux()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500, spatial_attention_block_identifiers=["transformer_blocks"],
    )  # fmt: skip
    pipe.transformer.enable_cache(config)
    check(pipe, FLOW)


def test_adapters_scaled_by_one_request_are_not_scaled_for_others() -> None:
    pipe = tiny.stable_diffusion()
    for part, layers in ((pipe.unet, ["to_q", "to_v"]), (pipe.text_encoder, ["q_proj", "v_proj"])):
        with tiny.seeded(5):
            part.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=layers, init_lora_weights=False))
    calls: list[dict[str, Any]] = [
        {**call, "cross_attention_kwargs": {"scale": scale}} if scale is not None else call
        for call, scale in zip(PLAIN, (0.0, None, 2.0), strict=True)
    ]
    check(pipe, calls)
    same = [{**call, "cross_attention_kwargs": {"scale": 0.5}} for call in PLAIN]
    stats = check(pipe, same)
    assert stats["unet"]["mean_batch"] > 1.5


def test_a_view_that_is_used_plainly_leaves_caches_as_a_pipeline_does() -> None:
    pipe = tiny.flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    expected = alone(pipe, FLOW)
    for one, call in zip(expected, seeded(FLOW), strict=True):
        np.testing.assert_allclose(view(pipe)(**call).images, one, atol=1e-6)


def test_an_adapter_added_in_the_middle_pins_its_request() -> None:
    pipe = tiny.stable_diffusion()
    batcher = Batcher()

    def adding() -> None:
        made = view(pipe)
        made.unet.set_attn_processor(pipe.unet.attn_processors)
        made(**seeded(PLAIN)[0])

    batcher.submit(adding)
    batcher.submit(lambda: view(pipe)(**seeded(PLAIN)[1]))
    with torch.no_grad():
        while batcher.step():
            pass
    assert batcher.counts.alone_because["unet", "unet: set_attn_processor"] == 4  # PNDM does one step more
    assert batcher.counts.unbatched["unet", "changed_module"] == 4


def test_a_patch_that_keeps_a_state_in_a_module_sees_one_request_after_another() -> None:
    pipe = tiny.stable_diffusion()
    forward = pipe.unet.forward
    kept: list[Any] = []

    def every_other(*args: Any, **kwargs: Any) -> Any:
        """As feature caches do: the last answer once more."""
        return kept.pop() if kept else kept.append(forward(*args, **kwargs)) or kept[0]

    pipe.unet.forward = every_other
    calls = [{**call, "guidance_scale": 5.0} for call in PLAIN]
    expected = alone(pipe, calls)
    kept.clear()
    stats: dict[str, dict[str, float]] = {}
    for one, other in zip(expected, sfumato.gather(pipe, seeded(calls), stats=stats), strict=True):
        np.testing.assert_allclose(other.images, one, atol=1e-4)
    assert stats["unet"]["mean_batch"] == 1.0


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_both_ways_of_doing_without_gradients_batch(outer: Any) -> None:
    pipe = tiny.flux()
    expected = alone(pipe, FLOW)
    batcher = Batcher()

    def drawing(call: dict[str, Any]) -> Any:
        with outer():
            return view(pipe)(**call).images

    tasks = [batcher.submit(lambda call=call: drawing(call)) for call in seeded(FLOW)]
    with outer():
        while batcher.step():
            pass
    for one, task in zip(expected, tasks, strict=True):
        np.testing.assert_allclose(task.outcome.value, one, atol=1e-4)
    assert batcher.counts["transformer"].forwards < batcher.counts["transformer"].calls
