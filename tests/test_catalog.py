"""Folders of model files: names, aliases, changes on the fly, and broken files that break only themselves."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from sfumato.config import Skipped
from sfumato.errors import ModelFileError, ModelNotFound
from sfumato.serving.catalog import EMBEDDED, Catalog
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
    assert catalog.get("a").sampling.steps == 7
    file.unlink()
    catalog.refresh()
    assert catalog.all() == []


def test_a_file_of_the_same_size_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", model("a", "step: 7\n"))
    catalog = Catalog([tmp_path])
    write(tmp_path, "a.yaml", model("a", "step: 8\n"))
    os.utime(file, ns=(1, 1))
    catalog.refresh()
    assert catalog.get("a").sampling.steps == 8


def test_a_broken_file_breaks_only_itself(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", model("a"))
    bad = write(tmp_path, "b.yaml", model("bee", "step: 3\n"))
    catalog = Catalog([tmp_path])
    assert catalog.get("bee").sampling.steps == 3
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
    assert "Available: animagine." in caught.value.message
    with pytest.raises(ModelNotFound, match="is disabled"):
        catalog.get("resting")
    assert [config.name for config in catalog.all()] == ["animagine"]


def test_two_files_with_one_name(tmp_path: Path) -> None:
    first, second = write(tmp_path, "1.yaml", model("x", "step: 1")), write(tmp_path, "2.yml", model("x", "step: 2"))
    catalog = Catalog([tmp_path])
    assert catalog.get("x").sampling.steps == 1
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


def test_an_alias_with_a_star_is_for_names_that_no_other_is(tmp_path: Path) -> None:
    user, house = tmp_path / "user", tmp_path / "house"
    write(house, "h.yaml", model("tiny", 'aliases: ["gpt-image-*", "*-e-*", latest]\n'))
    write(user, "a.yaml", model("a", "aliases: [gpt-image-1]\n"))
    write(user, "b.yaml", model("b", 'aliases: ["gpt-image-2*", "b.d"]\n'))
    write(user, "c.yaml", model("c", 'aliases: ["gpt-image-2*"]\n'))
    catalog = Catalog([user, house])
    served = {
        "gpt-image-1": "a", "gpt-image-2": "b", "gpt-image-2.5-flare": "b", "gpt-image-3": "tiny", "gpt-image-": "tiny",
        "dall-e-7": "tiny", "latest": "tiny", "b.d": "b",
    }  # fmt: skip
    assert {name: catalog.get(name).name for name in served} == served
    for unknown in ("gpt-image", "my-gpt-image-1", "bxd", "gpt-4o", "dall-e"):
        with pytest.raises(ModelNotFound):
            catalog.get(unknown)
    (problem,) = catalog.problems()
    assert "alias: 'gpt-image-2*' is also in" in problem.message
    (user / "b.yaml").unlink()
    (user / "c.yaml").unlink()
    catalog.refresh()
    assert catalog.get("gpt-image-2").name == "tiny"


def test_a_star_takes_no_name_of_a_source(tmp_path: Path) -> None:
    """On the command line a hub id is a model, whatever the files say."""
    write(tmp_path, "a.yaml", model("a", 'aliases: ["*"]\n'))
    assert Catalog([tmp_path], open=True).get("some/one").name != "a"
    assert Catalog([tmp_path], open=True).get("anything").name == "a"
    assert Catalog([tmp_path]).get("some/one").name == "a"


@pytest.mark.parametrize("name", ["gpt-image-1", "gpt-image-9-mini", "dall-e-2", "dall-e-3", "chatgpt-image-latest"])
def test_the_built_in_model_has_the_names_that_clients_know(tmp_path: Path, name: str) -> None:
    assert Catalog([tmp_path, EMBEDDED]).get(name).name == "sfumato-tiny"


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
    outcomes = {file.name: found for file, found in catalog.outcomes().items()}
    assert sorted(outcomes) == ["compose.yaml", "llama.yaml"]
    assert all(isinstance(found, Skipped) for (found,) in outcomes.values())
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
    catalog = Catalog([tmp_path, EMBEDDED])
    tiny = catalog.get("dall-e-2")
    assert (tiny.name, tiny.sampling.size, tiny.sampling.steps, tiny.sampling.guidance_scale) == (
        "sfumato-tiny",
        (128, 128),
        20,
        3.0,
    )
    assert tiny.folder / tiny.model == EMBEDDED / "sfumato-tiny"
    assert tiny.folder == tmp_path  # its LoRAs are where the user's models are
    assert tiny.enables("image")
    assert catalog.problems() == []


def test_an_open_catalog_takes_hub_ids(tmp_path: Path) -> None:
    assert Catalog([tmp_path], open=True).get("a/b").model == "a/b"
    with pytest.raises(ModelNotFound):
        Catalog([tmp_path], open=True).get("word")
    with pytest.raises(ModelNotFound):
        Catalog([tmp_path]).get("a/b")


def test_a_file_of_the_same_size_and_date_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", model("a", "step: 7\n"))
    before = file.stat()
    catalog = Catalog([tmp_path])
    file.write_text(model("a", "step: 8\n"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    catalog.refresh()
    assert catalog.get("a").sampling.steps == 8


def test_a_change_of_permissions_is_a_change(tmp_path: Path) -> None:
    """Also where the one who reads it may read anything, as root."""
    file = write(tmp_path, "a.yaml", model("a"))
    catalog = Catalog([tmp_path])
    before = catalog.get("a")
    file.chmod(0o600)
    catalog.refresh()
    assert catalog.get("a") is not before


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_file_that_could_not_be_read_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    write(tmp_path, "a.yaml", model("a"))
    write(tmp_path, "b.yaml", model("b"))
    open_file = Path.open

    def fails(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "a.yaml":
            raise OSError(error, os.strerror(error))
        return open_file(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fails)
        catalog = Catalog([tmp_path])
        with pytest.raises(ModelFileError, match="cannot be read"):
            catalog.get("a")
        other = catalog.get("b")
    catalog.refresh()
    assert catalog.get("a").name == "a"
    assert catalog.get("b") is other
    assert catalog.problems() == []


def test_links_and_folders_that_are_mended(tmp_path: Path) -> None:
    models = tmp_path / "models"
    catalog = Catalog([models])
    assert catalog.all() == []
    models.mkdir()
    (models / "a.yaml").symlink_to(tmp_path / "a.yaml")
    (models / "folder.yaml").mkdir()
    catalog.refresh()
    assert catalog.all() == []
    write(tmp_path, "a.yaml", model("a", "step: 7\n"))
    catalog.refresh()
    assert catalog.get("a").sampling.steps == 7
    write(tmp_path, "b.yaml", model("a", "step: 8\n"))
    (models / "a.yaml").unlink()
    (models / "a.yaml").symlink_to(tmp_path / "b.yaml")
    catalog.refresh()
    assert catalog.get("a").sampling.steps == 8


def merges(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels + 1):
        lines.append(f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}")
    return "\n".join(lines)


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x]"]
    for level in range(1, levels + 1):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(lines)


HOSTILE = {
    "merge keys": merges(9),
    "merge keys of one mapping": "a: &a {" + ", ".join(f"k{n}: 1" for n in range(300)) + "}\nb: {<<: ["
    + ", ".join(["*a"] * 1000) + "]}",
    "aliases": laughs(9),
    "a chain of aliases": "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 3000)),
    "an alias of itself": "a: &a [*a]",
    "a merge of itself": "a: &a {<<: *a}",
    "depth of lists": "a: " + "[" * 100_000,
    "depth of closed lists": "a: " + "[" * 200 + "]" * 200,
    "depth of mappings": "a: " + "{a: " * 30_000,
    "depth of lines": "".join(" " * depth + "a:\n" for depth in range(600)),
    "length": "a: 1\n" * 100_000,
    "a long key": "k" * 200_000 + ": 1",
    "a long number": "a: " + "1" * 200_000,
    "a long sexagesimal": "a: 1" + ":1" * 100_000,
    "a long hexadecimal": "a: 0x" + "f" * 200_000,
    "empty lines of a broken file": "\n" * 200_000 + "a: [",
    "a broken file's name with spaces": "name: a" + " " * 200_000 + "b: [",
    "many names": "- name: a\n" * 20_000 + "[",
    "twice the same": "a: 1\na: 2",
    "null bytes": "a: \0",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_costs_little_and_breaks_only_itself(tmp_path: Path, name: str) -> None:
    write(tmp_path, "a.yaml", model("a"))
    write(tmp_path, "hostile.yaml", model("hostile") + HOSTILE[name])
    began = time.process_time()
    catalog = Catalog([tmp_path])
    with pytest.raises(ModelFileError) as raised:
        catalog.get("hostile")
    assert time.process_time() - began < 5
    assert len(raised.value.message) < 1000
    assert catalog.get("a").name == "a"


def test_anchors_and_merge_keys_of_an_ordinary_size_work(tmp_path: Path) -> None:
    write(
        tmp_path, "a.yaml",
        "- &base\n  name: a\n  step: 7\n  parameters: {model: some/a}\n- <<: *base\n  name: b\n"
        "- <<: [{step: 9}, *base]\n  name: c\n",
    )  # fmt: skip
    catalog = Catalog([tmp_path])
    assert [(config.name, config.sampling.steps) for config in catalog.all()] == [("a", 7), ("b", 7), ("c", 9)]
