"""Model files and weights as people have them, each of which once failed. Numbers are those of the list of cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato import schedulers
from sfumato.config import Broken, Skipped, outcomes
from sfumato.config.keys import IGNORED
from sfumato.sampling import Sampling
from sfumato.serving.catalog import Catalog
from support.model_files import read

# Row 9: files of other backends that do not say so.

LANGUAGE = [
    "parameters: {model: llama-3.gguf}",
    "parameters: {model: 'huggingface://a/b/llama-3.Q4.GGUF'}",
    "parameters: {model: 'https://h/llama-3.gguf?x=1'}",
    "parameters: {model: a/b}\ntemplate: {chat: x}",
    "parameters: {model: a/b}\nroles: {user: x}\ncontext_size: 4096",
    "parameters: {model: a/b}\nembeddings: true",
    "parameters: {model: a/b}\nknown_usecases: [FLAG_CHAT]",
    "parameters: {model: a/b}\nknown_usecases: [tts]",
    "parameters: {model: a/b}\nknown_usecases: [FLAG_TRANSCRIPT, FLAG_CHAT]",
]
IMAGE = [
    "parameters: {model: a/b}",
    "parameters: {model: a/b}\ncontext_size: 1\nembeddings: false\ntemplate: {}",
    "parameters: {model: a/b}\nknown_usecases: [FLAG_IMAGE, FLAG_CHAT]",
    "parameters: {model: a/b}\nknown_usecases: [image]\ntemplate: {chat: x}",
    "parameters: {model: a/b}\nbackend: diffusers\nknown_usecases: [FLAG_CHAT]",
    "parameters: {model: a/b}\ndiffusers: {cuda: false}\ntemplate: {chat: x}",
    "parameters: {model: x.gguf}\nbackend: diffusers",
]


@pytest.mark.parametrize("text", LANGUAGE)
def test_row_9_a_language_model_without_backend_is_skipped(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("parameters: {model: a/b}")
    (skipped,) = outcomes(tmp_path / "a.yaml")
    assert isinstance(skipped, Skipped)
    assert "backend: diffusers" in skipped.reason
    catalog = Catalog([tmp_path])
    assert [config.name for config in catalog.all()] == ["b"]
    assert catalog.get(None).name == "b"


@pytest.mark.parametrize("text", IMAGE)
def test_row_9_an_image_model_is_not(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, text)


# Row 23: what LocalAI and its users write.

WITHOUT_EFFECT = [
    *(f"{key}: 1" for key in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "typical_p")),
    "parameters: {model: o/r, pooling: mean}",
    "parameters: {model: o/r, mirostat: 2, stop: [x]}",
    "options: [gpu]",
    "options: ['use_jinja', 'eta:0.5']",
    "license: mit",
    "tags: [anime, xl]",
    "urls: ['https://h/x']\nicon: x",
]


@pytest.mark.parametrize("text", WITHOUT_EFFECT)
def test_row_23_keys_of_others_are_read_and_told(text: str, tmp_path: Path) -> None:
    base = "" if text.startswith("parameters") else "parameters: {model: o/r}\n"
    config = read(tmp_path, base + text)
    assert config.ignored
    assert all(reason for _, reason in config.ignored)
    if "eta" in text:
        assert config.options == {"eta": 0.5}


FORMS = [
    ("name: 3.5", "3.5"),
    ("name: 3.50", "3.50"),
    ("name: 2024-01-01", "2024-01-01"),
    ("name: 1e3", "1e3"),
    ("name: 007", "007"),
    ("name: no", "no"),
    ("name:\tm1", "m1"),
    ("name: \t m1\t# a word", "m1"),
    ("name: m1\t", "m1"),
    ("x-common: &common {model: o/other}\nname: m1", "m1"),
]


@pytest.mark.parametrize(("text", "name"), FORMS)
def test_row_23_forms_of_yaml(text: str, name: str, tmp_path: Path) -> None:
    config = read(tmp_path, f"{text}\nparameters: {{model: o/r}}\n")
    assert config.name == name
    assert config.ignored == ()


def test_row_23_anchors_and_tabs(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "x-common: &common\n  step: 7\n  cfg_scale: 3\n<<: *common\nname: a\nparameters:\n  model:\to/r\n"
        "options:\n-\teta:0.5\n",
    )
    assert (config.sampling, config.model) == (Sampling(steps=7, guidance_scale=3.0), "o/r")
    assert config.options == {"eta": 0.5}
    (tmp_path / "m.yaml").write_text("parameters:\n\tmodel: o/r\n")
    assert isinstance(outcomes(tmp_path / "m.yaml")[0], Broken)


def test_row_23_a_misspelt_key_is_still_refused(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("parameters: {model: o/r}\ntempertaure: 1\n")
    assert isinstance(outcomes(tmp_path / "m.yaml")[0], Broken)
    assert "temperature" in IGNORED


# Row 26: LocalAI's `k_`.


@pytest.mark.parametrize(
    ("name", "plain"),
    [("k_euler_a", "euler_a"), ("k_pndm", "pndm"), ("k_ddim", "ddim"), ("k_lcm", "lcm"), ("k_tcd", "tcd")],
)
def test_row_26_k_without_karras_is_the_plain_solver(name: str, plain: str, tmp_path: Path) -> None:
    config = read(tmp_path, f"parameters: {{model: o/r}}\ndiffusers: {{scheduler_type: {name}}}")
    assert config.sampling.scheduler == plain
    assert schedulers.parse(name) == schedulers.parse(plain)
    assert schedulers.parse("k_dpmpp_2m").schedule == "karras"


# Row 30: one scale for several LoRAs.


@pytest.mark.parametrize(
    ("text", "scales"),
    [
        ("lora_adapters: [a, b]\nlora_scale: 0.5", [0.5, 0.5]),
        ("lora_adapters: [a, b]\nlora_scale: 0.5\nlora_scales: [1, 2]", [1.0, 2.0]),
        ("lora_adapter: c\nlora_adapters: [a]\nlora_scale: 0.5", [0.5, 0.5]),
        ("lora_adapters: [a, b]", [1.0, 1.0]),
    ],
)
def test_row_30_one_scale_holds_for_all(text: str, scales: list[float], tmp_path: Path) -> None:
    config = read(tmp_path, f"parameters: {{model: o/r}}\n{text}")
    assert [adapter.scale for adapter in config.adapters] == scales
