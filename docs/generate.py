"""Write the generated pages of docs/reference from the code: `make docs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sfumato import schedulers
from sfumato.api.app import create_app
from sfumato.api.http import documents
from sfumato.pictures.store import Store
from sfumato.process.supervisor import Supervisor
from sfumato.serving import metrics
from sfumato.serving.catalog import Catalog
from sfumato.serving.service import Service
from sfumato.settings import Settings, env_name, flag

REFERENCE = Path(__file__).parent / "reference"


def settings_page() -> str:
    lines = [
        "# Settings",
        "",
        "Each is read from the command line, else from the environment, else the default applies.",
        "",
        "| flag | environment | default | what it does |",
        "|---|---|---|---|",
    ]
    for spec in fields(Settings):
        default = f"`{spec.default}`" if spec.default != "" else "none"
        lines.append(f"| `{flag(spec)}` | `{env_name(spec)}` | {default} | {spec.metadata['help']} |")
    lines += [
        "",
        "huggingface_hub's `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` also apply.",
        "",
    ]
    return "\n".join(lines)


def schedulers_page() -> str:
    lines = [
        "# Schedulers",
        "",
        "Use these names for `scheduler_type` in a model file, `scheduler` in a request, and `--scheduler` on the",
        "command line. Each request has its own instance. The prefix `k_` means Karras sigmas; the suffixes `_karras`,",
        "`_exponential`, `_beta` and `_sgm_uniform` (or `schedule` in a model file) choose how the noise levels are",
        "spread, if the solver supports it. Flow-matching models get a solver's flow form if diffusers has one; other",
        "names are refused with a list of those that work.",
        "",
        "| name | solver | diffusers class | on flow-matching models | schedules |",
        "|---|---|---|---|---|",
    ]
    for name in schedulers.names():
        choice = schedulers.parse(name)
        solver = schedulers.SOLVERS.get(name)
        spread = ", ".join(solver.noise.schedules) if solver else ""
        flow = f"`{choice.flow.cls}`" if choice.flow else "–"
        lines.append(f"| `{name}` | {choice.description} | `{choice.noise.cls}` | {flow} | {spread or '–'} |")
    lines += ["", "`k_dpp_sde`, as LocalAI's page once spelt it, is `k_dpmpp_sde`.", ""]
    return "\n".join(lines)


def model_files_page() -> str:
    from sfumato.config import reference

    return reference.markdown()


def http_page() -> str:
    """Every route with its fields, responses and errors, from the server's OpenAPI document."""
    settings = Settings()
    service = Service(Catalog.of(settings), Supervisor(settings), settings)
    document = create_app(service, Store(settings.data)).openapi()
    lines = [
        "# HTTP",
        "",
        "For programs: `/openapi.json`. The routes under `/v1` also work without `/v1`.",
        "",
        HTTP_PREFACE,
        "## Statuses",
        "",
        "| status | when |",
        "|---|---|",
        *(f"| {status} | {reason} |" for status, reason in documents.REASONS.items()),
        "",
    ]
    tag = ""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if (named := operation.get("tags", ["Operations"])[0]) != tag:
                tag = named
                lines += [f"## {tag}", ""]
            lines += _operation(document, f"{method.upper()} {path}", operation)
    return "\n".join(lines)


HTTP_PREFACE = """\
Errors have one shape, `{"error": {"message", "type", "param", "code"}}`, except on Ollama's routes, `{"error": "..."}`,
and at `/mcp`, where they are JSON-RPC's. The message names the field, its value, what is valid and what to do.

Response headers:

| header | meaning |
|---|---|
| `x-request-id` | the request's id, for `/v1/images/progress/{id}`: the one it sent in this header, else a new one |
| `x-sfumato-ignored` | fields that were sent but have no effect |
| `x-sfumato-warning` | where the result differs from the request, such as a truncated prompt |
| `x-should-retry` | on errors: whether the same request may succeed when it is sent again |
| `retry-after` | on 429: seconds, at most 120; on 503 `jobs_unavailable`: 10 |
| `location`, `preference-applied` | on 202, of a request with `Prefer: respond-async`: [its job](../guides/jobs.md) |
| `idempotency-replayed` | `true` if the answer is that of an earlier request with the same `Idempotency-Key` |

With API keys configured, send `Authorization: Bearer KEY`, `x-api-key: KEY`, or Basic authentication (name and key).

Before a request is read: 408 if it arrives too slowly, 431 if its headers are too large, 503 if too many connections
are open. `HEAD` works wherever `GET` does.

A picture in a request is base64, a `data:` URI, the URL of a picture of this server or an http(s) URL of a public
address; in a form, it is a file. `usage` counts a picture as one token per 16x16 pixels.

With `stream: true` the response is server-sent events: `image_generation.partial_image` (`b64_json`,
`partial_image_index` from 0), then `image_generation.completed` (`b64_json`, `usage`); for edits `image_edit.…`. With
several pictures each event has an `index`. A later failure is sent as `data: {"error": …}`. Comments keep an idle
stream open; closing it cancels the work within one step.
"""


def _operation(document: Mapping[str, Any], title: str, operation: Mapping[str, Any]) -> list[str]:
    lines = [f"### `{title}`", "", operation["summary"], ""]
    content = operation.get("requestBody", {}).get("content", {})
    if content:
        media = " or ".join(f"`{each}`" for each in content)
        schema = _resolved(document, next(iter(content.values()))["schema"])
        lines += [f"Takes {media}.", "", "| field | type | default | |", "|---|---|---|---|"]
        # Of what may come by one of several names the first is the field's own.
        either = [each["anyOf"][0]["required"][0] for each in schema.get("allOf", ())]
        required = [*schema.get("required", ()), *either]
        for name, field in sorted(schema.get("properties", {}).items(), key=lambda item: item[0] not in required):
            default = "required" if name in required else _code(field.get("default"))
            said = field.get("description", "").replace("|", "\\|")
            lines.append(f"| `{name}` | {_type(document, field)} | {default} | {said} |")
        lines.append("")
    statuses = ", ".join(str(status) for status in operation["responses"])
    return [*lines, f"Responses: {statuses}.", ""]


def _type(document: Mapping[str, Any], field: Mapping[str, Any]) -> str:
    field = _resolved(document, field)
    kinds = [each for each in field.get("anyOf", [field]) if each.get("type") != "null"]
    return " or ".join(dict.fromkeys(_kind(document, each) for each in kinds))


def _kind(document: Mapping[str, Any], field: Mapping[str, Any]) -> str:
    field = _resolved(document, field)
    if "enum" in field:
        return ", ".join(_code(value) for value in field["enum"])
    if "const" in field:
        return _code(field["const"])
    if field.get("type") == "array":
        return f"list of {_type(document, field['items'])}"
    if field.get("format") == "binary":
        return "file"
    # Not through a float: the highest seed is none.
    least, most = (str(int(field[limit])) if limit in field else None for limit in ("minimum", "maximum"))
    within = f" {least} to {most}" if most is not None else f" from {least}" if least is not None else ""
    return f"{field.get('type', 'any')}{within}"


def _resolved(document: Mapping[str, Any], field: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in field:
        field = document["components"]["schemas"][field["$ref"].rsplit("/", 1)[1]]
    return field


def _code(value: Any) -> str:
    return "" if value is None or value == [] or value == "" else f"`{value}`"


def metrics_page() -> str:
    lines = [
        "# Metrics",
        "",
        "`GET /metrics` answers in Prometheus' text format. Times are seconds, sizes bytes. `route` is a path template",
        "(`none`: no such route), `code` an error's code. The API process adds Prometheus' own `process_*`;",
        "`sfumato_worker_memory_bytes` is that of the worker process. With several [devices](../guides/scale.md) what",
        "belongs to one has its name as the label `device`; with one worker it has no such label.",
        "",
        "| metric | kind | labels | what it is |",
        "|---|---|---|---|",
    ]
    for each in (*metrics.EVENT_METRICS, *metrics.SNAPSHOT_METRICS, *metrics.DEVICE_METRICS):
        of_devices = ["`device` (of several)"] if isinstance(each, metrics.DeviceMetric) else []
        labels = ", ".join([*of_devices, *(f"`{label}`" for label in each.labels)]) or "–"
        lines.append(f"| `{each.name}` | {each.kind} | {labels} | {each.help} |")
    return "\n".join([*lines, ""])


PAGES: Mapping[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "metrics.md": metrics_page,
    "schedulers.md": schedulers_page,
    "model-files.md": model_files_page,
    "http.md": http_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
