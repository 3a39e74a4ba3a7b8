"""The gallery: what is kept, whose it is, how it is found, and that the folder is enough to make it again."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, PngImagePlugin
from starlette.testclient import TestClient
from typer.testing import CliRunner

from sfumato.cli import app as command
from sfumato.config import ModelConfig
from sfumato.core import Event, Failed, Generation
from sfumato.errors import DrawError, StorageError
from sfumato.pictures import recipe
from sfumato.pictures.gallery import Gallery, GalleryQuery
from sfumato.pictures.store import Store, owner_of
from support.gallery import MADE, gallery, keep, names, png
from support.inside import DRAW, Inside, Painter


def test_the_newest_comes_first_and_pages_go_on_where_they_ended(tmp_path: Path) -> None:
    shelf = gallery(tmp_path)
    made = [keep(shelf, created=1000.0 + index // 2) for index in range(7)]  # two of each second
    seen: list[str] = []
    before = None
    while True:
        kept, more = shelf.page(GalleryQuery(), before=before, limit=3)
        seen += [each.name for each in kept]
        before = (kept[-1].created, kept[-1].name)
        if not more:
            break
    assert sorted(seen) == sorted(made)
    assert [made.index(name) // 2 for name in seen] == [3, 2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("CAT", ["A Cat on a mat"]),
        ("mat cat", ["A Cat on a mat"]),
        ("größe", ["ÄRMEL IN GRÖSSE XL"]),
        ("100%", ["100% wool"]),
        ("a_b", ["a_b"]),
        ("blurry", ["100% wool"]),
        ("<img", ["<img src=x onerror=alert(1)>"]),
        ("nothing", []),
    ],
)
def test_a_search_finds_words_in_prompts_and_takes_them_as_they_are(
    tmp_path: Path, words: str, found: list[str]
) -> None:
    shelf = gallery(tmp_path)
    prompts = ("A Cat on a mat", "ÄRMEL IN GRÖSSE XL", "100 wool", "a_b", "axb", "<img src=x onerror=alert(1)>")
    for prompt in prompts:
        keep(shelf, prompt)
    keep(shelf, "100% wool", negative_prompt="blurry")
    assert [kept.recipe and kept.recipe["prompt"] for kept in shelf.page(GalleryQuery(words=words))[0]] == found
    assert shelf.count(GalleryQuery(words=words)) == len(found)


def test_model_and_star_narrow_it(tmp_path: Path) -> None:
    shelf = gallery(tmp_path)
    one, two = keep(shelf, created=1), keep(shelf, model="other", created=2)
    shelf.star(one, True)
    assert names(shelf, model="other") == [two]
    assert names(shelf, starred=True) == [one]
    shelf.star(one, False)
    assert names(shelf, starred=True) == []


def test_each_sees_what_it_made_itself(tmp_path: Path) -> None:
    shelf = gallery(tmp_path, ("alice", "bob"))
    hers, his = keep(shelf, caller="alice"), keep(shelf, caller="bob")
    assert names(shelf, caller="alice") == [hers]
    assert names(shelf, caller="bob") == [his]
    assert sorted(names(shelf)) == sorted([hers, his])
    assert shelf.get(hers, "bob") is None
    shelf.star(hers, True, "bob")
    assert not shelf.get(hers, "alice").starred  # type: ignore[union-attr]


def test_the_folder_is_enough_to_make_it_again_owners_included(tmp_path: Path) -> None:
    shelf = gallery(tmp_path, ("alice", "bob"))
    hers, his = keep(shelf, "hers", "alice"), keep(shelf, "his", "bob")
    shelf.close()
    for file in tmp_path.glob("gallery.db*"):
        file.unlink()
    again = gallery(tmp_path, ("alice", "bob"))
    assert again.rebuild() == 2
    assert names(again, caller="alice") == [hers]
    assert names(again, caller="bob", words="his") == [his]


def test_a_name_tells_its_owner_only_to_who_knows_the_owners() -> None:
    store = Store(Path("nowhere"))
    assert store.get("0" * 32 + ".png") is None
    named = [Store.new_name("alice", "png") for _ in range(50)]
    assert {owner_of(name, ("bob", "alice")) for name in named} == {"alice"}
    assert {owner_of(name, ("bob", "carol")) for name in named} == {None}
    assert len(set(named)) == 50


def test_stars_stay_when_it_is_made_again(tmp_path: Path) -> None:
    shelf = gallery(tmp_path)
    one, _ = keep(shelf), keep(shelf)
    shelf.star(one, True)
    assert shelf.rebuild() == 2
    assert names(shelf, starred=True) == [one]


def test_a_file_that_somebody_deleted_is_missed_without_a_word(tmp_path: Path) -> None:
    shelf = gallery(tmp_path)
    one, two = keep(shelf, created=1), keep(shelf, created=2)
    (shelf.store.folder / two).unlink()
    assert shelf.get(two) is None
    assert names(shelf) == [one]
    assert shelf.count(GalleryQuery()) == 1
    (shelf.store.folder / one).unlink()
    assert shelf.reconcile() == (0, 1)
    assert shelf.count(GalleryQuery()) == 0


def test_files_that_nobody_listed_are_found(tmp_path: Path) -> None:
    shelf = gallery(tmp_path)
    listed = keep(shelf)
    loose = shelf.store.put(png(replace(MADE, prompt="found in the folder")), "png")
    plain = shelf.store.put(b"no picture at all", "png")
    webp = shelf.store.put(recipe.convert(png(replace(MADE, prompt="of a webp")), "webp"), "webp")
    assert shelf.reconcile() == (3, 0)
    assert sorted(names(shelf)) == sorted([listed, loose, plain, webp])
    assert names(shelf, words="folder") == [loose]
    assert names(shelf, words="webp") == [webp]
    assert shelf.get(plain).recipe is None  # type: ignore[union-attr]
    assert shelf.reconcile() == (0, 0)


def test_a_picture_that_was_found_before_it_was_listed_is_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = gallery(tmp_path)
    put = shelf.store.put

    def put_and_found(*args: Any, **kwargs: Any) -> str:
        name = put(*args, **kwargs)
        assert shelf.reconcile() == (1, 0)
        return name

    monkeypatch.setattr(shelf.store, "put", put_and_found)
    name = keep(shelf, created=5.0)
    (kept,), _ = shelf.page(GalleryQuery())
    assert (kept.name, kept.created) == (name, 5.0)
    assert not caplog.records


def test_a_picture_that_is_kept_while_the_files_are_listed_keeps_its_star(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = gallery(tmp_path)
    list_files, kept = shelf.store.names, list[str]()

    def listed_and_kept() -> dict[str, float]:
        files = list_files()
        kept.append(keep(shelf))
        shelf.star(kept[0], True)
        return files

    monkeypatch.setattr(shelf.store, "names", listed_and_kept)
    assert shelf.reconcile() == (0, 0)
    assert names(shelf, starred=True) == kept


def test_a_damaged_index_is_laid_aside(tmp_path: Path) -> None:
    shelf = gallery(tmp_path)
    one = keep(shelf)
    shelf.close()
    for file in tmp_path.glob("gallery.db-*"):
        file.unlink()
    (tmp_path / "gallery.db").write_bytes(b"no database, but long enough to be taken for one" * 40)
    again = gallery(tmp_path)
    assert again.rebuild() == 1
    assert names(again) == [one]
    assert (tmp_path / "gallery.db.damaged").exists()


def test_a_picture_is_kept_where_the_index_cannot_be_written(tmp_path: Path) -> None:
    shelf = Gallery(Store(tmp_path / "pictures"), f"sqlite:///{tmp_path}")  # a folder
    name = keep(shelf)
    assert shelf.store.has(name)
    with pytest.raises(StorageError, match="gallery_url"):
        shelf.page(GalleryQuery())


@pytest.mark.parametrize("url", ["no-such-database://here", "postgresql+psycopg://u:p@ss:secret@host/d"])
def test_a_url_that_is_none_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="gallery_url") as raised:
        Gallery(Store(tmp_path), url)
    assert "secret" not in str(raised.value)


def test_what_has_a_star_does_not_grow_old(tmp_path: Path) -> None:
    shelf = gallery(tmp_path)
    one, two = keep(shelf), keep(shelf)
    shelf.star(one, True)
    store = Store(shelf.store.folder, max_age_s=60)
    assert store.expire(time.time() + 3600, spare=shelf.starred()) == 1
    assert store.has(one)
    assert not store.has(two)


def test_ten_thousand_pictures_are_searched_in_a_moment(tmp_path: Path) -> None:
    import sqlalchemy as sql

    from sfumato.pictures import gallery as module

    shelf = gallery(tmp_path)
    shelf.store.folder.mkdir(parents=True)
    words = ["cat", "rocket", "apple", "house", "tree"]
    rows = []
    for index in range(10_000):
        prompt = f"{words[index % 5]} number {index} " + "on a background of many words " * 8
        made = replace(MADE, prompt=prompt)
        name = Store.new_name("", "png")
        (shelf.store.folder / name).touch()
        rows.append(module._row(name, 1000.0 + index, "", recipe.asdict(made)))
    with shelf._begin() as connection:
        connection.execute(sql.insert(module.PICTURES), rows)
    for query in (
        GalleryQuery(),
        GalleryQuery(words="rocket 9996"),
        GalleryQuery(words="not in any"),
        GalleryQuery(words="cat", model="m"),
    ):
        took = []
        for _ in range(5):  # the quickest: the machine has other things to do
            began = time.process_time()
            found, _more = shelf.page(query)
            shelf.count(query)
            took.append(time.process_time() - began)
        assert bool(found) == (query.words != "not in any")
        assert min(took) < 0.1, (query, took)


# Over HTTP.


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with Inside(tmp_path).client() as client:
        yield client


def listed(client: TestClient, **query: Any) -> list[dict[str, Any]]:
    answer = client.get("/v1/images/gallery", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("shape", ["url", "b64_json"])
def test_every_picture_is_kept_as_it_was_answered(client: TestClient, shape: str, format: str) -> None:
    body = DRAW["json"] | {"response_format": shape, "output_format": format, "n": 2}
    drawn = client.post("/v1/images/generations", json=body).json()["data"]
    kept = listed(client)
    assert len(kept) == 2
    assert all(each["name"].endswith(f".{format}") for each in kept)
    files = [client.get(f"/generated-images/{each['name']}").content for each in kept]
    if shape == "url":
        assert {each["url"].rsplit("/", 1)[1] for each in drawn} == {each["name"] for each in kept}
    else:
        assert sorted(files) == sorted(base64.b64decode(each["b64_json"]) for each in drawn)


@pytest.mark.parametrize("path", ["/sdapi/v1/txt2img", "/v1/images/generations"])
def test_the_setting_says_that_base64_is_not_kept(tmp_path: Path, path: str) -> None:
    with Inside(tmp_path, keep_pictures=False).client() as client:
        assert client.post(path, json={"prompt": "a cat", "response_format": "b64_json"}).status_code == 200
        assert listed(client) == []
        client.post("/v1/images/generations", json={"prompt": "a cat", "response_format": "url"})
        assert len(listed(client)) == 1


def test_a_stream_says_under_which_name_it_is_kept(client: TestClient) -> None:
    answer = client.post("/v1/images/generations", json=DRAW["json"] | {"stream": True})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1]["name"] == listed(client)[0]["name"]


class Tired(Painter):
    """Fails with the second picture."""

    async def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        if generation.seed == 8:
            yield Failed(DrawError("no more"))
            return
        async for event in super().submit(config, generation):
            yield event


@pytest.mark.parametrize("shape", ["url", "b64_json"])
def test_nothing_stays_of_a_request_that_fails_half_way(tmp_path: Path, shape: str) -> None:
    inside = Inside(tmp_path, max_active=1)
    inside.service.engine = Tired()
    body = DRAW["json"] | {"n": 2, "seed": 7, "response_format": shape}
    with inside.client() as client:
        assert client.post("/v1/images/generations", json=body).status_code == 500
        assert listed(client) == []
        assert list(inside.store.folder.iterdir()) == []
        answer = client.post("/v1/images/generations", json=body | {"stream": True})
        assert "image_generation.completed" in answer.text
        assert "no more" in answer.text
        assert len(listed(client)) == 1  # whoever streams has got it


def test_a_full_disk_costs_nobody_a_picture_that_is_answered(tmp_path: Path) -> None:
    inside = Inside(tmp_path)
    inside.store.folder.parent.mkdir(parents=True)
    inside.store.folder.write_text("no folder")
    with inside.client() as client:
        body = DRAW["json"] | {"response_format": "b64_json"}
        assert client.post("/v1/images/generations", json=body).status_code == 200
        assert client.post("/v1/images/generations", json=DRAW["json"]).status_code == 507


def test_star_and_delete(client: TestClient) -> None:
    client.post("/v1/images/generations", json=DRAW["json"])
    name = listed(client)[0]["name"]
    where = f"/v1/images/gallery/{name}"
    assert client.patch(where, json={"starred": True}).json()["starred"]
    assert [each["name"] for each in listed(client, starred=True)] == [name]
    assert client.get(where).json()["recipe"]["prompt"] == "a cat"
    assert client.delete(where).json()["name"] == name
    assert listed(client) == []
    assert client.get(f"/generated-images/{name}").status_code == 404
    for answer in (client.get(where), client.delete(where), client.patch(where, json={"starred": True})):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "picture_not_found"


@pytest.mark.parametrize("name", ["..%2f..%2fgallery.db", "%2e%2e", "x" * 5000, "a.png", "%00", "gallery.db"])
def test_names_are_never_paths(client: TestClient, name: str) -> None:
    for method in ("GET", "DELETE"):
        assert client.request(method, f"/v1/images/gallery/{name}").status_code == 404
    assert client.get(f"/generated-images/{name}/thumbnail").status_code == 404


@pytest.mark.parametrize("before", ["x", "1e999_a", "nan_a", "_", "1" * 101])
def test_a_place_that_is_none_is_refused(client: TestClient, before: str) -> None:
    answer = client.get("/v1/images/gallery", params={"before": before})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "before"


def test_with_keys_each_sees_its_own(tmp_path: Path) -> None:
    keys = {name: {"authorization": f"Bearer {name}-key"} for name in ("alice", "bob")}
    with Inside(tmp_path, api_keys="alice:alice-key,bob:bob-key").client() as client:
        client.post("/v1/images/generations", json=DRAW["json"], headers=keys["alice"])
        name = client.get("/v1/images/gallery", headers=keys["alice"]).json()["data"][0]["name"]
        assert client.get("/v1/images/gallery", headers=keys["bob"]).json()["data"] == []
        for method in ("GET", "DELETE"):
            assert client.request(method, f"/v1/images/gallery/{name}", headers=keys["bob"]).status_code == 404
        star = client.patch(f"/v1/images/gallery/{name}", json={"starred": True}, headers=keys["bob"])
        assert star.status_code == 404
        assert client.get("/v1/images/gallery").status_code == 401
        assert client.get(f"/generated-images/{name}/thumbnail").status_code == 200


def test_a_thumbnail_is_small_and_says_nothing(client: TestClient) -> None:
    store = client.app.state.gallery.store  # type: ignore[attr-defined]
    name = store.put(recipe.encode(Image.new("RGBA", (900, 300), "orange"), MADE), "png")
    answer = client.get(f"/generated-images/{name}/thumbnail")
    image = Image.open(io.BytesIO(answer.content))
    assert (image.format, image.size) == ("WEBP", (320, 107))
    assert b"a cat" not in answer.content


def test_the_command_reads_the_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "generated-images")
    name = store.put(png(), "png")
    done = CliRunner().invoke(command, ["gallery", "rebuild", "--data", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "1 picture" in done.output
    assert names(gallery(tmp_path)) == [name]


# Recipes of files.


def said(client: TestClient, file: bytes) -> dict[str, Any]:
    answer = client.post("/v1/images/recipe", files={"image": file})
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def with_chunks(**texts: str) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_text(name.replace("_AT_", "-"), text)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


INFOTEXT = (
    "a cat, <lora:x:1>\nNegative prompt: blurry, bad\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 12345678901234567, Size: 512x768, "
    "Model hash: abc, Model: dreamshaper_8, Denoising strength: 0.5, Clip skip: 2, Version: v1.10.1"
)
OF_INFOTEXT = {
    "model": "dreamshaper_8", "prompt": "a cat, <lora:x:1>", "negative_prompt": "blurry, bad", "width": 512,
    "height": 768, "steps": 20, "guidance_scale": 7.0, "seed": 12345678901234567, "scheduler": "k_dpmpp_2m",
    "clip_skip": 1, "strength": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_ours_is_read_from_every_format(client: TestClient, format: str) -> None:
    made = replace(
        MADE,
        prompt="ein Käse 🧀",
        seed=2**63 - 1,
        sampling=replace(MADE.sampling, negative_prompt="Maus", scheduler="dpmpp_2m_beta"),
    )
    found = said(client, recipe.convert(png(made), format))
    assert found["source"] == "sfumato"
    fields = found["recipe"]
    assert (fields["prompt"], fields["seed"], fields["negative_prompt"]) == ("ein Käse 🧀", 2**63 - 1, "Maus")
    assert fields["scheduler"] == "dpmpp_2m_beta"
    assert "strength" not in fields


def test_automatic1111_from_png(client: TestClient) -> None:
    assert said(client, with_chunks(parameters=INFOTEXT)) == {
        "object": "recipe", "source": "automatic1111", "recipe": OF_INFOTEXT, "warnings": [],
    }  # fmt: skip


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_automatic1111_from_exif(client: TestClient, format: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + INFOTEXT.encode("utf-16-be")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format.upper(), exif=exif.tobytes())
    assert said(client, file.getvalue())["recipe"] == OF_INFOTEXT


def test_comfyui_when_it_carries_that_text(client: TestClient) -> None:
    assert said(client, with_chunks(parameters=INFOTEXT, workflow="{}", prompt="{}"))["source"] == "comfyui"
    refused = client.post("/v1/images/recipe", files={"image": with_chunks(workflow="{}", prompt="{}")})
    assert refused.status_code == 400
    assert "ComfyUI" in refused.json()["error"]["message"]


INVOKE = {
    "app_version": "5.0.0", "positive_prompt": "a cat", "negative_prompt": "blurry", "width": 512, "height": 768,
    "seed": 42, "cfg_scale": 7.5, "steps": 30, "scheduler": "dpmpp_2m_k", "model": {"name": "juggernaut", "key": "x"},
}  # fmt: skip
INVOKE_2 = {
    "model": "stable diffusion", "model_weights": "sd-1.5",
    "image": {
        "prompt": [{"prompt": "a cat", "weight": 1.0}], "steps": 30, "cfg_scale": 7.5, "width": 512, "height": 768,
        "seed": 42, "sampler": "k_euler_a",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("chunk", "made", "scheduler"),
    [
        ("invokeai_metadata", INVOKE, "k_dpmpp_2m"),
        ("sd_AT_metadata", INVOKE_2, "euler_a"),
        ("invokeai_metadata", INVOKE | {"scheduler": "kdpm_9"}, None),
    ],
)
def test_invokeai(client: TestClient, chunk: str, made: dict[str, Any], scheduler: str | None) -> None:
    found = said(client, with_chunks(**{chunk: json.dumps(made)}))
    assert found["source"] == "invokeai"
    fields = found["recipe"]
    assert (fields["prompt"], fields["seed"], fields["steps"], fields["guidance_scale"]) == ("a cat", 42, 30, 7.5)
    assert (fields["width"], fields["height"], fields.get("scheduler")) == (512, 768, scheduler)
    assert bool(found["warnings"]) == (scheduler is None)


@pytest.mark.parametrize(
    "texts",
    [
        {"invokeai_metadata": "[" * 100_000},
        {"invokeai_metadata": '{"seed": 1e999, "steps": "x", "width": -5, "model": [1], "positive_prompt": 7}'},
        {"sfumato": "null", "parameters": ""},
        {"sfumato": '{"prompt": {"a": 1}, "seed": -1}'},
        {"parameters": "Steps: " + "9" * 5000},
        {},
    ],
)
def test_whatever_stands_in_a_file_is_an_answer_or_a_refusal(client: TestClient, texts: dict[str, str]) -> None:
    answer = client.post("/v1/images/recipe", files={"image": with_chunks(**texts)})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        assert all(value is not None for value in answer.json()["recipe"].values())
