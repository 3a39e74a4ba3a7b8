"""A readable report on each model file: for `sfumato check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sfumato.checkpoints import file_values, ip_adapters, pipeline_class, sources, static_capabilities, tiny_vaes
from sfumato.config import Broken, ModelConfig, ParsedFile, Redirect, Skipped, addresses
from sfumato.errors import DownloadError, InvalidRequest, SfumatoError, in_words
from sfumato.models import inspection, low_memory, quantizers
from sfumato.pipelines import guidance
from sfumato.sampling import PARAMETERS
from sfumato.serving.catalog import Catalog


@dataclass(frozen=True, slots=True)
class FileReport:
    """The report on one model of one file; `str` formats it for a terminal."""

    file: Path
    title: str
    facts: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    """Keys without effect, each with the reason."""
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{'ok' if self.ok else 'PROBLEM':7} {self.file}: {self.title}"]
        lines += [f"        {label + ':':12} {text}" for label, text in self.facts]
        lines += [f"        {'no effect:':12} {key} ({reason})" for key, reason in self.ignored]
        lines += [f"        {'fix:':12} {problem}" for problem in self.problems]
        return "\n".join(lines)


def check(catalog: Catalog, *, ask: bool = False) -> list[FileReport]:
    """A report for each model of each file, in the catalog's order.

    `ask`: of a model that is not on this disk, look at what its hub or server says of it; no weights are fetched.
    """
    hub = _Hub(ask)
    complaints: dict[Path, list[str]] = {}
    for problem in catalog.problems():
        complaints.setdefault(problem.file, []).append(problem.message)
    reports = []
    for file, outcomes in catalog.outcomes().items():
        reported = {outcome.error.message for outcome in outcomes if isinstance(outcome, Broken)}
        between_files = [text for text in complaints.get(file.absolute(), []) if text not in reported]
        for index, outcome in enumerate(outcomes):
            reports.append(_report(outcome, tuple(between_files) if index == 0 else (), hub))
    return reports


class _Hub:
    """Whether hubs and servers are asked: none after the first that cannot be reached, as each takes its time."""

    def __init__(self, ask: bool) -> None:
        self.ask = ask

    def inspect(self, config: ModelConfig) -> tuple[inspection.Inspection, str]:
        """What the source says of itself, and why it was not asked, if it was to be. Raises what loading would."""
        source = sources.resolve(config)
        if self.ask:
            try:
                return inspection.inspect(config, source, ask=True), ""
            except DownloadError as error:
                self.ask = False
                return inspection.inspect(config, source, ask=False), error.message
        return inspection.inspect(config, source, ask=False), ""


def _report(outcome: ParsedFile, complaints: tuple[str, ...], hub: _Hub) -> FileReport:
    match outcome:
        case Broken(names, file, error):
            return FileReport(file, names[0] if names else "a model", problems=(error.message, *complaints))
        case Skipped(file, reason):
            return FileReport(file, f"skipped: {reason}", problems=complaints)
        case Redirect(name, target, file):
            return FileReport(file, f"{name} is served by {target}", problems=complaints)
    return _model(outcome, complaints, hub)


def _model(config: ModelConfig, complaints: tuple[str, ...], hub: _Hub) -> FileReport:
    facts: list[tuple[str, str]] = []
    problems = list(complaints)
    try:
        facts += _source(config)
        pipeline_class.choose(config, None)
        found, unasked = hub.inspect(config)
        facts += [("not asked", unasked)] if unasked else []
        facts += [("base", found.base)] if found.contents and found.contents.needs_base and found.base else []
        name = inspection.choose(config, found.index, ask=hub.ask)
        inspection.refuse_vae(config, name, found.folder)
        problems += file_values.problems(config, name, found.index, found.folder)
        problems += _adapters(config)
        if (told := static_capabilities.static_capabilities(config).abilities) and told.problem:
            problems.append(f"{config.name} draws no picture: {told.problem}")
    except SfumatoError as error:
        problems.append(error.message)
    facts += [(label, text) for label, text in _settings(config) if text]
    title = config.name + (" (disabled)" if config.disabled else "")
    return FileReport(config.file or Path(), title, tuple(facts), config.ignored, tuple(problems))


def _adapters(config: ModelConfig) -> Iterator[str]:
    """The IP-Adapters that the file names and that are nowhere."""
    key = "diffusers.ip_adapter"
    for name in config.ip_adapters:
        try:
            there = ip_adapters.find(config.folder, name, key) or (config.folder / name).is_file()
        except InvalidRequest as error:
            yield error.message
        else:
            if not there:
                known = ip_adapters.available(config.folder)
                yield f"{key}: there is no IP-Adapter {name!r}. {known}; owner/name/file.safetensors is valid too"


def _source(config: ModelConfig) -> Iterator[tuple[str, str]]:
    match sources.resolve(config):
        case sources.HubRepository(repo, revision):
            commit = cached(repo, revision)
            state = f"in the local cache ({commit[:8]})" if commit else "not here yet; the first request downloads it"
            yield "weights", f"{repo}{f'@{revision}' if revision else ''} from the hub, {state}"
            yield "pipeline", config.pipeline_type or "as the repository says"
        case sources.Url(url):
            yield "weights", f"{addresses.redact(url)}, kept beside the model file"
            yield "pipeline", config.pipeline_type or "as the weights say"
        case sources.Folder(path):
            yield (
                "weights",
                f"{config.repo}@{config.revision} in {path}, fetched by LocalAI" if config.repo else f"folder {path}",
            )
            yield "pipeline", config.pipeline_type or _class_name(path)
        case sources.File(path):
            size = f"{path.stat().st_size / 1e6:,.0f} MB" if path.exists() else "not here yet; download_files lists it"
            yield "weights", f"file {path}, {size}"
            yield "pipeline", config.pipeline_type or "as the weights say"


def _class_name(folder: Path) -> str:
    file = next((name for name in sources.INDEXES if (folder / name).is_file()), sources.INDEX)
    try:
        index = json.loads((folder / file).read_text())
        return f"{index['_class_name']}, as {file} says"
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SfumatoError(f"{folder / file} cannot be read: {error}; download the model again") from None


def cached(repo: str, revision: str | None) -> str | None:
    """The commit of a repository in the local hub cache, or None if its model_index.json is not cached."""
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(repo, index, revision=revision) for index in sources.INDEXES]
    return next((Path(path).parent.name for path in paths if isinstance(path, str)), None)


_DEVICES = {
    None: "the best one available",
    True: "CUDA, or an error if there is none",
    False: "CPU",
}


def _settings(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Labels and their text; an empty text is left out."""
    gpu = f", GPU {config.main_gpu}" if config.main_gpu is not None else ""
    half = "fp16 on CUDA (bf16 for families made for it); " if config.f16 else ""
    yield "aliases", ", ".join(config.aliases)
    yield "device", _DEVICES[config.cuda] + gpu
    yield "dtype", config.dtype or f"{half}bf16 if the device supports it, else fp32"
    yield "memory", "; ".join(_memory(config))
    yield "scheduler", config.sampling.scheduler or "the model's own"
    yield "runner", config.accelerate or ""
    divided = config.context_parallel
    yield "devices", f"{divided} for each picture, of a worker with so many (--devices)" if divided else ""
    yield "VAE", "the tiny one for its latents" if config.vae == tiny_vaes.TINY else addresses.redact(config.vae or "")
    yield "IP-Adapters", ", ".join(config.ip_adapters)
    yield "depth", config.depth_model or ""
    yield "adapters", ", ".join(f"{addresses.redact(lora.source)} × {lora.scale:g}" for lora in config.adapters)
    yield "defaults", ", ".join(f"{label} {value}" for label, value in _defaults(config) if value is not None)
    yield "options", ", ".join(f"{key}={in_words(value)}" for key, value in config.options.items())
    enabled = ", ".join(sorted(config.enable_parameters))
    yield "requests", f"may set {enabled or 'nothing but prompt, size, seed, guidance and eta'}"


def _memory(config: ModelConfig) -> Iterator[str]:
    """What is saved, and what has no effect."""
    if told := low_memory.without_effect(config, "cpu" if config.cuda is False else ""):
        yield told
    elif config.low_vram or config.offload:
        yield f"offload: {config.offload or 'model, or group where that does not fit'}; no effect on a CPU"
    for key in ("vae_slicing", "vae_tiling", "layerwise_casting", "quantization", "cache"):
        if value := getattr(config, key):
            yield key if value is True else f"{key}: {value}"
    if config.quantization and (devices := quantizers.QUANTIZERS[config.quantization].devices):
        yield f"{config.quantization} needs {' or '.join(sorted(devices))}"


def _defaults(config: ModelConfig) -> Iterator[tuple[str, object]]:
    sampling = config.sampling
    yield "size", "{}x{}".format(*sampling.size) if sampling.size else None
    for parameter in PARAMETERS:
        if (parameter.argument or parameter.name in guidance.FIELDS) and not parameter.side:
            label, value = parameter.flag.removeprefix("--").replace("-", "_"), sampling[parameter]
            yield label, f"{value:g}" if isinstance(value, float) else value
    yield "seed", config.seed
    yield "n", config.n
    yield "pictures at a time", config.max_concurrent
