"""`preprocess: pose`: skeletons as OpenPose draws them, of the joints that transformers' ViTPose finds."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from sfumato.config import ModelConfig
from sfumato.core import Control
from sfumato.drawing import preprocessors, skeletons
from sfumato.errors import LoadError
from sfumato.models import estimators
from sfumato.models.estimators import JOINTS, PEOPLE, Estimator
from sfumato.pictures import recipe
from support import estimators as tiny_ones
from support import nets
from support.answers import image_of
from support.families import picture
from support.families_served import Served, encoded, served

PEOPLE_THERE = picture(5).resize((64, 64))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("pose")
    with served(folder, nets.families(), pose_model="pose-here", person_model="people-here") as server:
        tiny_ones.save_net(server.folder)
        tiny_ones.save_person(server.folder / "people-here")
        tiny_ones.save_pose(server.folder / "pose-here")
        yield server


def loaded(kind: str, folder: Path) -> Estimator:
    config = ModelConfig(name="x", part=kind, model=str(folder), folder=folder, cuda=False, dtype="fp32")
    made: Estimator = estimators.load(config, "cpu", lambda status: None, lambda needs: None).pipeline
    return made


def of_transformers(folder: Path, image: Image.Image) -> Image.Image:
    """As its documentation does it."""
    read: dict[str, Any] = {"use_safetensors": True}
    detector = transformers.AutoModelForObjectDetection.from_pretrained(folder / "people-here", **read)
    poses = transformers.VitPoseForPoseEstimation.from_pretrained(folder / "pose-here", **read)
    look = transformers.AutoImageProcessor.from_pretrained(folder / "people-here")
    fit = transformers.AutoImageProcessor.from_pretrained(folder / "pose-here")
    with torch.no_grad():
        outputs = detector(**look(images=image, return_tensors="pt"))
        sizes = torch.tensor([image.size[::-1]])
        (found,) = look.post_process_object_detection(outputs, target_sizes=sizes, threshold=PEOPLE)
        boxes = found["boxes"][found["labels"] == 1].numpy()
        boxes[:, 2:] -= boxes[:, :2]
        assert len(boxes) > 1
        outputs = poses(**fit(image, boxes=[boxes], return_tensors="pt"))
        (people,) = fit.post_process_pose_estimation(outputs, boxes=[boxes], threshold=JOINTS)
    joints = [
        {int(at): (float(x), float(y)) for at, (x, y) in zip(each["labels"], each["keypoints"], strict=True)}
        for each in people
    ]
    assert any(len(each) > 4 for each in joints)
    return skeletons.drawn(joints, image.size)


def drawn(server: Served, **control: Any) -> Any:
    fields = {"step": 4, "size": "64x64", "guidance_scale": 5.0}
    return server.generate(server.model("sd"), controls=[{"name": "strong", **control}], **fields)


def array(answer: Any) -> np.ndarray[Any, Any]:
    return np.asarray(image_of(answer).convert("RGB")).astype(int)


def test_it_draws_the_skeletons_of_those_that_transformers_finds(server: Served) -> None:
    expected = of_transformers(server.folder, PEOPLE_THERE)
    answer = drawn(server, image=encoded(PEOPLE_THERE), preprocess="pose")
    assert np.abs(array(answer) - array(drawn(server, image=encoded(expected)))).max() <= 1
    assert np.abs(array(answer) - array(drawn(server, image=encoded(PEOPLE_THERE)))).max() > 1
    file = io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    told = recipe.from_json(json.loads(Image.open(file).text["sfumato"])).controls[0]  # type: ignore[attr-defined]
    digests = [hashlib.sha256((server.folder / name / "model.safetensors").read_bytes()).hexdigest()
               for name in ("people-here", "pose-here")]  # fmt: skip
    assert told.estimators == (("people-here", digests[0]), ("pose-here", digests[1]))


@pytest.mark.parametrize(("module", "warned"), [("openpose", False), ("openpose_full", True), ("openpose_hand", True)])
def test_modules_of_automatic1111(server: Served, module: str, warned: bool) -> None:
    unit = {"model": "strong", "module": module, "image": encoded(PEOPLE_THERE)}
    body = {"prompt": "a cat", "seed": 1, "steps": 4, "width": 64, "height": 64, "cfg_scale": 5.0}
    body |= {"override_settings": {"sd_model_checkpoint": server.model("sd")}}
    answer = server.client.post("/sdapi/v1/txt2img", json=body | {"alwayson_scripts": {"controlnet": {"args": [unit]}}})
    assert answer.status_code == 200, answer.text
    made = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).convert("RGB")
    expected = array(drawn(server, image=encoded(PEOPLE_THERE), preprocess="pose"))
    assert np.array_equal(np.asarray(made).astype(int), expected)
    warnings = json.dumps(json.loads(answer.json()["info"]).get("warnings") or "")
    assert ("only bodies are found" in warnings) == warned
    assert module in server.client.get("/controlnet/module_list").json()["module_list"]


def test_nobody_is_a_black_picture_and_a_mixture_of_experts_is_read(server: Served, tmp_path: Path) -> None:
    experts = loaded("pose_model", tiny_ones.save_pose(tmp_path / "experts", num_experts=3, part_features=8))
    detector = loaded("person_model", server.folder / "people-here")
    with torch.no_grad():
        assert experts.poses(PEOPLE_THERE, detector.people(PEOPLE_THERE))
        for layer in detector.module.model.decoder.class_embed:
            layer.bias.fill_(-20.0)
        assert detector.people(PEOPLE_THERE) == []
        made = preprocessors._pose(PEOPLE_THERE, Control(b""), (detector, experts))
    assert not np.asarray(made).any()
    assert made.size == PEOPLE_THERE.size


@pytest.mark.parametrize(
    ("kind", "folder", "says"),
    [
        ("person_model", "pose-here", "is not an object detector"),
        ("person_model", "nobody", "knows no people"),
        ("pose_model", "people-here", "is not a ViTPose"),
    ],
)
def test_a_model_of_another_kind_is_refused(server: Served, kind: str, folder: str, says: str) -> None:
    nobody = tiny_ones.save_person(server.folder / "nobody")
    config = json.loads((nobody / "config.json").read_text())
    (nobody / "config.json").write_text(json.dumps({**config, "id2label": {"0": "cat", "1": "lamp", "2": "dog"}}))
    with pytest.raises(LoadError, match=says):
        loaded(kind, server.folder / folder)


# The drawing.


def test_a_skeleton_has_openposes_points_and_colours() -> None:
    joints = {0: (32.0, 8.0), 5: (44.0, 20.0), 6: (20.0, 20.0), 7: (50.0, 40.0), 8: (14.0, 40.0)}
    points = skeletons.openpose(joints)
    assert points == {0: (32, 8), 1: (32, 20), 2: (20, 20), 3: (14, 40), 5: (44, 20), 6: (50, 40)}
    image = skeletons.drawn([joints], (512, 512))
    assert {image.getpixel((round(x), round(y))) for x, y in points.values()} == {
        skeletons.COLOURS[point] for point in points
    }
    assert image.getpixel((26, 20)) == (153, 0, 0)  # between neck and right shoulder
    assert image.getpixel((17, 30)) == (153, 102, 0)  # the right upper arm
    assert image.getpixel((200, 200)) == (0, 0, 0)


def test_there_is_no_neck_with_one_shoulder_and_no_limb_with_one_end() -> None:
    assert skeletons.openpose({5: (1.0, 1.0), 0: (2.0, 2.0)}) == {0: (2.0, 2.0), 5: (1.0, 1.0)}
    alone = np.asarray(skeletons.drawn([{5: (30.0, 30.0), 11: (60.0, 60.0)}], (96, 96)))
    assert not alone[40:50, 40:50].any()
    assert alone[28:33, 28:33].any()
