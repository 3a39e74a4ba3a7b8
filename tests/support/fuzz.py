"""Requests made at random from good ones: bodies, forms, headers and pictures. `make fuzz` sends a hundred thousand.

Each is made from its number alone, so whatever is found can be had again: `make fuzz FUZZ="--first 4711 --cases 1"`.
The application runs in this process over an engine that draws a square, because it is HTTP that is tried: every answer
must come, have a status that is not the server's fault and the shape of an error if it is one, and cost less than
a second of CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from starlette.types import Message, Scope

from sfumato import logs
from support import broken_pictures
from support.inside import Inside

MOST_CPU_S = 1.0
MOST_S = 60.0

DRAWING = ("/v1/images/generations", "/images/generations", "/sdapi/v1/txt2img")
FROM_PICTURES = ("/v1/images/edits",
    "/v1/images/variations", "/v1/images/inpainting", "/v1/images/upscale", "/v1/images/generations",
    "/sdapi/v1/img2img", "/sdapi/v1/png-info", "/sdapi/v1/extra-single-image",
)  # fmt: skip
POSTED = (*DRAWING, *FROM_PICTURES, "/sdapi/v1/options", "/sdapi/v1/interrupt", "/sdapi/v1/skip", "/nothing")
GOT = ("/",
    "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/m", "/v1/images/progress/x", "/openapi.json",
    "/sdapi/v1/progress", "/sdapi/v1/options", "/sdapi/v1/samplers", "/docs", "/docs/favicon.png",
    "/generated-images/{stored}", "/generated-images/x.png", "/nothing",
)  # fmt: skip

FIELDS = (
    "prompt", "negative_prompt", "model", "n", "size", "seed", "steps", "step", "num_inference_steps",
    "guidance_scale", "cfg_scale", "scheduler", "sampler", "clip_skip", "strength", "response_format", "quality",
    "background", "stream", "output_format", "output_compression", "partial_images", "user", "style", "image",
    "images", "image[]", "mask", "file", "files", "ref_images", "init_images", "width", "height", "batch_size",
    "n_iter", "sampler_name", "scale", "sampler_index", "denoising_strength", "override_settings", "alwayson_scripts",
    "styles", "resize_mode", "mask_blur", "upscaling_resize", "upscaler_1", "sd_model_checkpoint", "_charset_",
    "image[0]", "a[b]", "", "x" * 300,
)  # fmt: skip

WORDS = (
    "", " ", "a cat", "a|b", "m", "512x512", "8x8", "0x0", "99999999x1", "auto", "euler_a", "k_dpmpp_2m", "Euler a",
    "true", "null", "NaN", "-1", "1e999", "0x10", "1_000", "²", "٣", "b64_json", "url", "webp", "jpeg", "transparent",
    "high", "\0", "\n\r", "\ud800", "😀" * 9, "\u202e", "../../etc/passwd", "%00", "data:image/png;base64,", "data:,x",
    "data:;base64,AAAA", "http://127.0.0.1:9/x.png", "http://[::1", "file:///etc/passwd", "'", '"', "<script>",
    "x" * 5000, "{{7*7}}", "<lora:a:1>",
)  # fmt: skip

NUMBERS = (0, 1, 2, -1, -2, 3.5, 64, 512, 1000, 1001, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**30, 1e308, -0.0, 1e-9)
HEADERS = ("range", "if-none-match", "if-range", "origin", "host", "referer", "sec-fetch-site",
    "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-port", "x-forwarded-prefix",
    "authorization", "x-api-key", "x-request-id", "accept", "accept-encoding", "content-length", "content-encoding",
    "transfer-encoding", "cookie", "access-control-request-method", "access-control-request-headers", "user-agent",
    "expect", "te", "upgrade",
)  # fmt: skip
HEADER_WORDS = (
    "", "bytes=0-5", "bytes=-5", "bytes=5-", "bytes=0-0,5-9", "bytes=9999-", '"x"', "*", "null", "http://localhost",
    "https://evil.example", "localhost", "evil.example:99999", "[::1]:80", "a b", "same-origin", "cross-site", "none",
    "127.0.0.1", "1.2.3.4, 5.6.7.8", "http", "https, http", "65536", "-1", "/a/../b", "/p", "Bearer x", "Basic eDp5",
    "Basic ====", "Basic " + "A" * 999, "gzip", "gzip, br", "identity", "chunked", "GET", "\xff\xfe", "x" * 4000,
    "Mozilla/5.0", "application/json", "text/html", "100-continue", "websocket",
)  # fmt: skip
KINDS = (
    "application/json", "", "application/x-www-form-urlencoded", "multipart/form-data; boundary=B", "text/plain",
    "application/json; charset=utf-8", "application/json; charset=punycode", "multipart/form-data", "text/html",
    "nonsense", "multipart/form-data; boundary=B; charset=idna", "application/x-www-form-urlencoded; charset=latin-1",
    ";;;=", "a/b;c=\"", "application/problem+json", "multipart/mixed; boundary=B",
)  # fmt: skip
PART_HEADERS = (
    "content-type: text/plain", "content-type: image/png", "content-type: text/plain; charset=utf-7", "x: y",
    "content-transfer-encoding: base64", "content-transfer-encoding: binary", "content-type: multipart/mixed",
    'content-disposition: form-data; name="again"', "no colon", "", ": x", "x" * 3000 + ": y",
)  # fmt: skip
TOKENS = (
    b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"null", b"\\u0000", b"\\ud800", b"1e999", b"\0", b"\xff", b"&",
    b"=", b"%", b";", b"\r\n", b"--B", b"--B--", b"\r\n\r\n", b"[" * 300, b'{"a":' * 300, b"9" * 500, b'"",' * 100,
)  # fmt: skip


@dataclass(slots=True)
class Case:
    """One request."""

    method: str
    path: str
    query: str = ""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    def __str__(self) -> str:
        address = f"{self.method} {self.path!r}?{self.query[:80]!r}"
        return f"{address} {self.headers} {self.body[:300]!r} ({len(self.body)} bytes)"


class Maker:
    """Makes a case from its number."""

    def __init__(self, stored: str) -> None:
        self._stored = stored
        self._pictures = tuple(broken_pictures.good().values())
        self._good = (self._pictures[0], self._pictures[6])

    def case(self, number: int) -> Case:
        chance = random.Random(number)
        make: Callable[[random.Random], Case] = chance.choice(
            (self._json, self._json, self._urlencoded, self._multipart, self._multipart, self._reading, self._picture)
        )
        case = make(chance)
        for _ in range(chance.choice((0, 0, 0, 1, 3, 30))):
            value = chance.choice(HEADER_WORDS)
            case.headers.append((chance.choice(HEADERS).encode(), value.encode("latin-1")))
        if not any(name == b"host" for name, _ in case.headers):
            case.headers.append((b"host", b"localhost"))
        return case

    def _value(self, chance: random.Random, depth: int = 0) -> Any:
        match chance.randrange(12 if depth < 4 else 6):
            case 0 | 1 | 2:
                return chance.choice(WORDS)
            case 3 | 4:
                return chance.choice(NUMBERS)
            case 5:
                return chance.choice((None, True, False))
            case 6:
                return chance.choice((base64.b64encode(self._some_picture(chance)).decode(), "A" * 5000))
            case 7 | 8:
                return [self._value(chance, depth + 1) for _ in range(chance.choice((0, 1, 2, 20)))]
            case 9:
                return {"image_url": self._value(chance, depth + 1)}
            case 10:
                return {chance.choice(FIELDS): self._value(chance, depth + 1) for _ in range(chance.choice((0, 1, 4)))}
            case _:
                return "".join(
                    chr(chance.choice((chance.randrange(32, 127), chance.randrange(0xD7FF)))) for _ in range(9)
                )

    def _some_picture(self, chance: random.Random) -> bytes:
        return broken_pictures.changed(chance.choice(self._pictures), chance)

    def _fields(self, chance: random.Random) -> dict[str, Any]:
        fields = {chance.choice(FIELDS): self._value(chance) for _ in range(chance.choice((0, 1, 2, 5, 40)))}
        if chance.random() < 0.7:
            fields.setdefault("prompt", "a cat")
        return fields

    def _json(self, chance: random.Random) -> Case:
        body = json.dumps(self._fields(chance), ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
        return self._posted(chance, "application/json", body)

    def _urlencoded(self, chance: random.Random) -> Case:
        fields = [(name, str(value)) for name, value in self._fields(chance).items()]
        body = urlencode(fields, errors="surrogatepass").encode()
        return self._posted(chance, "application/x-www-form-urlencoded", body)

    def _multipart(self, chance: random.Random) -> Case:
        body = b"".join(self._part(chance, name, value) for name, value in self._fields(chance).items())
        return self._posted(chance, "multipart/form-data; boundary=B", body + b"--B--\r\n")

    def _part(self, chance: random.Random, name: str, value: Any) -> bytes:
        head = f'content-disposition: form-data; name="{name}"'
        data = str(value).encode("utf-8", "surrogatepass")
        if chance.random() < 0.3:
            head += chance.choice(
                ('; filename="a.png"', "; filename*=utf-8''a.png", '; filename=""', "; filename", ";;")
            )
            data = self._some_picture(chance)
        lines = [head, *(chance.choice(PART_HEADERS) for _ in range(chance.choice((0, 0, 1, 3, 20))))]
        return b"--B\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + data + b"\r\n"

    def _posted(self, chance: random.Random, kind: str, body: bytes) -> Case:
        data = bytearray(body)
        for _ in range(chance.choice((0, 0, 0, 0, 1, 3))):
            at = chance.randrange(len(data) + 1)
            match chance.randrange(3):
                case 0:
                    del data[at:]
                case 1:
                    data[at : at + chance.choice((0, 1, 5))] = chance.choice(TOKENS)
                case _:
                    data = bytearray(broken_pictures.changed(data, chance))
        kind = chance.choice(KINDS) if chance.random() < 0.1 else kind
        headers = [(b"content-type", kind.encode())] if kind else []
        return Case("POST", chance.choice(POSTED), "", headers, bytes(data))

    def _reading(self, chance: random.Random) -> Case:
        method = chance.choice(("GET", "GET", "HEAD", "DELETE", "OPTIONS", "PUT", "POST", "TRACE", "x"))
        path = chance.choice(GOT).replace("{stored}", self._stored)
        if chance.random() < 0.2:
            path += chance.choice(("/", "/..", "/" + chance.choice(WORDS), "//x", "%2e%2e", "?"))
        query = urlencode({chance.choice(("skip_current_image", "x")): chance.choice(WORDS)}, errors="surrogatepass")
        return Case(method, path, chance.choice(("", query, "&" * 500, "%" * 99)))

    def _picture(self, chance: random.Random) -> Case:
        path, data = chance.choice(FROM_PICTURES), self._some_picture(chance)
        text = base64.b64encode(data).decode()
        if chance.random() < 0.1:
            text = "data:image/png;base64," + text
        other = base64.b64encode(chance.choice((data, *self._good))).decode()
        body: dict[str, Any] = {"prompt": "a cat", "image": text, "init_images": [text], "scale": 2, "size": "64x64"}
        if chance.random() < 0.3:
            body["mask"] = other
        if chance.random() < 0.5 or path.startswith("/sdapi"):
            return Case("POST", path, "", [(b"content-type", b"application/json")], json.dumps(body).encode())
        parts = [self._part(random.Random(1), "prompt", "a cat")]
        parts += [b'--B\r\ncontent-disposition: form-data; name="%s"; filename="a"\r\n\r\n%s\r\n' % (name, data)
                  for name in (b"image", b"mask")[: chance.choice((1, 2))]]  # fmt: skip
        kind = b"multipart/form-data; boundary=B"
        return Case("POST", path, "", [(b"content-type", kind)], b"".join(parts) + b"--B--\r\n")


@dataclass(slots=True)
class Report:
    """What came of it."""

    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)
    """Seconds of CPU, and the case."""

    def __str__(self) -> str:
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        took, number = self.slowest
        lines = [f"{self.statuses.total()} cases; {counts}", f"slowest: {took:.3f} s of CPU, case {number}"]
        return "\n".join([*lines, *self.problems[:50], f"{len(self.problems)} problems"])


async def send(app: Any, case: Case) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of the answer."""
    chunks = [case.body[i : i + 2**16] for i in range(0, len(case.body), 2**16)] or [b""]
    received = asyncio.Event()
    status, headers, body = 0, {}, bytearray()

    async def receive() -> Message:
        if chunks:
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}
        await received.wait()
        return {"type": "http.disconnect"}

    async def take(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers.update(message["headers"])
        elif message["type"] == "http.response.body":
            body.extend(message.get("body", b""))

    path = case.path.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    scope: Scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": case.method,
        "scheme": "http", "path": path, "raw_path": quote(path).encode(), "query_string": case.query.encode("latin-1"),
        "root_path": "", "headers": case.headers, "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8080), "state": {},
    }  # fmt: skip
    async with asyncio.timeout(MOST_S):
        await app(scope, receive, take)
    received.set()
    return status, headers, bytes(body)


def wrong(case: Case, status: int, headers: dict[bytes, bytes], body: bytes) -> str:
    """What is wrong with an answer, if anything is."""
    if not 200 <= status < 500:
        return f"status {status}: {body[:300]!r}"
    if b"x-request-id" not in headers:
        return "an answer without x-request-id"
    if case.method == "HEAD" and body:
        return "an answer to HEAD with a body"
    if status >= 400 and case.method != "HEAD" and not headers.get(b"content-type", b"").startswith(b"text/plain"):
        error = json.loads(body).get("error", {})
        if case.method == "POST" and (case.path == "/" or case.path.startswith("/models/")):  # Hugging Face's shape
            return "" if error and isinstance(error, str) else f"an error of another shape: {body[:300]!r}"
        if set(error) != {"message", "type", "param", "code"} or not error["message"]:
            return f"an error of another shape: {body[:300]!r}"
    return ""


async def run(folder: Path, first: int, cases: int, *, shown: bool = False) -> Report:
    """Send the cases of these numbers, one after another."""
    inside = Inside(folder, max_source_pixels=2**20, max_body_mb=8, max_pixels=2**20, trusted_proxies="127.0.0.1")
    maker = Maker(inside.store.put(b"x" * 1000))
    report = Report()
    async with inside.app.router.lifespan_context(inside.app):
        for number in range(first, first + cases):
            case = maker.case(number)
            began = time.process_time()
            try:
                answer = await send(inside.app, case)
                problem = wrong(case, *answer)
                report.statuses[answer[0]] += 1
            except Exception as error:
                problem = f"raised {error!r}"
                report.statuses[0] += 1
            took = time.process_time() - began
            report.slowest = max(report.slowest, (took, number))
            inside.engine.seen.clear()
            if took > MOST_CPU_S:
                problem = problem or f"{took:.2f} s of CPU"
            if problem:
                report.problems.append(f"case {number}: {problem}\n    {case}")
            if shown and (number - first + 1) % 5000 == 0:
                print(f"{number - first + 1} cases, {len(report.problems)} problems", flush=True)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    for name in logs.FORM_PARSERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(run(Path(folder), asked.first, asked.cases, shown=True))
    print(report)
    return bool(report.problems)


if __name__ == "__main__":
    sys.exit(main())
