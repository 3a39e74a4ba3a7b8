"""Files and batches as the official OpenAI SDK sends them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai
from openai.types import Batch

from support import serving
from support.answerable import within

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
OPEN = ("validating", "in_progress", "finalizing", "cancelling")


@contextmanager
def sdk(server: serving.Server, key: str = "unused") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=serving.TIMEOUT_S) as client:
        yield client


def jsonl(bodies: Sequence[dict[str, Any]], url: str = GENERATIONS, **more: Any) -> bytes:
    """Lines with the custom ids line-0, line-1 ..."""
    lines = (
        {"custom_id": f"line-{index}", "method": "POST", "url": url, "body": body} | more
        for index, body in enumerate(bodies)
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def uploaded(client: openai.OpenAI, content: bytes) -> str:
    return client.files.create(file=("input.jsonl", content), purpose="batch").id


def begun(client: openai.OpenAI, content: bytes, endpoint: Any = GENERATIONS, **more: Any) -> Batch:
    file = uploaded(client, content)
    return client.batches.create(input_file_id=file, endpoint=endpoint, completion_window="24h", **more)


def ended(client: openai.OpenAI, id: str) -> Batch:
    within(serving.TIMEOUT_S, lambda: client.batches.retrieve(id).status not in OPEN)
    return client.batches.retrieve(id)


def counts(batch: Batch) -> dict[str, int]:
    """total, completed and failed."""
    return dict(batch.request_counts.to_dict()) if batch.request_counts else {}  # type: ignore[arg-type]


def lines_of(client: openai.OpenAI, file: str | None) -> list[dict[str, Any]]:
    """Of an output or error file."""
    assert file
    return [json.loads(line) for line in client.files.content(file).text.splitlines()]
