"""Thousands of requests made up from our own OpenAPI document: no answer is a 5xx, each is as documented.

Valid requests would be drawn, so their cost is bounded: the default model draws 64x64 in two steps, and the steps
that a made-up body asks for are brought down to two. Nothing else of a body is touched; now and then a field
that random text would never get right (a model's name, a size, a picture) gets a value that works.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import sfumato
from support.serving import Server

pytestmark = pytest.mark.slow

TINY = Path(sfumato.__file__).parent / "models" / "sfumato-tiny"
CHEAP = (
    f"name: cheap\nparameters:\n  model: {TINY}\nstep: 2\nsize: 64x64\n"
    "diffusers:\n  enable_parameters: negative_prompt,num_inference_steps,clip_skip,image\n"
)

OF_A_BODY, OF_A_PATH = 100, 50
"""Requests of each operation: as many that fit the document as that do not, where it has a body."""

ENOUGH = 2000
SHAPE = response_schema_conformance
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    SHAPE,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("schemathesis")
    (folder / "models").mkdir()
    (folder / "models" / "cheap.yaml").write_text(CHEAP)
    flags = ("--default-model", "cheap", "--max-pixels", "16384", "--max-n", "2", "--max-body-mb", "1")
    with Server(folder / "models", folder / "data", *flags) as server:
        yield server


def photo() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


WORKS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.just("a cat"),
    "inputs": st.just("a cat"),
    "messages": st.just([{"role": "user", "content": "a cat"}]),
    "model": st.sampled_from(["cheap", "sfumato-tiny"]),
    "n": st.sampled_from([1, 2]),
    "size": st.sampled_from(["64x64", "auto"]),
    "scheduler": st.sampled_from(["euler_a", "ddim"]),
    "image": st.just(photo()),
    "init_images": st.just([photo()]),
    "width": st.just(64),
    "height": st.just(64),
    "batch_size": st.just(1),
    "n_iter": st.just(1),
    "sampler_name": st.just("Euler a"),
    "file": st.just(photo()),
    "files": st.just([photo()]),
    "images": st.just([photo()]),
    "ref_images": st.just([photo()]),
    "mask": st.just(photo()),
    "quality": st.sampled_from(["low", "auto"]),
    "clip_skip": st.just(1),
    "id": st.just("an-id"),
}
SOME_WORK = st.fixed_dictionaries(WORKS) | st.fixed_dictionaries({}, optional=WORKS)


def adapted(body: Any, works: dict[str, Any]) -> Any:
    if not isinstance(body, dict):
        return body
    body = body | {name: value for name, value in works.items() if name in body}
    if "parameters" in body:  # Hugging Face's, which has the others
        body["parameters"] = adapted(body["parameters"], works)
    for name in ("steps", "step", "num_inference_steps", "quality", "hr_second_pass_steps"):
        if isinstance(body.get(name), int | float) and 2 < body[name] <= 1000:
            body[name] = 2
    return body


def limits(operation: schemathesis.APIOperation) -> settings:
    return settings(
        max_examples=OF_A_BODY if operation.body else OF_A_PATH if operation.path_parameters else 1,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def test_nothing_made_up_breaks_it(server: Server) -> None:
    schema = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    sent: Counter[tuple[str, int]] = Counter()

    def try_out(operation: schemathesis.APIOperation, mode: GenerationMode) -> None:
        @limits(operation)
        @given(case=operation.as_strategy(mode), works=SOME_WORK)
        def send(case: schemathesis.Case, works: dict[str, Any]) -> None:
            case.body = adapted(case.body, works)
            if (case.headers or {}).get("x-deadline-ms", "").isdecimal():
                case.headers["x-deadline-ms"] = "600000"  # one that has passed is a 504, as it should be
            if operation.label == "POST /models/{id}" and "model" in works:
                case.path_parameters["id"] = works["model"]
            answer = case.call(base_url=server.url, timeout=300)
            sent[operation.label, answer.status_code] += 1
            streamed = answer.headers["content-type"][0].startswith("text/event-stream")
            # Of a stream OpenAPI 3.1 can say no more than that it is text; the SDKs' tests read the events.
            case.validate_response(answer, checks=[check for check in CHECKS if not (streamed and check is SHAPE)])

        send()

    for operation in (found.ok() for found in schema.get_all_operations()):
        try_out(operation, GenerationMode.POSITIVE)
        if operation.body:  # any text is valid where a path has a parameter
            try_out(operation, GenerationMode.NEGATIVE)
    assert sent.total() >= ENOUGH, sent
    assert sum(count for (_, status), count in sent.items() if status == 200) >= ENOUGH // 20, sent
