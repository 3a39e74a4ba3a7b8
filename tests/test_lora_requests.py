"""LoRAs over HTTP: every spelling and every place, on every route, and the examples of the guide."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from starlette.testclient import TestClient

from sfumato.api.app import create_app
from sfumato.checkpoints import lora_files, weight_file
from sfumato.checkpoints.remote_limits import Limits
from sfumato.commands.generate import _as_request, generate
from sfumato.core import Control
from sfumato.engine.local import Local
from sfumato.errors import InvalidRequest
from sfumato.loras import MAX_LORAS, Lora, checked, name_of, read_tags
from sfumato.pictures import recipe
from sfumato.pictures.stores import store_of
from sfumato.serving.catalog import Catalog
from sfumato.serving.planning import ImageRequest
from sfumato.serving.service import Service
from sfumato.settings import Settings
from support import loras, tiny
from support.answers import error_of, image_of, pixels
from support.fake_engine import FakeEngine
from support.here import use
from support.hub import Hub

GUIDE = (Path(__file__).parent.parent / "docs" / "guides" / "adapters.md").read_text()

FEW: dict[str, Any] = {"prompt": "a cat", "seed": 1, "steps": 2, "size": "64x64", "response_format": "b64_json"}
WEBUI: dict[str, Any] = {"prompt": "a cat", "seed": 1, "steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(repositories: dict[str, Path], hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model files, `loras/` beside them; `style` is the model file's own, `hub/anna` is on the hub."""
    folder = tmp_path_factory.mktemp("models")
    sd = repositories["nitrosocke/Ghibli-Diffusion"]
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    parts = {"text_encoder": "lora_te"}
    for seed, path in enumerate(
        ("loras/watercolour.safetensors", "loras/people/anna.safetensors", "style.safetensors", "hub/far.safetensors",
         "loras/a/twice.safetensors", "loras/b/twice.safetensors")
    ):  # fmt: skip
        loras.saved(loras.kohya(pipeline, parts, seed=seed), folder / path)
    loras.saved(loras.kohya(tiny.stable_diffusion_xl()), folder / "loras" / "for-xl.safetensors")
    (folder / "loras" / "pickle.pt").write_bytes(b"x")
    (folder / "loras" / "broken.safetensors").write_bytes(b"x")
    hub.add("acme/one", folder / "hub")
    hub.add("acme/many", folder / "loras" / "a")
    enabled = "image,negative_prompt,num_inference_steps"
    model = f"name: m\nparameters:\n  model: {sd}\ndtype: fp32\ndiffusers:\n  enable_parameters: {enabled}\n"
    (folder / "m.yaml").write_text(model)
    painter = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[0].replace("owner/base", str(sd))
    (folder / "painter.yaml").write_text(f"{painter}dtype: fp32\n")
    return folder


@pytest.fixture(scope="module")
def settings(folder: Path, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    data = tmp_path_factory.mktemp("data")
    hosts = "hub,localhost,127.0.0.1"
    return Settings(models=folder, data=data, device="cpu", log_level="error", lora_hosts=hosts, default_model="m")


@pytest.fixture(scope="module")
def client(settings: Settings, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        use(hub, tmp_path_factory.mktemp("cache"), patch)
        service = Service(Catalog.of(settings), Local(settings), settings)
        with TestClient(create_app(service, store_of(settings))) as client:
            yield client


def draw(client: TestClient, **fields: Any) -> Any:
    return np.asarray(image_of(client.post("/v1/images/generations", json={**FEW, "model": "m", **fields}))).astype(int)


def webui(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/sdapi/v1/txt2img", json=WEBUI | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def expected(client: TestClient) -> Any:
    """With `watercolour` at 0.8."""
    picture = draw(client, loras=[{"name": "watercolour", "weight": 0.8}])
    assert np.abs(picture - draw(client)).max() > 1
    return picture


ENTRY = {"name": "watercolour", "weight": 0.8}

SPELLINGS: list[dict[str, Any]] = [
    {"loras": ENTRY}, {"lora": ENTRY}, {"lora": [ENTRY]}, {"image_loras": [{"path": "watercolour", "scale": 0.8}]},
    {"loras": [{"id": "watercolour", "scale": "0.8"}]}, {"loras": [{"lora_name": "watercolour", "strength": 0.8}]},
    {"lora": [{"path": "watercolour.safetensors", "multiplier": 0.8, "is_high_noise": False}]},
    {"lora": {"name": "x", "path": "Watercolour", "scale": 0.8, "int_id": 3}},
    {"loras": json.dumps([ENTRY])}, {"loras": [{"name": "watercolour", "weight": 0.8, "text_weight": 0.8}]},
    {"loras": [{"name": "watercolour", "weight": 0.5}], "lora": [{"name": "watercolour", "weight": 0.3}]},
    {"prompt": "a cat <lora:watercolour:0.8>"}, {"prompt": "<lora:watercolour:0.8:0.8> a cat"},
    {"prompt": "a <lyco:watercolour:te=0.8:unet=0.8> cat"},
    {"prompt": "a cat", "negative_prompt": "<lora:watercolour:.8>"},
]  # fmt: skip


@pytest.mark.parametrize("fields", SPELLINGS, ids=str)
def test_every_spelling_is_the_same(client: TestClient, expected: Any, fields: dict[str, Any]) -> None:
    if "negative_prompt" not in fields:
        assert np.abs(draw(client, **fields) - expected).max() == 0
    else:
        assert np.abs(draw(client, **fields) - draw(client, negative_prompt="", loras=ENTRY)).max() == 0


def test_every_route_reads_them(client: TestClient, expected: Any) -> None:
    one = webui(client, prompt="a cat <lora:watercolour:0.8>")
    other = webui(client, lora=[{"path": "watercolour", "multiplier": 0.8}])
    assert one["images"] == other["images"]
    assert json.loads(one["info"])["infotexts"][0].startswith("a cat <lora:watercolour:0.8>\n")
    png = client.post("/v1/images/generations", json={**FEW, "model": "m"}).json()["data"][0]["b64_json"]
    plain, tuned = [
        client.post("/v1/images/edits", json={**FEW, "model": "m", "image": png, "strength": 0.9, **more})
        for more in ({}, {"loras": "watercolour"})
    ]
    assert np.abs(pixels(image_of(plain)) - pixels(image_of(tuned))).max() > 0
    form = {key: str(value) for key, value in FEW.items()} | {"model": "m"}
    for value in ("watercolour", json.dumps([ENTRY])):
        answer = client.post("/v1/images/generations", data=form | {"loras": value})
        assert image_of(answer).size == (64, 64)
    for body in ({"prompt": "<lora:watercolor:1>"}, {"lora": "watercolor"}):
        for path, few in (("/v1/images/generations", FEW), ("/sdapi/v1/txt2img", WEBUI)):
            assert "did you mean watercolour?" in error_of(client.post(path, json=few | body))["message"]


SOURCES = {
    "people/anna": "people/anna", "anna": "people/anna", "PEOPLE/Anna.safetensors": "people/anna",
    "acme/one": "far", "acme/one/far.safetensors": "far", "hf://acme/one/far.safetensors": "far",
    "acme/one@main/far.safetensors": "far", "{hub}/acme/one/resolve/main/far.safetensors": "far",
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_every_place(client: TestClient, hub: Hub, folder: Path, source: str) -> None:
    named = source.replace("{hub}", hub.url)
    answer = client.post("/v1/images/generations", json={**FEW, "model": "m", "loras": named})
    picture = np.asarray(image_of(answer)).astype(int)
    other = client.post("/v1/images/generations", json={**FEW, "model": "m", "loras": "watercolour"})
    assert np.abs(picture - np.asarray(image_of(other)).astype(int)).max() > 1
    if SOURCES[source] == "people/anna":
        assert np.abs(picture - draw(client, loras="people/anna")).max() == 0
    else:
        assert np.abs(picture - draw(client, loras="acme/one/far.safetensors")).max() == 0


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown": ("nothing-like-it", "there is no LoRA"), "close": ("people/ana", "people/anna"),
    "up": ("../style.safetensors", "leads out"), "absolute": ("/etc/passwd", "leads out"),
    "home": ("~/x.safetensors", "leads out"), "inner up": ("people/../../style", "leads out"),
    "backslashes": ("..\\style", "leads out"), "drive": ("C:\\x.safetensors", "leads out"),
    "nul": ("a\0b", "leads out"), "long": ("x" * 1025, "1024"),
    "two of a name": ("twice", "a/twice, b/twice"), "pickle": ("pickle.pt", "there is no LoRA"),
    "hub's pickle": ("acme/one/x.pt", "no .safetensors file"), "broken": ("broken", "broken"),
    "no such repository": ("acme/nothing", "acme/nothing"), "no such file": ("acme/one/x.safetensors", "acme/one"),
    "other host": ("http://example.com/x.safetensors", "lora_hosts"),
    "other family": ("for-xl", "for-xl does not fit m"),
    "weight": ({"name": "anna", "weight": 11}, "-10 to 10"), "nan": ({"name": "anna", "weight": "nan"}, "-10 to 10"),
    "sum": ([{"name": "anna", "weight": 9}, {"name": "anna", "weight": 9}], "-10 to 10"),
    "text weight": ({"name": "anna", "text_weight": -11}, "-10 to 10"),
    "bool": ({"name": "anna", "weight": True}, "number"),
    "word": ({"name": "anna", "weight": "much"}, "number"), "key": ({"name": "anna", "wieght": 1}, "wieght"),
    "no name": ({"weight": 1}, "must name"), "number": (3, "name or an object"),
    "list": ([["anna"]], "name or an object"),
    "json": ("[{", "must be JSON"), "many": ([f"x{at}" for at in range(MAX_LORAS + 1)], str(MAX_LORAS)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(client: TestClient, case: str) -> None:
    value, words = REFUSED[case]
    error = error_of(client.post("/v1/images/generations", json={**FEW, "model": "m", "loras": value}))
    assert words in error["message"]
    assert error["param"].partition(".")[0] == "loras"


@pytest.mark.parametrize(
    "tag", ["<lora:>", "<lora:a:b>", "<lora:a:x=1>", "<lora:a:11>", "<lora:../a:1>", "<lora:a:nan>"]
)
def test_tags_that_are_refused(client: TestClient, tag: str) -> None:
    error_of(client.post("/sdapi/v1/txt2img", json=WEBUI | {"prompt": f"a cat <lora:{tag}>"}))


def test_many_tags_are_read_fast_and_refused() -> None:
    with pytest.raises(InvalidRequest, match="at most 10"):
        checked(read_tags(" ".join(f"<lora:x{at}:1>" for at in range(1000)))[1])
    assert read_tags("<lora:" * 4000)[1] == ()
    assert read_tags("a <b> (c:1.2) <hypernet:x:1>") == ("a <b> (c:1.2) <hypernet:x:1>", ())


def test_what_tags_say() -> None:
    text, found = read_tags("a <lora:x:0.5:0.7> cat, <lora:y> sits <lora:z:unet=2>")
    assert text == "a cat, sits"
    assert [(each.source, each.weight_of_text, each.weight) for each in found] == [
        ("x", 0.5, 0.7), ("y", 1.0, 1.0), ("z", 1.0, 2.0),
    ]  # fmt: skip
    assert [each.tag for each in found] == ["<lora:x:0.5:0.7>", "<lora:y:1>", "<lora:z:1:2>"]
    assert name_of("https://user:secret@host/a/b.safetensors?token=x") == "b"
    assert name_of("owner/name@v2/anna.SAFETENSORS") == "anna"


def test_a_secret_in_a_url_is_shown_nowhere(client: TestClient, hub: Hub) -> None:
    url = f"{hub.url}/acme/one/resolve/main/far.safetensors?token=SECRET"
    answer = client.post("/v1/images/generations", json={**FEW, "model": "m", "loras": url})
    image = image_of(answer)
    assert "far.safetensors" in image.info["sfumato"]
    assert "SECRET" not in str(image.info) + answer.text + str(answer.headers)
    refused = client.post("/v1/images/generations", json={**FEW, "loras": url.replace("far", "gone")})
    assert refused.status_code in (400, 503)
    assert "SECRET" not in refused.text
    for body in (
        {"loras": {"name": url, "weight": "much"}},
        {"loras": {"name": url, "wait": 1}},
        {"loras": [url] * 11},
        {"prompt": "a <lora:https://u:SECRET@host/x.safetensors:much>"},
        {"loras": url.replace("safetensors", "bin")},
    ):
        refused = client.post("/v1/images/generations", json={**FEW, "model": "m", **body})
        assert refused.status_code == 400, refused.text
        assert "SECRET" not in refused.text
        assert "Lora(" not in refused.text


def test_a_url_brings_its_own_file(client: TestClient, settings: Settings, hub: Hub, folder: Path) -> None:
    """Not one of the same name that lies beside the model files, in `loras/`, or in the folder of downloads."""
    hub.add("somebody/else", folder / "loras" / "people")
    named = f"{hub.url}/somebody/else/resolve/main/anna.safetensors"
    before = set(lora_files.found(folder))
    expected = draw(client, loras="people/anna")
    place = weight_file.path_for(named, settings.data / "loras", by_hand=False)
    for path in (folder / "anna.safetensors", settings.data / "loras" / "anna.safetensors", place):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(folder / "loras" / "watercolour.safetensors", path)
    for _ in range(2):
        assert np.abs(draw(client, loras=named) - expected).max() == 0
    assert hub.downloads("somebody/else") == {"anna.safetensors": 1}
    assert set(lora_files.found(folder)) == before
    assert not list(folder.glob(".anna*"))


@pytest.mark.parametrize("file", ["x.bin", "x.ckpt", "x.gguf", "x.html"])
def test_a_url_of_another_kind_of_file_is_refused_before_the_download(client: TestClient, hub: Hub, file: str) -> None:
    url = f"{hub.url}/acme/one/resolve/main/{file}?token=SECRET"
    before = len(hub.requests)
    error = error_of(client.post("/v1/images/generations", json={**FEW, "model": "m", "loras": url}))
    assert "no .safetensors file" in error["message"] and "SECRET" not in error["message"]
    assert len(hub.requests) == before


# Lists, recipe, infotext.


def test_the_lists(client: TestClient) -> None:
    data = {each["id"]: each for each in client.get("/v1/loras").json()["data"]}
    assert set(data) == {"watercolour", "people/anna", "a/twice", "b/twice", "for-xl", "style"}
    assert data["style"]["models"] == ["painter"] and data["people/anna"]["path"] == "people/anna.safetensors"
    listed = client.get("/sdapi/v1/loras").json()
    assert {(each["name"], each["alias"]) for each in listed} >= {
        ("people/anna", "anna"),
        ("watercolour", "watercolour"),
    }
    assert client.post("/sdapi/v1/refresh-loras").status_code == 200


def test_recipe_infotext_and_back(
    client: TestClient, settings: Settings, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "a cat <lora:style:0.3> <lora:watercolour:0.5:0.8>"
    answer = webui(client, prompt=prompt, override_settings={"sd_model_checkpoint": "painter"})
    told = client.post("/sdapi/v1/png-info", json={"image": answer["images"][0]}).json()
    assert told["parameters"]["Prompt"] == prompt
    hashes = dict(each.split(": ") for each in told["parameters"]["Lora hashes"].split(", "))
    assert set(hashes) == {"style", "watercolour"} and all(
        re.fullmatch("[0-9a-f]{12}", each) for each in hashes.values()
    )
    assert json.loads(told["items"]["sfumato"])["prompt"] == "a cat"
    again = webui(client, prompt=told["parameters"]["Prompt"], override_settings={"sd_model_checkpoint": "painter"})
    assert again["images"][0] == answer["images"][0]
    (tmp_path / "one.png").write_bytes(base64.b64decode(answer["images"][0]))
    made = recipe.read(tmp_path / "one.png")
    assert [(name_of(source), weight, text) for source, _, _, weight, text in made.loras] == [
        ("style", 0.3, 0.3), ("watercolour", 0.8, 0.5),
    ]  # fmt: skip
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for _, digest, *_ in made.loras)
    assert recipe.from_json(json.loads(json.dumps(recipe.as_json(made)))) == made
    (path,) = generate({}, tmp_path / "one.png", tmp_path / "two.png", settings)
    redrawn = recipe.read(path)
    assert redrawn.loras == made.loras
    assert "loras was" not in caplog.text
    one, two = (np.asarray(image_in(each)).astype(int) for each in (tmp_path / "one.png", path))
    assert np.abs(one - two).max() <= 1


@pytest.mark.parametrize(
    "named",
    ["acme/one", "acme/one/far.safetensors", "hf://acme/one@main/far.safetensors", "a/twice", "people/anna.safetensors",
     "{hub}/acme/one/resolve/main/far.safetensors?token=SECRET"],
)  # fmt: skip
def test_tags_of_an_infotext_name_the_same_file(client: TestClient, hub: Hub, named: str) -> None:
    answer = webui(client, loras={"name": named.replace("{hub}", hub.url), "weight": 0.7})
    told = client.post("/sdapi/v1/png-info", json={"image": answer["images"][0]}).json()["parameters"]
    assert "SECRET" not in json.dumps(told)
    again = webui(client, prompt=told["Prompt"])
    assert np.array_equal(
        *(pixels(Image.open(io.BytesIO(base64.b64decode(each["images"][0])))) for each in (answer, again))
    )
    told_again = client.post("/sdapi/v1/png-info", json={"image": again["images"][0]}).json()["parameters"]
    assert told_again["Lora hashes"] == told["Lora hashes"] and told_again["Prompt"] == told["Prompt"]


@pytest.mark.parametrize(
    "fields", [{"loras": {"name": "style", "weight": 0}}, {"replace_loras": True},
               {"replace_loras": True, "loras": "watercolour"}]
)  # fmt: skip
def test_an_infotext_says_which_of_the_models_own_is_off(client: TestClient, fields: dict[str, Any]) -> None:
    painter = {"sd_model_checkpoint": "painter"}
    answer = webui(client, override_settings=painter, **fields)
    told = client.post("/sdapi/v1/png-info", json={"image": answer["images"][0]}).json()["parameters"]
    assert told["Prompt"].endswith("<lora:style:0>")
    again = webui(client, prompt=told["Prompt"], override_settings=painter)
    one, two = (pixels(Image.open(io.BytesIO(base64.b64decode(each["images"][0])))) for each in (answer, again))
    assert np.abs(one.astype(int) - two.astype(int)).max() <= 1
    assert client.post("/sdapi/v1/png-info", json={"image": again["images"][0]}).json()["parameters"] == told


def test_a_tag_of_a_new_prompt_replaces_the_weight_of_a_recipe(
    client: TestClient, settings: Settings, tmp_path: Path
) -> None:
    answer = webui(client, prompt="a cat <lora:watercolour:0.5> <lora:people/anna:0.4>")
    (tmp_path / "one.png").write_bytes(base64.b64decode(answer["images"][0]))
    for prompt, weights in {
        "a cat <lora:watercolour:0.1>": {"anna": 0.4, "watercolour": 0.1},
        "a cat <lora:anna:0>": {"watercolour": 0.5},
        "a cat": {"watercolour": 0.5, "anna": 0.4},
    }.items():
        (path,) = generate({"prompts": [prompt]}, tmp_path / "one.png", tmp_path / "two.png", settings)
        assert {name_of(source): weight for source, _, _, weight, _ in recipe.read(path).loras} == weights


def image_in(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def test_like_keeps_what_acted(client: TestClient, settings: Settings, tmp_path: Path) -> None:
    """Pictures of earlier versions do not say which of the model file's LoRAs acted: all did."""
    for name, fields in {"own": {}, "none": {"loras": {"name": "style", "weight": 0}}}.items():
        answer = client.post("/v1/images/generations", json={**FEW, "model": "painter", **fields})
        image = image_of(answer)
        (tmp_path / f"{name}.png").write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
        assert ("without_loras" in json.loads(image.info["sfumato"])) == (name == "none")
        (path,) = generate({}, tmp_path / f"{name}.png", tmp_path / f"{name}-again.png", settings)
        one, two = pixels(image.convert("RGB")).astype(int), pixels(image_in(path))
        assert np.abs(one - two).max() <= 1
    old = recipe.as_json(recipe.read(tmp_path / "own.png"))
    del old["loras"]
    assert _as_request(recipe.from_json(old))["replace_loras"] is False


def test_a_recipe_without_loras_has_no_field(client: TestClient) -> None:
    answer = client.post("/v1/images/generations", json={**FEW, "model": "m"})
    assert "loras" not in json.loads(image_of(answer).info["sfumato"])
    zero = client.post("/v1/images/generations", json={**FEW, "model": "m", "loras": [{"name": "anna", "weight": 0}]})
    assert image_of(zero).info["sfumato"] == image_of(answer).info["sfumato"]


def test_the_model_files_own(client: TestClient) -> None:
    plain = draw(client)
    own = draw(client, model="painter")
    assert np.abs(own - plain).max() > 1
    assert np.abs(draw(client, model="painter", replace_loras=True) - plain).max() == 0
    assert np.abs(draw(client, model="painter", loras={"name": "style", "weight": 0}) - plain).max() == 0
    assert np.abs(draw(client, model="painter", loras={"name": "style", "weight": 0.7}) - own).max() == 0
    replaced = draw(client, model="painter", replace_loras=True, loras="watercolour")
    assert np.abs(replaced - draw(client, loras="watercolour")).max() <= 1
    assert np.abs(draw(client, model="painter") - own).max() == 0


def test_lora_hosts_may_be_empty(folder: Path) -> None:
    config = Catalog([folder]).get("m")
    for source in ("acme/one", "https://huggingface.co/acme/one/resolve/main/far.safetensors"):
        with pytest.raises(InvalidRequest, match="lora_hosts: nowhere"):
            lora_files.locate(Lora(source), config, Limits([]), folder)
    assert lora_files.locate(Lora("anna"), config, Limits([]), folder).file


def test_without_hub_no_controlnet_comes_from_there(folder: Path) -> None:
    settings = Settings(models=folder, lora_hosts="", default_model="m")
    service = Service(Catalog.of(settings), FakeEngine(), settings)
    asked = ImageRequest(prompts=["a cat"], model="m", controls=[Control(b"", name="any/repo")])
    with pytest.raises(InvalidRequest, match="lora_hosts") as refused:
        asyncio.run(service.submit(asked))
    assert refused.value.param == "controls[0].name"


# The guide.


@pytest.mark.parametrize(
    "body", [json.loads(each) for each in re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL)], ids=str
)
def test_the_examples_of_the_guide_are_drawn(client: TestClient, body: dict[str, Any]) -> None:
    few = {**FEW, "model": "m", **body}
    answer = client.post("/v1/images/generations", json=few)
    prompt = read_tags(body["prompt"])[0]
    plain = client.post("/v1/images/generations", json={**few, "prompt": prompt, "loras": [], "replace_loras": False})
    assert np.abs(np.asarray(image_of(answer)).astype(int) - np.asarray(image_of(plain)).astype(int)).max() > 0


def test_the_guides_table_of_clients(client: TestClient, expected: Any) -> None:
    table = GUIDE.partition("### What clients send")[2].partition("\n###")[0]
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| (.+) \|$", table, re.MULTILINE)
    assert len(rows) == 6
    for field, cell in rows:
        for entry in re.findall(r"`([^`]+)`", cell):
            value = f"a cat {entry}" if field == "prompt" else json.loads(entry)
            picture = draw(client, **{field: value})
            if "0.6" not in entry and entry[0] != '"':
                assert np.abs(picture - expected).max() == 0, entry
            if field != "prompt":
                assert np.abs(draw(client, **{field: [value]}) - picture).max() == 0


def test_slow_downloads_keep_nobody_waiting_whose_lora_is_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, located = threading.Event(), lora_files.locate

    def slow(lora: Lora, *rest: Any) -> Lora:
        if "/" in lora.source:
            assert let_go.wait(120)
            raise InvalidRequest("gone")
        return located(lora, *rest)

    monkeypatch.setattr(lora_files, "locate", slow)

    async def run() -> None:
        service = Service(Catalog([folder]), FakeEngine(), Settings(data=folder / "data", max_queue=20))

        def asked(name: str) -> asyncio.Task[Any]:
            request = ImageRequest(prompts=["x"], model="m", loras=(Lora(name),))
            return asyncio.create_task(service.submit(request))

        waiting = [asked("acme/one") for _ in range(8)]
        job = await asked("watercolour")
        assert len(await job.pictures()) == 1
        assert not any(task.done() for task in waiting)
        let_go.set()
        assert all(isinstance(each, InvalidRequest) for each in await asyncio.gather(*waiting, return_exceptions=True))
        await service.stop()

    try:
        asyncio.run(run())
    finally:
        let_go.set()
