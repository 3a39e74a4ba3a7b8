"""Write the generated pages of docs/reference from the code: `make docs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

from sfumato import schedulers
from sfumato.settings import Settings, env_name, flag

REFERENCE = Path(__file__).parent / "reference"


def settings_page() -> str:
    lines = [
        "# Settings",
        "",
        "Each is read from the command line, else from the environment, else it has its default.",
        "",
        "| flag | environment | default | what it does |",
        "|---|---|---|---|",
    ]
    for spec in fields(Settings):
        default = f"`{spec.default}`" if spec.default != "" else "none"
        lines.append(f"| `{flag(spec)}` | `{env_name(spec)}` | {default} | {spec.metadata['help']} |")
    lines += [
        "",
        "Of huggingface_hub these are honoured: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`.",
        "",
    ]
    return "\n".join(lines)


def schedulers_page() -> str:
    lines = [
        "# Schedulers",
        "",
        "For `scheduler_type` in a model file, `scheduler` in a request, `--scheduler` on the command line. Each",
        "request has an instance of its own. A `k_` in front means Karras sigmas; `_karras`, `_exponential`, `_beta`",
        "and `_sgm_uniform` behind the name (or `schedule` in a model file) choose how the noise levels are spread,",
        "where the solver can. Flow-matching models get the flow form of a solver where diffusers has one; other",
        "names are refused with those that work.",
        "",
        "| name | solver | diffusers class | on flow-matching models | schedules |",
        "|---|---|---|---|---|",
    ]
    for name in schedulers.names():
        choice = schedulers.parse(name)
        solver = schedulers.SOLVERS.get(name)
        spread = ", ".join(solver.noise.schedules) if solver else ""
        flow = f"`{choice.flow.cls}`" if choice.flow else "–"
        lines.append(f"| `{name}` | {choice.description} | `{choice.noise.cls}` | {flow} | {spread or '–'} |")
    lines += ["", "`k_dpp_sde`, as LocalAI's page once spelt it, is `k_dpmpp_sde`.", ""]
    return "\n".join(lines)


def model_files_page() -> str:
    from sfumato.config import reference

    return reference.markdown()


PAGES: Mapping[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "schedulers.md": schedulers_page,
    "model-files.md": model_files_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
