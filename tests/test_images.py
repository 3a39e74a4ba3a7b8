"""OpenAI's Images API as it stands on the wire, and what its pictures show; over the embedded model."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.pictures import recipe
from support.answers import error_of
from support.pictures import encoded
from support.serving import Server
from training.judge import Judge

TINY = Path(sfumato.__file__).parent / "models" / "sfumato-tiny"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("images")
    (folder / "models").mkdir()
    (folder / "models" / "org.yaml").write_text(
        f"name: org/tiny\nparameters:\n  model: {TINY}\nstep: 4\nsize: 64x64\nquality_steps: {{low: 2, high: 6}}\n"
    )
    flags = ("--max-n", "4", "--default-model", "sfumato-tiny")
    with Server(folder / "models", folder / "data", *flags) as server:
        yield server


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def items_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == {"created", "data", "background", "output_format", "quality", "size", "usage"}
    assert all(("url" in item) != ("b64_json" in item) for item in body["data"])
    return list(body["data"])


def images_of(answer: httpx.Response) -> list[Image.Image]:
    found = []
    for item in items_of(answer):
        data = base64.b64decode(item["b64_json"]) if "b64_json" in item else httpx.get(item["url"]).content
        found.append(Image.open(io.BytesIO(data)))
    return found


def draw(server: Server, prompt: str, **fields: Any) -> Image.Image:
    return images_of(server.draw(prompt=prompt, **{"seed": 1, "response_format": "b64_json"} | fields))[0]


def edit(
    server: Server, source: Image.Image, prompt: str, mask: Image.Image | None = None, **fields: str
) -> Image.Image:
    files = {"image": ("source.png", encoded(source))} | ({"mask": ("mask.png", encoded(mask))} if mask else {})
    form = {"prompt": prompt, "seed": "1", **fields}
    answer = server.client.post("/v1/images/edits", data=form, files=files)
    return images_of(answer)[0].convert("RGB")


def hole(box: tuple[int, int, int, int], *, inside: bool) -> Image.Image:
    """A mask as OpenAI's: transparent is redrawn, `inside` the box or all around it."""
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255 if inside else 0))
    mask.paste((0, 0, 0, 0 if inside else 255), box)
    return mask


def far(one: Image.Image, other: Image.Image) -> float:
    return float(np.sqrt(np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)))


# What the pictures show.


def test_a_mask_keeps_the_outside_and_the_inside_follows_the_prompt(server: Server, judge: Judge) -> None:
    source = draw(server, "a rocket on a blue background")
    before = np.asarray(source)
    objects = colours = 0
    for thing, colour in (("cat", "green"), ("apple", "red"), ("car", "white"), ("ghost", "yellow")):
        inner = edit(server, source, f"a {thing} on a blue background", hole((16, 16, 112, 112), inside=True))
        outer = edit(server, source, f"a rocket on a {colour} background", hole((24, 24, 104, 104), inside=False))
        ring = np.ones((128, 128), bool)
        ring[16:112, 16:112] = False
        assert np.array_equal(before[ring], np.asarray(inner)[ring])
        assert np.array_equal(before[24:104, 24:104], np.asarray(outer)[24:104, 24:104])
        objects += judge.object(inner) == thing
        colours += judge.background(outer) == colour
    assert objects >= 3
    assert colours >= 3


def test_an_edit_without_a_mask_stays_near_at_low_strength_and_follows_at_high(server: Server, judge: Judge) -> None:
    source = draw(server, "an alarm clock on a yellow background")
    prompt = "a pig on a blue background"
    plain = draw(server, prompt)
    near, away = (edit(server, source, prompt, strength=strength) for strength in ("0.2", "0.9"))
    assert far(near, source) < far(near, plain)
    assert far(near, source) < far(away, source)
    assert (judge.object(away), judge.background(away)) == ("pig", "blue")


def test_a_variation_is_like_its_source_and_not_the_same(server: Server, judge: Judge) -> None:
    source = draw(server, "a cat on a green background")
    files = {"image": ("source.png", encoded(source))}
    answer = server.client.post("/v1/images/variations", data={"n": "2", "seed": "1", "strength": "0.5"}, files=files)
    assert all("url" in item for item in items_of(answer))
    for varied in images_of(answer):
        assert varied.size == source.size
        assert far(varied.convert("RGB"), source) > 0
        assert judge.background(varied) == "green"


@pytest.mark.parametrize("size", ["64x64", "128x64", "96x160"])
def test_size_is_the_size_of_the_file(server: Server, size: str) -> None:
    answer = server.draw(prompt="a cat", size=size, steps=2)
    assert answer.json()["size"] == size
    assert "x".join(map(str, images_of(answer)[0].size)) == size
    source = Image.new("RGB", (128, 128), "orange")
    assert "x".join(map(str, edit(server, source, "a cat", size=size, steps="2").size)) == size


@pytest.mark.parametrize(("format", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_the_format_asked_for_with_its_recipe(server: Server, format: str, kind: str, tmp_path: Path) -> None:
    for response_format in ("b64_json", "url"):
        answer = server.draw(
            prompt="ein Bär|blau", seed=3, steps=2, output_format=format, response_format=response_format
        )
        assert answer.json()["output_format"] == format
        (image,) = images_of(answer)
        assert image.format == kind
    served = server.draw(prompt="ein Bär|blau", seed=3, steps=2, output_format=format, response_format="url")
    fetched = httpx.get(served.json()["data"][0]["url"])
    assert fetched.headers["content-type"] == f"image/{format}"
    (tmp_path / "picture").write_bytes(fetched.content)
    made = recipe.read(tmp_path / "picture")
    assert (made.prompt, made.sampling.negative_prompt, made.seed, made.sampling.steps) == ("ein Bär", "blau", 3, 2)


def test_compression_makes_files_smaller(server: Server) -> None:
    for format in ("webp", "jpeg"):
        sizes = [
            len(server.draw(prompt="a cat", seed=1, output_format=format, output_compression=level).content)
            for level in (0, 50, 100)
        ]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[2] / 2


def test_quality_chooses_steps_by_the_models_table(server: Server) -> None:
    def steps(**fields: Any) -> Any:
        (image,) = images_of(server.draw(prompt="a cat", response_format="b64_json", **fields))
        return json.loads(image.info["sfumato"])["steps"]

    assert [steps(quality=quality) for quality in ("low", "medium", "high", "auto", "standard", "hd")] == [
        10, 20, 30, 20, 20, 30,
    ]  # fmt: skip
    assert [steps(quality=quality, model="org/tiny") for quality in ("low", "medium", "high")] == [2, 4, 6]
    assert [steps(quality="3"), steps(quality=5), steps(quality="high", steps=2)] == [3, 5, 2]


# What goes over the wire.


def test_every_picture_field_and_every_way_to_send_one(server: Server) -> None:
    source = encoded(Image.linear_gradient("L").convert("RGB").resize((128, 128)))
    text = base64.b64encode(source).decode()
    fields: dict[str, Any] = {"prompt": "a cat", "seed": 1, "steps": 3, "strength": 0.5, "response_format": "b64_json"}
    form = {key: str(value) for key, value in fields.items()}
    url = "/v1/images/edits"
    ways = [
        server.client.post(url, data=form, files={"image": ("a.png", source)}),
        server.client.post(url, data=form, files=[("image[]", ("a.png", source))]),
        server.client.post(url, data=form | {"image": text}, files={"unused": ("b.bin", b"x")}),
        server.client.post(url, json=fields | {"image": text}),
        server.client.post(url, json=fields | {"image": [f"data:image/png;base64,{text}"]}),
        server.client.post(url, json=fields | {"images": [{"image_url": f"data:image/png;base64,{text}"}]}),
        server.client.post("/images/edits", json=fields | {"image": text}),
        server.draw(**fields, image=text),
        server.draw(**fields, file=text),
        server.draw(**fields, files=[text]),
        server.draw(**fields, ref_images=[text]),
    ]
    pictures = [np.asarray(images_of(answer)[0]) for answer in ways]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def test_base64_is_the_default_of_edits_and_of_gpt_image_style(server: Server) -> None:
    files = {"image": ("a.png", encoded(Image.new("RGB", (128, 128), "red")))}
    edits = server.client.post("/v1/images/edits", data={"prompt": "a cat", "steps": "2"}, files=files)
    assert "b64_json" in items_of(edits)[0]
    for fields, key in (
        ({}, "url"),
        ({"quality": "standard"}, "url"),
        ({"quality": 2}, "url"),
        ({"model": "gpt-image-1"}, "b64_json"),
        ({"quality": "low"}, "b64_json"),
        ({"background": "opaque"}, "b64_json"),
        ({"moderation": "low"}, "b64_json"),
        ({"output_format": "webp"}, "b64_json"),
        ({"output_format": "webp", "response_format": "url"}, "url"),
    ):
        assert key in items_of(server.draw(prompt="a cat", steps=2, **fields))[0], fields


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"quality": "ultra"}, "quality", "medium"),
        ({"quality": 0}, "steps", "1"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"background": "transparent", "output_format": "jpeg"}, "background", "png"),
        ({"background": "pink"}, "background", "transparent"),
        ({"output_format": "gif"}, "output_format", "webp"),
        ({"output_format": "webp", "output_compression": 101}, "output_compression", "100"),
        ({"partial_images": 4, "stream": True}, "partial_images", "3"),
        ({"stream": "maybe"}, "stream", "maybe"),
        ({"n": 5}, "n", "4"),
        ({"n": 10**399}, "n", "1000"),
        ({"size": "9" * 5000 + "x8"}, "size", "WIDTHxHEIGHT"),
        ({"quality": "9" * 5000}, "quality", "medium"),
        ({"negative_prompt": "x" * 32_001}, "negative_prompt", "32000"),
        ({"size": "16400x8", "steps": 1, "output_format": "webp"}, "size", "max_side"),
        ({"image": "http://" + "a" * 64 + ".com/x.png"}, "image", "does not resolve"),
        ({"image": "http://1.1.1.1:99999/x.png"}, "image", "99999"),
        ({"image": "http://[64:ff9b::7f00:1]/x.png"}, "image", "not a public address"),
        ({"image": 5}, "image", ""),
        ({"guidance_scale": -1}, "guidance_scale", "0"),
        ({"steps": 1001}, "steps", "1000"),
    ],
)
def test_bad_fields_are_named(server: Server, fields: dict[str, Any], param: str, words: str) -> None:
    error = error_of(server.draw(prompt="a cat", **fields))
    assert error["param"].split(".")[0] == param
    assert param in error["message"]
    assert words in error["message"]


def test_an_edit_needs_a_picture_and_a_mask_that_marks_something(server: Server) -> None:
    source = ("a.png", encoded(Image.new("RGB", (128, 128), "red")))
    url = "/v1/images/edits"
    nothing = error_of(server.client.post(url, data={"prompt": "a cat"}, files={"unused": source}))
    assert nothing["param"] == "image"
    empty = {"image": source, "mask": ("m.png", encoded(Image.new("RGBA", (128, 128), (0, 0, 0, 255))))}
    assert error_of(server.client.post(url, data={"prompt": "a cat"}, files=empty))["param"] == "mask"
    small = {"image": source, "mask": ("m.png", encoded(Image.new("L", (64, 64), 255)))}
    assert error_of(server.client.post(url, data={"prompt": "a cat"}, files=small))["param"] == "mask"
    many = [("image[]", source), ("image[]", source)]
    assert error_of(server.client.post(url, data={"prompt": "a cat"}, files=many))["param"] == "image"


def test_fields_without_effect_are_named_in_a_header(server: Server) -> None:
    answer = server.draw(prompt="a cat", steps=2, style="vivid", output_compression=5, colour="red", user="me")
    assert set(answer.headers["x-sfumato-ignored"].split(", ")) == {"style", "output_compression", "colour"}
    assert "x-sfumato-ignored" not in server.draw(prompt="a cat", steps=2, user="me").headers


def test_a_prompt_over_the_encoders_length_is_cut_and_said(server: Server) -> None:
    answer = server.draw(prompt="cat " * 100, steps=2, response_format="b64_json")
    assert images_of(answer)
    assert "prompt" in answer.headers["x-sfumato-warning"]
    assert "77" in answer.headers["x-sfumato-warning"]
    assert answer.json()["usage"]["input_tokens_details"]["text_tokens"] == 102
    assert "x-sfumato-warning" not in server.draw(prompt="a cat", steps=2).headers


def test_usage_adds_up(server: Server) -> None:
    usage = server.draw(prompt="a cat", steps=2, n=2, image=server.png_data_uri((128, 128))).json()["usage"]
    details = usage["input_tokens_details"]
    assert usage["input_tokens"] == details["text_tokens"] + details["image_tokens"]
    assert (details["image_tokens"], usage["output_tokens"]) == (128, 128)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_models_say_what_they_can(server: Server) -> None:
    server.draw(prompt="a cat", model="org/tiny", steps=2)
    for path in ("/v1/models/org/tiny", "/models/org/tiny"):
        model = server.client.get(path).json()
        assert (model["id"], model["object"]) == ("org/tiny", "model")
        extension = model["sfumato"]
        assert extension["tasks"] == ["text-to-image", "image-to-image", "inpainting"]
        assert extension["defaults"]["size"] == "64x64"
        assert extension["defaults"]["steps"] == 4
        assert extension["limits"] | {"max_concurrent": None} == {
            "n": 4, "steps": 1000, "pixels": 2048 * 2048, "size_multiple": 8, "prompt_tokens": 77,
            "max_concurrent": None, "frames": None, "frame_step": None, "seconds": None, "sample_rate": None,
        }  # fmt: skip
        assert extension["qualities"]["low"] == 2
    assert server.client.get("/v1/models/gpt-image-1").json()["id"] == "gpt-image-1"
    missing = error_of(server.client.get("/v1/models/no/such"), 404)
    assert missing["code"] == "model_not_found"
    assert "org/tiny" in missing["message"]


def test_inpainting_as_localai_has_it(server: Server) -> None:
    source = draw(server, "a rocket on a blue background")
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (32, 32, 96, 96))
    files = {"image": ("i.png", encoded(source)), "mask": ("m.png", encoded(mask))}
    form = {"model": "sfumato-tiny", "prompt": "a cat", "steps": "4"}
    for path in ("/v1/images/inpainting", "/images/inpainting"):
        (after,) = images_of(server.client.post(path, data=form, files=files))
        assert np.array_equal(np.asarray(after)[:32], np.asarray(source)[:32])
        assert not np.array_equal(np.asarray(after)[32:96, 32:96], np.asarray(source)[32:96, 32:96])
    assert error_of(server.client.post(path, data=form, files={"image": files["image"]}))["param"] == "mask"


def test_upscaling_without_an_upscaler_is_refused_and_never_a_resize(server: Server) -> None:
    files = {"image": ("i.png", encoded(Image.new("RGB", (64, 64), "red")))}
    for form in ({"scale": "2"}, {"scale": "4", "model": "sfumato-tiny"}):
        error = error_of(server.client.post("/v1/images/upscale", data=form, files=files))
        assert error["param"] == "model"
        assert "StableDiffusionUpscalePipeline" in error["message"]
    assert error_of(server.client.post("/v1/images/upscale", data={"scale": "3"}, files=files))["param"] == "scale"


@pytest.mark.parametrize("size", [(124, 84), (130, 90)])
def test_outside_the_mask_nothing_changes_at_sizes_that_the_model_does_not_draw(
    server: Server, size: tuple[int, int]
) -> None:
    source = Image.effect_noise(size, 80).convert("RGB")
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (20, 20, 60, 60))
    after = edit(server, source, "a cat", mask, steps="4")
    assert after.size == size
    outside = np.ones((size[1], size[0]), bool)
    outside[20:60, 20:60] = False
    assert np.array_equal(np.asarray(source)[outside], np.asarray(after)[outside])
    assert not np.array_equal(np.asarray(source)[20:60, 20:60], np.asarray(after)[20:60, 20:60])


def test_an_empty_mask_file_is_refused_and_not_left_out(server: Server) -> None:
    files = {"image": ("a.png", encoded(Image.new("RGB", (128, 128), "red"))), "mask": ("m.png", b"")}
    assert error_of(server.client.post("/v1/images/edits", data={"prompt": "a cat"}, files=files))["param"] == "mask"


def test_sixteen_bits_are_read_as_levels(server: Server) -> None:
    levels = np.tile(np.linspace(0, 255, 128).astype(np.uint16), (128, 1))
    files = {"image": ("a.png", encoded(Image.fromarray(levels * 256)))}
    form = {"prompt": "a cat", "steps": "50", "strength": "0.02", "seed": "1"}
    (after,) = images_of(server.client.post("/v1/images/edits", data=form, files=files))
    assert np.abs(np.asarray(after.convert("L"), float).mean(0) - np.linspace(0, 255, 128)).mean() < 20


def test_the_cap_of_pixels_holds_for_what_a_picture_makes(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with Server(tmp_path / "models", tmp_path / "data", "--max-pixels", "16384") as server:
        large = {"prompt": "a cat", "steps": 1, "image": server.png_data_uri((256, 256))}
        error = error_of(server.client.post("/v1/images/edits", json=large))
        assert error["param"] == "image"
        assert "256x256" in error["message"]
        assert server.client.post("/v1/images/edits", json=large | {"size": "128x128"}).status_code == 200
        wide = {"prompt": "a cat", "width": 100, "init_images": [server.png_data_uri()]}
        assert error_of(server.client.post("/sdapi/v1/img2img", json=wide))["param"] == "width"


def test_a_form_in_an_odd_codec_is_refused(server: Server) -> None:
    content = b'--B\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx\r\n--B--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=B; charset=punycode"}
    error = error_of(server.client.post("/v1/images/edits", content=content, headers=headers), 415)
    assert "punycode" in error["message"]
