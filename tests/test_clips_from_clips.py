"""Clips from clips: the numbers of a plain call, the frames and the rate of the source, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sfumato.checkpoints import class_reading, clip_rules, diffusers_source
from sfumato.checkpoints.static_capabilities import default_size, static_capabilities
from sfumato.config import ModelConfig
from sfumato.core import Generation, Limits, SourceClip
from sfumato.drawing import draw as drawing
from sfumato.drawing.arguments import own_size
from sfumato.drawing.info import model_info
from sfumato.errors import InvalidRequest
from sfumato.models.load import Loaded
from sfumato.models.siblings import over
from sfumato.pictures.results import Clip
from support import tiny
from support.drawing import loaded, quiet, source, wanted
from support.families_moving import FAMILIES, animate_diff_controlled, cogvideox, wan
from support.moving import frames_of, source_clip
from support.tiny import WIDTH, seeded

SLOW = pytest.mark.slow


def shown(count: int, size: tuple[int, int] = (32, 32)) -> SourceClip:
    return source_clip(count, size=size)


def fun_control() -> Any:
    parts = cogvideox().components
    config = {**parts["transformer"].config, "in_channels": 8}
    with seeded(0):
        denoiser = d.CogVideoXTransformer3DModel.from_config(config).eval()
    return d.CogVideoXFunControlPipeline(**parts | {"transformer": denoiser})


def vace() -> Any:
    parts = wan().components
    with seeded(0):
        denoiser = d.WanVACETransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32, vace_layers=[0, 1],
            vace_in_channels=96,
        )  # fmt: skip
    return d.WanVACEPipeline(**parts | {"transformer": denoiser.eval()})


def of_clips(family: str) -> Callable[[], Any]:
    """The class that draws from a clip, over the parts of a family that draws from a text."""
    base = FAMILIES[family].build
    return lambda: (made := base()) and over(made, getattr(d, clip_rules.FROM_CLIPS[type(made).__name__]))


CLASSES: dict[str, tuple[Callable[[], Any], int]] = {
    "WanVideoToVideoPipeline": (of_clips("Wan"), 5),
    "CogVideoXVideoToVideoPipeline": (of_clips("CogVideoX"), 9),
    "AnimateDiffVideoToVideoPipeline": (of_clips("AnimateDiff"), 4),
    "CogVideoXFunControlPipeline": (fun_control, 9),
    "WanVACEPipeline": (vace, 5),
    "AnimateDiffControlNetPipeline": (animate_diff_controlled, 4),
}
"""Class -> a tiny one, and frames that it draws."""


@functools.cache
def model(name: str) -> Loaded:
    return loaded(CLASSES[name][0]())


def asked(source_clip: SourceClip | None, **fields: Any) -> Generation:
    return wanted(**{"prompt": "a cat", "format": "webp", "steps": 3, "clip": source_clip} | fields)


def drawn(made: Loaded, generation: Generation) -> tuple[Clip, drawing.Drawn]:
    with torch.no_grad():
        result = drawing.picture(made, generation, quiet)
    assert isinstance(result.result, Clip)
    return result.result, result


def plain(pipeline: Any, frames: list[Image.Image], **more: Any) -> Any:
    name = clip_rules.SOURCES[type(pipeline).__name__]
    made = pipeline(
        prompt="a cat", num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(1),
        **{name: frames, "width": 32, "height": 32} | more,
    ).frames[0]  # fmt: skip
    return made if isinstance(made, np.ndarray) else made.float().movedim(1, -1).numpy()


def test_every_class_that_takes_a_clip_is_compared() -> None:
    assert CLASSES.keys() == clip_rules.SOURCES.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_a_clip_from_a_clip_is_that_of_a_plain_call(name: str) -> None:
    made, frames = model(name), CLASSES[name][1]
    assert type(made.pipeline).__name__ == name
    strength = {"strength": 0.7} if "strength" in class_reading.of_pipeline(made.pipeline).parameters else {}
    count = {"num_frames": frames} if "num_frames" in class_reading.of_pipeline(made.pipeline).parameters else {}
    clip, result = drawn(made, asked(shown(frames), **strength))
    assert (len(clip), clip.size, clip.fps, result.warnings) == (frames, (32, 32), 12, ())
    expected = plain(made.pipeline, frames_of(frames), **strength, **count)
    assert (apart := np.abs(clip.frames - expected).max()) < 1e-4
    other = replace(shown(frames), frames=shown(frames).frames[::-1])
    assert np.abs(clip.frames - drawn(made, asked(other, **strength))[0].frames).max() > 10 * apart  # it is looked at
    recipe = result.recipe
    assert (recipe.pipeline, recipe.video_sha256, recipe.image_sha256) == (name, shown(frames).sha256, ())
    assert (recipe.sampling.num_frames, recipe.sampling.fps, recipe.size) == (frames, 12, (32, 32))


@pytest.mark.parametrize("family", ["Wan", *(pytest.param(name, marks=SLOW) for name in ("CogVideoX", "AnimateDiff"))])
def test_a_class_that_draws_from_a_text_draws_from_a_clip_with_its_sibling(family: str) -> None:
    made = loaded(FAMILIES[family].build())
    name = clip_rules.FROM_CLIPS[type(made.pipeline).__name__]
    frames = CLASSES[name][1]
    assert model_info(made).tasks == ("text-to-video", "video-to-video")
    clip, result = drawn(made, asked(shown(frames), strength=0.7))
    assert result.recipe.pipeline == name
    assert np.abs(clip.frames - plain(model(name).pipeline, frames_of(frames), strength=0.7)).max() < 1e-4
    _, result = drawn(made, asked(None, width=32, height=32, num_frames=frames))
    assert (result.recipe.pipeline, result.recipe.video_sha256) == (type(made.pipeline).__name__, None)


def test_wan_2_2_draws_from_no_clip() -> None:
    """The class for clips would leave out its second denoiser, or its times for each token."""
    parts = wan().components
    for more in ({"boundary_ratio": 0.9, "transformer_2": parts["transformer"]}, {"expand_timesteps": True}):
        made = loaded(d.WanPipeline(**parts | more))
        assert model_info(made).tasks == ("text-to-video",)
        with pytest.raises(InvalidRequest, match=r"video: m takes no clip .text-to-video."):
            drawn(made, asked(shown(5)))


WAN = "WanVideoToVideoPipeline"


@pytest.mark.parametrize(
    ("count", "fields", "frames", "fps", "warning"),
    [
        (11, {}, 9, 12, "num_frames: 9, and the source clip has 11: the class does not draw as many"),
        (11, {"num_frames": 5}, 5, 12, ""),
        (11, {"num_frames": 5, "fps": 30}, 5, 30, ""),
        (11, {"seconds": 0.5}, 5, 12, ""),
        (11, {"seconds": 0.5, "fps": 20}, 9, 20, ""),
        (50, {"seconds": 4.25}, 49, 12, ""),  # 51 frames by a rate that is no closer
    ],
)
def test_frames_and_rate_are_those_of_the_source(
    count: int, fields: dict[str, Any], frames: int, fps: float, warning: str
) -> None:
    made = loaded(model(WAN).pipeline, num_frames=81, fps=4)  # of texts
    clip, result = drawn(made, asked(shown(count), **fields))
    assert (len(clip), clip.fps, result.warnings) == (frames, fps, (warning,) if warning else ())
    assert (result.recipe.sampling.num_frames, result.recipe.sampling.fps) == (frames, fps)


def test_what_follows_from_the_source_is_no_fault_of_the_model_file() -> None:
    made = loaded(model(WAN).pipeline, num_frames=5, fps=4, width=32, height=32)
    with pytest.raises(InvalidRequest, match=r"num_frames: 9 at 12 frames a second are 0.75 seconds") as caught:
        drawn(made, asked(shown(9), limits=Limits(1 << 20, 64, 8, seconds=0.5)))
    assert caught.value.param == "num_frames"


def test_no_more_frames_than_the_motion_modules_know() -> None:
    clip, _ = drawn(model("AnimateDiffVideoToVideoPipeline"), asked(shown(11)))
    assert len(clip) == 8  # motion_max_seq_length


def test_the_size_is_that_of_the_source_at_most_of_the_area_of_the_model() -> None:
    made = model(WAN)
    clip, _ = drawn(made, asked(shown(5, (50, 34))))
    assert clip.size == (48, 32)  # multiples of 16
    fitted = [ImageOps.fit(frame, (48, 32), Image.Resampling.LANCZOS) for frame in frames_of(5, (50, 34))]
    assert np.abs(clip.frames - plain(made.pipeline, fitted, width=48)).max() < 1e-4
    small = loaded(made.pipeline, width=32, height=32)
    assert drawn(small, asked(shown(5, (128, 32))))[0].size == (64, 16)
    already = replace(shown(5), size=(1280, 1280))  # decoded at the size that is drawn
    assert drawn(small, asked(already))[0].size == (32, 32)


@pytest.mark.parametrize("name", ["CogVideoXVideoToVideoPipeline", "CogVideoXFunControlPipeline"])
def test_the_size_of_a_model_that_says_both_sides_in_latents(name: str, tmp_path: Path) -> None:
    """A phone's clip is not drawn at its full size."""
    made = model(name)
    tiny.save(made.pipeline, tmp_path)
    index = diffusers_source.json_of(tmp_path / "model_index.json")
    assert own_size(made) == default_size(name, tmp_path, index) == (32, 32)
    assert drawn(made, asked(shown(9, (128, 32))))[0].size == (64, 16)


@pytest.mark.parametrize(
    ("name", "fields", "param", "words"),
    [
        (WAN, {"clip": None, "width": 32, "height": 32}, "image", "m needs a source clip: MP4"),
        (WAN, {"clip": None, "images": (source(32, 32),)}, "image", "m needs a source clip: MP4"),
        (WAN, {"images": (source(32, 32),)}, "image", "m takes no picture; .* or send a clip"),
        (WAN, {"num_frames": 13}, "num_frames", "13; the source clip has 9"),
        (WAN, {"num_frames": 8}, "num_frames", "8; m does not draw that many: frames of the form 4k.1"),
        (WAN, {"seconds": 2}, "num_frames", "24; the source clip has 9"),
        (WAN, {"width": 24, "height": 32}, "size", "multiples of 16"),
        (WAN, {"limits": Limits(1 << 20, 64, 8, seconds=0.5)}, "num_frames", "0.75 seconds; at most 0.5"),
        (WAN, {"limits": Limits(1 << 20, 64, 8, clip_pixels=5000)}, "num_frames", "9 of 32x32; at most 4"),
        (WAN, {"limits": Limits(512, 64, 8)}, "image", "32x32 would become 32x32; a picture has at most 512 pixels"),
        (WAN, {"fps": 60, "format": "gif"}, "fps", "at most 50 frames a second"),
        ("CogVideoXFunControlPipeline", {"strength": 0.5}, "strength", "does not take it"),
        ("AnimateDiffVideoToVideoPipeline", {"num_frames": 9}, "num_frames", "at most 8 are drawn at a time"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(name: str, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        drawn(model(name), asked(shown(9), **fields))
    assert caught.value.param == param


@pytest.mark.parametrize("family", ["LTX", "HunyuanVideo"])
def test_a_class_without_a_sibling_takes_no_clip(family: str) -> None:
    made = loaded(FAMILIES[family].build())
    with pytest.raises(InvalidRequest, match=r"m takes no clip .text-to-video.; leave it out"):
        drawn(made, asked(shown(9)))


def test_a_picture_model_takes_no_clip() -> None:
    with pytest.raises(InvalidRequest, match="m takes no clip"):
        drawing.draw(loaded(tiny.stable_diffusion()), asked(shown(5), format="png"), quiet)


@pytest.mark.parametrize("name", CLASSES)
def test_the_model_list_says_it_before_and_after_loading(name: str, tmp_path: Path) -> None:
    made = model(name)
    tiny.save(made.pipeline, tmp_path / "weights")
    told = static_capabilities(ModelConfig(name="m", model=str(tmp_path / "weights"))).abilities
    known = model_info(made).abilities
    assert told == known
    video = known.input("video")
    assert known.tasks == ("video-to-video",)
    assert video and (video.least, video.most, video.roles) == (1, 1, ("clip",))


@pytest.mark.parametrize(
    "name", ["LTXConditionPipeline", "SkyReelsV2DiffusionForcingVideoToVideoPipeline", "Kandinsky6SRPipeline"]
)
def test_classes_that_continue_or_enlarge_a_clip_are_not_offered(name: str) -> None:
    reading = class_reading.of_name(name)
    assert reading
    assert reading.of("clip") is None
