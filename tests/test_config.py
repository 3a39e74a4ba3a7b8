"""One model file: what each key becomes, and what is said when it cannot become anything."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import schedulers
from sfumato.config import DEFAULTS, Adapter, Broken, Download, ModelConfig, Redirect, Skipped, load, outcomes
from sfumato.config.keys import IGNORED, IMG2IMG, KEYS
from sfumato.config.reference import markdown
from sfumato.errors import ModelFileError
from sfumato.sampling import NAMED, Sampling

ROOT = Path(__file__).parent.parent
PAGE = (Path(__file__).parent / "data" / "seed.md").read_text()
FILES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
TABLE = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| (.*?) \|$", PAGE, re.MULTILINE))


def one(folder: Path, text: str, name: str = "m.yaml") -> ModelConfig:
    (folder / name).write_text(text)
    (config,) = load(folder / name)
    return config


def of(folder: Path, text: str) -> ModelConfig:
    return one(folder, f"parameters: {{model: o/r}}\n{text}")


def refused(folder: Path, text: str) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        one(folder, text)
    assert str(folder / "m.yaml") in caught.value.message
    return caught.value


# The seed page


def test_the_four_files_of_the_page(tmp_path: Path) -> None:
    xl, local, edit, depth = (one(tmp_path, text, f"{index}.yaml") for index, text in enumerate(FILES))
    assert (xl.name, xl.model, xl.cuda, xl.f16) == ("animagine-xl", "Linaqruf/animagine-xl", False, False)
    assert (xl.pipeline_type, xl.sampling.scheduler) == ("StableDiffusionXLPipeline", "euler_a")
    assert (local.model, local.folder) == ("toonyou_beta6.safetensors", tmp_path)
    assert local.sampling == Sampling(steps=30, guidance_scale=8.0, clip_skip=11, scheduler="k_dpmpp_sde")
    assert (local.f16, local.cuda) == (True, True)
    assert not local.enables("image")
    assert edit.enables("image")
    assert edit.enables("mask_image")
    assert edit.enables("strength")
    assert not edit.enables("clip_skip")
    assert (depth.sampling.steps, depth.sampling.guidance_scale, depth.pipeline_type) == (
        50,
        6.0,
        "StableDiffusionDepth2ImgPipeline",
    )
    for config in (xl, local, edit, depth):
        assert config.ignored == ()


def test_the_page_s_defaults(tmp_path: Path) -> None:
    assert yaml.safe_load(TABLE["f16"].strip("`")) == DEFAULTS["f16"]
    assert yaml.safe_load(TABLE["step"].strip("`")) == DEFAULTS["step"]
    assert yaml.safe_load(TABLE["cfg_scale"].strip("`")) == DEFAULTS["cfg_scale"]
    assert set(TABLE["enable_parameters"].strip("`").split(",")) == DEFAULTS["enable_parameters"]
    config = of(tmp_path, "")
    assert config.enable_parameters == DEFAULTS["enable_parameters"]
    assert (config.name, config.sampling, config.cuda) == ("m", Sampling(), None)


NAMES = re.findall(r"^\| `(\w+)` \| [^|]* \|$", PAGE.partition("types of schedulers")[2], re.MULTILINE)


@pytest.mark.parametrize("name", [*[word for word in NAMES if not word.endswith("Pipeline")], "k_dpp_sde"])
def test_the_page_s_schedulers(name: str, tmp_path: Path) -> None:
    assert of(tmp_path, f"diffusers: {{scheduler_type: {name}}}").sampling.scheduler == schedulers.ALIASES.get(
        name, name
    )


# What each key becomes

CASES: list[tuple[str, dict[str, Any]]] = [
    ("name: a/b c", {"name": "a/b c"}),
    ("name: 7", {"name": "7"}),
    ("alias: x\naliases: [y, z, x]", {"aliases": ("x", "y", "z")}),
    ("disabled: true\npinned: true", {"disabled": True, "pinned": True}),
    ("step: 0", {"steps": None}),
    ("step:", {"steps": None}),
    ("step: '12'", {"steps": 12}),
    ("cfg_scale: 0", {"guidance_scale": 0.0}),
    ("cfg_scale: 3\ndiffusers: {cfg_scale: 0}", {"guidance_scale": 0.0}),
    ("diffusers: {cfg_scale: 5e-1}\ncfg_scale: 3", {"guidance_scale": 0.5}),
    ("diffusers: {cuda: false}\ncuda: true", {"cuda": False}),
    ("cuda: true", {"cuda": True}),
    ("clip_skip: 1\ndiffusers: {clip_skip: 2}", {"clip_skip": 2}),
    ("diffusers: {pipeline_type: ''}", {"pipeline_type": None}),
    ("diffusers: {img2img: true}", {"img2img": True, "pipeline_type": None}),
    ("diffusers: {img2img: true, pipeline_type: FluxPipeline}", {"pipeline_type": "FluxImg2ImgPipeline"}),
    ("diffusers: {img2img: true, pipeline_type: OtherPipeline}", {"pipeline_type": "OtherPipeline"}),
    ("diffusers: {scheduler_type: euler, schedule: karras}", {"scheduler": "k_euler"}),
    ("diffusers: {control_net: a/b, clip_model: c/d, clip_subfolder: e}", {"control_net": "a/b", "clip_model": "c/d"}),
    ("dtype: float16", {"dtype": "fp16"}),
    ("dtype: auto", {"dtype": None}),
    ("options: ['torch_dtype:torch.bfloat16']", {"dtype": "bf16", "options": {}}),
    ("dtype: fp32\noptions: ['torch_dtype:bf16']", {"dtype": "fp32"}),
    ("main_gpu: 'cuda:1'", {"main_gpu": 1}),
    ("low_vram: true\nthreads: 4", {"low_vram": True, "threads": 4}),
    ("quality_steps: {high: 40, low: '10'}", {"quality_steps": (("low", 10), ("high", 40))}),
    ("diffusers: {preview_vae: madebyollin/taesd}", {"preview_vae": "madebyollin/taesd"}),
    ("strength: 0.5\nsize: 512X768", {"strength": 0.5, "width": 512, "height": 768}),
    ("size: auto", {"width": None}),
    ("lora_adapter: l.safetensors\nlora_scale: 0.5", {"adapters": (Adapter("l.safetensors", 0.5),)}),
    ("lora_adapters: [a, b]", {"adapters": (Adapter("a"), Adapter("b"))}),
    ("lora_adapters: [a]\nlora_scales: [-1]", {"adapters": (Adapter("a", -1.0),)}),
    ("limits: {max_concurrent: 2, retry_after_seconds: 9}", {"max_concurrent": 2, "retry_after": 9}),
    ("limits: {max_concurrent: 0, retry_after_seconds: 0}", {"max_concurrent": None, "retry_after": 1}),
    ("diffusers: {enable_parameters: none}", {"enable_parameters": frozenset()}),
    ("diffusers: {enable_parameters: 'image, eta'}", {"enable_parameters": frozenset({"image", "eta"})}),
    ("download_files: [{uri: 'https://h/x.gguf'}]", {"downloads": (Download("https://h/x.gguf", "x.gguf"),)}),
    ("artifacts: [{source: {type: huggingface, repo: hf://x/y, revision: v1}}]", {"repo": "x/y", "revision": "v1"}),
    ("backend: cuda12-diffusers-development", {"name": "m"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_a_key_becomes(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    config = of(tmp_path, text)
    assert {field: getattr(config.sampling if field in NAMED else config, field) for field in expected} == expected


def test_parameters_are_read(tmp_path: Path) -> None:
    config = one(tmp_path, "parameters: {model: o/r, seed: 0, n: 3, negative_prompt: bad, clip_skip: 1}")
    assert (config.seed, config.n, config.sampling) == (0, 3, Sampling(negative_prompt="bad", clip_skip=1))
    assert one(tmp_path, "parameters: {model: o/r, seed: -1}").seed is None
    assert one(tmp_path, f"parameters: {{model: o/r, seed: {2**63 - 1}}}").seed == 2**63 - 1


def test_options_keep_their_types(tmp_path: Path) -> None:
    lines = ["a:1", "b:1.0", "c:true", "d:none", "e:http://h:80/x", "f:1e-3", "'g:'", "h: x"]
    options = of(tmp_path, "options:\n" + "".join(f"- {line}\n" for line in lines)).options
    assert dict(options) == {
        "a": 1, "b": 1.0, "c": True, "d": None, "e": "http://h:80/x", "f": 1e-3, "g": "", "h": "x"
    }  # fmt: skip
    assert [type(options[key]) for key in "abc"] == [int, float, bool]
    assert of(tmp_path, "options: ['a:1']") != of(tmp_path, "options: ['a:1.0']")


def test_none_leaves_prompt_and_guidance(tmp_path: Path) -> None:
    config = of(tmp_path, "diffusers: {enable_parameters: none}")
    assert config.enables("prompt")
    assert config.enables("guidance_scale")
    assert not config.enables("negative_prompt")
    assert not config.enables("image")


def test_it_is_a_value(tmp_path: Path) -> None:
    config = of(tmp_path, "options: ['a:1']\nlora_adapter: x\ndescription: one")
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert hash(again) == hash(config)
    assert of(tmp_path, "options: ['a:1']\nlora_adapter: x\ndescription: other") == config
    assert of(tmp_path, "options: ['a:2']\nlora_adapter: x\ndescription: one") != config


# Files that hold something else than one model


def test_a_list_of_models_and_one_of_them_broken(tmp_path: Path) -> None:
    file = tmp_path / "many.yaml"
    file.write_text(
        "- {name: a, parameters: {model: o/a}}\n"
        "- {name: b, parameters: {model: o/b}, stepp: 3}\n"
        "- {name: c, backend: llama-cpp, nonsense: 1}\n"
        "- {name: gpt, alias: a}\n"
        "- {parameters: {model: o/d}}\n"
    )
    a, b, c, d, e = outcomes(file)
    assert isinstance(a, ModelConfig)
    assert isinstance(b, Broken)
    assert b.names == ("b",)
    assert b.error.message == (f"{file}, line 2: stepp: unknown key. Did you mean 'step'? Correct or remove it.")
    assert isinstance(c, Skipped)
    assert "llama-cpp" in c.reason
    assert d == Redirect("gpt", "a", file)
    assert isinstance(e, Broken)
    assert "name" in e.error.message


@pytest.mark.parametrize("backend", ["llama-cpp", "whisper", "stablediffusion-ggml", "piper", "cuda12-vllm"])
def test_other_backends_are_skipped(backend: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"name: x\nbackend: {backend}\nparameters: {{model: x.gguf}}\nunheard_of: 1\n")
    (skipped,) = outcomes(tmp_path / "x.yaml")
    assert isinstance(skipped, Skipped)
    assert backend in skipped.reason


@pytest.mark.parametrize("text", ["services: {a: 1}", "name: r\nrouter: {fallback: a}"])
def test_what_is_no_model_is_skipped(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert isinstance(outcomes(tmp_path / "x.yaml")[0], Skipped)


def test_every_ignored_key_is_accepted_with_its_reason(tmp_path: Path) -> None:
    values: dict[str, Any] = {"parameters": {"model": "o/r"}, "diffusers": {}}
    for path in IGNORED:
        section, dot, key = path.rpartition(".")
        (values[section] if dot else values)[key] = {"any": ["thing"]}
    config = one(tmp_path, yaml.safe_dump(values))
    assert dict(config.ignored) == dict(IGNORED)


# What is refused

BAD: list[tuple[str, str | None, str]] = [
    ("", None, "is empty"),
    ("# nothing\n", None, "is empty"),
    ("[]", None, "empty list"),
    ("just text", None, "is not a model"),
    ("name: [a\n", None, "line 2: not valid YAML"),
    ("name: a\n\tstep: 3\n", None, "line 2: not valid YAML"),
    ("name: a\n---\nname: b\n", None, "not valid YAML"),
    ("name: a\nname: b\n", "name", "line 2: name: duplicate key, also in line 1"),
    ("name: a\ndiffusers:\n  cuda: true\n  cuda: false\n", "cuda", "line 4"),
    ("name: a\n", "parameters.model", "is missing"),
    ("name: ' a'\nparameters: {model: o/r}", "name", "needs a name"),
    ("name: [a]\nparameters: {model: o/r}", "name", "needs text"),
    ("parameters: o/r", "parameters", "key: value"),
    ("name: a\nbackend: 5", "backend", "is not the name of a backend"),
    ("1: 2\nname: a", None, "the key 1 is not text"),
]

BAD_KEYS: list[tuple[str, str, str]] = [
    ("step: thirty", "step", "'thirty': needs a whole number from 1 to 10000"),
    ("step: -3", "step", "from 1"),
    ("step: true", "step", "needs a whole number"),
    ("f16: 'yes'", "f16", "true or false"),
    ("cfg_scale: .nan", "cfg_scale", "needs a number"),
    ("cfg_scale: -1", "cfg_scale", "from 0"),
    ("size: 512", "size", "512x768"),
    ("size: 0x64", "size", "from 1 to 16384"),
    ("quality_steps: {hihg: 40}", "quality_steps", "hd. Did you mean 'high'?"),
    ("quality_steps: {1: 40}", "quality_steps", "1 is not one of low"),
    ("quality_steps: {high: 0}", "quality_steps", "high needs a whole number from 1 to 10000"),
    ("quality_steps: 40", "quality_steps", "{low: 10, high: 40}"),
    ("dtype: int8", "dtype", "is not one of"),
    ("options: a:b", "options", "needs a list"),
    ("options: ['a b:c']", "options", '"key:value"'),
    ("options: ['torch_dtype:int4']", "options", "torch_dtype is not one of"),
    ("lora_adapters: [a, b]\nlora_scales: [1]", "lora_scales", "1 scales for 2 lora_adapters"),
    ("lora_adapters: [a, b]\nlora_scales: [1, 1e300]", "lora_scales", "needs a number from -100 to 100"),
    ("main_gpu: best", "main_gpu", "number of a GPU"),
    ("pipeline_type: FluxPipeline", "pipeline_type", "Did you mean 'diffusers.pipeline_type'?"),
    ("parameters.modle: x", "parameters.modle", "Did you mean 'parameters.model'?"),
    ("diffusers: {scheduler_typ: ddim}", "diffusers.scheduler_typ", "Did you mean 'diffusers.scheduler_type'?"),
    ("diffusers: {scheduler_type: eulr}", "diffusers.scheduler_type", "euler"),
    ("diffusers: {schedule: karras}", "diffusers.schedule", "needs a diffusers.scheduler_type"),
    ("diffusers: {enable_parameters: 'a b'}", "diffusers.enable_parameters", "is not the name of a pipeline argument"),
    ("download_files: [{filename: x}]", "download_files", "needs a `uri`"),
    ("download_files: [{uri: 'https://h/x', filename: ../x}]", "download_files", "must stay"),
    ("download_files: [{uri: 'https://h/x', sha256: abc}]", "download_files", "64 hexadecimal digits"),
    ("artifacts: [{source: {type: s3, repo: a/b}}]", "artifacts", "huggingface"),
    ("artifacts: [{source: {repo: a}}]", "artifacts", "owner/name"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "key", "message"), BAD)
def test_a_bad_file_says_why(text: str, key: str | None, message: str, tmp_path: Path) -> None:
    error = refused(tmp_path, text)
    assert error.param == key
    assert message in error.message


@pytest.mark.parametrize(("text", "key", "message"), BAD_KEYS)
def test_a_bad_key_says_where_and_what_is_valid(text: str, key: str, message: str, tmp_path: Path) -> None:
    error = refused(tmp_path, f"parameters: {{model: o/r}}\n{text}")
    assert error.param == key
    assert message in error.message
    assert ", line " in error.message


def test_bytes_that_are_not_text_and_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_bytes(b"name: \xff")
    for file, message in (("m.yaml", "UTF-8"), ("gone.yaml", "cannot be read")):
        (broken,) = outcomes(tmp_path / file)
        assert isinstance(broken, Broken)
        assert message in broken.error.message


def test_few_lines_that_unfold_to_gigabytes_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    refused(tmp_path, "\n".join([*lines, "name: *a29"]))
    refused(tmp_path, "name: &a [*a]")
    refused(tmp_path, "name: " + "[" * 5000)


# Properties

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
nested = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
paths = st.sampled_from([key.path for key in KEYS] + list(IGNORED))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(paths, nested, max_size=5), st.booleans())
def test_no_value_raises_anything_else(values: dict[str, Any], complete: bool) -> None:
    document: dict[str, Any] = {"parameters": {"model": "o/r"} if complete else {}, "diffusers": {}, "limits": {}}
    for path, value in values.items():
        section, dot, key = path.rpartition(".")
        (document[section] if dot else document)[key] = value
    _harmless(yaml.safe_dump(document, allow_unicode=True))


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab:-[]{}&*!<>|'\"#%@,.?0x1e \n\t\r\0é", max_size=60))
def test_no_text_raises_anything_else(text: str) -> None:
    _harmless(text)
    _harmless("name: " + text)


CHOKING = ["a: !!int ''", "a: !!bool x", "a: 2020-13-45", "a: !!timestamp x", "a: !!python/object:os.system x",
           "? [a]\n: b", "parameters: {0x" + "f" * 6000 + ": 1}"]  # fmt: skip


@pytest.mark.parametrize("text", CHOKING)
def test_scalars_that_pyyaml_chokes_on(text: str) -> None:
    _harmless(text + "\nname: x" if text.startswith("a") else text)


def _harmless(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "m.yaml"
        file.write_text(text, newline="")
        for outcome in outcomes(file):
            assert isinstance(outcome, ModelConfig | Redirect | Skipped | Broken)
            if isinstance(outcome, ModelConfig):
                hash(outcome)
                dict(outcome.options)
                pickle.dumps(outcome)


# Tables


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "reference" / "model-files.md").read_text()
    assert page == markdown(), "run: python -m sfumato.config.reference > docs/reference/model-files.md"


def test_the_siblings_exist() -> None:
    import diffusers

    for cls in [*IMG2IMG, *IMG2IMG.values()]:
        assert cls in diffusers._import_structure["pipelines"], cls


def test_no_key_stands_in_two_tables() -> None:
    assert not {key.path for key in KEYS} & IGNORED.keys()
    assert schedulers.names()


def test_reading_files_needs_no_torch() -> None:
    modules = "sfumato.config, sfumato.serving.catalog, sfumato.commands.check"
    code = f"import sys, {modules}; print({{'torch', 'diffusers'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
