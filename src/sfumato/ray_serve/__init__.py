"""The server on Ray Serve: `serve run sfumato.ray_serve:app`. Needs the extra `ray`.

The application is the ingress deployment, each model or group of models a deployment of its own. Ray starts, places,
scales and replaces them; `engine` is the interface of `engine.protocol` over their handles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["app"]


def app(args: dict[str, Any]) -> Application:
    """The application, from arguments and from environment variables as other servers.

    Each model is a deployment that has the model's name, or is in that of its group: what the arguments say of all
    can be said of one in the YAML for `serve deploy`. Raises ValueError naming the argument at fault.
    """
    from sfumato.ray_serve.application import build  # a replica starts without: it has no HTTP

    return build(args)
