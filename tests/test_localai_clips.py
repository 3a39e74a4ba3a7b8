"""LocalAI's model files of clips: fetched from the hub under the real ids, drawn, played."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest

from support import clip_classes, tiny
from support.answerable import within
from support.drawing import source
from support.families_moving import FAMILIES
from support.hub import Hub
from support.probed import needs
from support.serving import TIMEOUT_S, Server

INFERENCE = "temperature: 0.8\ntop_p: 0.95\ntop_k: 40\nmin_p: 0\nrepeat_penalty: 1\n"
"""Defaults that LocalAI writes into every file that it installs."""

FILES = {
    # Of its gallery.
    "ltx-2.3": """artifacts:
- name: model
  target: model
  source: {type: huggingface, repo: Lightricks/LTX-2.3}
backend: diffusers
diffusers: {cuda: true, pipeline_type: LTX2ImageToVideoPipeline}
low_vram: true
name: ltx-2.3
options: ['torch_dtype:bf16']
parameters: {model: Lightricks/LTX-2.3}
""",
    # As the change that brought Wan tells people to write.
    "wan21": """backend: diffusers
diffusers: {cuda: true, pipeline_type: WanPipeline}
f16: true
known_usecases: [FLAG_VIDEO]
name: wan21
options: ['guidance_scale:5.0', 'num_frames:81', 'torch_dtype:bf16']
parameters: {model: Wan-AI/Wan2.1-T2V-1.3B-Diffusers}
step: 40
""",
    # As people write from these and from the gallery's files of pictures.
    "wan-2.1-i2v": """backend: diffusers
diffusers: {cuda: true, img2vid: true, pipeline_type: WanImageToVideoPipeline}
f16: true
known_usecases: [video]
low_vram: true
name: wan-2.1-i2v
parameters: {model: Wan-AI/Wan2.1-I2V-14B-480P-Diffusers}
step: 2
""",
    "ltx-video": """backend: diffusers
cfg_scale: 5
diffusers: {cuda: true, enable_parameters: 'negative_prompt,num_inference_steps', pipeline_type: LTXPipeline}
f16: true
name: ltx-video
parameters: {model: Lightricks/LTX-Video}
step: 2
""",
    # Of its documentation.
    "img2vid": """backend: diffusers
cuda: true
diffusers: {pipeline_type: StableVideoDiffusionPipeline}
f16: true
name: img2vid
parameters: {model: stabilityai/stable-video-diffusion-img2vid}
step: 25
""",
    "txt2vid": """backend: diffusers
cuda: true
diffusers: {cuda: true, pipeline_type: VideoDiffusionPipeline}
f16: true
name: txt2vid
parameters: {model: damo-vilab/text-to-video-ms-1.7b}
step: 25
""",
}
REPOSITORIES: dict[str, Any] = {
    "Lightricks/LTX-2.3": clip_classes.ltx2,
    "Lightricks/LTX-Video": FAMILIES["LTX"].build,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": FAMILIES["Wan"].build,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": clip_classes.wan_image,
    "stabilityai/stable-video-diffusion-img2vid": FAMILIES["StableVideoDiffusion"].build,
    "damo-vilab/text-to-video-ms-1.7b": clip_classes.text_to_video,
}
FROM_PICTURE = ("ltx-2.3", "wan-2.1-i2v", "img2vid")
WITH_SOUND = ("ltx-2.3",)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    needs("mp4")
    root = tmp_path_factory.mktemp("localai-clips")
    (root / "models").mkdir()
    for name, text in FILES.items():
        (root / "models" / f"{name}.yaml").write_text(text + INFERENCE)
    with Hub() as hub:
        for number, (repo, build) in enumerate(REPOSITORIES.items()):
            hub.add(repo, tiny.save(build(), root / str(number)))
        env = hub.environment(root / "hf")
        with Server(root / "models", root / "data", "--device", "cpu", "--loaded-models", "10", env=env) as server:
            yield server


def request(name: str) -> dict[str, Any]:
    """In LocalAI's words."""
    body: dict[str, Any] = {"model": name, "prompt": "a cat", "width": 32, "height": 32, "num_frames": 9, "fps": 8,
                            "step": 2, "seed": 3}  # fmt: skip
    if name in FROM_PICTURE:
        body["start_image"] = base64.b64encode(source(32, 32)).decode()
    return body


def played(data: bytes) -> dict[str, int]:
    """What a player has of a file, after it has decoded all of it: frames and samples of sound."""
    import av

    with av.open(io.BytesIO(data)) as container:
        kinds = {stream.type: stream.index for stream in container.streams}
        counts = dict.fromkeys(kinds, 0)
        for frame in container.decode(list(container.streams)):
            kind = "video" if isinstance(frame, av.VideoFrame) else "audio"
            counts[kind] += 1 if kind == "video" else frame.samples
            assert kind == "audio" or (frame.width, frame.height) == (32, 32)
    return counts


@pytest.mark.parametrize("name", FILES)
def test_each_is_fetched_drawn_and_played(server: Server, name: str) -> None:
    drawn = server.client.post("/video", json=request(name))
    assert drawn.status_code == 200, drawn.text
    file = server.client.get(drawn.json()["data"][0]["url"])
    assert file.headers["content-type"] == "video/mp4"
    counts = played(file.content)
    assert counts["video"] == 9
    assert bool(counts.get("audio")) == (name in WITH_SOUND)

    body = request(name)
    fields = {"input_reference": body.pop("start_image", None), "num_inference_steps": body.pop("step")}
    made = server.client.post("/v1/videos", json={**body, **fields})
    assert made.status_code == 200, made.text
    id = made.json()["id"]

    def state() -> dict[str, Any]:
        told: dict[str, Any] = server.client.get(f"/v1/videos/{id}").json()
        return told

    within(TIMEOUT_S, lambda: state()["status"] in ("completed", "failed"))
    assert state()["status"] == "completed", state()
    assert played(server.client.get(f"/v1/videos/{id}/content").content) == counts
    (tasks,) = (
        each["sfumato"]["tasks"] for each in server.client.get("/v1/models").json()["data"] if each["id"] == name
    )
    task = "image-to-video" if name in FROM_PICTURE else "text-to-video"
    assert [each for each in tasks if each != "video-to-video"] == [task]
