"""The server on Ray Serve: `serve run sfumato.ray_serve:app`. Needs the extra `ray`.

The application is the ingress deployment, each model a deployment of its own. Ray starts, places, scales and replaces
them; `engine` is the interface of `engine.protocol` over their handles.
"""

from sfumato.ray_serve.application import app

__all__ = ["app"]
