"""ControlNets in single files, with the original names and with diffusers': each draws what its folder draws."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sfumato.checkpoints import controlnets
from sfumato.commands.check import check
from sfumato.core import Failed
from sfumato.models import load, net_files
from sfumato.serving.catalog import Catalog
from support import nets
from support.control_engine import requested, save
from support.drawing import quiet
from support.engines import Engine, pixels
from support.families_controlled import ONE_FOR_ALL, XL_UNET, net, xl_unet
from support.hub import Hub
from support.net_names import original
from support.tiny import seeded

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some about toy sizes


def named_as_in_diffusers(net: Any) -> dict[str, Any]:
    return {name: tensor.contiguous() for name, tensor in net.state_dict().items()}


WRITTEN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "original": original,
    "without a prefix": lambda net: original(net, ""),
    "diffusers": named_as_in_diffusers,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("models"))
    there = folder / "controlnets"
    for family in ("xl", "flux"):
        save_file(named_as_in_diffusers(nets.whole(family).controlnet), there / f"{family}_canny.safetensors")
    (there / "v11").mkdir()
    save_file(original(nets.whole("sd").controlnet), there / "v11" / "control_v11p_sd15_canny.safetensors")
    return folder


def settings(family: str) -> dict[str, Any]:
    pipeline = nets.plain(family)
    return net_files.settings_of((getattr(pipeline, "unet", None) or pipeline.transformer).config)


def same(one: Any, other: Any) -> None:
    mine, its = one.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in its)
    kept = (dict(each.config) for each in (one, other))
    for ours, theirs in [tuple(kept)]:
        ours["transformer_layers_per_block"] = theirs.get("transformer_layers_per_block")  # 1 is as (1, 1, 1)
        assert {k: _plain(v) for k, v in ours.items() if k[0] != "_" and v is not None and k in theirs} == {
            k: _plain(v) for k, v in theirs.items() if k[0] != "_" and v is not None
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("family", nets.CONTROLLED)
def test_a_file_of_each_family_is_the_net_that_was_written(family: str, tmp_path: Path) -> None:
    written, path = nets.whole(family).controlnet, tmp_path / "net.safetensors"
    save_file(named_as_in_diffusers(written), path)
    same(net_files.load(path, settings(family), torch.float32), written)
    for other in nets.CONTROLLED:
        assert (net_files.problem(path, settings(other)) is None) == (other == family), other


@pytest.mark.parametrize("names", ["original", "without a prefix"])
@pytest.mark.parametrize("family", ["sd", "xl"])
def test_the_original_names_are_read(family: str, names: str, tmp_path: Path) -> None:
    written, path = nets.whole(family).controlnet, tmp_path / "net.sft"
    save_file(WRITTEN[names](written), path)
    same(net_files.load(path, settings(family), torch.float32), written)


SMALL = XL_UNET | {"down_block_types": ("DownBlock2D",) * 3, "transformer_layers_per_block": 1}
VARIANTS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "small": (SMALL, diffusers.ControlNetModel, {"mid_block_type": "UNetMidBlock2D"}),
    "mid": (XL_UNET | {"down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
                       "transformer_layers_per_block": (1, 1, 1)}, diffusers.ControlNetModel, {}),
    "union": (XL_UNET, diffusers.ControlNetUnionModel, ONE_FOR_ALL | {"num_trans_head": 8}),
    "promax": (XL_UNET, diffusers.ControlNetUnionModel,
               ONE_FOR_ALL | {"num_control_type": 8, "num_trans_head": 8, "num_trans_layer": 2}),
    "four channels": (XL_UNET, diffusers.ControlNetModel, {"conditioning_channels": 4}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_smaller_nets_and_unions_are_told_from_their_shapes(variant: str, tmp_path: Path) -> None:
    shape, kind, changes = VARIANTS[variant]
    with seeded(3):
        written = net(shape, kind, **changes)
    save_file(named_as_in_diffusers(written), tmp_path / "net.safetensors")
    read = net_files.load(tmp_path / "net.safetensors", net_files.settings_of(xl_unet().config), torch.float32)
    assert type(read) is kind
    same(read, written)


def test_a_flux_net_of_several_modes_is_told_from_its_shapes(tmp_path: Path) -> None:
    shape = {key: value for key, value in nets.whole("flux").controlnet.config.items() if key[0] != "_"}
    with seeded(3):
        written = diffusers.FluxControlNetModel(**shape | {"num_mode": 5, "num_layers": 2, "num_single_layers": 0})
    save_file(named_as_in_diffusers(written), tmp_path / "net.safetensors")
    same(net_files.load(tmp_path / "net.safetensors", settings("flux"), torch.float32), written)


@pytest.mark.parametrize(
    "name",
    [
        "v11/control_v11p_sd15_canny", "control_v11p_sd15_canny", "control_v11p_sd15_canny.safetensors",
        "V11/Control_v11p_sd15_canny.safetensors", "control_v11p_sd15_canny [d14c016b]",
        "control_v11p_sd15_canny.safetensors [d14c016b]",
    ],
)  # fmt: skip
def test_a_file_is_named_with_and_without_suffix_and_hash_and_draws_what_the_folder_draws(
    folder: Path, name: str, drawn: np.ndarray[Any, Any]
) -> None:
    assert np.array_equal(pixels(Engine(folder).draw(requested("1", name))["1"]), drawn)


@pytest.fixture(scope="module")
def drawn(folder: Path) -> np.ndarray[Any, Any]:
    """By the folder `sd/canny`."""
    return np.asarray(pixels(Engine(folder).draw(requested("1", "sd/canny"))["1"]))


def test_files_are_listed_by_their_path_without_the_suffix(folder: Path, tmp_path: Path) -> None:
    assert {"flux_canny", "sd/canny", "sd/depth", "v11/control_v11p_sd15_canny", "xl_canny"} <= {
        *controlnets.listed(folder)
    }
    shutil.copytree(folder / "controlnets" / "sd" / "canny", tmp_path / "controlnets" / "canny")
    both = tmp_path / "controlnets" / "canny.safetensors"
    shutil.copy(folder / "controlnets" / "v11" / "control_v11p_sd15_canny.safetensors", both)
    assert {*controlnets.listed(tmp_path)} == {"canny", "canny.safetensors"}
    assert [*controlnets.find(tmp_path, "canny", "x").values()] == [both.with_suffix("")]
    assert [*controlnets.find(tmp_path, "canny.safetensors", "x").values()] == [both]


def test_a_file_on_a_hub_is_fetched(folder: Path, here: Hub, tmp_path: Path, drawn: np.ndarray[Any, Any]) -> None:
    (tmp_path / "nets").mkdir()
    shutil.copy(
        folder / "controlnets" / "v11" / "control_v11p_sd15_canny.safetensors", tmp_path / "nets" / "a.safetensors"
    )
    (tmp_path / "nets" / "b.pth").write_bytes(b"a pickle")
    here.add("some/files", tmp_path)
    for name in (
        "some/files/nets/a.safetensors",
        "some/files@main/nets/a.safetensors",
        "hf://some/files/nets/a.safetensors",
    ):
        assert np.array_equal(pixels(Engine(folder).draw(requested("1", name))["1"]), drawn), name
    whole = Engine(folder).draw(requested("1", "some/files"))["1"]
    assert (whole.error.status, "some/files/nets/a.safetensors" in whole.error.message) == (400, True)
    refused = Engine(folder).draw(requested("1", "some/files/nets/b.pth"))["1"]
    assert (refused.error.status, "pickle" in refused.error.message) == (400, True)
    assert not any("b.pth" in name for name in here.downloads("some/files"))


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(2, 2) for name in names}


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled.pth": (lambda path: path.write_bytes(b"x"), "is a pickle"),
    "damaged.safetensors": (lambda path: path.write_bytes(b"no tensors"), "has no header"),
    "lllite.safetensors": (lambda path: save_file(tensors("lllite_unet_x.down.0.weight"), path), "a ControlLLLite"),
    "small_lora.safetensors": (lambda path: save_file(tensors("lora_controlnet", "x"), path), "a Control-LoRA"),
    "t2i.safetensors": (lambda path: save_file(tensors("body.0.block1.weight"), path), "a T2I-Adapter"),
    "xlabs.safetensors": (lambda path: save_file(tensors("double_blocks.0.img_mod.lin.weight"), path), "XLabs"),
    "lora.safetensors": (lambda path: save_file(tensors("lora_unet_x.lora_down.weight"), path), "a LoRA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_what_would_work(folder: Path, name: str, here: Hub) -> None:
    path = folder / "controlnets" / name
    write, says = REFUSED[name]
    write(path)
    try:
        assert path.stem not in controlnets.listed(folder)
        for asked in (name, path.stem):
            failed = Engine(folder).draw(requested("1", asked))["1"]
            assert isinstance(failed, Failed)
            assert (failed.error.status, failed.error.param) == (400, "controls[0].name")
            assert says in failed.error.message
            assert ".safetensors" in failed.error.message
    finally:
        path.unlink()


def test_a_net_of_another_family_is_refused_before_it_is_read(folder: Path) -> None:
    engine = Engine(folder)
    events = engine.draw(requested("1", "xl_canny"), requested("2", "flux_canny"))
    assert "made for another model" in events["1"].error.message
    assert "takes ControlNetModel" in events["2"].error.message
    assert [event.error.status for event in events.values()] == [400, 400]
    assert engine.in_memory == {"m"}


def test_a_name_that_several_families_have_is_the_one_that_fits_the_model(
    folder: Path, drawn: np.ndarray[Any, Any]
) -> None:
    there = folder / "controlnets"
    for family in ("sd", "xl", "flux"):
        (there / "by" / family).mkdir(parents=True)
        save_file(named_as_in_diffusers(nets.whole(family).controlnet), there / "by" / family / "edges.safetensors")
    try:
        assert np.array_equal(pixels(Engine(folder).draw(requested("1", "edges"))["1"]), drawn)
        shutil.rmtree(there / "by" / "sd")
        failed = Engine(folder).draw(requested("1", "edges"))["1"]
        assert (failed.error.status, "by/flux/edges: " in failed.error.message) == (400, True)
        assert "by/xl/edges: " in failed.error.message
        (there / "by" / "more").mkdir()
        for name in ("sd", "more"):
            (there / "by" / name).mkdir(exist_ok=True)
            save_file(original(nets.whole("sd").controlnet), there / "by" / name / "edges.safetensors")
        failed = Engine(folder).draw(requested("1", "edges"))["1"]
        assert "may be by/more/edges or by/sd/edges" in failed.error.message
    finally:
        shutil.rmtree(there / "by")


def test_the_budget_knows_the_size_of_a_file_from_its_header(folder: Path) -> None:
    engine = Engine(folder)
    engine.draw(requested("1", "sd/canny"))
    engine.loop._pool._budget.size = engine.loop._pool.sizes["m"] + 1000
    failed = Engine(folder)
    failed.loop._pool._budget.size = engine.loop._pool._budget.size
    event = failed.draw(requested("1", "control_v11p_sd15_canny"))["1"]
    assert isinstance(event, Failed)
    assert event.error.param == "controls[0].name"
    assert failed.in_memory == {"m"}


@pytest.mark.parametrize(
    "named", ["v11.safetensors", "controlnets/other.safetensors", "other", "[v11.safetensors, other]"]
)
def test_a_model_file_names_a_file(folder: Path, tmp_path: Path, named: str) -> None:
    (tmp_path / "controlnets").mkdir()
    save_file(original(nets.whole("sd").controlnet), tmp_path / "v11.safetensors")
    save_file(named_as_in_diffusers(nets.another("sd")), tmp_path / "controlnets" / "other.safetensors")
    (tmp_path / "m.yaml").write_text(
        f"parameters: {{model: {folder / 'base'}}}\ndtype: fp32\ndiffusers: {{control_net: {named}}}\n"
    )
    catalog = Catalog([tmp_path])
    (report,) = check(catalog)
    assert report.ok, str(report)
    pipeline = load.load(catalog.get("m"), "cpu", quiet).pipeline
    first = getattr(pipeline.controlnet, "nets", [pipeline.controlnet])[0]
    same(first, nets.another("sd") if "other" in named.split(",")[0] else nets.whole("sd").controlnet)


@pytest.mark.parametrize(("name", "says"), [("net.pth", "is a pickle"), ("vae.safetensors", "What is read")])
def test_sfumato_check_refuses_what_is_no_net(folder: Path, tmp_path: Path, name: str, says: str) -> None:
    save_file(tensors("decoder.conv_in.weight"), tmp_path / name)
    (tmp_path / "m.yaml").write_text(
        f"parameters: {{model: {folder / 'base'}}}\ndtype: fp32\ndiffusers: {{control_net: {name}}}\n"
    )
    (report,) = check(Catalog([tmp_path]))
    assert not report.ok
    assert says in str(report)
