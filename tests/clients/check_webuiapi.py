"""webuiapi, a client of AUTOMATIC1111's API. Argument: the server's URL."""

from __future__ import annotations

import sys
import threading

import webuiapi
from PIL import Image

URL = sys.argv[1]
api = webuiapi.WebUIApi(baseurl=f"{URL}/sdapi/v1", sampler="Euler a", steps=4)
PHOTO = Image.radial_gradient("L").convert("RGB").resize((128, 128))


def txt2img() -> None:
    result = api.txt2img(prompt="a cat", negative_prompt="blue", seed=7, width=64, height=96, cfg_scale=4)
    assert result.image.size == (64, 96)
    assert (result.info["seed"], result.info["width"], result.info["height"]) == (7, 64, 96)
    assert "a cat" in result.info["infotexts"][0]
    again = api.txt2img(prompt="a cat", negative_prompt="blue", seed=7, width=64, height=96, cfg_scale=4)
    assert result.image.tobytes() == again.image.tobytes()


def several() -> None:
    result = api.txt2img(prompt="a cat", seed=3, width=64, height=64, batch_size=2, n_iter=2)
    assert [image.size for image in result.images] == [(64, 64)] * 4
    assert result.info["all_seeds"] == [3, 4, 5, 6]


def img2img() -> None:
    result = api.img2img(images=[PHOTO], prompt="a cat", denoising_strength=0.75, width=128, height=128, seed=1)
    assert result.image.size == (128, 128)
    assert result.image.tobytes() != PHOTO.tobytes()


def img2img_with_a_mask() -> None:
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (0, 0, 128, 40))
    options = {"prompt": "a cat", "width": 128, "height": 128, "seed": 1, "mask_blur": 0, "inpaint_full_res": False}
    result = api.img2img(images=[PHOTO], mask_image=mask, **options)
    kept = (0, 48, 128, 128)
    assert result.image.convert("RGB").crop(kept).tobytes() == PHOTO.crop(kept).tobytes()
    assert result.image.convert("RGB").tobytes() != PHOTO.tobytes()


def options() -> None:
    before = api.get_options()
    assert before["sd_model_checkpoint"] == api.util_get_current_model()
    api.set_options(before)
    api.util_set_model("sfumato-tiny")
    assert "sfumato-tiny" in api.get_options()["sd_model_checkpoint"]


def lists() -> None:
    assert "Euler a" in api.util_get_sampler_names()
    assert any("sfumato-tiny" in name for name in api.util_get_model_names())
    assert {"title", "model_name"} <= set(api.get_sd_models()[0])
    assert api.util_get_scheduler_names()
    for empty_or_not in (api.get_sd_vae, api.get_upscalers, api.get_latent_upscale_modes, api.get_prompt_styles):
        assert isinstance(empty_or_not(), list), empty_or_not
    assert isinstance(api.get_loras(), list)
    assert isinstance(api.get_embeddings(), dict)
    assert isinstance(api.get_scripts(), dict)


def an_unknown_sampler() -> None:
    result = api.txt2img(prompt="a cat", sampler_name="No such sampler", width=64, height=64)
    assert result.image.size == (64, 64)


def progress_and_interrupt() -> None:
    idle = api.get_progress()
    assert (idle["progress"], idle["state"]["job_count"]) == (0.0, 0)
    ended = []

    def draw() -> None:
        try:
            ended.append(api.txt2img(prompt="a cat", steps=900, width=128, height=128))
        except RuntimeError as error:
            ended.append(error)

    work = threading.Thread(target=draw)
    work.start()
    while True:  # until it draws: each turn is a request of its own
        seen = api.get_progress()
        if seen["state"]["job_count"] and seen["progress"] > 0:
            break
        assert work.is_alive(), ended
    assert seen["progress"] < 1
    assert seen["eta_relative"] >= 0
    api.interrupt()
    work.join(60)
    assert not work.is_alive()
    assert len(ended) == 1


for check in (
    txt2img,
    several,
    img2img,
    img2img_with_a_mask,
    options,
    lists,
    an_unknown_sampler,
    progress_and_interrupt,
):
    check()
    print(check.__name__, "ok")
