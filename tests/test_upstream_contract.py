"""What Sfumato leans on in other packages beyond what they document. A failure here names the file to mend.

`make test UPSTREAM=1` runs this against the newest releases.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import accelerate
import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from peft import LoraConfig
from torch.nn import functional

import sfumato
from sfumato import schedulers
from sfumato.batching import divided_attention, exclusive, feature_caches, offload, outputs, torch_state
from sfumato.batching.adapter_state import Adapters
from sfumato.batching.calls import original_module
from sfumato.checkpoints import class_reading, diffusers_source, pipeline_class, single_file
from sfumato.drawing import steps
from sfumato.pipelines import capabilities, request_scheduler, scheduler_calls, source_digest
from sfumato.previews import x0
from sfumato.process import lean_imports
from support import tiny

SOURCE = Path(sfumato.__file__).parent

NAMES: dict[str, tuple[str, ...]] = {
    "batching/views.py": (
        "diffusers.pipelines.pipeline_utils:DiffusionPipeline._execution_device",
        "diffusers.pipelines.pipeline_utils:DiffusionPipeline.maybe_free_model_hooks",
        "diffusers.hooks.group_offloading:_get_top_level_group_offload_hook",
        "diffusers.hooks.group_offloading:_is_group_offload_enabled",
        "diffusers.models.cache_utils:CacheMixin.cache_context",
        "diffusers.models.cache_utils:CacheMixin._reset_stateful_cache",
        "diffusers.models.attention:AttentionMixin.attn_processors",
        "diffusers.models.attention:AttentionMixin.set_attn_processor",
        "diffusers.guiders:ClassifierFreeGuidance",
        "torch.nn:Module._modules",
    ),
    "batching/offload.py": (
        "accelerate.hooks:UserCpuOffloadHook.offload",
        "diffusers.hooks:apply_group_offloading",
        "diffusers:ModelMixin._supports_group_offloading",
        "diffusers:ModelMixin.enable_group_offload",
    ),
    "batching/feature_caches.py": (
        "diffusers.hooks.hooks:StateManager", "diffusers.hooks.hooks:ModelHook._is_stateful",
    ),
    "runners/compiled.py": (
        "torch._dynamo:config.patch", "torch._inductor:config.patch",
        "diffusers:ModelMixin._repeated_blocks", "diffusers:ModelMixin.compile_repeated_blocks",
    ),
    "batching/torch_state.py": (
        "torch._C:_get_privateuse1_backend_name", "torch._C:_len_torch_function_stack",
        "torch._C:_len_torch_dispatch_stack",
    ),
    "checkpoints/download.py": (
        "diffusers.loaders.single_file_utils:load_single_file_checkpoint",
        "diffusers.loaders.single_file_utils:fetch_diffusers_config",
        "huggingface_hub:get_cached_repo_tree",
    ),
    "checkpoints/single_file.py": tuple(f"diffusers.loaders.single_file_utils:{name}" for name in single_file.NEEDED),
    "checkpoints/repository_files.py": (
        "diffusers.pipelines.pipeline_loading_utils:filter_model_files",
        "diffusers.pipelines.pipeline_loading_utils:is_safetensors_compatible",
        "diffusers.pipelines.pipeline_loading_utils:variant_compatible_siblings",
        "diffusers.utils.constants:TRANSFORMERS_COMPONENT_AUX_FILES",
    ),
    "drawing/draw.py": (
        "diffusers:StableDiffusionPipeline.check_inputs",
        "diffusers.pipelines.stable_diffusion:StableDiffusionPipelineOutput.nsfw_content_detected",
    ),
    "drawing/steps.py": tuple(f"diffusers:{name}" for name in steps.ENDED),
    "batching/interruption.py": ("torch.nn:Module._compiled_call_impl",),
    "previews/decode.py": ("diffusers:FluxPipeline._unpack_latents", "diffusers:Flux2Pipeline._unpatchify_latents"),
    "pipelines/capabilities.py": (
        *(f"diffusers:{name}" for name in capabilities.UPSCALERS),
        *(f"diffusers:{name}.from_pipe" for name in capabilities.AUTO_PIPELINES.values()),
    ),
    "pipelines/request_scheduler.py": tuple(
        f"diffusers:{name}.set_timesteps"
        for name in sorted(request_scheduler.SLOW_CONSTRUCTORS | schedulers.FLOW_CLASSES)
    ),
    "schedulers.py": tuple(
        f"diffusers:{form.cls}.step"
        for solver in schedulers.SOLVERS.values()
        for form in (solver.noise, solver.flow)
        if form
    ),
    "checkpoints/pipeline_class.py": ("diffusers:DiffusionPipeline._optional_components",),
    "batching/adapted.py": ("torch.nn:Module._buffers", "peft.tuners.tuners_utils:BaseTunerLayer._active_adapter"),
    "models/context_parallel.py": (
        "diffusers:FluxTransformer2DModel._cp_plan", "diffusers:ModelMixin.enable_parallelism",
        "diffusers.hooks.context_parallel:apply_context_parallel", "diffusers:ContextParallelConfig.setup",
    ),
    "models/by_layer.py": ("diffusers.hooks.group_offloading:_is_group_offload_enabled",),
    "models/attention_kinds.py": tuple(
        f"diffusers.loaders.{mixin}._convert_ip_adapter_{part}_to_diffusers"
        for part in ("attn", "image_proj")
        for mixin in (
            "unet:UNet2DConditionLoadersMixin", "transformer_flux:FluxTransformer2DLoadersMixin",
            "transformer_sd3:SD3Transformer2DLoadersMixin",
        )
    ),
    "models/controlnets.py": ("diffusers:DiffusionPipeline._get_signature_keys",),
    "checkpoints/prediction.py": ("diffusers:ConfigMixin._get_init_keys",),
    "previews/x0.py": tuple(f"diffusers:{name}" for name in x0.X0_FORMULAS),
    "api/http/connections.py": ("uvicorn.protocols.http.h11_impl:H11Protocol._unset_keepalive_if_required",),
    "batching/outputs.py": tuple(f"transformers.cache_utils:{name}" for name in sorted(outputs.DYNAMIC_LAYERS)),
}  # fmt: skip
"""File of src/sfumato → what it needs to be there, as module:attribute."""

TOUCHED = {name.rpartition(".")[2].rpartition(":")[2] for names in NAMES.values() for name in names} | {
    "_cache_config", "_diffusers_hook", "_state_cache", "_all_hooks", "_hf_hook", "_old_forward", "_use_default_values",
    "_orig_mod", "_version", "_C", "_class_name", "_name_or_path", "_diffusers_version", "_ignore_files",
    "_workflow_map", "_blocks_class_name", "_lora_loadable_modules", "_commit_hash", "_forward_hooks",
    "_forward_pre_hooks", "_dynamo", "_inductor",
}  # fmt: skip
"""Private names that a test here touches."""


OWN = {
    ("_charset_", "api/http/multipart.py"), ("_total", "serving/metrics.py"), ("_mask", "batching/text_masks.py"),
    ("_k", "api/file_parameters.py"), ("_Bar", "checkpoints/download.py"),
    # Parts of file names and functions that are looked for: see `test_packages_of_a_class_are_found`.
    ("_available", "checkpoints/pipeline_class.py"), ("_objects", "checkpoints/pipeline_class.py"),
    ("_and_", "checkpoints/pipeline_class.py"), ("_embeds", "drawing/weights.py"),
    ("_unpatchify", "pipelines/modular.py"),
    # The standard library's, documented in spite of the underscore.
    ("_getframe", "batching/stand_in.py"), ("_exit", "process/worker.py"), ("_replace", "checkpoints/url_version.py"),
    ("_exit", "runners/follower.py"), ("_exit", "runners/group.py"),
}  # fmt: skip
"""What looks like a private name of another package and is none."""


def mend(file: str) -> str:
    assert (SOURCE / file).is_file(), f"{file} is not there any more: tests/test_upstream_contract.py names it"
    return f"mend src/sfumato/{file}"


@pytest.mark.parametrize(
    ("file", "name"), [(file, name) for file, names in NAMES.items() for name in sorted(set(names))]
)
def test_what_is_named_is_there(file: str, name: str) -> None:
    module, _, attribute = name.partition(":")
    words = f"{name} is not there any more: {mend(file)}"
    try:
        found = importlib.import_module(module)
    except ImportError:
        pytest.fail(words)
    fields = getattr(getattr(found, attribute.partition(".")[0], None), "__dataclass_fields__", {})
    annotated = getattr(getattr(found, attribute.partition(".")[0], None), "__annotations__", {})
    last = attribute.rpartition(".")[2]
    try:
        attrgetter(attribute)(found)
    except AttributeError:
        # `_modules` of torch and fields of dataclasses are an instance's.
        assert last in fields or last in annotated, words


def private_names() -> Iterator[tuple[str, str]]:
    """Private names that our source reads of others' objects: (name, file)."""
    own: set[str] = set()
    read: list[tuple[str, str]] = []
    for path in SOURCE.rglob("*.py"):
        file = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.Attribute):
                read.append((node.attr, file))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                read.append((node.value, file))
    for name, file in read:
        if name.startswith("_") and not name.startswith(("__", "_sfumato")) and name not in own:
            yield name, file


def test_every_private_name_is_touched_here() -> None:
    untouched = {(name, file) for name, file in private_names() if name not in TOUCHED}
    untouched -= OWN
    assert untouched == set(), "private names of other packages that no test of the contract touches"


# How they behave.


def test_feature_caches_keep_their_states_where_they_are_looked_for() -> None:
    words = mend("batching/feature_caches.py")
    transformer = tiny.flux().transformer
    assert feature_caches.state_managers(transformer) is None, words
    transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    assert transformer._cache_config is not None, words
    managers = feature_caches.state_managers(transformer)
    assert managers, words
    assert all(isinstance(manager._state_cache, dict) for manager in managers), mend("batching/views.py")
    assert any("_diffusers_hook" in vars(part) for part in transformer.modules()), words


def test_hooks_of_a_module_are_where_they_are_looked_for() -> None:
    words = mend("runners/module_state.py")
    module = torch.nn.Linear(2, 2)
    assert not module._forward_hooks and not module._forward_pre_hooks, words
    module.register_forward_hook(lambda *given: None)
    module.register_forward_pre_hook(lambda *given: None)
    assert len(module._forward_hooks) == len(module._forward_pre_hooks) == 1, words


def test_offload_hooks_are_where_they_are_looked_for() -> None:
    words = mend("batching/offload.py")
    module, hook = accelerate.cpu_offload_with_hook(torch.nn.Linear(2, 2), "cpu")
    assert hasattr(module, "_hf_hook") and hasattr(module, "_old_forward"), mend("batching/exclusive.py")
    assert hook.model is module, words
    assert hook.hook.prev_module_hook is None, words
    assert "prev_module_hook" in inspect.getsource(type(hook.hook).pre_forward), words
    assert "_all_hooks" in inspect.getsource(diffusers.DiffusionPipeline.enable_model_cpu_offload), words
    assert not offload.enabled(tiny.ddpm())


def test_modular_pipelines_say_what_they_are_made_of() -> None:
    blocks = diffusers.StableDiffusionXLAutoBlocks()
    assert "text2image" in blocks._workflow_map, mend("pipelines/modular.py")
    assert "_blocks_class_name" in inspect.getsource(diffusers.ModularPipeline), mend("checkpoints/modular.py")


def test_components_say_what_adapters_and_caches_need() -> None:
    assert "unet" in diffusers.StableDiffusionPipeline._lora_loadable_modules, mend("models/sharing.py")
    assert "_commit_hash" in inspect.getsource(transformers.PretrainedConfig), mend("models/sharing.py")


def test_torch_says_its_state() -> None:
    assert len(torch_state.ambient()) == 7, mend("batching/torch_state.py")
    with torch.overrides.BaseTorchFunctionMode():
        assert torch_state.ambient()[3] == 1, mend("batching/torch_state.py")
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1, mend("batching/fingerprints.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_on_a_cpu_computes_blocks_of_queries_by_themselves(dtype: torch.dtype, threads: int) -> None:
    """`batching/divided_attention.py`: the picture would not be the same bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    parts: list[None] = []
    try:
        for features, heads in ((8, 1), (64, 2)):
            chance = torch.Generator().manual_seed(features)
            arguments = [torch.randn(1, heads, 5001, features, generator=chance).to(dtype) for _ in range(3)]
            whole = functional.scaled_dot_product_attention(*arguments)
            with divided_attention.DividedAttention(lambda: parts.append(None)):
                assert torch.equal(functional.scaled_dot_product_attention(*arguments), whole)
    finally:
        torch.set_num_threads(before)
    assert len(parts) == 2 * (5001 // 1024 // threads - 1)


def test_a_compiled_module_has_the_one_that_was_written() -> None:
    module = torch.nn.Linear(2, 2)
    assert original_module(torch.compile(module, backend="eager")) is module, mend("batching/calls.py")


def test_adapter_layers_have_the_state_that_is_put_back() -> None:
    words = mend("batching/adapter_state.py")
    unet = tiny._unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert unet.peft_config, mend("batching/views.py")
    adapters = Adapters()
    adapters.track(unet)
    assert adapters._before, words
    layer, (active, disabled, scaling) = next(iter(adapters._before.values()))
    assert (active, disabled) == (("default",), False), words
    layer.scaling["default"] = 0.5
    layer.enable_adapters(False)
    assert adapters.changed(), words
    adapters.restore()
    assert (dict(layer.scaling), layer.disable_adapters) == (scaling, False), words


def test_configurations_say_what_was_not_written_down() -> None:
    config = diffusers.PNDMScheduler().config
    assert "steps_offset" in config["_use_default_values"], mend("pipelines/request_scheduler.py")
    written = json.loads(tiny._unet().to_json_string())
    assert "_class_name" in written, mend("checkpoints/static_capabilities.py")
    assert "_diffusers_version" in written, mend("batching/proof_store.py")
    assert "_name_or_path" in inspect.getsource(diffusers.ModelMixin.from_pretrained), mend("batching/proof_store.py")
    assert "_ignore_files" in inspect.getsource(diffusers.DiffusionPipeline.download), mend(
        "checkpoints/repository_files.py"
    )


def test_schedulers_keep_what_previews_read() -> None:
    words = mend("previews/x0.py")
    assert hasattr(diffusers.DPMSolverMultistepScheduler(), "model_outputs"), words
    assert all(
        hasattr(diffusers.PNDMScheduler(), name) for name in ("counter", "alphas_cumprod", "final_alpha_cumprod")
    )
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    assert all(hasattr(flow, name) for name in ("sigmas", "step_index")), words


def test_the_readers_of_source_find_what_they_know() -> None:
    assert exclusive.intrusion(diffusers.StableDiffusionPAGPipeline), mend("batching/exclusive.py")
    assert exclusive.intrusion(diffusers.StableDiffusionPipeline) == "", mend("batching/exclusive.py")
    flux = scheduler_calls.from_source(diffusers.FluxPipeline)
    assert flux and flux.runs[0].with_values({}) == {"sigmas", "mu"}, mend("pipelines/scheduler_calls.py")
    for name, task in (("StableDiffusionPipeline", "image"), ("FluxPipeline", "mask")):
        assert capabilities.task_class(name, task, controlled=False), mend("pipelines/capabilities.py")
    parameters = class_reading.parameters("StableDiffusionPipeline")
    assert parameters and "clip_skip" in parameters, mend("checkpoints/static_capabilities.py")
    _, repositories = single_file._rules()
    assert "v1" in repositories, mend("checkpoints/single_file.py")


def test_distributions_are_known_by_name() -> None:
    names = diffusers_source.files()
    missing = [name for name in outputs.DISTRIBUTIONS if name not in names]
    assert missing == [], f"{missing}: {mend('batching/outputs.py')}"


def test_packages_of_a_class_are_found() -> None:
    assert pipeline_class.packages("PRXPipeline") == ("ftfy",), mend("checkpoints/pipeline_class.py")
    assert pipeline_class.packages("StableDiffusionPipeline") == (), mend("checkpoints/pipeline_class.py")
    assert pipeline_class._backends(), mend("checkpoints/pipeline_class.py")


def test_modules_that_compute_nothing_are_there() -> None:
    modules = [name.rstrip(".") for name in source_digest.APART]
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    assert missing == [], f"{missing}: {mend('pipelines/source_digest.py')}"


def test_downloads_can_be_watched() -> None:
    assert "tqdm_class" in inspect.signature(huggingface_hub.snapshot_download).parameters, mend(
        "checkpoints/download.py"
    )


# What a worker leaves out when it starts.


def test_packages_that_wait_only_gather_names() -> None:
    words = mend("process/lean_imports.py")
    for package in sorted(lean_imports.LAZY_PACKAGES):
        spec = importlib.util.find_spec(package)
        assert spec and spec.origin, f"{package}: {words}"
        for node in ast.parse(Path(spec.origin).read_text()).body:
            harmless = isinstance(node, ast.ImportFrom | ast.Import | ast.If) or (
                isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            )
            assert harmless, f"{package} does more than to gather names ({ast.unparse(node)}): {words}"


def test_modules_that_wait_are_there() -> None:
    words = mend("process/lean_imports.py")
    for name, known in lean_imports.DEFERRED.items():
        module = importlib.import_module(name)
        for attribute in known:
            assert hasattr(module, attribute), f"{name}.{attribute}: {words}"
    for name in lean_imports.INDEPENDENT:
        assert importlib.util.find_spec(name), f"{name}: {words}"
    assert callable(torch.distributed.is_available), words
    losses = inspect.getsource(importlib.import_module("transformers.loss.loss_for_object_detection"))
    assert "from scipy.optimize import linear_sum_assignment" in losses, words
    assert transformers.utils.logging and diffusers.utils.logging.disable_progress_bar, mend("models/load.py")
