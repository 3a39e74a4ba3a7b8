"""What a model file says, as one frozen value.

It is sent to the worker, which reloads a model when its config no longer equals the one in
memory; so equality and hash depend on the content, without the fields that only people read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato.config import addresses
from sfumato.config.scalar import Scalar, scalar
from sfumato.sampling import PARAMETERS, Sampling

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "f16": False,
        "step": 30,
        "cuda": None,
        "enable_parameters": frozenset(each.argument for each in PARAMETERS if each.guarded and each.argument),
        "scheduler_type": None,
        "cfg_scale": 8.0,
        "clip_skip": None,
        "pipeline_type": None,
    }
)
"""Defaults for keys that a file leaves out.

The worker fills in `step` and `cfg_scale`, for Stable Diffusion classes only: other classes
keep the defaults of their own signature, so an absent key stays None in `ModelConfig`. None here means that
the model decides: `cuda` the best available device, `scheduler_type` the model's own scheduler,
`pipeline_type` the class that the repository's model_index.json names, `clip_skip` no layer skipped.
"""

REQUEST_DEFAULTS = Sampling(
    **{each.name: DEFAULTS.get(each.keys[0].rpartition(".")[2]) for each in PARAMETERS if each.keys}
)
"""The sampling parameters of `DEFAULTS`."""

ALWAYS = frozenset({"prompt", "generator"}) | {
    each.argument for each in PARAMETERS if each.argument and not each.guarded and not each.source
}
"""Pipeline arguments that every model accepts, even with `enable_parameters: none`."""

WITH_IMAGE = frozenset({"mask_image"}) | {each.argument for each in PARAMETERS if each.argument and each.source}
"""Pipeline arguments that only concern a source picture: `image` enables them."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA: a file beside the model file or a hub id, and its weight."""

    source: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Download:
    """A file to fetch into the model file's folder before the model is loaded."""

    uri: str
    filename: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """A way to skip layers whose output changes little from step to step, with the settings that the file gives it."""

    kind: str
    """A key of `readers.CACHES`."""
    settings: tuple[tuple[str, int | float | bool | tuple[float, ...]], ...] = ()

    def __str__(self) -> str:
        return ":".join((self.kind, *(f"{name}={_words(value)}" for name, value in self.settings)))


def _words(setting: Any) -> str:
    return "/".join(f"{each:g}" for each in setting) if isinstance(setting, tuple) else str(setting)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model. `None` means that the file does not say; see `DEFAULTS`."""

    name: str
    aliases: tuple[str, ...] = ()
    description: str | None = field(default=None, compare=False)
    usage: str | None = field(default=None, compare=False)
    disabled: bool = False
    pinned: bool = False
    """Never unloaded to make room for another model, and not for being idle."""
    keep_alive: float | None = None
    """Seconds that it stays in memory once it is idle; None: as the server says."""

    part: str = ""
    """Not a model but what requests for models need, loaded for itself and shared by them: `controlnet`, `ip_adapter`,
    `image_encoder`, or a kind of `models.estimators`."""
    part_file: str | None = None
    """The file of such a ControlNet in its repository on the hub; of an estimator, its name as it is written."""
    part_of_file: bool = False
    """Whether the model file or a setting names it, and not a request: it may be of any size."""
    denoiser: str | None = None
    """Of such a ControlNet, if it is a single file: settings of the denoiser that it was made for, as JSON."""

    model: str
    """Where the weights come from, as written; `sfumato.checkpoints.sources` says what it is."""
    file: Path | None = None
    """The model file; None for a model that was named on the command line."""
    folder: Path = field(default_factory=Path)
    """Relative paths are resolved against it."""
    repo: str | None = None
    """Hub id from the file's `artifacts`; replaces `model`."""
    revision: str | None = None
    variant: str | None = None
    """Variant of the weight files in a repository: fp16, ema, ..."""
    downloads: tuple[Download, ...] = ()
    allow_pickle: bool = False
    snapshot: str | None = None
    """Path in `folder` of what LocalAI has fetched for the file's `artifacts`, at `revision`."""
    original_config: str | None = None
    """The YAML that a single file was trained with: a path or URL."""
    base_model: str | None = None
    """What a file that holds a denoiser alone takes all else from: hub id or folder."""
    text_encoders: tuple[str, ...] = ()
    """Files with the text encoders of such a model, in any order: their headers tell which is which."""

    pipeline_type: str | None = None
    img2img: bool = False
    """Used for image-to-image; `pipeline_type` is already the class for it, if known."""
    control_net: str | tuple[str, ...] | None = None
    ip_adapters: tuple[str, ...] = ()
    """IP-Adapters that follow the controls of a request that name nothing."""
    depth_model: str | None = None
    """What estimates depth for `preprocess: depth`; None: what the server has."""
    clip_model: str | None = None
    clip_subfolder: str | None = None
    vae: str | None = None
    """Another VAE: file, folder, hub id or URL."""
    prediction_type: str | None = None
    rescale_betas_zero_snr: bool | None = None
    timestep_spacing: str | None = None
    """What the model was trained with, where neither its repository nor its single file says so."""
    prior: str | None = None
    """Another pipeline that makes embeddings of pictures for this one: folder or hub id."""
    preview_vae: str | None = None
    """A tiny autoencoder for previews."""
    adapters: tuple[Adapter, ...] = ()

    sampling: Sampling = field(default_factory=Sampling)
    """Of requests that leave something open; a scheduler with the schedule that the file has beside it."""
    quality_steps: tuple[tuple[str, int], ...] = ()
    """Name of a quality → steps, for those that the file names."""
    seed: int | None = None
    n: int | None = None
    option_lines: tuple[tuple[str, str], ...] = ()
    """`options` as written. Kept as text: 1, 1.0 and true are equal in Python but not the same."""
    enable_parameters: frozenset[str] = DEFAULTS["enable_parameters"]
    locked: frozenset[str] = frozenset()
    """Pipeline arguments that requests cannot change; `*`: all of `options`."""

    f16: bool = DEFAULTS["f16"]
    cuda: bool | None = DEFAULTS["cuda"]
    dtype: str | None = None
    """fp16, bf16 or fp32; takes precedence over `f16`."""
    main_gpu: int | None = None
    low_vram: bool = False
    """As `offload: model` where the file does not say `offload`."""
    offload: str | None = None
    """none, model or group; None: what fits."""
    vae_slicing: bool = False
    vae_tiling: bool | None = None
    """None: when memory runs out. False: never."""
    layerwise_casting: str | None = None
    """The dtype in which the denoiser's weights are stored: a value of `readers.STORAGE_DTYPES`."""
    quantization: str | None = None
    """A key of `models.quantizers.QUANTIZERS`."""
    cache: FeatureCache | None = None
    accelerate: str | None = None
    """A value of `readers.RUNNERS`; None: as the server says."""
    context_parallel: int | None = None
    """Devices that compute one picture together; None: one."""
    threads: int | None = None

    max_concurrent: int | None = None
    """Maximum pictures drawn at a time; None: no limit."""
    retry_after: int = 1
    """Seconds that a refused caller is told to wait."""

    ignored: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    """Keys of the file that have no effect here, each with the reason."""
    created: int = field(default=0, compare=False)
    """When the file was written, in seconds since 1970."""

    @property
    def options(self) -> Mapping[str, Scalar]:
        """Extra arguments of the pipeline call; numbers are numbers and integers stay integers."""
        return MappingProxyType({key: scalar(text) for key, text in self.option_lines})

    def locks(self, parameter: str) -> bool:
        """Whether the file's value of this argument holds whatever a request says."""
        return parameter in self.locked or ("*" in self.locked and parameter in self.options)

    def __repr__(self) -> str:  # its URLs may carry secrets
        return f"ModelConfig({self.name!r}, {self.label!r})"

    @property
    def label(self) -> str:
        """`model` without the parts of a URL that may be secret; use it in messages."""
        return addresses.redact(self.model)

    @property
    def file_name(self) -> str:
        """What to call the model file in messages: clients need not know its folder. The model's name without one."""
        return self.file.name if self.file else self.name

    def enables(self, parameter: str) -> bool:
        """Whether a request may set this argument of the pipeline call."""
        enabled_by = "image" if parameter in WITH_IMAGE else parameter
        return parameter in ALWAYS or bool(self.enable_parameters & {parameter, enabled_by})
