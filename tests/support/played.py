"""An engine's loop, played: commands are posted at the events of a request, from the loop's own thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPAGPipeline

from sfumato.config import ModelConfig
from sfumato.core import Generation
from sfumato.engine.loop import Loop
from sfumato.engine.protocol import Answer, Report, Submit
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings
from support import tiny

STEPS = 12


class Ended(BaseException):
    """Thrown into a request that is cancelled."""


def guided() -> Any:
    """Perturbed-attention guidance on the parts of Stable Diffusion."""
    parts = {name: part for name, part in tiny.stable_diffusion().components.items() if name != "image_encoder"}
    return StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers="mid")


def saved(folder: Path) -> dict[str, ModelConfig]:
    """Model files in `folder`: `pag` is guided by perturbed attention and does not switch, `sd` does."""
    tiny.save(guided(), folder / "pag")
    tiny.save(tiny.stable_diffusion(), folder / "sd")
    for name in ("pag", "sd"):
        (folder / f"{name}.yaml").write_text(f"name: {name}\nparameters:\n  model: {folder / name}\ndtype: fp32\n")
    catalog = Catalog([folder])
    return {name: catalog.get(name) for name in ("pag", "sd")}


def wanted(id: str, **fields: Any) -> Generation:
    asked = {"id": id, "prompt": "a cat", "seed": 1, "steps": STEPS, "width": 64, "height": 64, "scheduler": "ddim"}
    return Generation(**{**asked, **fields})


class Played:
    """A loop whose reports are answered, in its own thread, by commands; `sent` is what it said, in order."""

    def __init__(self, configs: dict[str, ModelConfig], on: Callable[[Played, str, Any], None]) -> None:
        self.sent: list[Report] = []
        self.configs = configs
        self._on = on
        self.loop = Loop(Settings(device="cpu", loaded_models=2, log_level="error"), self._send)

    def submit(self, model: str, id: str, **fields: Any) -> None:
        self.loop.post(Submit(self.configs[model], wanted(id, **fields)))

    def run(self) -> None:
        self.loop.run()

    def _send(self, report: Report) -> None:
        self.sent.append(report)
        if isinstance(report, Answer):
            self._on(self, report.id, report.event)

    def events(self, id: str) -> list[Any]:
        return [report.event for report in self.sent if isinstance(report, Answer) and report.id == id]

    def at(self, id: str, kind: Any) -> int:
        """Where in `sent` the first event of that kind for `id` is."""
        return next(
            n for n, it in enumerate(self.sent) if isinstance(it, Answer) and it.id == id and isinstance(it.event, kind)
        )
