"""`sfumato bench`: what it measures, shows and writes; a real server is measured in the slow test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from sfumato.cli import MOST_CLIENTS, app
from sfumato.commands.bench import measure, report, runners
from sfumato.commands.bench.runners import Compared
from sfumato.commands.bench.server import running
from sfumato.config import ModelConfig, readers
from sfumato.errors import SfumatoError
from sfumato.runners import graph
from sfumato.serving.catalog import EMBEDDED, Catalog

runner = CliRunner()


def bench(*arguments: str) -> Any:
    return runner.invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})


def a_report() -> measure.Report:
    picture = {"size": "64x64", "steps": 4, "guidance_scale": 3.0, "scheduler": None}
    made = measure.Report("tiny", measure.machine(), 1.0, 2.5, picture)
    made.steps = [measure.Step("64x64", 1, 0.02), measure.Step("64x64", 4, 0.04)]
    made.load = [measure.Load(1, 2, 1.5, 0.6, 0.7), measure.Load(4, 8, 2.5, 1.5, 1.7)]
    made.model_bytes, made.worker_bytes = 45_000_000, 500_000_000
    made.runners = {"unet": "openvino-bf16", "vae": "eager"}
    made.compared = [
        Compared("eager", "eager", 0.04, 1.0, None, 0.0),
        Compared("openvino", "openvino-fp32", 0.02, 2.0, 52.3, 7.5),
    ]
    made.over_plain = {"sfumato": 0.5, "plain": 0.6, "ratio": 1.2}
    return made


def test_the_tables() -> None:
    text = "\n".join(report.tables(a_report()))
    assert "size 64x64, steps 4, guidance_scale 3.0" in text
    assert "scheduler" not in text  # it is not set
    assert "weights 45.0 MB, worker 500.0 MB" in text
    assert "computed by: unet openvino-bf16, vae eager" in text
    assert "64x64        4     0.040            0.010" in text  # a quarter of the step is each picture's
    assert "      4         8       2.500  1.500  1.700" in text
    assert "plain diffusers 0.60 s: 1.20 times as fast" in text
    assert "   eager     0.040       1.000  same          0.000          eager" in text
    assert "openvino     0.020       2.000  52.3          7.500  openvino-fp32" in text
    without = a_report()
    without.compared = []
    assert "over eager" not in "\n".join(report.tables(without))


def test_what_is_written(tmp_path: Path) -> None:
    paths = report.write(a_report(), tmp_path / "new" / "m.v1")
    assert [path.name for path in paths] == ["m.v1.json", "m.v1.png", "m.v1.svg"]
    written = json.loads(paths[0].read_text())
    assert written["load"][1] == {"clients": 4, "pictures": 8, "per_second": 2.5, "p50": 1.5, "p95": 1.7}
    assert written["machine"]["cores"]
    assert [each["runner"] for each in written["compared"]] == ["eager", "openvino"]
    assert written["compared"][1]["decibels"] == 52.3
    with Image.open(paths[1]) as plot:
        assert plot.size[0] > 500
    assert paths[2].read_text().lstrip().startswith("<?xml")
    without = a_report()
    without.compared = []
    with Image.open(report.write(without, tmp_path / "without")[1]) as plot, Image.open(paths[1]) as with_runners:
        assert with_runners.size[0] > 1.4 * plot.size[0]  # one more


def test_without_matplotlib_there_is_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert [path.name for path in report.write(a_report(), tmp_path / "m")] == ["m.json"]


@pytest.mark.parametrize(("share", "value"), [(0.5, 2), (0.95, 4), (0.0, 1), (1.0, 4), (0.75, 3)])
def test_percentiles_are_by_nearest_rank(share: float, value: float) -> None:
    assert measure.percentile([4, 1, 3, 2], share) == value


@pytest.mark.parametrize("clients", ["", "0", "two", "1,,2", "-1", "1.5", str(MOST_CLIENTS + 1)])
def test_numbers_of_clients_that_make_no_sense(clients: str) -> None:
    result = bench("sfumato-tiny", "--clients", clients)
    assert result.exit_code == 2
    assert f"needs whole numbers from 1 to {MOST_CLIENTS}" in result.output


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("eager", ["eager"]),
        ("openvino", ["eager", "openvino"]),
        (" Compile,eager", ["eager", "compile"]),
        ("all", ["eager", "openvino", "compile"]),
    ],
)
def test_names_of_runners(text: str, names: list[str]) -> None:
    assert runners.chosen(text) == names
    assert set(runners.NAMES) | {"auto"} == set(readers.RUNNERS)


@pytest.mark.parametrize("text", ["auto", "eager,", "tensorrt", "all,eager"])
def test_names_that_are_no_runner(text: str) -> None:
    result = bench("sfumato-tiny", "--runners", text)
    assert result.exit_code == 2
    assert "is not one of eager, openvino, compile" in result.output


def test_what_a_runner_lacks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "installed", lambda: False)
    told: list[str] = []
    assert "openvino" not in runners.able(runners.NAMES, told.append)
    assert told[0].startswith("openvino is left out: the package openvino is not installed")
    config = ModelConfig(name="m", model="nobody")
    with pytest.raises(SfumatoError, match="--runners openvino: the package openvino is not installed"):
        runners.compared(config, "cpu", ["eager", "openvino"], "a", {}, 1, told.append)


def test_runners_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's own `accelerate` does not count; each draws the same picture."""
    config = replace(Catalog([EMBEDDED]).get("sfumato-tiny"), accelerate="openvino")
    picture = {"size": "64x64", "steps": 2, "guidance_scale": 3.0}
    (eager,) = runners.compared(config, "cpu", ["eager"], measure.PROMPT, picture, 2, lambda line: None)
    assert (eager.computed_by, eager.over_eager, eager.decibels, eager.prepared_s) == ("eager", 1.0, None, 0.0)
    assert eager.step_s > 0


def test_decibels() -> None:
    one, other = (Image.new("RGB", (4, 4), (shade,) * 3) for shade in (100, 110))
    assert runners.decibels(one, one) is None
    assert runners.decibels(one, other) == 28.1  # 20 * log10(255 / 10)


def test_other_refusals(tmp_path: Path) -> None:
    assert "only `plain`" in bench("sfumato-tiny", "--against", "theirs").output
    result = bench("nobody", "--models", str(EMBEDDED))
    assert result.exit_code == 1
    assert "nobody" in str(result.exception)


def test_a_server_that_does_not_start_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_MAX_BATCH", "many")
    with pytest.raises(SfumatoError, match=r"(?s)did not start.*many"), running(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not graph.installed(), reason="the package openvino is not installed")
def test_the_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_API_KEYS", "one:secret")  # the measured server has none
    result = bench(
        "sfumato-tiny", "--models", str(EMBEDDED), "--clients", "1,2", "--pictures", "1", "--repeats", "1",
        "--steps", "2", "--size", "64x64", "--against", "plain", "--runners", "openvino",
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["picture"]["size"] == "64x64"
    assert written["picture"]["steps"] == 2
    assert written["first_picture_s"] > 0
    assert [step["pictures"] for step in written["steps"]] == [1, 2, 4, 8]
    assert [(load["clients"], load["pictures"]) for load in written["load"]] == [(1, 1), (2, 2)]
    assert all(load["p95"] >= load["p50"] > 0 for load in written["load"])
    assert written["over_plain"].keys() == {"sfumato", "plain", "ratio"}
    assert [each["runner"] for each in written["compared"]] == ["eager", "openvino"]
    assert written["compared"][1]["computed_by"] == "openvino-fp32"
    assert written["compared"][1]["prepared_s"] > 0
    assert "over eager" in result.output
    assert written["model_bytes"] > 1e7
    assert written["worker_bytes"] > written["model_bytes"]
    for path in (tmp_path / "out.png", tmp_path / "out.svg"):
        assert str(path) in result.output
        assert path.stat().st_size


@pytest.mark.slow
def test_a_request_that_fails_ends_it(tmp_path: Path) -> None:
    result = bench("sfumato-tiny", "--models", str(EMBEDDED), "--size", "3x3")
    assert result.exit_code == 1
    assert "the server answered 400" in str(result.exception)
