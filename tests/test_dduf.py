"""DDUF files: a repository in one zip, from a folder, a URL or a hub; and zips that are something else."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import export_folder_as_dduf

from sfumato.checkpoints import dduf, static_capabilities
from sfumato.commands.check import check
from sfumato.errors import LoadError
from sfumato.models import load
from sfumato.serving.catalog import Catalog
from support.here import config, cut, drawn, quiet
from support.hub import Hub

INDEX = json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})


@pytest.fixture(scope="module")
def packed(repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dduf") / "one.dduf"
    export_folder_as_dduf(path, repositories["nitrosocke/Ghibli-Diffusion"])
    return path


@pytest.mark.parametrize("where", ["file", "huggingface://acme/packed/one.dduf", "ONE.DDUF"])
def test_it_draws_as_the_folder_that_is_packed_in_it(
    where: str, here: Hub, packed: Path, repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.add("acme/packed", packed.parent)
    models = tmp_path / "models"
    models.mkdir()
    name = {"file": "one.dduf"}.get(where, where)
    if "://" not in name:
        shutil.copy(packed, models / name)
    made = config(models, name)
    if "://" not in name:
        assert static_capabilities.static_capabilities(made).pipeline == "StableDiffusionPipeline"
        assert not list(models.glob(".*"))  # looking at it unpacks nothing
    expected = drawn(config(tmp_path, repositories["nitrosocke/Ghibli-Diffusion"]))
    assert np.array_equal(drawn(made), expected)
    assert static_capabilities.static_capabilities(made).prompt_tokens == 77
    cut(monkeypatch)
    monkeypatch.setattr(dduf, "_copy", None)  # it was unpacked
    assert np.array_equal(drawn(made), expected)


def packed_with(*entries: tuple[str, str], **options: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:  # type: ignore[call-overload]
        for name, text in entries:
            archive.writestr(name, text)
    return file.getvalue()


def longer(data: bytes, value: int = 2**31) -> bytes:
    """The same with an entry that claims to be larger than the file."""
    at = data.index(b"PK\x01\x02")
    return data[: at + 20] + struct.pack("<II", value, value) + data[at + 28 :]


HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"x" * 5000,
    "no index": lambda: packed_with(("a/config.json", "{}")),
    "compressed": lambda: packed_with(("model_index.json", INDEX * 100), compression=zipfile.ZIP_DEFLATED),
    "out of the folder": lambda: packed_with(("model_index.json", INDEX), ("../evil.json", "{}")),
    "root": lambda: packed_with(("model_index.json", INDEX), ("/evil.json", "{}")),
    "deep": lambda: packed_with(("model_index.json", INDEX), ("unet/a/config.json", "{}")),
    "windows": lambda: packed_with(("model_index.json", INDEX), ("unet\\config.json", "{}")),
    "code": lambda: packed_with(("model_index.json", INDEX), ("unet/model.py", "")),
    "pickle": lambda: packed_with(("model_index.json", INDEX), ("unet/model.bin", "")),
    "no component": lambda: packed_with(("model_index.json", INDEX), ("other/config.json", "{}")),
    "index that is no object": lambda: packed_with(("model_index.json", "[]")),
    "index that is no json": lambda: packed_with(("model_index.json", "{")),
    "deeply nested": lambda: packed_with(("model_index.json", '{"a":' * 100_000)),
    "large index": lambda: packed_with(("model_index.json", json.dumps({"a": "x" * 2**21}))),
    "many": lambda: packed_with(("model_index.json", INDEX), *((f"unet/{index}.json", "") for index in range(10_001))),
    "longer than it is": lambda: longer(packed_with(("model_index.json", INDEX))),
    "an index that claims to be huge": lambda: packed_with(("model_index.json", INDEX))[:-10]
    + struct.pack("<LLH", 2**31, 0, 0),
    "cut": lambda: packed_with(("model_index.json", INDEX))[:-30],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", [*HOSTILE, "two of one name"])
def test_a_zip_that_is_something_else_is_refused_at_check_and_load(kind: str, tmp_path: Path) -> None:
    data = HOSTILE[kind]() if kind in HOSTILE else packed_with(("model_index.json", INDEX), ("model_index.json", INDEX))
    (tmp_path / "x.dduf").write_bytes(data)
    (tmp_path / "m.yaml").write_text("parameters: {model: x.dduf}")
    (report,) = check(Catalog([tmp_path]))
    assert "is not a whole DDUF file" in str(report)
    with pytest.raises(LoadError, match="is not a whole DDUF file"):
        load.load(config(tmp_path, "x.dduf"), "cpu", quiet)
    assert {path.name for path in tmp_path.iterdir()} == {"x.dduf", "m.yaml"}
