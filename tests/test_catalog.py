"""Folders of model files: names, aliases, changes on the fly, and broken files that break only themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sfumato.catalog import EMBEDDED, Catalog
from sfumato.errors import ModelFileError, ModelNotFound
from sfumato.settings import Settings


def write(folder: Path, file: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(text)
    return folder / file


def model(name: str, more: str = "") -> str:
    return f"name: {name}\nparameters:\n  model: some/{name}\n{more}"


def test_a_new_an_edited_and_a_removed_file_need_no_restart(tmp_path: Path) -> None:
    catalog = Catalog([tmp_path])
    with pytest.raises(ModelNotFound, match="no model yet"):
        catalog.get(None)
    file = write(tmp_path, "a.yaml", model("a"))
    catalog.refresh()
    assert catalog.get(None).name == "a"
    held = catalog.get("a")
    catalog.refresh()
    assert catalog.get("a") is held
    write(tmp_path, "a.yaml", model("a", "step: 7\n"))
    catalog.refresh()
    assert catalog.get("a").steps == 7
    file.unlink()
    catalog.refresh()
    assert catalog.all() == []


def test_a_file_of_the_same_size_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", model("a", "step: 7\n"))
    catalog = Catalog([tmp_path])
    write(tmp_path, "a.yaml", model("a", "step: 8\n"))
    os.utime(file, ns=(1, 1))
    catalog.refresh()
    assert catalog.get("a").steps == 8


def test_a_broken_file_breaks_only_itself(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", model("a"))
    bad = write(tmp_path, "b.yaml", model("bee", "step: 3\n"))
    catalog = Catalog([tmp_path])
    assert catalog.get("bee").steps == 3
    for text in (model("bee", "stepp: 3\n"), model("bee", "step: [\n")):
        bad.write_text(text)
        catalog.refresh()
        assert [config.name for config in catalog.all()] == ["a"]
        with pytest.raises(ModelFileError, match=r"b\.yaml"):  # not the last good config
            catalog.get("bee")
        (problem,) = catalog.problems()
        assert problem.file == bad
        assert str(bad) in str(problem)
    bad.write_text("")
    catalog.refresh()
    with pytest.raises(ModelFileError, match="is empty"):
        catalog.get("b")


def test_unknown_and_disabled_models(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", model("animagine"))
    write(tmp_path, "b.yaml", model("resting", "disabled: true\n"))
    catalog = Catalog([tmp_path])
    with pytest.raises(ModelNotFound) as caught:
        catalog.get("animagin")
    assert caught.value.param == "model"
    assert "Did you mean 'animagine'?" in caught.value.message
    assert "These exist: animagine." in caught.value.message
    with pytest.raises(ModelNotFound, match="is disabled"):
        catalog.get("resting")
    assert [config.name for config in catalog.all()] == ["animagine"]


def test_two_files_with_one_name(tmp_path: Path) -> None:
    first, second = write(tmp_path, "1.yaml", model("x", "step: 1")), write(tmp_path, "2.yml", model("x", "step: 2"))
    catalog = Catalog([tmp_path])
    assert catalog.get("x").steps == 1
    (problem,) = catalog.problems()
    assert problem.file == second
    assert str(first) in problem.message


def test_names_come_before_aliases_and_the_user_before_the_house(tmp_path: Path) -> None:
    user, house = tmp_path / "user", tmp_path / "house"
    write(house, "h.yaml", model("tiny", "aliases: [dall-e-2, dall-e-3, gpt-image-1]\n"))
    write(user, "a.yaml", model("a", "aliases: [b, dall-e-2]\n"))
    write(user, "b.yaml", model("b"))
    write(user, "c.yaml", model("dall-e-3"))
    catalog = Catalog([user, house])
    assert [config.name for config in catalog.all()] == ["a", "b", "dall-e-3", "tiny"]
    served = {name: catalog.get(name).name for name in ("b", "dall-e-2", "dall-e-3", "gpt-image-1", "tiny")}
    assert served == {"b": "b", "dall-e-2": "a", "dall-e-3": "dall-e-3", "gpt-image-1": "tiny", "tiny": "tiny"}
    (problem,) = catalog.problems()
    assert "alias: 'b' is also in" in problem.message
    write(user, "tiny.yaml", model("tiny", "stepp: 1"))
    catalog.refresh()
    with pytest.raises(ModelFileError):  # the user's file has the name, mended or not
        catalog.get("tiny")


def test_an_alias_without_weights_redirects(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", model("a"))
    write(tmp_path, "b.yaml", "name: gpt\nalias: a\n")
    write(tmp_path, "c.yaml", "name: lost\nalias: nowhere\n")
    catalog = Catalog([tmp_path])
    assert catalog.get("gpt").name == "a"
    with pytest.raises(ModelFileError, match="no such model"):
        catalog.get("lost")
    assert len(catalog.problems()) == 1


def test_what_is_skipped_is_listed(tmp_path: Path) -> None:
    write(tmp_path, "llama.yaml", "name: llama\nbackend: llama-cpp\nparameters: {model: x.gguf}\n")
    write(tmp_path, "compose.yaml", "services: {}\n")
    write(tmp_path, "notes.txt", "not yaml")
    (tmp_path / "folder.yaml").mkdir()
    catalog = Catalog([tmp_path])
    assert sorted(skipped.file.name for skipped in catalog.skipped()) == ["compose.yaml", "llama.yaml"]
    assert catalog.problems() == catalog.all() == []


def test_each_ignored_key_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "a.yaml", model("a", "mmap: true\ncontext_size: 1\n"))
    catalog = Catalog([tmp_path])
    catalog.refresh()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "mmap has no effect" in caplog.text


def test_the_default_and_the_settings(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", model("a"))
    write(tmp_path, "b.yaml", model("b"))
    assert Catalog.of(Settings(models=tmp_path)).get(None).name == "a"
    assert Catalog.of(Settings(models=tmp_path, default_model="b")).get("").name == "b"
    assert Catalog.of(Settings(models=tmp_path / "none")).get(None).name == "sfumato-tiny"
    with pytest.raises(ModelNotFound):
        Catalog.of(Settings(models=tmp_path, default_model="c")).get(None)


def test_the_embedded_model(tmp_path: Path) -> None:
    catalog = Catalog([tmp_path / "none", EMBEDDED])
    tiny = catalog.get("dall-e-2")
    assert (tiny.name, tiny.width, tiny.height, tiny.steps, tiny.cfg_scale) == ("sfumato-tiny", 128, 128, 20, 3.0)
    assert tiny.folder / tiny.model == EMBEDDED / "sfumato-tiny"
    assert tiny.enables("image")
    assert catalog.problems() == []


def test_an_open_catalog_takes_hub_ids(tmp_path: Path) -> None:
    assert Catalog([tmp_path], open=True).get("a/b").model == "a/b"
    with pytest.raises(ModelNotFound):
        Catalog([tmp_path], open=True).get("word")
    with pytest.raises(ModelNotFound):
        Catalog([tmp_path]).get("a/b")
