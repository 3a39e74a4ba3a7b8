"""How recipes name the runners of a picture, and what that asks for when it is drawn again."""

from __future__ import annotations

from collections.abc import Mapping, Set

from sfumato.core import EAGER


def told(computed_by: Mapping[str, Set[str]]) -> str:
    """`openvino-bf16`; with differences `unet openvino-bf16, vae eager`; calls of one module by two: `eager+...`."""
    by = {name: "+".join(sorted(runners)) for name, runners in sorted(computed_by.items())}
    if len(set(by.values())) < 2:
        return next(iter(by.values()), EAGER)
    return ", ".join(f"{name} {runner}" for name, runner in by.items())


def read(recipe: str) -> Mapping[str, str]:
    """Component → the runner that a recipe says has computed it, as `accelerate` has it; "": every other one.

    Of a module that two have computed, the one that is not the module itself. Empty: the recipe does not say.
    """
    named = [part.rpartition(" ") for part in filter(None, recipe.split(", "))]
    return {name: _family(runner) for name, _, runner in named}


def _family(runner: str) -> str:
    names = [name for name in runner.split("+") if name != EAGER]
    return names[0].partition("-")[0] if names else EAGER
