"""The manifest for KubeRay against what its published schema says of the fields that it uses.

The facts are those of `helm-chart/kuberay-operator/crds/ray.io_rayservices.yaml`, version v1, in the repository
ray-project/kuberay at 02a80a6f2abf. Fields that the manifest does not use are left out, so a misspelt one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

FILE = Path(__file__).parent.parent / "docs" / "guides" / "ray" / "rayservice.yaml"

TEXT: Mapping[str, Any] = {"type": "string"}
WHOLE: Mapping[str, Any] = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
FLAG: Mapping[str, Any] = {"type": "boolean"}
TEXTS: Mapping[str, Any] = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Mapping[str, Any] = {
    "type": ["integer", "string"],
    "pattern": r"^[+-]?(\d+\.?\d*|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?(\d+\.?\d*|\.\d+))?$",
}
QUANTITIES: Mapping[str, Any] = {"type": "object", "additionalProperties": QUANTITY}


def fields(required: str = "", /, **properties: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "type": "object", "properties": properties, "required": required.split(), "additionalProperties": False
    }  # fmt: skip


def items(required: str, /, **properties: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "array", "items": fields(required, **properties)}


CONTAINERS = items(
    "name",
    name=TEXT,
    image=TEXT,
    env=items(
        "name", name=TEXT, value=TEXT,
        valueFrom=fields(secretKeyRef=fields("key", key=TEXT, name=TEXT, optional=FLAG)),
    ),
    ports=items("containerPort", containerPort=WHOLE, name=TEXT),
    resources=fields(limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=items("mountPath name", mountPath=TEXT, name=TEXT),
)  # fmt: skip
VOLUMES = items("name", name=TEXT, persistentVolumeClaim=fields("claimName", claimName=TEXT, readOnly=FLAG))
POD = fields(spec=fields("containers", containers=CONTAINERS, volumes=VOLUMES))
SCHEMA = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=fields("name", name=TEXT),
    spec=fields(
        "rayClusterConfig",
        serveConfigV2=TEXT,
        rayClusterConfig=fields(
            "headGroupSpec",
            rayVersion=TEXT,
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=fields(idleTimeoutSeconds=WHOLE),
            headGroupSpec=fields("template", rayStartParams=TEXTS, template=POD),
            workerGroupSpecs=items(
                "groupName maxReplicas minReplicas template",
                groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, rayStartParams=TEXTS,
                template=POD,
            ),
        ),
    ),
)  # fmt: skip


@pytest.fixture
def manifest() -> Any:
    return yaml.safe_load(FILE.read_text())


def test_the_manifest_is_as_the_schema_says(manifest: Any) -> None:
    jsonschema.validate(manifest, SCHEMA)


def cluster(manifest: Any) -> Any:
    return manifest["spec"]["rayClusterConfig"]


def container(manifest: Any) -> Any:
    return cluster(manifest)["headGroupSpec"]["template"]["spec"]["containers"][0]


WRONG: Mapping[str, Callable[[Any], object]] = {
    "misspelt": lambda m: cluster(m).update(workerGroupSpec=cluster(m).pop("workerGroupSpecs")),
    "a number as text": lambda m: cluster(m)["workerGroupSpecs"][0].update(replicas="0"),
    "text as a number": lambda m: cluster(m)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 2}),
    "no head": lambda m: cluster(m).pop("headGroupSpec"),
    "a port without its number": lambda m: container(m)["ports"][0].pop("containerPort"),
    "no unit that exists": lambda m: container(m)["resources"]["limits"].update(memory="8GiB"),
    "a secret without a key": lambda m: container(m)["env"][-1]["valueFrom"]["secretKeyRef"].pop("key"),
    "another version": lambda m: m.update(apiVersion="ray.io/v2"),
    "Serve's file not as text": lambda m: m["spec"].update(serveConfigV2={"applications": []}),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_one_is_refused(manifest: Any, change: Callable[[Any], object]) -> None:
    change(manifest)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)
