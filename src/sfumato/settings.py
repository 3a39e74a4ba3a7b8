"""Server settings: one table, from which come the environment names, the flags and the docs.

Each field is read from, in this order: the command line (`--max-pixels`), the environment
(`SFUMATO_MAX_PIXELS`), the default below.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

PREFIX = "SFUMATO_"

_FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _setting(default: Any, help: str, *, secret: bool = False, **limits: Any) -> Any:
    return field(default=default, repr=not secret, metadata={"help": help, **limits})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator decides; see `help` of each field."""

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 serves the network.")
    port: int = _setting(8080, "Port to listen on; 0 takes a free one.", least=0)
    models: Path = _setting(Path("models"), "Folder of model files (*.yaml) and of the weights beside them.")
    data: Path = _setting(Path("data"), "Folder for generated pictures.")
    proofs: str = _setting(
        "", "File that keeps what was shown about batching; empty: `proofs.json` in the data folder."
    )
    default_model: str = _setting("", "Model for requests that name none; empty: the first model file.")
    device: str = _setting(
        "auto", "Device for every model: auto (as the model file says), cpu, cuda, cuda:1, mps, xpu."
    )
    loaded_models: int = _setting(2, "How many models stay in memory; the least recently used leaves.", least=1)
    max_batch: int = _setting(8, "Largest batch of one forward, in rows; with guidance a picture takes two.", least=1)
    max_active: int = _setting(16, "Pictures that are drawn at the same time; others wait.", least=1)
    max_queue: int = _setting(64, "Pictures that may wait for their turn; more are refused with 429.", least=1)
    hang_s: int = _setting(1800, "A worker that draws and is silent for so many seconds is replaced.", least=1)
    grace_s: int = _setting(
        30, "Seconds that running requests may take once the server is told to stop; then they get a 503.", least=0
    )
    time_limit_s: int = _setting(3600, "Longest time from a request to its pictures, in seconds.", least=1)
    max_connections: int = _setting(
        1000,
        "Most open connections, fewer where there are few descriptors; beyond it the one idle longest is closed.",
        least=1,
    )
    patience_s: int = _setting(
        30, "A client that sends or takes nothing for so many seconds, in the middle of a request, is cut off.", least=1
    )
    public_url: str = _setting("", "Base of the picture URLs, e.g. https://host/prefix, behind a proxy.")
    trusted_proxies: str = _setting(
        "127.0.0.1", "Addresses or networks (comma-separated, * for any) whose X-Forwarded-* headers are believed."
    )
    api_keys: str = _setting(
        "",
        "NAME:KEY pairs, comma-separated; callers need one of the keys and share the queue by name. Empty: no key.",
        secret=True,
    )
    cors_origins: str = _setting("", "Origins (comma-separated, * for any) of web pages that may call this server.")
    allowed_hosts: str = _setting(
        "",
        "Names (comma-separated, *.name for all below one, * for any) by which web browsers may ask for this server, "
        "besides addresses, names of the local network and the one in public_url.",
    )
    cross_site: bool = _setting(False, "Whether any web page may use this server from its visitors' browsers.")
    max_n: int = _setting(10, "Most pictures of one request.", least=1)
    max_pixels: int = _setting(2048 * 2048, "Largest picture that may be asked for, in pixels.", least=64)
    max_side: int = _setting(4096, "Longest side of a picture that may be asked for, in pixels.", least=64)
    max_aspect: int = _setting(
        8, "How many times longer than the other a side may be, of pictures asked for and of source pictures.", least=1
    )
    max_body_mb: int = _setting(64, "Largest request body, in MiB.", least=1)
    max_text_mb: int = _setting(4, "Largest part of a request that is no picture: prompts, fields; in MiB.", least=1)
    max_source_pixels: int = _setting(64_000_000, "Largest source picture that is decoded, in pixels.", least=64)
    max_waiting_mb: int = _setting(
        512, "Source pictures of all requests that wait and draw, in MiB; more are refused with 429.", least=1
    )
    decoders: int = _setting(2, "Source pictures that are decoded at the same time, each in a process.", least=1)
    decode_s: int = _setting(10, "Longest time of the processor that decoding a source picture may take.", least=1)
    picture_hosts: str = _setting(
        "", "Hosts (comma-separated) whose picture URLs are fetched although their address is not public."
    )
    outputs_max_age_h: int = _setting(168, "Generated pictures are deleted after so many hours; 0 keeps them.", least=0)
    outputs_max_mb: int = _setting(
        10_000, "The oldest generated pictures are deleted beyond so many MiB in all; 0 keeps them.", least=0
    )
    keep_pictures: bool = _setting(
        True, "Whether pictures that are answered as base64 are kept too, for the gallery; those with a URL always are."
    )
    gallery_url: str = _setting(
        "",
        "Database of the gallery's index, as SQLAlchemy's URL; empty: SQLite in the data folder.",
        secret=True,
    )
    log_format: str = _setting("text", "text, or json: one object a line.", choices=("text", "json"))
    log_prompts: bool = _setting(False, "Whether prompts may stand in the log.")
    log_level: str = _setting("info", "debug, info, warning or error.", choices=("debug", "info", "warning", "error"))

    @classmethod
    def load(cls, given: Mapping[str, Any] | None = None, env: Mapping[str, str] = os.environ) -> Settings:
        """Settings from `given` (None values count as not given), then the environment, then defaults.

        Raises ValueError that names the setting, its value and what is valid.
        """
        values: dict[str, Any] = {}
        for spec in fields(cls):
            raw = (given or {}).get(spec.name)
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


def kind(spec: Field[Any]) -> type:
    """The field's Python type: str, int, bool or Path."""
    return type(spec.default)


def _parse(spec: Field[Any], name: str, raw: Any) -> Any:
    if kind(spec) is bool and isinstance(raw, str):
        if raw.lower() not in _FLAGS:
            raise ValueError(f"{name}={raw!r}: true or false is needed. {spec.metadata['help']}")
        raw = _FLAGS[raw.lower()]
    choices = spec.metadata.get("choices")
    if choices and str(raw).lower() not in choices:
        raise ValueError(f"{name}={raw!r}: {', '.join(choices)} are valid. {spec.metadata['help']}")
    if choices:
        raw = str(raw).lower()
    try:
        value = kind(spec)(raw)
    except ValueError:
        raise ValueError(f"{name}={raw!r}: a whole number is needed. {spec.metadata['help']}") from None
    least = spec.metadata.get("least")
    if least is not None and value < least:
        raise ValueError(f"{name}={raw!r}: must be at least {least}. {spec.metadata['help']}")
    return value
