"""The application that Ray Serve runs: the HTTP server as its ingress, and a deployment for each model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato import logs
from sfumato.api.app import create_app
from sfumato.batching.policy import low_places
from sfumato.config import ModelConfig
from sfumato.errors import did_you_mean
from sfumato.pictures.store import Store
from sfumato.ray_serve.autoscaling import StepsToDo
from sfumato.ray_serve.engine import RayServe
from sfumato.ray_serve.replica import Replica
from sfumato.serving.catalog import Catalog
from sfumato.serving.service import Service
from sfumato.settings import Settings

NAME = "sfumato"
"""Of the ingress deployment."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What `serve run sfumato.ray_serve:app NAME=VALUE` takes besides settings and Ray's `AutoscalingConfig`."""

    num_gpus: float | None = None
    """GPUs of each replica; a part of one, such as 0.5, is shared. None: 1, or none with the setting device=cpu."""
    num_cpus: float = 1.0
    """CPUs of each replica."""
    steps: int = 200
    """Denoising steps that a replica should have left at most; with more to do there are more replicas."""


def app(args: dict[str, Any]) -> Application:
    """The application, from arguments and from environment variables as other servers.

    Each model is a deployment that has the model's name: what the arguments say of all can be said of one in the
    YAML for `serve deploy`. Raises ValueError naming the argument at fault.
    """
    arguments, scaling, settings = _sorted(args)
    gpus = arguments.num_gpus
    if gpus is None:
        gpus = 0.0 if settings.device == "cpu" else 1.0
    places = settings.max_active
    policy = {"policy_function": StepsToDo, "policy_kwargs": {"steps": arguments.steps, "places": places}}
    model = serve.deployment(Replica).options(
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": gpus},
        max_ongoing_requests=places + low_places(places),
        graceful_shutdown_timeout_s=settings.time_limit_s,  # until its pictures are drawn
    )
    handles = {
        config.name: model.options(name=config.name, autoscaling_config=_scaling(config, scaling, policy)).bind(
            settings, config.name
        )
        for config in Catalog.of(settings).all()
    }
    ingress = serve.deployment(Ingress).options(
        name=NAME, max_ongoing_requests=settings.max_connections, graceful_shutdown_timeout_s=settings.grace_s
    )
    application: Application = ingress.bind(settings, handles)
    return application


def _scaling(config: ModelConfig, scaling: Mapping[str, Any], policy: Mapping[str, Any]) -> AutoscalingConfig:
    """To nothing when idle, unless the model file says that it stays."""
    return AutoscalingConfig(
        **{
            "min_replicas": 1 if config.pinned else 0,
            "aggregation_function": "max",
            "metrics_interval_s": 1.0,
            "policy": policy,
            **scaling,
        }
    )


def _sorted(args: Mapping[str, Any]) -> tuple[Arguments, dict[str, Any], Settings]:
    """The arguments by whom they are for."""
    ours = {spec.name: float for spec in fields(Arguments)} | {"steps": int}
    names = [*ours, *AutoscalingConfig.model_fields, *(spec.name for spec in fields(Settings))]
    for name in args:
        if name not in names:
            raise ValueError(
                f"{name}={args[name]!r}: no argument has that name.{did_you_mean(name, names)} There are all settings, "
                f"all fields of Ray's AutoscalingConfig, {', '.join(ours)}"
            )
    values: dict[str, Any] = {}
    for name, kind in ours.items():
        try:
            if name in args:
                values[name] = kind(args[name])
        except ValueError:
            raise ValueError(f"{name}={args[name]!r}: must be a number") from None
        if name in values and values[name] < (0 if name != "steps" else 1):
            raise ValueError(f"{name}={args[name]!r}: must be at least {0 if name != 'steps' else 1}")
    scaling = {name: args[name] for name in AutoscalingConfig.model_fields if name in args}
    return Arguments(**values), scaling, Settings.load({spec.name: args.get(spec.name) for spec in fields(Settings)})


@serve.ingress()
class Ingress:
    """Builds the application in the process that serves it."""

    def __init__(self, settings: Settings, models: Mapping[str, DeploymentHandle]) -> None:
        self._settings, self._models = settings, models

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray."""
        settings = self._settings
        logs.configure(settings)
        service = Service(Catalog.of(settings), RayServe(settings, self._models), settings)
        application = create_app(service, Store.of(settings))
        application.add_middleware(OneRequestId)
        return application


class OneRequestId:
    """Ray's proxy adds the header `x-request-id` to responses, also where the application has."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Removes the application's, if Ray's is the same."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        theirs = (b"x-request-id", Headers(scope=scope).get("x-request-id", "").encode("latin-1"))

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if tuple(header) != theirs]
            await send(message)

        await self.app(scope, receive, send_without)
