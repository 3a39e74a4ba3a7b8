"""Clips: frames, sizes and rates as asked, the numbers of a plain call, and what is refused before any work."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sfumato.checkpoints import class_reading, clip_rules, diffusers_source
from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.config import ModelConfig, load
from sfumato.core import Generation, Limits
from sfumato.drawing import arguments, clips, outputs
from sfumato.drawing import draw as drawing
from sfumato.drawing.info import model_info
from sfumato.errors import InvalidRequest
from sfumato.models.load import Loaded
from sfumato.pictures.results import Clip
from sfumato.pipelines.inputs import FRAME_COUNTS, MOVING
from sfumato.sampling import Sampling
from sfumato.serving.planning import ImageRequest, plan
from sfumato.status import FrameRule
from support import clip_classes, families_newer, tiny
from support.drawing import loaded, quiet, source, wanted
from support.families_moving import FAMILIES

LIMITS = Limits(2048 * 2048, 4096, 8)
SLOW = pytest.mark.slow

TEXT = {"Wan": 9, "LTX": 9, "CogVideoX": 9, "Mochi": 7, "Latte": 2, "HunyuanVideo": 9, "AnimateDiff": 4}
"""Families that draw from a text, and frames that they draw."""

TEXTS = [name if name == "Wan" else pytest.param(name, marks=SLOW) for name in TEXT]


@functools.cache
def model(family: str) -> Loaded:
    return loaded(FAMILIES[family].build())


def asked(family: str, **fields: Any) -> Generation:
    side = FAMILIES[family].calls[0]["width"]
    made = {"prompt": "a cat", "width": side, "height": side, "num_frames": TEXT.get(family), "format": "webp"}
    return wanted(**made | fields)


def clip_of(made: Loaded, generation: Generation) -> tuple[Clip, drawing.Drawn]:
    with torch.no_grad():
        drawn = drawing.picture(made, generation, quiet)
    assert isinstance(drawn.result, Clip)
    return drawn.result, drawn


@pytest.mark.parametrize("family", TEXTS)
def test_a_clip_is_that_of_a_plain_call(family: str) -> None:
    made = model(family)
    generation = asked(family, fps=12)
    clip, drawn = clip_of(made, generation)
    side, frames = generation.sampling.width, TEXT[family]
    assert (len(clip), clip.size, clip.fps, drawn.warnings) == (frames, (side, side), 12, ())
    taken = class_reading.of_pipeline(made.pipeline).parameters
    count = "num_frames" if "num_frames" in taken else "video_length"
    rate = {"frame_rate": 12} if "frame_rate" in taken else {}
    plain = made.pipeline(
        prompt="a cat", width=side, height=side, num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(1), **{count: frames}, **rate,
    ).frames[0]  # fmt: skip
    plain = plain if isinstance(plain, np.ndarray) else plain.float().movedim(1, -1).numpy()
    assert np.abs(clip.frames - plain).max() < 1e-4
    recipe = drawn.recipe.sampling
    assert (recipe.num_frames, recipe.fps, recipe.seconds, recipe.size) == (frames, 12, None, (side, side))


PICTURE = source(32, 16)
SOURCE = Image.open(io.BytesIO(PICTURE))


def test_a_clip_from_a_picture_is_that_of_a_plain_call() -> None:
    made = loaded(clip_classes.wan_image())
    clip, drawn = clip_of(made, asked("Wan", images=(PICTURE,), width=None, height=None, num_frames=5))
    assert (len(clip), clip.size, drawn.warnings) == (5, (32, 16), ())  # the size of the picture
    plain = made.pipeline(
        image=SOURCE, prompt="a cat", width=32, height=16, num_frames=5, num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(1),
    ).frames[0]  # fmt: skip
    assert np.abs(clip.frames - plain).max() < 1e-4
    assert len(drawn.recipe.image_sha256) == 1
    with pytest.raises(InvalidRequest, match="m needs a source picture"):
        clip_of(made, asked("Wan"))


def test_a_clip_between_two_pictures_is_that_of_a_plain_call() -> None:
    made = loaded(families_newer.wan_between())
    end = source(20, 40)
    asked_for = asked("Wan", images=(PICTURE, end), width=32, height=16, num_frames=5)
    clip, drawn = clip_of(made, asked_for)
    fitted = ImageOps.fit(Image.open(io.BytesIO(end)), (32, 16), Image.Resampling.LANCZOS)
    plain = made.pipeline(
        image=SOURCE, last_image=fitted, prompt="a cat", width=32, height=16, num_frames=5, num_inference_steps=2,
        output_type="np", generator=torch.Generator().manual_seed(1),
    ).frames[0]  # fmt: skip
    assert np.abs(clip.frames - plain).max() < 1e-4
    assert len(drawn.recipe.image_sha256) == 2
    other, _ = clip_of(made, replace(asked_for, images=(PICTURE, PICTURE)))
    assert np.abs(clip.frames - other.frames).max() > 1e-3
    with pytest.raises(InvalidRequest, match="from a first to the last frame there are two or more"):
        clip_of(made, replace(asked_for, sampling=replace(asked_for.sampling, num_frames=1)))


def wan_2_2_image() -> Any:
    """Its denoiser looks at no embeddings of pictures."""
    parts = clip_classes.wan_image().components
    seen = {**parts["transformer"].config, "image_dim": None}
    denoiser = d.WanTransformer3DModel.from_config(seen).eval()
    return d.WanImageToVideoPipeline(
        **parts | {"transformer": denoiser, "image_encoder": None, "image_processor": None}
    )


def wan_2_2_small_image() -> Any:
    """A time step for every token."""
    parts = FAMILIES["Wan"].build().components
    return d.WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None, expand_timesteps=True)


WEIGHTS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "places for two pictures": (families_newer.wan_between, 2, 2),
    "places for one picture": (clip_classes.wan_image, 1, 1),
    "a time per token": (wan_2_2_small_image, 1, 1),
    "no embeddings of pictures": (wan_2_2_image, 1, 2),
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_how_many_pictures_are_taken_is_known_of_the_weights(weights: str, tmp_path: Path) -> None:
    build, least, most = WEIGHTS[weights]
    pipeline = build()
    tiny.save(pipeline, tmp_path / "weights")
    told = static_capabilities(ModelConfig(name="m", model=str(tmp_path / "weights"))).abilities
    known = model_info(loaded(pipeline)).abilities
    for abilities in (told, known):
        image = abilities and abilities.input("image")
        assert image and (image.roles, image.least, image.most) == (("picture", "last")[:most], least, most)
    for number in (1, 2):
        generation = asked("Wan", images=(PICTURE,) * number, width=32, height=16, num_frames=5)
        if least <= number <= most:
            assert len(clip_of(loaded(pipeline), generation)[0]) == 5
        else:
            with pytest.raises(InvalidRequest, match="picture"):
                clip_of(loaded(pipeline), generation)


@pytest.mark.parametrize(
    "name",
    [
        "WanImageToVideoPipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "HunyuanVideoFramepackPipeline",
    ],
)
def test_classes_with_a_last_frame(name: str) -> None:
    reading = class_reading.of_name(name)
    assert reading
    assert [each.role for each in reading.sources] == ["picture", "last"]


@SLOW
def test_a_clip_of_stable_video_diffusion_is_that_of_a_plain_call() -> None:
    made = model("StableVideoDiffusion")
    sizes: dict[str, Any] = {"width": 32, "height": 16}
    clip, drawn = clip_of(made, wanted(images=(PICTURE,), **sizes, num_frames=3, fps=9, format="webp"))
    assert (len(clip), clip.size, clip.fps, drawn.warnings) == (3, (32, 16), 9, ())
    plain = made.pipeline(
        SOURCE, **sizes, num_frames=3, fps=9, num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(1),
    ).frames[0]  # fmt: skip
    assert np.abs(clip.frames - plain).max() < 1e-4


def test_a_large_picture_becomes_a_clip_of_the_area_of_the_model() -> None:
    """By its signature Wan draws 832x480; a photograph would be as large times the frames."""
    made = loaded(clip_classes.wan_image())
    generation = asked("Wan", images=(source(2000, 1000),), width=None, height=None)
    width, height = arguments.canvas(made, made.pipeline, generation).sources[0].size
    assert (width % 16, height % 16) == (0, 0)
    assert 0.9 < width * height / (832 * 480) < 1.1
    assert width / height == pytest.approx(2, rel=0.05)


@pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, about toy sizes
def test_the_sound_of_a_clip_comes_with_it() -> None:
    made = loaded(clip_classes.ltx2())
    clip, drawn = clip_of(made, asked("LTX", num_frames=5, fps=25, max_sequence_length=16))
    plain = made.pipeline(
        prompt="a cat", width=32, height=32, num_frames=5, frame_rate=25.0, num_inference_steps=2, output_type="np",
        max_sequence_length=16, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert np.abs(clip.frames - plain.frames[0]).max() < 1e-4
    assert clip.sound and clip.sound.rate == clip_classes.RATE
    assert np.abs(clip.sound.samples - plain.audio[0].numpy()).max() < 1e-4
    assert clip.sound.seconds == pytest.approx(5 / 25, abs=0.05)
    assert (len(clip), drawn.warnings) == (5, ())


@pytest.mark.parametrize("family", [*TEXTS[:1], *(pytest.param(n, marks=SLOW) for n in ("CogVideoX", "AnimateDiff"))])
def test_a_preview_is_the_first_frame(family: str) -> None:
    made = model(family)
    shown: list[Any] = []
    generation = asked(family, steps=6, previews=1)
    with torch.no_grad():
        drawn = drawing.picture(made, generation, quiet, shown.append)
    assert isinstance(drawn.result, Clip)
    (preview,) = shown
    assert (preview.width, preview.height) == drawn.result.size
    image = Image.open(io.BytesIO(preview.png)).convert("RGB").resize(drawn.result.size)
    assert np.abs(np.asarray(image, float) - np.asarray(drawn.result.picture(0), float)).mean() < 64
    plain, _ = clip_of(made, replace(generation, previews=0))
    assert np.array_equal(plain.frames, drawn.result.frames)  # it changes nothing


def test_the_same_seed_is_the_same_clip() -> None:
    made = model("Wan")
    first, again, other = (clip_of(made, replace(asked("Wan"), seed=seed))[0].frames for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_seconds_are_rounded_up_to_frames_that_the_class_draws() -> None:
    clip, drawn = clip_of(model("Wan"), asked("Wan", num_frames=None, seconds=0.75, fps=8))
    assert len(clip) == 9  # of the form 4k+1, not below 6
    assert (drawn.recipe.sampling.num_frames, drawn.recipe.sampling.seconds) == (9, None)


def test_the_length_of_the_model_file_holds_where_a_request_says_none() -> None:
    made = loaded(FAMILIES["Wan"].build(), num_frames=5, fps=4)
    clip, _ = clip_of(made, asked("Wan", num_frames=None))
    assert (len(clip), clip.fps) == (5, 4)
    clip, _ = clip_of(made, asked("Wan", num_frames=None, seconds=2, fps=4))
    assert len(clip) == 9
    known = model_info(made)
    assert (known.sampling.num_frames, known.sampling.fps) == (5, 4)


def test_a_picture_of_a_model_with_a_length_is_told_of() -> None:
    made = loaded(tiny.stable_diffusion(), num_frames=5)
    done = drawing.draw(made, wanted(prompt="a cat", width=64, height=64), quiet)
    assert done.warnings == ("num_frames: 5 of the model file has no effect on pictures",)
    assert done.recipe.sampling.num_frames is None


@pytest.mark.parametrize(
    ("family", "fields", "param", "words"),
    [
        ("Wan", {"num_frames": 8}, "num_frames", "8; m does not draw that many: frames of the form 4k.1 .* 5 and 9"),
        ("Wan", {"width": 24, "height": 16}, "size", "multiples of 16"),
        ("Wan", {"format": "png", "num_frames": None}, "model", "m makes clips .text-to-video, .* for pictures"),
        ("Wan", {"images": (source(16, 16),)}, "image", "m takes no picture"),
        ("Wan", {"num_frames": 9, "limits": Limits(1 << 20, 64, 8, frames=5)}, "num_frames", "at most 5 .*max_frames"),
        ("Wan", {"num_frames": None, "limits": Limits(1 << 20, 64, 8, frames=80)}, "num_frames", "81 of 16x16"),
        ("Wan", {"num_frames": 81, "fps": 1, "limits": Limits(1 << 20, 64, 8)}, "num_frames", "81 seconds; at most 60"),
        ("Wan", {"num_frames": None, "fps": 1, "limits": Limits(1 << 20, 64, 8)}, "num_frames", "81 seconds"),
        ("Wan", {"fps": 60, "format": "gif"}, "fps", "at most 50 frames a second"),
        ("Wan", {"fps": 100, "format": "webp"}, "fps", "at most 90 frames a second"),
        ("Wan", {"limits": Limits(1 << 20, 64, 8, clip_pixels=2000)}, "num_frames", "at most 7 .*max_clip_mega"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(family: str, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        clip_of(model(family), asked(family, **fields))
    assert caught.value.param == param


def test_a_picture_model_makes_no_clip() -> None:
    with pytest.raises(InvalidRequest, match=r"m makes pictures .*, and the request is for clips"):
        clip_of(loaded(tiny.stable_diffusion()), wanted(prompt="a cat", format="webp"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"sampling": Sampling(num_frames=300)}, "num_frames"),
        ({"sampling": Sampling(seconds=90)}, "seconds"),
        ({"sampling": Sampling(seconds=2, num_frames=9)}, "seconds"),
        ({"sampling": Sampling(num_frames=257, width=2048, height=2048)}, "num_frames"),
        ({"sampling": Sampling(num_frames=81, fps=1)}, "num_frames"),
        ({"sampling": Sampling(num_frames=9, fps=60)}, "fps"),  # a GIF
        ({"sampling": Sampling(num_frames=9), "format": "png"}, "num_frames"),
        ({"sampling": Sampling(num_frames=9), "format": "wav"}, "num_frames"),
        ({"images": [b""], "mask": b""}, "mask"),
    ],
)
def test_what_is_refused_before_any_model_is_looked_at(fields: dict[str, Any], param: str) -> None:
    request = ImageRequest(**{"prompts": ["a cat"], "format": "gif", **fields})
    with pytest.raises(InvalidRequest) as caught:
        plan(request, ModelConfig(name="m", model="m"), LIMITS, 1)
    assert caught.value.param == param


@pytest.mark.parametrize(("enabled", "fits"), [(None, True), ({"num_inference_steps"}, True), (set(), False)])
def test_a_picture_to_start_from_is_only_kept_out_by_none(enabled: set[str] | None, fits: bool) -> None:
    more = {} if enabled is None else {"enable_parameters": frozenset(enabled)}
    config, request = ModelConfig(name="m", model="m", **more), ImageRequest(prompts=["x"], images=[b""], format="gif")
    if fits:
        assert plan(request, config, LIMITS, 1)
        return
    with pytest.raises(InvalidRequest, match="m does not allow requests to set it") as caught:
        plan(request, config, LIMITS, 1)
    assert caught.value.param == "image"


def test_a_format_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    request = ImageRequest(prompts=["a cat"], format="mp4")
    with pytest.raises(InvalidRequest, match=re.escape("pip install 'sfumato[video]'); webp and gif work")) as caught:
        plan(request, ModelConfig(name="m", model="m"), LIMITS, 1)
    assert caught.value.param == "output_format"


# What files say, before a model is loaded


@pytest.mark.parametrize("family", TEXTS)
def test_the_files_say_what_the_loaded_model_says(family: str, tmp_path: Path) -> None:
    pipeline: Any = FAMILIES[family].build()
    tiny.save(pipeline, tmp_path / "weights")
    told = static_capabilities(ModelConfig(name="m", model=str(tmp_path / "weights")))
    known = model_info(loaded(pipeline))
    assert told.abilities and told.tasks == known.tasks
    assert known.tasks[0] == "text-to-video"
    assert (told.abilities.kind, told.abilities.frames) == ("video", known.abilities.frames)
    assert (told.size_multiple, told.fps) == (known.size_multiple, known.sampling.fps)


def test_localais_words_for_clips(tmp_path: Path) -> None:
    """The class is the repository's; requests may send a picture."""
    FAMILIES["Wan"].build().save_pretrained(tmp_path / "weights")
    (tmp_path / "m.yaml").write_text(
        "name: m\nparameters: {model: weights}\n"
        "diffusers: {pipeline_type: VideoDiffusionPipeline, img2vid: true, enable_parameters: num_inference_steps}\n"
    )
    (config,) = load(tmp_path / "m.yaml")
    assert config.enables("image")
    told = static_capabilities(config)
    assert (told.pipeline, told.tasks) == ("WanPipeline", ("text-to-video", "video-to-video"))


RULES = {
    "WanPipeline": 16.0, "CogVideoXPipeline": 8.0, "HunyuanVideoPipeline": 15.0, "LTXPipeline": 24.0,
    "StableVideoDiffusionPipeline": 7.0, "AnimateDiffPipeline": 10.0, "Nobody": 10.0,
}  # fmt: skip


@pytest.mark.parametrize(("name", "rate"), RULES.items())
def test_the_rate_is_that_of_the_example_of_the_class(name: str, rate: float) -> None:
    assert clip_rules.rate(name) == rate


def test_frames_of_a_rule() -> None:
    rule = FrameRule(4, 81)
    assert [rule.at_least(frames) for frames in (0, 1, 1.2, 5, 5.5, 80)] == [1, 1, 5, 5, 9, 81]
    assert [bool(rule.violation(frames)) for frames in (1, 2, 5, 81, 85)] == [False, True, False, False, True]
    assert FrameRule().violation(7) == ""
    pieces = FrameRule(16, first=24)
    assert [pieces.at_least(frames) for frames in (1, 24, 25, 88)] == [24, 24, 40, 88]
    assert pieces.violation(88) == ""
    assert pieces.violation(9) == "frames of the form 16k+24 are valid; the fewest are 24"
    assert pieces.violation(30) == "frames of the form 16k+24 are valid; the nearest are 24 and 40"


_STEP = re.compile(rf"(?:{'|'.join(clip_rules.STEPS)})\b[^=]*=[^=]*?(?:else )?(\d+)\s*\)?\n")


def frames_by_itself(name: str) -> int | None:
    """By the signature of a class; None if that does not say."""
    taken = class_reading.parameters(name) or {}
    count = next((taken[each].default for each in FRAME_COUNTS if each in taken), None)
    return count if isinstance(count, int) else None


MOVING_CLASSES = [
    name
    for name in sorted(diffusers_source.files())
    if name.endswith("Pipeline") and (found := class_reading.of_name(name)) and found.output == MOVING
    and "VideoToVideo" not in name
]  # fmt: skip
"""Without those that no request can ask for."""


def test_every_class_draws_the_frames_that_it_draws_by_itself() -> None:
    checked = {"AllegroPipeline": 88}  # its signature leaves it to the denoiser, and that has 22 frames of latents
    for name in MOVING_CLASSES:
        step = _STEP.search(diffusers_source.files()[name].read_text(encoding="utf-8"))
        frames = checked.setdefault(name, frames_by_itself(name) or 1)
        rule = clip_rules.OWN.get(name) or clip_rules.frame_rule(int(step[1]) if step else None, None, "")
        if frames > 1:
            assert rule.violation(frames) == "", name
    assert checked["HeliosPipeline"] == 132
    assert sum(frames > 1 for frames in checked.values()) > 30


def test_allegros_frames_of_latents_are_no_frames() -> None:
    made = loaded(families_newer.allegro())  # its denoiser has 8
    assert clips.default_frames(made) == 32
    assert clip_rules.of_pipeline(made.pipeline) == FrameRule(16, first=24)


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("WanImageToVideoPipeline", ("image-to-video",)),
        ("StableVideoDiffusionPipeline", ("image-to-video",)),
        ("LTXConditionPipeline", ("text-to-video", "image-to-video")),
        ("WanVideoToVideoPipeline", ("video-to-video",)),
        ("AnimateDiffControlNetPipeline", ("video-to-video",)),
        ("AnimateDiffVideoToVideoControlNetPipeline", ()),
    ],
)
def test_the_tasks_of_a_class(name: str, tasks: tuple[str, ...]) -> None:
    reading = class_reading.of_name(name)
    assert reading
    can = class_reading.abilities_of(ModelConfig(name="m", model="m"), class_reading.kin_of(reading))
    assert can.tasks == tasks, can.problem
    assert bool(can.problem) == (not tasks)


@pytest.mark.parametrize(("rate", "warned"), [(16_000, False), (None, True)])
def test_the_rate_of_a_clips_sound_may_be_the_pipelines(rate: int | None, warned: bool) -> None:
    """Kandinsky 6 has it there. Sound whose rate nobody says is left out, and not in silence."""
    pipeline = SimpleNamespace(**({"audio_sample_rate": rate} if rate else {}))
    output = SimpleNamespace(frames=np.zeros((1, 5, 16, 16, 3)), audio=torch.zeros(1, 800))
    generation = Generation("a", "a cat", seed=1, format="webp")
    clip, warnings = outputs.result_of(pipeline, output, generation)
    assert isinstance(clip, Clip) and len(clip) == 5
    assert (clip.sound and (clip.sound.rate, clip.sound.samples.shape)) == (None if warned else (16_000, (1, 800)))
    assert warnings == (["audio: SimpleNamespace does not say its rate; it is not returned"] if warned else [])
