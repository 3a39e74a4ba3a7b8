"""Every key of a model file: those with an effect here, and LocalAI's without one, each with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sfumato.config import readers as read
from sfumato.config.readers import Reader
from sfumato.sampling import PARAMETERS, Parameter


@dataclass(frozen=True, slots=True)
class Key:
    path: str
    """Dotted path in the file: `step`, `diffusers.clip_skip`."""
    field: str
    """The field of `ModelConfig` or of its `sampling`, or a name that `parse` handles."""
    read: Reader
    help: str
    group: str


def _group(group: str, *rows: tuple[str, str, Reader, str]) -> tuple[Key, ...]:
    return tuple(Key(path, field, reader, help, group) for path, field, reader, help in rows)


def _sampling_keys(parameter: Parameter) -> tuple[Key, ...]:
    """The keys of a sampling parameter: the first has its description, the others say which of them wins."""
    if not parameter.keys:
        return ()
    first, *others = parameter.keys
    absent = f" Absent: {parameter.absent}." if parameter.absent else ""
    rows = [(first, f"{parameter.help}.{absent}")]
    same = f"Same as `{first}`; takes precedence over"
    rows += [(key, f"{same} {'both' if at else 'it'}.") for at, key in enumerate(others)]
    return _group(DEFAULTS, *((key, parameter.name, _reader(parameter), text) for key, text in rows))


def _reader(parameter: Parameter) -> Reader:
    if parameter.kind is str:
        return read.string
    least, most = parameter.least or 0, parameter.most_in_file or parameter.most or math.inf
    if parameter.kind is float:
        return read.number(least, most)
    return read.integer(int(least), int(most), absent=0 if least else None)


DEFAULTS = "Defaults of requests"

KEYS: tuple[Key, ...] = (
    *_group(
        "Identity",
        ("name", "name", read.name, "Model name in requests. Absent: the file's name without `.yaml`."),
        ("alias", "alias", read.names, "Another name, or a list. Without `parameters.model`: the model serving it."),
        ("aliases", "aliases", read.names, "More names for the model; `*` stands for any text, as in `gpt-image-*`."),
        ("backend", "backend", read.string, "`diffusers` or a variant (`cuda12-diffusers`). Others are skipped."),
        ("description", "description", read.string, "Free text for people."),
        ("usage", "usage", read.string, "Free text for people."),
        ("disabled", "disabled", read.flag, "Requests for this model are refused."),
        ("pinned", "pinned", read.flag, "Never unloaded to make room for another model, and not for being idle."),
    ),
    *_group(
        "Source",
        (
            "parameters.model", "model", read.string,
            "Hub id (`owner/name`, `owner/name@revision`), folder (diffusers' or ComfyUI's), `.safetensors`, `.gguf`, "
            "`.dduf`, http(s) URL or `huggingface://owner/name[/file]`. A path is relative to the model file.",
        ),
        (
            "artifacts", "artifacts", read.artifacts,
            "LocalAI's managed repository: `source.repo` and `revision`. With `resolved`, the pinned commit; what "
            "LocalAI has fetched of it under `.artifacts` is used as it lies there.",
        ),
        ("download_files", "downloads", read.downloads, "Fetched beside the file first: `uri`, `filename`, `sha256`."),
        ("revision", "revision", read.string, "Branch, tag or commit of the hub repository."),
        ("variant", "variant", read.string, "Variant of the weight files, e.g. `fp16`. Absent: what fits the dtype."),
        ("allow_pickle", "allow_pickle", read.flag, "Load `.ckpt`, `.bin` and `.pt`, which can run any code."),
        (
            "diffusers.original_config_file", "original_config", read.string,
            "The YAML that a single file was trained with: path or URL. Absent: told from its weights.",
        ),
        (
            "diffusers.base_model", "base_model", read.string,
            "Where a file that holds a denoiser alone (`.gguf`, ComfyUI's `diffusion_models/`) takes all else from: "
            "hub id or folder. Absent: what diffusers knows for its names and shapes.",
        ),
        (
            "diffusers.text_encoders", "text_encoders", read.strings,
            "Text encoders of such a model: `.safetensors` files, `owner/name/file`, `huggingface://` or URLs, in any "
            "order. Absent: the ones of ComfyUI's `text_encoders/` or `clip/` beside it that fit, else the base's.",
        ),
    ),
    *_group(
        "Pipeline",
        ("diffusers.pipeline_type", "pipeline_type", read.string, "diffusers class. Absent: as the repository says."),
        ("diffusers.img2img", "img2img", read.flag, "Use the image-to-image class and accept source pictures."),
        ("diffusers.img2vid", "img2img", read.flag, "Accept source pictures, of a class that makes clips of them."),
        (
            "diffusers.control_net", "control_net", read.one_or_more,
            "ControlNet: folder, `.safetensors` file, name in `controlnets/`, hub id or file of a repository; or a "
            "list of them. It chooses the class that takes one.",
        ),
        (
            "diffusers.ip_adapter", "ip_adapters", read.strings,
            "IP-Adapter that follows the `controls` of requests that name nothing: a name in `ip_adapters/`, a file "
            "beside the model file or `owner/name/file.safetensors`; or a list of them.",
        ),
        (
            "diffusers.depth_model", "depth_model", read.string,
            "What estimates depth for `preprocess: depth`: hub id or folder. Absent: the setting `depth_model`.",
        ),
        ("diffusers.clip_model", "clip_model", read.string, "Another CLIP text encoder: folder or hub id."),
        ("diffusers.clip_subfolder", "clip_subfolder", read.string, "Where in it the text encoder stands."),
        (
            "vae", "vae", read.string,
            "Another VAE: `.safetensors` file, folder, hub id or URL. `tiny`: the small one made for its latents.",
        ),
        ("sd_vae", "vae", read.string, "As `vae`, AUTOMATIC1111's word; `None` and `Automatic` are the model's own."),
        ("diffusers.vae", "vae", read.string, "As `vae`, and wins over it."),
        (
            "diffusers.prediction_type", "prediction_type", read.prediction_type,
            "What it predicts: `epsilon`, `v_prediction`, `sample`. Absent: as repository or single file say.",
        ),
        (
            "diffusers.rescale_betas_zero_snr", "rescale_betas_zero_snr", read.flag,
            "Whether it was trained with zero terminal SNR. Absent: as repository or single file say.",
        ),
        (
            "diffusers.timestep_spacing", "timestep_spacing", read.timestep_spacing,
            "How steps are spaced: `leading`, `trailing`, `linspace`. Absent: as repository or single file say.",
        ),
        (
            "diffusers.prior", "prior", read.string,
            "A pipeline that makes embeddings of pictures for this one (FLUX.1 Redux): folder or hub id. The model "
            "then draws variations of pictures.",
        ),
        (
            "diffusers.preview_vae", "preview_vae", read.string,
            "A tiny autoencoder for previews: folder, hub id or `tiny`.",
        ),
    ),
    *_group(
        "Adapters",
        (
            "lora_adapter", "lora_adapter", read.string,
            "A LoRA: file beside the model file, hub id, `owner/name/file.safetensors`, `huggingface://` or URL.",
        ),
        (
            "lora_scale", "lora_scale", read.number(-100, 100),
            "How strongly it acts, and each of `lora_adapters` without `lora_scales`. Absent: 1.",
        ),
        ("lora_adapters", "lora_adapters", read.strings, "Several LoRAs."),
        ("lora_scales", "lora_scales", read.numbers(-100, 100), "One for each of them. Absent: `lora_scale`."),
    ),
    *(key for parameter in PARAMETERS for key in _sampling_keys(parameter)),
    *_group(
        DEFAULTS,
        ("diffusers.schedule", "schedule", read.string, "Noise schedule of the scheduler, e.g. `karras`."),
        (
            "quality_steps", "quality_steps", read.qualities,
            "Steps by `quality`: `{low: 10, high: 40}`. A missing one: low is 0.5, high and hd 1.5, "
            "xhigh 2, max 3 times the default steps.",
        ),
        ("parameters.seed", "seed", read.seed, "Seed; -1 is random. Absent: random."),
        ("parameters.n", "n", read.integer(1, 10, absent=0), "Pictures per request. Absent: 1."),
        ("size", "size", read.size, 'Size in pixels, `"512x768"`. Absent or `auto`: the model\'s own.'),
        (
            "diffusers.enable_parameters", "enable_parameters", read.parameters,
            "Pipeline arguments that requests may set. Absent: `negative_prompt,num_inference_steps,clip_skip`. "
            "`none`: only prompt, size, seed, guidance and eta. `image` allows source pictures, masks and strength; "
            "clips may start from a picture without it.",
        ),
        (
            "options", "options", read.options,
            "List of `key:value`: arguments of every pipeline call, where a request says nothing else. "
            "`torch_dtype:fp16` sets the dtype.",
        ),
        ("locked", "locked", read.locked, "Arguments that requests cannot change: names, or `true`: all of `options`."),
    ),
    *_group(
        "Device",
        (
            "f16", "f16", read.flag,
            "Half precision on CUDA: float16, or bfloat16 for families made for it, such as Flux. Absent: bfloat16 if "
            "the device supports it, else float32.",
        ),
        ("dtype", "dtype", read.dtype, "`fp16`, `bf16` or `fp32`; takes precedence over `f16`."),
        ("cuda", "cuda", read.flag, "true: CUDA or an error. false: CPU. Absent: the best device available."),
        ("diffusers.cuda", "cuda", read.flag, "Same as `cuda`; takes precedence over it."),
        ("main_gpu", "main_gpu", read.gpu, "Number of the GPU."),
        ("low_vram", "low_vram", read.flag, "As `offload: model`, or `group` where that does not fit."),
        (
            "offload", "offload", read.offload,
            "What of the weights waits in main memory: `none`; `model`: all modules but the active one; `group`: all "
            "layers but the active ones. Absent or `auto`: as little as fits on the GPU. No effect on a CPU.",
        ),
        ("vae_slicing", "vae_slicing", read.flag, "The VAE works on one picture of a batch at a time. Same pixels."),
        (
            "vae_tiling", "vae_tiling", read.flag,
            "true: the VAE works in tiles, which changes pixels where they meet. false: never. Absent: for pictures "
            "that do not fit otherwise.",
        ),
        (
            "layerwise_casting", "layerwise_casting", read.layerwise_casting,
            "`fp8` (or `true`), `fp8_e5m2`: the denoiser's weights are stored in a byte each, and cast for each layer.",
        ),
        (
            "quantization", "quantization", read.quantization,
            "`int8`, `fp8` (package torchao), `nf4`, `fp4` (package bitsandbytes, CUDA): denoiser and large text "
            "encoders are quantised while they are loaded.",
        ),
        (
            "cache", "cache", read.cache,
            "Skips layers of a transformer whose output changes little from step to step: `first_block`, `taylorseer`, "
            "or a mapping with one of them as `type` and its settings beside it. Faster, and another picture.",
        ),
        (
            "accelerate", "accelerate", read.accelerate,
            "What computes denoiser, VAE and text encoders, in the model's dtype: `eager`, the modules themselves; "
            "`openvino`, graphs made of them, on a CPU (extra `openvino`); `compile`, torch.compile; `auto`, what was "
            "measured to be faster. Absent: the setting `accelerate`.",
        ),
        (
            "diffusers.context_parallel", "context_parallel", read.integer(2, 64, absent=1),
            "Devices that compute each forward pass of the denoiser together, on a server with such a worker "
            "(`--devices cuda:0+cuda:1`); for transformers that diffusers can divide. Absent or 1: one.",
        ),
        ("threads", "threads", read.integer(1, 4096, absent=0), "CPU threads."),
    ),
    *_group(
        "Serving",
        (
            "keep_alive", "keep_alive", read.keep_alive,
            "How long it stays in memory once it is idle: seconds, `5m`, 0 for not at all, -1 for no limit. "
            "Absent: the setting `keep_alive`.",
        ),
        ("limits.max_concurrent", "max_concurrent", read.integer(1, absent=0), "Pictures at a time. Absent: no limit."),
        ("limits.retry_after_seconds", "retry_after", read.integer(1, 86400, absent=0), "`Retry-After` of a 429."),
    ),
)  # fmt: skip
"""In order of precedence: of two rows for the same field, the later (more specific) one wins."""

SECTIONS = ("parameters", "diffusers", "limits")
"""Keys whose value is a mapping of keys."""

REDIRECTS = ("failover", "router", "pipeline", "proxy", "mitm")
"""Without `parameters.model`, a file with one of these describes how LocalAI routes, not a model."""

LANGUAGE_KEYS = (
    "template", "roles", "function", "embeddings", "reranking", "mmproj", "grammar", "stopwords", "system_prompt",
    "chat_template_kwargs", "reasoning", "reasoning_effort", "mcp", "agent", "draft_model", "tts",
)  # fmt: skip
"""A file without a word of pictures that has one of these describes a model of language or speech."""

IMAGE_KEYS = ("diffusers", "step", "cfg_scale", "lora_adapters", "size", "strength", "quality_steps", "vae", "sd_vae")
"""Words of pictures."""

CUSTOM_PREFIX = "x-"
"""What people write for themselves begins so: for anchors, mostly."""

_TEXT = "is for language models"
_SAMPLING = "is about sampling text"
_RUNNER = "is a switch of another backend"
_SPEECH = "is for speech"
_ROUTING = "configures LocalAI's routing"
_PLACEMENT = "Sfumato places models itself"


_SAMPLING_KEYS = (
    "top_p top_k min_p temperature max_tokens echo ignore_eos repeat_penalty repeat_last_n n_keep frequency_penalty "
    "presence_penalty tfz typical_p logprobs top_logprobs logit_bias rope_freq_base rope_freq_scale "
    "negative_prompt_scale tokenizer use_fast_tokenizer encoding_format batch pooling"
)
"""LocalAI writes some of them into every file, at the top as well."""


def _ignored(reason: str, keys: str, section: str = "") -> dict[str, str]:
    return {section + key: reason for key in keys.split()}


IGNORED: Mapping[str, str] = MappingProxyType(
    {
        **_ignored("what a model can do is read from its pipeline class",
                   "known_usecases known_input_modalities known_output_modalities"),
        **_ignored("configures LocalAI itself", "feature_flags"),
        **_ignored("there is no separate backend process to set up", "grpc env"),
        **_ignored("the server's log level decides", "debug disable_log_stats"),
        **_ignored("one GPU draws; set `main_gpu` to choose it", "tensor_parallel_size tensor_split"),
        **_ignored("the weights themselves say how they are stored", "load_format"),
        **_ignored(_PLACEMENT, "concurrency_groups gpu_memory_utilization swap_space mmap mmlock numa gpu_layers"),
        **_ignored("a LoRA applies to the model of this file", "lora_base"),
        **_ignored("code from repositories is never run", "trust_remote_code"),
        **_ignored("diffusers tells the architecture from the weights", "type"),
        **_ignored("is for people and galleries", "license tags url urls icon icons files config_file"),
        **_ignored(_SPEECH, "tts"),
        **_ignored(_ROUTING, "failover router pipeline proxy mitm overrides pii pii_detection"),
        **_ignored(_RUNNER, "rms_norm_eps ngqa no_mulmatq draft_model n_draft enforce_eager max_model_len "
                   "limit_mm_per_prompt engine_args mmproj flash_attention no_kv_offloading cache_type_k cache_type_v "
                   "rope_scaling yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow"),
        **_ignored(_TEXT, "roles embeddings template function reasoning reasoning_effort chat_template_kwargs "
                   "compression mcp agent system_prompt context_size reranking prompt_cache_path prompt_cache_all "
                   "prompt_cache_ro grammar stopwords cutstrings extract_regex trimspace trimsuffix mirostat "
                   "mirostat_eta mirostat_tau"),
        **_ignored(_TEXT, "mirostat mirostat_eta mirostat_tau", "parameters."),
        **_ignored(_SAMPLING, _SAMPLING_KEYS),
        **_ignored(_SAMPLING, f"{_SAMPLING_KEYS} stop", "parameters."),
        **_ignored(_SPEECH, "language translate", "parameters."),
    }
)  # fmt: skip
"""LocalAI's keys without effect here, with the reason; each logs one warning."""

IMG2IMG: Mapping[str, str] = MappingProxyType(
    {
        "AutoPipelineForText2Image": "AutoPipelineForImage2Image",
    }
    | {
        f"{family}Pipeline": f"{family}Img2ImgPipeline"
        for family in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "Kandinsky",
                       "KandinskyV22", "Kandinsky3", "QwenImage")
    }
)  # fmt: skip
"""Text-to-image class -> the corresponding image-to-image class, for `img2img: true`."""

RENAMED: Mapping[str, str] = MappingProxyType({"VideoDiffusionPipeline": "DiffusionPipeline"})
"""LocalAI's name of a class -> diffusers': that which the repository names."""
