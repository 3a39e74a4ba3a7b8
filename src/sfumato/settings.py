"""Server settings: one table from which the environment names, the flags and the docs are made.

Each field is read from, in this order: the command line (`--max-pixels`), the environment
(`SFUMATO_MAX_PIXELS`), the default below.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from sfumato.core import MAX_CLIP_MEGAPIXELS, MAX_FRAMES, MAX_SECONDS, Limits, keep_alive_seconds

PREFIX = "SFUMATO_"

_DEVICE = re.compile(r"cpu|mps|(cuda|xpu)(:[0-9]{1,3})?")

_HOST = re.compile(r"[\w.-]{1,253}|[0-9A-Fa-f:.]{2,45}")
"""A name or an IPv4 address, or an IPv6 address."""

_FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def device_names(text: str) -> list[str]:
    """The items of the setting `devices`, as torch names them; `auto` stands alone. Raises ValueError."""
    if text.strip() == "auto":
        return ["auto"]
    names = [name.strip() for name in text.split(",")] if text else []
    groups = [members(name) for name in names]
    for name in (name for group in groups for name in group):
        if not _DEVICE.fullmatch(name):
            raise ValueError(f"{name!r} is no device: write auto, or a list of cuda:0, cuda:1, xpu:0, mps, cpu")
    groups = [[f"{name}:0" if name in ("cuda", "xpu") else name for name in group] for group in groups]
    for group in groups:
        if len({name.partition(":")[0] for name in group}) > 1 or (len(group) > 1 and "mps" in group):
            raise ValueError(f"{'+'.join(group)}: devices that compute one picture together are of one kind, not mps")
    for name, count in Counter(name for group in groups for name in group).items():
        if count > 1 and name != "cpu":
            raise ValueError(f"{name} is named {count} times; only cpu may have several workers")
    return ["+".join(group) for group in groups]


def host_names(text: str, *, any_host: bool = False) -> list[str]:
    """The hosts of a setting, in lower case, IPv6 addresses without brackets. Raises ValueError for what is none.

    Hosts are compared with those of URLs: a port or a scheme would match nothing, and nothing would say so.
    `any_host`: `*` is valid, too.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    names = [name[1:-1] if name[0] == "[" and name[-1] == "]" else name for name in names]
    for name in names:
        if not _HOST.fullmatch(name) and not (any_host and name == "*"):
            also = ", or *" if any_host else ""
            raise ValueError(f"{name[:100]!r} is no host: write names or addresses without scheme, port and path{also}")
    return names


def members(device: str) -> list[str]:
    """The devices of one worker, its own first: it has more than one of `cuda:0+cuda:1`."""
    return [name.strip() for name in device.split("+")]


def _setting(default: Any, help: str, *, secret: bool = False, **limits: Any) -> Any:
    return field(default=default, repr=not secret, metadata={"help": help, **limits})


@dataclass(frozen=True, slots=True)
class Settings:
    """The operator's choices; see each field's `help`."""

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 listens on all interfaces.")
    port: int = _setting(8080, "Port to listen on; 0 picks a free one.", least=0)
    models: Path = _setting(Path("models"), "Folder with model files (*.yaml) and the weights beside them.")
    data: Path = _setting(Path("data"), "Folder for generated pictures.")
    proofs: str = _setting(
        "", "File for the results of batching verification; empty: `proofs.json` in the data folder."
    )
    default_model: str = _setting("", "Model for requests without a model name; empty: the first model file.")
    device: str = _setting(
        "auto", "Device for every model: auto (as the model file says), cpu, cuda, cuda:1, mps, xpu."
    )
    devices: str = _setting(
        "",
        "Devices that draw at the same time, each with a worker process of its own: auto (every accelerator of this "
        "machine), or a list such as cuda:0,cuda:1. A worker of cuda:0+cuda:1 draws each picture on both, if the model "
        "file says context_parallel. It takes the place of `device`. Empty: one worker, on `device`.",
        check=device_names,
    )
    loaded_models: int = _setting(
        2, "Maximum models on a device, or in memory without one; the least recently used leaves.", least=1
    )
    memory_mb: int = _setting(
        0,
        "Memory that models may take on each device, in MiB: idle ones leave when another needs it. 0: what the device "
        "has, less vram_headroom.",
        least=0,
    )
    main_memory_mb: int = _setting(
        0,
        "Main memory for idle models that left an accelerator for another, in MiB: they come back without being read "
        "from disk. 0: what is free, but a tenth; -1: none. With several `devices` each worker has its part of it.",
        least=-1,
    )
    vram_headroom: int = _setting(
        512, "Memory of each device left to other programs and to what models need while they draw, in MiB.", least=0
    )
    keep_alive: str = _setting(
        "-1",
        "How long a model stays in memory once it is idle, unless its file or the request says: seconds, 5m, 1h30m; "
        "0: not at all; -1: until another model needs the memory.",
        check=keep_alive_seconds,
    )
    accelerate: str = _setting(
        "eager",
        "What computes denoisers, VAEs and text encoders, unless the model file says: eager (the modules "
        "themselves), openvino (graphs made of them; needs the extra openvino, and memory for a copy of the weights), "
        "compile (torch.compile, in the background; needs a C++ compiler) or auto (what was faster on this machine).",
        choices=("eager", "openvino", "compile", "auto"),
    )
    runners: str = _setting(
        "", "Folder for converted models and what was measured of them; empty: `runners` in the data folder."
    )
    max_batch: int = _setting(8, "Largest batch of a forward pass, in rows; guidance takes two per picture.", least=1)
    max_active: int = _setting(
        16,
        "Maximum pictures drawn at the same time on each device, besides half as many of the priority batch; "
        "others wait.",
        least=1,
    )
    max_queue: int = _setting(64, "Maximum pictures in the queue; further ones get a 429.", least=1)
    hang_s: int = _setting(1800, "Seconds after which a drawing worker that sends nothing is replaced.", least=1)
    grace_s: int = _setting(
        30, "Seconds that running requests get to finish when the server is stopped; then they get a 503.", least=0
    )
    time_limit_s: int = _setting(
        3600,
        "Time limit of a request, queueing included, in seconds; of a stored one (a job, clip or batch line), "
        "of each picture from when the engine begins with it, without the load of its model.",
        least=1,
    )
    max_connections: int = _setting(
        1000,
        "Maximum open connections (fewer if file descriptors are short); beyond it the longest idle one is closed.",
        least=1,
    )
    patience_s: int = _setting(
        30, "Seconds after which a client that stalls in the middle of a request is disconnected.", least=1
    )
    public_url: str = _setting("", "Base of picture URLs behind a proxy, e.g. https://host/prefix.")
    trusted_proxies: str = _setting(
        "127.0.0.1", "Addresses or networks (comma-separated, * for any) whose X-Forwarded-* headers are trusted."
    )
    api_keys: str = _setting(
        "",
        "NAME:KEY pairs, comma-separated; callers must send one of the keys; the queue is fair by name. Empty: no key.",
        secret=True,
    )
    cors_origins: str = _setting("", "Origins (comma-separated, * for any) of web pages that may call this server.")
    allowed_hosts: str = _setting(
        "",
        "Host names (comma-separated, *.name for all subdomains, * for any) that browsers may reach this server by, "
        "besides IP addresses, names of the local network and the host in public_url.",
    )
    cross_site: bool = _setting(False, "Whether any web page may use this server from a visitor's browser.")
    max_n: int = _setting(10, "Maximum pictures per request.", least=1)
    max_pixels: int = _setting(2048 * 2048, "Largest picture that may be requested, in pixels.", least=64)
    max_side: int = _setting(4096, "Longest side of a picture that may be requested, in pixels.", least=64)
    max_aspect: int = _setting(
        8, "Maximum aspect ratio (longer to shorter side) of requested and source pictures.", least=1
    )
    max_frames: int = _setting(MAX_FRAMES, "Maximum frames of a clip.", least=1)
    max_seconds: int = _setting(MAX_SECONDS, "Maximum length of a clip or a sound, in seconds.", least=1)
    max_clip_megapixels: int = _setting(
        MAX_CLIP_MEGAPIXELS,
        "Maximum megapixels of all frames of a clip together; while it is encoded, each takes 12 MB of main memory.",
        least=1,
    )
    max_body_mb: int = _setting(64, "Largest request body, in MiB.", least=1)
    max_text_mb: int = _setting(4, "Maximum size of a request without its pictures (prompts, fields), in MiB.", least=1)
    max_source_pixels: int = _setting(64_000_000, "Largest source picture that is decoded, in pixels.", least=64)
    max_waiting_mb: int = _setting(
        512, "Source pictures of all queued and running requests, in MiB; further ones get a 429.", least=1
    )
    decoders: int = _setting(2, "Maximum source pictures decoded at the same time, each in its own process.", least=1)
    decode_s: int = _setting(
        10, "Maximum CPU time for decoding a source picture, in seconds; a clip may take six times as long.", least=1
    )
    picture_hosts: str = _setting(
        "",
        "Hosts (comma-separated) whose picture URLs are fetched even if their address is not public.",
        check=host_names,
    )
    loaded_loras: int = _setting(
        8, "Maximum LoRAs of requests in memory for each model; the least recently used is dropped.", least=1
    )
    lora_hosts: str = _setting(
        "hub",
        "Where LoRAs, ControlNets and IP-Adapters that requests name may be downloaded from: hosts (of LoRAs), "
        "comma-separated, and hub for the Hugging Face hub. Empty: only what lies in loras/, controlnets/ and "
        "ip_adapters/ is used.",
        check=host_names,
    )
    depth_model: str = _setting(
        "depth-anything/Depth-Anything-V2-Small-hf",
        "What estimates depth for `preprocess: depth` of controls: a hub id (owner/name, owner/name@revision), "
        "downloaded when it is first needed, or a folder with a depth estimator of transformers. Empty: none.",
    )
    pose_model: str = _setting(
        "usyd-community/vitpose-base-simple",
        "What finds people's joints for `preprocess: pose` of controls: a ViTPose of transformers, as for depth_model.",
    )
    person_model: str = _setting(
        "PekingU/rtdetr_r50vd_coco_o365",
        "What finds people for `preprocess: pose`: an object detector of transformers, as for depth_model.",
    )
    max_lora_mb: int = _setting(4096, "Maximum size in MiB of a LoRA that is downloaded for a request.", least=1)
    max_net_mb: int = _setting(
        8192,
        "Maximum size in MiB of what is downloaded of a ControlNet, an IP-Adapter or its image encoder for a request.",
        least=1,
    )
    outputs_max_age_h: int = _setting(168, "Hours after which generated pictures are deleted; 0 keeps them.", least=0)
    outputs_max_mb: int = _setting(
        10_000, "Total MiB of generated pictures beyond which the oldest are deleted; 0 keeps them.", least=0
    )
    outputs_url: str = _setting(
        "",
        "Where generated pictures are stored, as a URL of fsspec: s3://bucket/folder (with s3fs, which the extra ray "
        "has; its key and endpoint come from AWS's environment variables). Empty: `generated-images` in the data "
        "folder.",
        secret=True,
    )
    keep_pictures: bool = _setting(
        True, "Whether pictures returned as base64 are also stored, for the gallery; those with a URL always are."
    )
    mcp_max_side: int = _setting(
        512,
        "Longer side in pixels of pictures in answers of MCP's tools: larger ones are scaled down there, and whole "
        "behind their links. Chat programs limit the size of an answer. 0: only links.",
        least=0,
    )
    gallery_url: str = _setting(
        "",
        "Database of the gallery index, as an SQLAlchemy URL; empty: SQLite in the data folder.",
        secret=True,
    )
    database: str = _setting(
        "",
        "Database of jobs (requests with `Prefer: respond-async` or `Idempotency-Key`), as an SQLAlchemy URL; empty: "
        "SQLite, `jobs.db` in the data folder.",
        secret=True,
    )
    jobs_max_age_h: int = _setting(24, "Hours after its end that a job and its answer are stored.", least=1)
    jobs_max_mb: int = _setting(
        2000,
        "Total MiB of stored jobs beyond which ended ones are deleted: the oldest, of the caller that has most.",
        least=1,
    )
    files_max_mb: int = _setting(
        10_000, "Maximum MiB of a caller's files and batches: what it uploads, and the answers of batches.", least=1
    )
    files_max_age_h: int = _setting(
        720, "Hours after which files are deleted, and batches after their end, unless the request says.", least=1
    )
    webhook_hosts: str = _setting(
        "",
        "Hosts (comma-separated) that webhooks of jobs and batches may be sent to, also if their address is not "
        "public; * for all with a public address. Empty: no webhooks.",
        check=partial(host_names, any_host=True),
    )
    webhook_secret: str = _setting(
        "", "What signs webhooks: whsec_ and 24 to 64 random bytes in base64 (Standard Webhooks).", secret=True
    )
    content_images: str = _setting(
        "",
        "Who gets the pictures of chat completions in `content`, too, as Markdown with their URLs, for clients that do "
        "not read `images`: names of API keys, comma-separated, or * for all. A request decides with its own field "
        "of this name.",
    )
    log_format: str = _setting("text", "text, or json: one object per line.", choices=("text", "json"))
    log_prompts: bool = _setting(False, "Whether prompts may appear in the log.")
    log_level: str = _setting(
        "info",
        "The least severe lines to log: debug, info, warning or error.",
        choices=("debug", "info", "warning", "error"),
    )

    @property
    def limits(self) -> Limits:
        """For the size of a result."""
        return Limits(
            self.max_pixels,
            self.max_side,
            self.max_aspect,
            frames=self.max_frames,
            seconds=self.max_seconds,
            clip_pixels=self.max_clip_megapixels * 10**6,
        )

    @property
    def runners_folder(self) -> Path:
        return Path(self.runners) if self.runners else self.data / "runners"

    @classmethod
    def load(cls, overrides: Mapping[str, Any] | None = None, env: Mapping[str, str] = os.environ) -> Settings:
        """Settings from `overrides` (None means "not set"), then the environment, then defaults.

        Raises ValueError naming the setting, its value and what is valid.
        """
        values: dict[str, Any] = {}
        for spec in fields(cls):
            raw = (overrides or {}).get(spec.name)
            name = spec.name
            if raw is None and env_name(spec) in env:
                raw, name = env[env_name(spec)], env_name(spec)
            if raw is not None:
                values[spec.name] = _parse(spec, name, raw)
        return cls(**values)


def env_name(spec: Field[Any]) -> str:
    return PREFIX + spec.name.upper()


def flag(spec: Field[Any]) -> str:
    return "--" + spec.name.replace("_", "-")


def python_type(spec: Field[Any]) -> type:
    """The field's Python type: str, int, bool or Path."""
    return type(spec.default)


def _parse(spec: Field[Any], name: str, raw: Any) -> Any:
    if python_type(spec) is bool and isinstance(raw, str):
        if raw.lower() not in _FLAGS:
            raise ValueError(f"{name}={raw!r}: must be true or false. {spec.metadata['help']}")
        raw = _FLAGS[raw.lower()]
    choices = spec.metadata.get("choices")
    if choices and str(raw).lower() not in choices:
        raise ValueError(f"{name}={raw!r}: must be one of {', '.join(choices)}. {spec.metadata['help']}")
    if choices:
        raw = str(raw).lower()
    try:
        value = python_type(spec)(raw)
    except ValueError:
        raise ValueError(f"{name}={raw!r}: must be a whole number. {spec.metadata['help']}") from None
    try:
        spec.metadata.get("check", lambda value: None)(value)
    except ValueError as error:
        raise ValueError(f"{name}={raw!r}: {error}. {spec.metadata['help']}") from None
    least = spec.metadata.get("least")
    if least is not None and value < least:
        raise ValueError(f"{name}={raw!r}: must be at least {least}. {spec.metadata['help']}")
    return value
