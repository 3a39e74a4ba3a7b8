"""Chat completions for picture models: what a conversation asks for, and the answer's shape."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.testclient import TestClient

from sfumato.api.chat.conversation import MAX_MESSAGES, in_markdown
from sfumato.api.chat.sizes import ImageConfig
from sfumato.api.openai import answers
from sfumato.core import Generation
from support import quick
from support.answerable import within
from support.inside import Inside
from support.pictures import encoded

PATH = "/v1/chat/completions"
TEXT = {"role": "user", "content": "a cat"}


def uri(side: int) -> str:
    """A square that is known again by its size."""
    return "data:image/png;base64," + base64.b64encode(encoded(Image.new("RGB", (side, side), "orange"))).decode()


def part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def user(text: str, *urls: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text}, *(part({"url": url}) for url in urls)]}


def answered(*urls: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "images": [part({"url": url}) for url in urls]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


class Door(Inside):
    """An application that one client uses for all tests here."""

    http: TestClient


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("chat")
    models = folder / "models"
    inside = Door(folder, max_text_mb=1, api_keys="anna:key-a,ben:key-b", content_images="ben")
    for name, text in MODELS.items():
        (models / f"{name}.yaml").write_text(f"name: {name}\n{text}")
    for name, cls in CLASSES.items():
        (models / name).mkdir()
        (models / name / "model_index.json").write_text(json.dumps({"_class_name": cls}))
    with inside.client() as inside.http:
        yield inside


CLASSES = {"music": "AudioLDMPipeline", "labels": "DiTPipeline"}
MODELS = {
    "music": "parameters: {model: music}\n",
    "labels": "parameters: {model: labels}\ndiffusers: {enable_parameters: image}\n",
    "closed": "parameters: {model: some/one}\ndiffusers: {enable_parameters: num_inference_steps}\n",
    "small": "parameters: {model: some/one}\nsize: 128x128\n",
}


def post(inside: Door, key: str = "key-a", **body: Any) -> httpx.Response:
    inside.engine.seen.clear()
    headers = {"authorization": f"Bearer {key}"}
    return inside.http.post(PATH, json={"model": "m", "messages": [TEXT], **body}, headers=headers)


def drawn(inside: Door, **body: Any) -> Generation:
    answer = post(inside, **body)
    assert answer.status_code == 200, answer.text
    return inside.engine.seen[0]


def side(png: bytes) -> int:
    return Image.open(io.BytesIO(png)).width


def test_the_answer_is_a_completion_with_pictures(inside: Door) -> None:
    answer = post(inside, seed=5, n=2)
    body = answer.json()
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "stop", "assistant")
    assert choice["message"]["content"] == ""
    images = choice["message"]["images"]
    assert [(each["type"], each["index"], each["seed"]) for each in images] == [
        ("image_url", 0, 5),
        ("image_url", 1, 6),
    ]
    for each in images:
        head, _, data = each["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 8)
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert usage["completion_tokens_details"] == {"image_tokens": usage["completion_tokens"]}


CONVERSATIONS: list[tuple[str, list[dict[str, Any]], str, list[int]]] = [
    ("a text", [TEXT], "a cat", []),
    ("a system message is no prompt", [{"role": "system", "content": "You are an artist."}, TEXT], "a cat", []),
    ("the last text of the user", [TEXT, {"role": "assistant", "content": "?"}, user("a dog")], "a dog", []),
    ("several parts", [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
     "a\nb", []),
    ("a picture and a text", [user("make it blue", uri(16))], "make it blue", [16]),
    ("several pictures", [user("both", uri(16), uri(24))], "both", [16, 24]),
    ("keys of other parts are null", [{"role": "user", "content": [
        {"type": "text", "text": "x", "image_url": None, "image": None, "file_id": None},
        {"type": "image_url", "text": None, "image_url": {"url": uri(16)}}]}], "x", [16]),
    ("a URL alone", [{"role": "user", "content": [part(uri(16)), {"type": "text", "text": "x"}]}], "x", [16]),
    ("without data:", [{"role": "user", "content": [part({"url": uri(16).split(",")[1]}),
                                                    {"type": "text", "text": "x"}]}], "x", [16]),
    ("the answer before", [TEXT, answered(uri(16)), user("make it blue")], "make it blue", [16]),
    ("the latest answer", [TEXT, answered(uri(16)), user("a"), answered(uri(24)), user("b")], "b", [24]),
    ("the last of several", [TEXT, answered(uri(16), uri(24)), user("b")], "b", [24]),
    ("a picture of the user goes before", [TEXT, answered(uri(16)), user("b", uri(24))], "b", [24]),
    ("an earlier picture of the user", [user("a", uri(16)), said("no"), user("b")], "b", [16]),
    ("Markdown", [TEXT, said(f"Here: ![a cat]({uri(16)}) as you said"), user("b")], "b", [16]),
    ("Markdown in a part", [TEXT, {"role": "assistant", "content": [{"type": "text", "text": f"![]({uri(16)})"}]},
                            user("b")], "b", [16]),
    ("both are one", [TEXT, {**answered(uri(16)), "content": f"![a]({uri(24)})"}, user("b")], "b", [16]),
    ("a link is no picture", [TEXT, said(f"[a]({uri(16)}) ![b](/files/1)"), user("b")], "b", []),
    ("only what is used is looked at", [user("a", "data:x"), answered("data:x"), user("b", uri(16))], "b", [16]),
    ("a picture alone means the text before", [TEXT, answered(uri(16)),
                                               {"role": "user", "content": [part({"url": uri(24)})]}], "a cat", [24]),
    ("tools are not read", [TEXT, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                            {"role": "tool", "tool_call_id": "1", "content": "x"}, user("b")], "b", []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "prompt", "sources"), [pytest.param(*each, id=name) for name, *each in CONVERSATIONS]
)
def test_what_a_conversation_asks_for(
    inside: Door, messages: list[dict[str, Any]], prompt: str, sources: list[int]
) -> None:
    generation = drawn(inside, messages=messages)
    assert generation.prompt == prompt
    assert [side(image) for image in generation.images] == sources


def test_our_own_urls_are_sources(inside: Door) -> None:
    """By whatever name the client reaches this server, and from every route that takes a picture."""
    url = post(inside, response_format="url").json()["choices"][0]["message"]["images"][0]["image_url"]["url"]
    name = url.rsplit("/", 1)[1]
    assert url == f"http://testserver/generated-images/{name}"
    for own in (
        url,
        f"http://localhost:1/generated-images/{name}",
        f"https://pictures.example/ai/generated-images/{name}",
    ):
        for message in (answered(own), said(f"![a cat]({own})")):
            generation = drawn(inside, messages=[TEXT, message, user("make it blue")])
            assert [side(image) for image in generation.images] == [8]
    for path, body in (("edits", {"images": [{"image_url": url}]}), ("generations", {"image": url})):
        asked = {"model": "m", "prompt": "a", **body}
        answer = inside.http.post(f"/v1/images/{path}", json=asked, headers={"authorization": "Bearer key-a"})
        assert answer.status_code == 200, answer.text
        assert [side(image) for image in inside.engine.seen[-1].images] == [8]


def test_a_picture_that_is_gone_is_told(inside: Door) -> None:
    url = f"http://127.0.0.1:9/generated-images/{'0' * 32}.png"
    answer = post(inside, messages=[user("b", url)])
    assert answer.status_code == 400
    assert "it has expired" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["testserver", "localhost:8080", "127.0.0.1:9"])
@pytest.mark.parametrize("shape", [answered, lambda url: said(f"![a cat]({url})"), lambda url: user("a cat", url)])
def test_a_conversation_goes_on_when_its_last_picture_has_expired(inside: Door, host: str, shape: Any) -> None:
    url = f"http://{host}/generated-images/{'0' * 32}.png"
    answer = post(inside, messages=[TEXT, shape(url), user("make it blue")], strength=0.5)
    assert answer.status_code == 200, answer.text
    assert inside.engine.seen[0].images == ()
    assert markdown(answer) == "The earlier picture has expired: this one is drawn from the text alone."


def test_an_earlier_picture_of_another_server_that_is_gone_is_told(inside: Door) -> None:
    for url in (f"http://no-such-host.invalid/generated-images/{'0' * 32}.png", "http://localhost:9/a.png"):
        answer = post(inside, messages=[TEXT, answered(url), user("make it blue")])
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[1].images[0]")


def test_the_address_of_a_picture_in_a_text() -> None:
    text = '![a](http://x/1.png) [b](http://x/2.png) ![c] (http://x/3.png) ![d](<http://x/4.png> "title")'
    assert list(in_markdown(text)) == ["http://x/1.png", "http://x/4.png"]
    assert list(in_markdown("![" * 10 + "](" * 10)) == []


def test_where_the_model_does_not_edit_the_answer_says_so(inside: Door) -> None:
    for model in ("closed", "labels"):
        for messages in ([TEXT, answered(uri(16)), user("make it blue")], [user("make it blue", uri(16))]):
            answer = post(inside, model=model, messages=messages)
            assert answer.status_code == 200, answer.text
            assert inside.engine.seen[0].images == ()
            message = answer.json()["choices"][0]["message"]
            assert message["content"] == f"{model} does not edit pictures: this one is drawn from the text alone."
            assert len(message["images"]) == 1
            streamed = post(inside, model=model, messages=messages, stream=True)
            assert "does not edit pictures" in chunks(streamed)[0]["choices"][0]["delta"]["content"]


@pytest.mark.parametrize("model", ["gpt-4o", "music"])
def test_what_is_no_picture_model_is_unknown(inside: Door, model: str) -> None:
    answer = post(inside, model=model)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "model_not_found")
    assert model in error["message"]


def test_strength_without_a_picture_is_told_and_not_refused(inside: Door) -> None:
    """Clients set it once for all messages."""
    answer = post(inside, strength=0.5)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-sfumato-ignored"] == "strength"
    assert drawn(inside, strength=0.5, messages=[user("b", uri(16))]).sampling.strength == 0.5


def test_fields_of_language_models_are_listed(inside: Door) -> None:
    fields = {"temperature": 0.7, "top_p": 1, "max_tokens": 100, "tools": [], "response_format": {"type": "text"}}
    answer = post(inside, **fields, metadata={"a": "b"}, image_config={"font": "x"}, partial_images=2)
    assert answer.status_code == 200, answer.text
    assert set(answer.headers["x-sfumato-ignored"].split(", ")) == {
        *fields,
        "metadata",
        "image_config.font",
        "partial_images",
    }


def test_what_stands_beside_extra_body_goes_before_it(inside: Door) -> None:
    assert drawn(inside, seed=1, extra_body={"seed": 2, "guidance_scale": 3}).seed == 1
    assert inside.engine.seen[0].sampling.guidance_scale == 3


@pytest.mark.parametrize(
    ("config", "own", "multiple", "size"),
    [
        ({"aspect_ratio": "16:9", "image_size": "1K"}, (128, 128), 8, (1344, 768)),
        ({"aspect_ratio": "2:3", "image_size": "2K"}, (128, 128), 16, (1664, 2496)),
        ({"aspect_ratio": "2:3", "image_size": "0.5K"}, (128, 128), 8, (416, 624)),
        ({"aspect_ratio": "1:1"}, (128, 128), 8, (128, 128)),
        ({"aspect_ratio": "16:9"}, (1024, 1024), 8, (1344, 768)),
        ({"aspect_ratio": "16:9"}, (512, 512), 64, (704, 384)),
        ({"image_size": "1k"}, (128, 128), 8, (1024, 1024)),
        ({"aspect_ratio": "1:4", "image_size": "1K"}, (128, 128), 16, (512, 2048)),
        ({"aspect_ratio": "auto", "image_size": "1K"}, (1344, 768), 8, (1352, 776)),
    ],
)
def test_sizes(config: dict[str, str], own: tuple[int, int], multiple: int, size: tuple[int, int]) -> None:
    assert ImageConfig(**config).size(own, multiple) == size


def test_image_config_is_a_size(inside: Door) -> None:
    assert drawn(inside, model="small", image_config={"aspect_ratio": "3:2"}).sampling.size == (160, 104)
    assert drawn(inside, model="small", image_config={"aspect_ratio": "3:2"}, size="64x64").sampling.size == (64, 64)
    assert drawn(inside, model="small", image_config={}).sampling.size is None
    edited = post(inside, model="m", image_config={"image_size": "1K"}, messages=[user("b", uri(16))])
    assert inside.engine.seen[0].sampling.size is None  # LiteLLM sends it with every edit
    assert edited.headers["x-sfumato-ignored"] == "image_config"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"image_config": {"aspect_ratio": "wide"}}, "image_config"),
        ({"image_config": {"image_size": "8K"}}, "image_config"),
        ({"image_config": {"aspect_ratio": "1:1", "image_size": "4K"}}, "image_config"),
        ({"image_config": {"aspect_ratio": "99:1"}}, "image_config"),
        ({"modalities": ["text"]}, "modalities"),
        ({"messages": []}, "messages"),
        ({"messages": [TEXT] * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a cat"}]}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [user("a", "")]}, "messages[0].content[1]"),
        ({"messages": [user("a"), answered(""), user("b")]}, "messages[1].images[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part(None)]}]},
         "messages[0].content[1]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"},
                                                    {"type": "input_image", "file_id": "file-1"}]}]},
         "messages[0].content[1]"),
        ({"messages": [user("a", "data:image/png;base64,AAAA")]}, "messages[0].content[1]"),
        ({"messages": [user("a", uri(16), "data:image/png;base64,AAAA")]}, "messages[0].content[2]"),
        ({"messages": [user("a"), answered("data:image/png;base64,AAAA"), user("b")]}, "messages[1].images[0]"),
        ({"image": "data:image/png;base64,AAAA"}, "image"),
        ({"messages": [user("a", *[uri(16)] * 17)]}, "image"),
        ({"n": 0}, "n"),
        ({"size": "huge"}, "size"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(inside: Door, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        answer = post(inside, stream=stream, **fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param, error


def test_a_long_conversation_is_refused(inside: Door) -> None:
    messages = [{"role": "assistant", "content": "word " * 100_000}] * 3 + [TEXT]
    assert post(inside, messages=messages).status_code == 413


def chunks(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_stream_is_chunks_with_pictures_at_the_end(inside: Door) -> None:
    first, *pictures, last, usage = chunks(
        post(inside, n=2, seed=3, stream=True, stream_options={"include_usage": True})
    )
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [each["choices"][0]["delta"]["images"][0]["seed"] for each in pictures] == [3, 4]
    assert [each["choices"][0]["delta"]["images"][0]["index"] for each in pictures] == [0, 1]
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2)
    whole = (first, *pictures, last, usage)
    assert {each["object"] for each in whole} == {"chat.completion.chunk"}
    assert len({(each["id"], each["created"], each["model"]) for each in whole}) == 1
    assert not any("usage" in each for each in chunks(post(inside, stream=True)))


def markdown(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def test_pictures_in_the_content(inside: Door) -> None:
    """By the setting for one key, and by the request for any."""
    assert markdown(post(inside, "key-a")) == ""
    assert markdown(post(inside, "key-b")).startswith("![a cat](http://testserver/generated-images/")
    assert markdown(post(inside, "key-b", content_images=False)) == ""
    answer = post(inside, "key-a", content_images=True, n=2, messages=[user("a [red]\n(cat)")])
    lines = markdown(answer).split("\n\n")
    assert len(lines) == 2
    assert all(line.startswith("![a (red) (cat)](http://testserver/generated-images/") for line in lines)
    assert len(answer.json()["choices"][0]["message"]["images"]) == 2
    slashed = post(inside, "key-b", messages=[user("a \\cat\\")])
    assert markdown(slashed).startswith("![a /cat/](http://testserver/generated-images/")
    deltas = [each["choices"][0]["delta"] for each in chunks(post(inside, content_images=True, n=2, stream=True))]
    text = "".join(delta.get("content", "") for delta in deltas)
    assert [len(list(in_markdown(text))), text.count("\n\n")] == [2, 1]
    for url in in_markdown(text):
        assert inside.http.get(url).headers["content-type"] == "image/png"


def test_sources_are_not_kept_while_it_is_drawn(inside: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the answer's functions have keeps a picture in memory once more, for minutes."""
    asked: list[Any] = []
    submit, wait = answers.submit, answers.all_pictures

    async def submitted(service: Any, body: Any, more: Any) -> Any:
        asked.append(more)
        assert more["images"]
        return await submit(service, body, more)

    async def waiting(job: Any, gallery: Any) -> Any:
        assert asked[0]["images"] == []
        return await wait(job, gallery)

    monkeypatch.setattr(answers, "submit", submitted)
    monkeypatch.setattr(answers, "all_pictures", waiting)
    assert [side(image) for image in drawn(inside, messages=[user("b", uri(16))]).images] == [16]
    assert len(asked) == 1


def test_the_setting_names_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="content_images: no API key has the name 'bob'"):
        Inside(tmp_path, api_keys="anna:key-a", content_images="bob")


def test_the_setting_for_all(tmp_path: Path) -> None:
    inside = Inside(tmp_path, content_images="*")
    with inside.client() as client:
        assert markdown(client.post(PATH, json={"messages": [TEXT]})).startswith("![a cat](http")


def test_formats(inside: Door) -> None:
    answer = post(inside, output_format="webp")
    assert answer.json()["choices"][0]["message"]["images"][0]["image_url"]["url"].startswith("data:image/webp;base64,")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[quick.Server]:
    folder = tmp_path_factory.mktemp("slow")
    with quick.Server(folder, folder / "data") as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_work(slow: quick.Server, stream: bool) -> None:
    id = f"left-{stream}"
    body = {"messages": [TEXT], "steps": quick.FOR_EVER, "stream": stream}

    def status() -> str:
        answer = slow.client.get(f"/v1/images/progress/{id}")
        return str(answer.json().get("status"))

    with httpx.Client(base_url=slow.url) as client:
        if stream:
            with client.stream("POST", PATH, json=body, headers={"x-request-id": id}) as answer:
                assert any(line.startswith(": step 1 of 2") for line in answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(PATH, json=body, headers={"x-request-id": id}, timeout=2)
    within(60, lambda: status() == "cancelled")


def test_it_is_cancelled_by_its_id(slow: quick.Server) -> None:
    body = {"messages": [TEXT], "steps": quick.FOR_EVER, "stream": True}
    with slow.client.stream("POST", PATH, json=body, headers={"x-request-id": "by-id"}) as answer:
        lines = answer.iter_lines()
        assert any(line.startswith(": step") for line in lines)
        assert slow.client.delete("/v1/images/progress/by-id").status_code == 200
        *_, last = [line for line in lines if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "cancelled"
