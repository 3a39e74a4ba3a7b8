"""What preprocessors estimate with: the depth of a picture, and where people and their joints are.

Models of transformers, loaded for themselves as ControlNets of requests are, and shared by all models and requests on a
device. Always in fp32: they are small, and a map of depth in bf16 would have steps that are seen.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from PIL import Image

from sfumato.batching.views import View
from sfumato.checkpoints import request_files, sources
from sfumato.checkpoints.remote_limits import ANY, Limits
from sfumato.config import ModelConfig
from sfumato.core import DEPTH, POSE
from sfumato.errors import DrawError, LoadError
from sfumato.models import footprint, request_parts
from sfumato.models.content_hashes import ContentHashes
from sfumato.models.device import DTYPES
from sfumato.models.fetch import OnStatus
from sfumato.models.load import Loaded, MakeRoom
from sfumato.models.sharing import Sharing
from sfumato.status import ModelStatus

DTYPE = "fp32"

DEPTH_MODEL, PERSON_MODEL, POSE_MODEL = "depth_model", "person_model", "pose_model"
"""Kinds of estimators, by the setting that names one."""

NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType({DEPTH: (DEPTH_MODEL,), POSE: (PERSON_MODEL, POSE_MODEL)})
"""Preprocessor -> the estimators that it needs, in the order in which they are used."""

FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)  # fmt: skip
"""What of a repository is downloaded."""

METRIC = frozenset({"zoedepth", "glpn", "depth_pro"})
"""Types of models that estimate distances, which grow with the distance; others estimate their inverse."""

PERSON = "person"
"""What detectors call people."""

PEOPLE, JOINTS = 0.3, 0.3
"""The least certainty, 0 .. 1, of a person and of a joint that is drawn: those of transformers' own example."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of estimator."""

    read: Callable[..., Any]
    """Reads a model from a folder, as `from_pretrained`."""
    reads: str
    """The method of its image processor that makes sense of what it computes."""
    words: str


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        DEPTH_MODEL: Kind(
            transformers.AutoModelForDepthEstimation.from_pretrained,
            "post_process_depth_estimation",
            "a depth estimator, such as depth-anything/Depth-Anything-V2-Small-hf",
        ),
        PERSON_MODEL: Kind(
            transformers.AutoModelForObjectDetection.from_pretrained,
            "post_process_object_detection",
            "an object detector, such as PekingU/rtdetr_r50vd_coco_o365",
        ),
        POSE_MODEL: Kind(
            transformers.VitPoseForPoseEstimation.from_pretrained,
            "post_process_pose_estimation",
            "a ViTPose, such as usyd-community/vitpose-base-simple",
        ),
    }
)


class Estimator:
    """One in memory, in place of a pipeline."""

    def __init__(self, kind: str, name: str, module: torch.nn.Module, processor: Any, digest: str) -> None:
        self.module: Any = module
        self.kind = kind
        self.name = name
        """As the operator wrote it."""
        self.digest = digest
        """SHA-256 of its weights."""
        self._processor = processor

    def depth(self, picture: Image.Image) -> torch.Tensor:
        """How near each place of an RGB picture is: height x width, 0 (farthest) .. 255 (nearest), on the CPU."""
        outputs = self._outputs(images=picture)
        # The second parameter has two names: the size of the picture is what they all mean.
        (told,) = self._processor.post_process_depth_estimation(outputs, [picture.size[::-1]])
        depth = told["predicted_depth"].float().cpu()
        low, high = depth.min(), depth.max()
        if not (low.isfinite() and high.isfinite()):
            raise DrawError(f"the depth model {self.name} estimated no finite numbers; take another (depth_model)")
        levels = ((depth - low) / (high - low) * 255 if high > low else torch.zeros_like(depth)).byte()
        return 255 - levels if self._estimates_distances else levels

    def people(self, picture: Image.Image) -> list[list[float]]:
        """The people in an RGB picture: left, top, width and height of each in pixels, the most certain first."""
        (told,) = self._processor.post_process_object_detection(
            self._outputs(images=picture), threshold=PEOPLE, target_sizes=[picture.size[::-1]]
        )
        labels = self.module.config.id2label
        order = told["scores"].argsort(descending=True, stable=True).tolist()
        boxes, kinds = told["boxes"].tolist(), told["labels"].tolist()
        found = [boxes[at] for at in order if labels.get(kinds[at], "").casefold() == PERSON]
        return [[left, top, right - left, bottom - top] for left, top, right, bottom in found
                if right > left and bottom > top]  # fmt: skip

    def poses(self, picture: Image.Image, people: Sequence[Sequence[float]]) -> list[dict[int, tuple[float, float]]]:
        """Of each of the `people`: number of a joint (COCO's order) -> its place in pixels, of those that are seen."""
        if not people:
            return []
        boxes = [[list(each) for each in people]]
        (told,) = self._processor.post_process_pose_estimation(
            self._outputs(images=picture, boxes=boxes), boxes=boxes, threshold=JOINTS
        )
        return [
            {
                int(label): (float(place[0]), float(place[1]))
                for label, place in zip(each["labels"], each["keypoints"], strict=True)
            }
            for each in told
        ]

    @property
    def _estimates_distances(self) -> bool:
        config = self.module.config
        return config.model_type in METRIC or getattr(config, "depth_estimation_type", "") == "metric"

    def _outputs(self, **inputs: Any) -> Any:
        """What the model computes of a picture; its forward pass is shared like others."""
        given = self._processor(**inputs, return_tensors="pt").to(self.module.device)
        if getattr(getattr(self.module.config, "backbone_config", None), "num_experts", 1) > 1:  # ViTPose++
            given["dataset_index"] = torch.zeros(
                len(given["pixel_values"]), dtype=torch.long, device=self.module.device
            )
        shared = View("")
        try:
            return shared.stand_in(self.module, self.kind)(**given)
        finally:
            shared.close()


def _place(folder: Path, kind: str, name: str) -> tuple[str, str]:
    """Where an estimator is: a folder, or a hub id and a revision, which may be empty. Raises LoadError."""
    path = (folder / os.path.expanduser(name)).resolve()  # noqa: PTH111
    plain = re.sub(r"^(huggingface|hf):/{0,2}", "", name, flags=re.IGNORECASE)
    if not name:
        raise LoadError(f"{kind} is empty; set it to {KINDS[kind].words}, or to a folder with one")
    if path.is_dir():
        return str(path), ""
    if not sources.is_hub_id(plain):
        raise LoadError(f"{kind}: {name[:200]!r} is neither a folder that is there nor a hub id (owner/name)")
    repo, _, revision = plain.partition("@")
    return repo, revision


def fetch(config: ModelConfig) -> None:
    """Download the estimator that a model file names. Raises LoadError or DownloadError."""
    if config.depth_model:
        where, revision = _place(config.folder, DEPTH_MODEL, config.depth_model)
        if not Path(where).is_absolute():
            _fetch(where, revision or None)


def config_of(model: Loaded, kind: str, name: str) -> ModelConfig:
    """What loads an estimator, on the model's device. Raises LoadError if the name can be none."""
    base = model.config
    where, revision = _place(base.folder, kind, name)
    return ModelConfig(
        name=f"{kind} {where}{'@' * bool(revision)}{revision} ({DTYPE} on {model.device})", part=kind, model=where,
        part_file=name, revision=revision or None, folder=base.folder, dtype=DTYPE, cuda=base.cuda,
        main_gpu=base.main_gpu,
    )  # fmt: skip


def load(
    config: ModelConfig,
    device_setting: str,
    on_status: OnStatus,
    make_room: MakeRoom,
    known: Sharing | None = None,
    limits: Limits = ANY,
) -> Loaded:
    """Load an estimator. `limits`: of what is downloaded.

    Raises LoadError, or DownloadError, and what torch raises when memory runs out.
    """
    path, kind = Path(config.model), KINDS[config.part]
    if not path.is_absolute():
        on_status(ModelStatus("downloading", config.model))
        path = _fetch(config.model, config.revision, limits)
    label = config.part_file or config.model
    device, dtype = request_parts.place(config, device_setting)
    make_room(footprint.Needs(footprint.of_folders({config.part: path}, dtype, None), device, dtype))
    with request_parts.reading(path) as state:
        own = {"local_files_only": True, "trust_remote_code": False}
        processor = transformers.AutoImageProcessor.from_pretrained(path, **own)
        if not hasattr(processor, kind.reads):
            raise LoadError(f"{label} is not {kind.words}: its image processor is a {type(processor).__name__}")
        read, told = kind.read(path, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **own)
        if missing := sorted(told["missing_keys"]):
            raise LoadError(f"{label} lacks {', '.join(missing[:3])}: its weights are not those of {kind.words}")
        if config.part == PERSON_MODEL and PERSON not in map(str.casefold, read.config.id2label.values()):
            raise LoadError(f"{label} knows no people ({PERSON}); take {kind.words}")
        module = request_parts.detached(read.to(device))
        files = footprint.weights_of(path, None)
        digest = request_parts.digest(files, known.hashes if known else ContentHashes())
    return Loaded(
        config, Estimator(config.part, label, module, processor, digest), str(path), device, dtype, state=state
    )


def _fetch(repo: str, revision: str | None, limits: Limits = ANY) -> Path:
    """Download an estimator. Raises LoadError or DownloadError."""
    remedy = "Name a folder with such a model, or use this one"
    there = request_files.names(repo, revision, remedy)
    needed = [name for name in there if any(fnmatch.fnmatch(name, pattern) for pattern in FILES)]
    return request_files.fetch(repo, revision, needed, limits, remedy)
