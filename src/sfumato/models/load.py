"""Load a model file into a diffusers pipeline on its device, ready to draw."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
import transformers

from sfumato import schedulers
from sfumato.batching import offload
from sfumato.batching.batcher import is_out_of_memory
from sfumato.batching.exclusive import rewires
from sfumato.checkpoints import (
    descriptions,
    hub_files,
    modular,
    pipeline_class,
    prediction,
    split,
    tiny_vaes,
    variants,
    weight_file,
)
from sfumato.config import ModelConfig, addresses
from sfumato.errors import DownloadError, InvalidRequest, LoadError, ModelFileError, SfumatoError, first_line
from sfumato.loras import Lora
from sfumato.models import (
    context_parallel,
    feature_caches,
    footprint,
    inspection,
    low_memory,
    modular_load,
    parts,
    precision,
    quantizers,
    sharing,
    split_load,
    weight_stamps,
)
from sfumato.models.adapters import Adapters
from sfumato.models.device import DTYPES, choose_device, choose_dtype, expected_dtype
from sfumato.models.fetch import Fetched, OnStatus, fetch, fetch_prior
from sfumato.models.picture_prompt import PicturePrompt
from sfumato.pipelines import request_scheduler, tokens, with_prior
from sfumato.pipelines.capabilities import most_clip_skip
from sfumato.previews.decode import CheapDecoder, cheap_decoder
from sfumato.runners.candidate import KeptRunner
from sfumato.status import ModelStatus

log = logging.getLogger(__name__)

MakeRoom: TypeAlias = Callable[[footprint.Needs], None]


@dataclass(slots=True)
class ModelState:
    """State of a model that changed after loading; shared by all its requests."""

    tiled_from: float | None = None
    """Pixels of the smallest picture for which the VAE ran out of memory; from that size on it is tiled at once."""
    offload: low_memory.Offload = "none"
    """What of the weights waits in main memory: since it was loaded, or since memory ran out."""
    broken: str = ""
    """What a request changed and could not restore; new requests do not use such a model."""
    kept: tuple[torch.nn.Module, ...] = ()
    """Components without this model's adapters, for other models to share; their tensors are the pipeline's own."""
    adapters: Adapters = field(default_factory=Adapters)
    """The LoRAs that requests have loaded."""
    stamps: weight_stamps.Stamps = field(default_factory=dict)
    """Of the weight files that it was loaded of."""
    own_loras: tuple[Lora, ...] = ()
    """The LoRAs of the model file."""
    runners: dict[str, KeptRunner] = field(default_factory=dict)
    """What has computed its modules in their place, by component."""
    embeddings: dict[str, str] = field(default_factory=dict)
    """Hash of each textual inversion that its tokenizers and text encoders have → its tokens."""


@dataclass(slots=True)
class Loaded:
    """A model in memory as one request sees it: `config` is the one that request was made with."""

    config: ModelConfig
    pipeline: Any
    source: str
    device: str
    dtype: str
    task_pipelines: dict[str, Any] = field(default_factory=dict)
    """Pipelines for other tasks on the same weights, by task."""
    state: ModelState = field(default_factory=ModelState)
    net_digests: Mapping[str, str] = field(default_factory=dict)
    """ControlNet that the request names -> SHA-256 of its weights."""
    beside: tuple[str, ...] = ()
    """Names of what else the request uses."""
    estimators: Mapping[tuple[str, tuple[str, ...]], Sequence[Any]] = field(default_factory=dict)
    """Preprocessor of the request's controls, and the names that they say -> the estimators that it needs."""
    prompt: PicturePrompt | None = None
    """The IP-Adapters that the request names."""
    preview_decoder: CheapDecoder | None = None
    """Cheap preview decoder; None: previews use the model's own VAE."""

    def modules(self) -> dict[str, torch.nn.Module]:
        """Everything of it that has weights, by name."""
        parts: dict[str, Any] = {**vars(self.pipeline), "the preview decoder": self.preview_decoder}
        parts |= {f"component {at} without adapters": module for at, module in enumerate(self.state.kept)}
        parts |= {f"component {at} with adapters": module for at, module in enumerate(self.state.adapters.modules)}
        return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}

    def blocks(self) -> footprint.Blocks:
        """The memory blocks that its weights take, and the runners' copies of them."""
        copies = {("cpu", id(runner)): runner.bytes for runner in self.state.runners.values() if runner.bytes}
        return {**footprint.blocks(self.modules().values()), **copies}

    def computing(self) -> dict[str, torch.nn.Module]:
        """What takes the time of a picture, by component, most of it first: denoisers, VAE and text encoders."""
        parts = sorted(vars(self.pipeline).items(), key=lambda named: (not precision.is_denoiser(named[0]), named[0]))
        return {name: part for name, part in parts if precision.computes(name) and isinstance(part, torch.nn.Module)}

    @property
    def savings(self) -> tuple[str, ...]:
        """Memory savings in effect for every picture, as recipes have them."""
        return low_memory.savings(self.config, self.state.offload)


def load(
    config: ModelConfig,
    device_setting: str,
    on_status: OnStatus,
    make_room: MakeRoom = lambda needs: None,
    known: sharing.Sharing | None = None,
) -> Loaded:
    """Load a model. Raises LoadError, ModelFileError or InvalidRequest with a readable message, and then keeps nothing.

    `make_room` is called when all files are there, before weights are read; what it raises ends the load. Components
    that are `known` are used again, and the model's own are made known.
    If memory runs out, raises what torch or Python raised (see `is_out_of_memory`).
    """
    # The server logs what is loaded; progress bars are for terminals.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()

    def report(fraction: float | None, name: str) -> None:
        on_status(ModelStatus("downloading", name, fraction))

    try:
        place = choose_device(config, device_setting)
        components = known.of(config) if known else sharing.Components()
        pipeline, fetched, dtype = _pipeline(config, place, on_status, make_room, components)
        if fetched.prior:
            pipeline = with_prior.joined(pipeline, parts.prior(config, fetched.prior, dtype))
        source = fetched.label
        prediction.apply(config, pipeline, fetched.path if fetched.description else None)
        _check(config, pipeline)
        context_parallel.check_loaded(config, pipeline)
        vae = getattr(pipeline, "vae", None)
        named = tiny_vaes.resolve(config, {"_class_name": type(vae).__name__, **getattr(vae, "config", {})})
        parts.replace_vae(named, pipeline, DTYPES[dtype], report)
        with components.kept_from_adapters(pipeline):
            own_loras = parts.load_adapters(config, pipeline, report)
        low_memory.engage(config, pipeline, DTYPES[dtype])
        feature_caches.engage(config, pipeline, DTYPES[dtype])
        preview_decoder = _load_preview_decoder(named, components.private_view(pipeline), place, dtype)
        offloaded = _place(config, pipeline, place, components.given)
        state = ModelState(offload=offloaded, own_loras=own_loras, stamps=fetched.stamps)
        if state.offload == "none":
            state.kept = components.make_known(pipeline)
    except SfumatoError:
        raise
    except Exception as error:  # whatever a pipeline's loading code raises, the caller gets a readable message
        gc.collect()
        if is_out_of_memory(error):
            raise
        log.exception("%s: load failed", config.name)
        raise LoadError(f"{config.name}: {type(error).__name__}: {addresses.redact(str(error))}") from error
    pipeline.set_progress_bar_config(disable=True)
    log.info("%s: %s from %s on %s in %s", config.name, type(pipeline).__name__, source, place, dtype)
    model = Loaded(config, pipeline, source, place, dtype, state=state, preview_decoder=preview_decoder)
    if model.savings:
        log.info("%s: saves with %s", config.name, ", ".join(model.savings))
    return model


def _pipeline(
    config: ModelConfig, device: str, on_status: OnStatus, make_room: MakeRoom, shared: sharing.Components
) -> tuple[Any, Fetched, str]:
    """The pipeline in main memory, what it was loaded from, and its dtype. `shared` components are where they are."""
    pipeline_class.choose(config, None)  # an unknown class is reported before anything is fetched
    dtype = expected_dtype(config, device)
    fetched = replace(fetch(config, dtype, on_status), prior=fetch_prior(config, dtype, on_status))
    places = (fetched.path, *fetched.files.values(), fetched.description, fetched.prior, *parts.places(config))
    fetched = replace(fetched, stamps=weight_stamps.of(filter(None, places)))
    on_status(ModelStatus("loading", fetched.label))
    index = pipeline_class.index_of(fetched.description or fetched.path)
    dtype = choose_dtype(config, device, index)
    name = inspection.choose(config, index, device)
    cls = getattr(diffusers, name)
    variant, sizes = _sizes(config, fetched, index, dtype)
    named = parts.sizes(config, dtype, lambda fraction, name: on_status(ModelStatus("downloading", name, fraction)))
    if prior := fetched.prior:
        named["prior"] = sum(footprint.of_files(prior, pipeline_class.index_of(prior), dtype, None).values())
    if config.control_net:  # in place of the repository's own
        sizes.pop("controlnet", None)
    sizes |= {name: size for name, size in named.items() if size}
    if not rewires(cls):
        described = fetched.description or fetched.path
        shared.identify(fetched.path, described, fetched.files, index, variant, (device, dtype))
    make_room(_needs(config, sizes, shared.find(), device, dtype))
    given = shared.find()  # more than before, if another model was loaded while this one waited
    with hub_files.as_download_errors(fetched.label):
        if fetched.description and not fetched.files:
            return _single_file(config, fetched, cls, dtype, index, **given), fetched, dtype
        folder = fetched.description or fetched.path
        if fetched.files:
            own = {name: file for name, file in fetched.files.items() if name not in given}
            settings = quantizers.settings(config, index, DTYPES[dtype])
            given |= split_load.components(own, folder, index, DTYPES[dtype], settings)
        if modular.is_one(name):
            pick = functools.partial(variants.choose, config, dtype)
            settings = quantizers.settings(config, index, DTYPES[dtype])
            pipeline = modular_load.load(config, folder, index, cls, DTYPES[dtype], pick, given, settings)
            return pipeline, fetched, dtype
        return _folder(config, folder, cls, dtype, index, **given), fetched, dtype


def _sizes(
    config: ModelConfig, fetched: Fetched, index: dict[str, Any], dtype: str
) -> tuple[str | None, dict[str, int]]:
    """The variant of its weights, and the bytes that each component takes; a GGUF file's denoiser stays quantised."""
    folder = fetched.description or fetched.path
    variant, quantised = None, dict[str, int]()
    if fetched.description and not fetched.files:
        sizes = footprint.of_files(fetched.path, index, dtype, None)
    else:
        files = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
        variant = variants.pick(files, variants.preferred(config, dtype))
        if modular.is_one(pipeline_class.choose(config, index)):
            sizes = footprint.of_folders(modular_load.folders(config, folder, index), dtype, variant)
        else:
            sizes = footprint.of_files(folder, index, dtype, variant, without=fetched.files)
    for component, file in fetched.files.items():
        of_file = sum(footprint.of_files(file, index, dtype, None).values())
        (quantised if file.suffix == split.GGUF else sizes)[component] = of_file
    return variant, {**low_memory.stored(config, sizes, index, footprint.BYTES[dtype]), **quantised}


def _needs(
    config: ModelConfig, sizes: Mapping[str, int], shared: Mapping[str, torch.nn.Module], device: str, dtype: str
) -> footprint.Needs:
    """What its own weights will take, without `shared` components."""
    own = {name: size for name, size in sizes.items() if name not in shared}
    in_memory = footprint.blocks(shared.values())
    return footprint.Needs(own, device, dtype, in_memory, by_layer=config.offload == "group")


def _folder(config: ModelConfig, folder: Path, cls: Any, dtype: str, index: dict[str, Any], **components: Any) -> Any:
    files = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
    return cls.from_pretrained(
        folder,
        dtype=DTYPES[dtype],
        variant=variants.choose(config, dtype, files),
        use_safetensors=None if config.allow_pickle else True,
        local_files_only=True,
        **quantizers.for_pipeline(config, index, DTYPES[dtype], without=components),
        **{**components, **parts.components(config, DTYPES[dtype], folder)},
    )


def _single_file(
    config: ModelConfig, fetched: Fetched, cls: Any, dtype: str, index: dict[str, Any], **components: Any
) -> Any:
    assert fetched.description
    original = {"original_config": str(parts.original_config(config))} if config.original_config else {}
    with weight_file.in_lower_case(fetched.path) as file, descriptions.whole(fetched.description) as described:
        given = {
            "config": str(described),
            "dtype": DTYPES[dtype],
            **original,
            **parts.components(config, DTYPES[dtype], described),
            **quantizers.denoiser(config, file, described, index, DTYPES[dtype]),
            **components,
        }
        try:
            return cls.from_single_file(str(file), **given)
        except ValueError as error:  # of other shapes, say
            if described == fetched.description:
                raise
            raise DownloadError(
                f"{config.name}: {fetched.path.name} does not fit what Sfumato knows of its kind without a network "
                f"({first_line(error)}). Run `sfumato pull {config.name}` once while online."
            ) from error


def _load_preview_decoder(config: ModelConfig, pipeline: Any, device: str, dtype: str) -> CheapDecoder | None:
    """The tiny autoencoder that the file names; else a latent-to-RGB map, fitted now while the model is idle."""
    if not config.preview_vae:
        # With weights offloaded to main memory, the map is fitted there.
        vae = getattr(pipeline, "vae", None)
        if vae is not None and not config.low_vram and config.offload in (None, "none"):
            vae.to(device)
        return cheap_decoder(pipeline)
    source = parts.component(config, config.preview_vae)
    with hub_files.as_download_errors(config.preview_vae):
        tiny = diffusers.AutoencoderTiny.from_pretrained(source, local_files_only=True, dtype=DTYPES[dtype])
    channels, model_channels = (
        tiny.config.latent_channels,
        getattr(getattr(pipeline, "vae", None), "config", {}).get("latent_channels"),
    )
    if model_channels is not None and channels != model_channels:
        raise ModelFileError(
            f"{config.name}: preview_vae {config.preview_vae} decodes latents with {channels} channels; "
            f"this model's have {model_channels}. Use one made for this model, or leave it out.",
            param="diffusers.preview_vae",
        )
    return tiny.to(device)


def _check(config: ModelConfig, pipeline: Any) -> None:
    scheduler = config.sampling.scheduler
    if scheduler and (reason := request_scheduler.keeps_own(pipeline)):
        log.warning("%s: scheduler_type %s is left out: %s", config.name, scheduler, reason)
    elif scheduler:
        choice = schedulers.parse(scheduler)
        try:
            request_scheduler.check(pipeline, choice)
        except InvalidRequest as error:
            raise ModelFileError(f"{config.name}: {error.message}", param="scheduler_type") from error
    limit = token_limit(config, pipeline)
    if limit and not config.sampling.max_sequence_length and tokens.LIMIT not in config.options:
        log.info(
            "%s: prompts are read up to %d tokens, as LocalAI does with FluxPipeline and as schnell was trained; "
            "`max_sequence_length` in the model file or a request sets another limit",
            config.name, limit,
        )  # fmt: skip
    most = most_clip_skip(pipeline)
    clip_skip = config.sampling.clip_skip
    if clip_skip and most is not None and clip_skip > most:
        raise ModelFileError(
            f"{config.name}: clip_skip {clip_skip} skips more layers than the text encoder has; 0 to {most} are valid",
            param="clip_skip",
        )


def token_limit(config: ModelConfig, pipeline: Any) -> int | None:
    """`max_sequence_length` where neither file nor request says it; None: the pipeline's own default."""
    denoiser = getattr(pipeline, "transformer", None)
    guidance_embeds = getattr(denoiser, "config", {}).get("guidance_embeds")
    return tokens.usual_limit(config.pipeline_type, type(pipeline).__name__, guidance_embeds)


def _place(
    config: ModelConfig, pipeline: Any, device: str, shared: Sequence[torch.nn.Module] = ()
) -> low_memory.Offload:
    """Put the modules where they belong, except `shared` ones, which are there and may be in use.

    Returns what of the weights waits in main memory.
    """
    chosen = _offload(config, pipeline, device)
    if chosen == "none" and not shared:
        pipeline.to(device)
    elif chosen == "none":
        for module in footprint.modules_of(pipeline):
            if all(module is not other for other in shared):
                module.to(device)
    elif chosen == "model":
        sharing.unshare(pipeline, shared)
        offload.enable(pipeline, device)
    else:
        sharing.unshare(pipeline, shared)
        offload.enable_groups(pipeline, device, precision.is_denoiser)
    return chosen


def _offload(config: ModelConfig, pipeline: Any, device: str) -> low_memory.Offload:
    """What of the weights is to wait in main memory."""
    if not device.startswith("cpu"):
        ordered, room = low_memory.is_ordered(pipeline), low_memory.room(pipeline, device)
        return low_memory.choose_offload(config, low_memory.sizes(pipeline), room, ordered=ordered)
    if told := low_memory.without_effect(config, device):
        log.warning("%s: %s", config.name, told)
    return "none"
