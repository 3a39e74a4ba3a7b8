"""The tasks of a modular pipeline, from the workflows that its blocks declare; without torch or diffusers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

DRAWN_FROM = frozenset({"prompt", "image", "mask_image"})
"""Inputs of a picture's workflow; one that needs others (a ControlNet's picture, an IP adapter's) is not offered."""

TASKS = ("text-to-image", "image-to-image", "inpainting")


def of_pictures(workflows: Mapping[str, Any] | None) -> list[str]:
    """Names of the workflows that draw from a prompt, a picture and a mask; text to image first.

    `workflows`: name → inputs that select it, or a tuple of alternatives.
    """
    names = [name for name, inputs in (workflows or {}).items() if _inputs(inputs) <= DRAWN_FROM]
    return sorted(names, key=lambda name: len(_inputs((workflows or {})[name])))


def for_task(workflows: Mapping[str, Any] | None, task: str) -> str | None:
    """The name of the workflow for a task; None if there is none."""
    names = of_pictures(workflows)
    return next((name for name in names if task_of(_inputs((workflows or {})[name])) == task), None)


def tasks(workflows: Mapping[str, Any] | None, parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """The subset of text-to-image, image-to-image and inpainting; from `parameters` where there are no workflows."""
    names = of_pictures(workflows)
    if workflows and names:
        found = {task_of(_inputs(workflows[name])) for name in names}
    else:
        found = {task_of({name}) for name in ("image", "mask_image") if name in parameters}
        image = parameters.get("image")
        if image is None or image.default is not image.empty:
            found.add(task_of(()))
    return tuple(task for task in TASKS if task in found)


def task_of(inputs: Collection[str]) -> str:
    """The task of a workflow that these inputs select."""
    if "mask_image" in inputs:
        return "inpainting"
    return "image-to-image" if "image" in inputs else "text-to-image"


def _inputs(inputs: Any) -> frozenset[str]:
    first = inputs[0] if isinstance(inputs, tuple | list) else inputs
    return frozenset(name for name, needed in first.items() if needed)
