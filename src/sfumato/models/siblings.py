"""A pipeline of another class over the components of one."""

from __future__ import annotations

from typing import Any


def over(pipeline: Any, cls: Any, **parts: Any) -> Any:
    """A pipeline of `cls` over the components and settings of another, with these parts besides.

    diffusers' `from_pipe` would cast the shared modules.
    """
    expected, optional = cls._get_signature_keys(cls)
    modules = {name: module for name, module in pipeline.components.items() if name in expected}
    settings = {name: value for name, value in pipeline.config.items() if name in optional and name not in modules}
    if "requires_safety_checker" in optional and modules.get("safety_checker") is None:
        settings["requires_safety_checker"] = False  # else every request would log a warning
    made = cls(**{**modules, **parts}, **settings)
    made.set_progress_bar_config(disable=True)
    made._all_hooks = list(getattr(pipeline, "_all_hooks", ()))
    return made
