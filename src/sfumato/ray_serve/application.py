"""The application that Ray Serve runs: the HTTP server as its ingress, and a deployment for each model or group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle

from sfumato import logs
from sfumato.api.app import create_app
from sfumato.batching.policy import low_places
from sfumato.config import ModelConfig
from sfumato.pictures.stores import store_of
from sfumato.ray_serve.arguments import INGRESS, Arguments
from sfumato.ray_serve.autoscaling import StepsToDo
from sfumato.ray_serve.engine import RayServe
from sfumato.ray_serve.replica import Replica
from sfumato.ray_serve.request_id import OneRequestId
from sfumato.serving.catalog import Catalog
from sfumato.serving.service import Service
from sfumato.settings import Settings

DRAIN_S = 300
"""Seconds that a replica that is to go, or to be replaced, gets to draw its pictures. Then others draw them."""


def build(args: dict[str, Any]) -> Application:
    """As `sfumato.ray_serve.app`."""
    arguments = Arguments.of(args)
    settings = arguments.settings
    places = settings.max_active
    policy = {"policy_function": StepsToDo, "policy_kwargs": {"steps": arguments.steps, "places": places}}
    model = serve.deployment(Replica).options(
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        graceful_shutdown_timeout_s=DRAIN_S,
    )
    configs = {config.name: config for config in Catalog.of(settings).all()}
    models = arguments.deployments(configs)
    scalings = {
        name: _scaling((configs[each] for each in members), arguments.scaling, policy)
        for name, members in models.items()
    }
    most = sum(scaling.max_replicas for scaling in scalings.values())
    handles: dict[str, Application] = {}
    for name, scaling in scalings.items():
        # The queue knows places, not models: those of all other deployments' replicas may have pictures of this one's
        # models. They are sent on, too: its worker draws by policy what it has, but in Ray's queue nothing yields.
        room = places * (most - scaling.max_replicas + 1)
        deployment = model.options(name=name, max_ongoing_requests=room + low_places(room), autoscaling_config=scaling)
        handles[name] = deployment.bind(settings, name)
    ingress = serve.deployment(Ingress).options(
        name=INGRESS, max_ongoing_requests=settings.max_connections, graceful_shutdown_timeout_s=settings.grace_s
    )
    application: Application = ingress.bind(settings, handles, models)
    return application


def _scaling(models: Iterable[ModelConfig], scaling: Mapping[str, Any], policy: Mapping[str, Any]) -> AutoscalingConfig:
    """To nothing when idle, unless the file of one of the models says that it stays."""
    return AutoscalingConfig(
        **{
            "min_replicas": int(any(config.pinned for config in models)),
            "aggregation_function": "max",
            "metrics_interval_s": 1.0,
            "policy": policy,
            **scaling,
        }
    )


@serve.ingress()
class Ingress:
    """Builds the application in the process that serves it."""

    def __init__(
        self, settings: Settings, handles: Mapping[str, DeploymentHandle], models: Mapping[str, Sequence[str]]
    ) -> None:
        self._settings, self._handles, self._models = settings, handles, models

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray."""
        settings = self._settings
        logs.configure(settings)
        service = Service(Catalog.of(settings), RayServe(settings, self._handles, self._models), settings)
        application = create_app(service, store_of(settings))
        application.add_middleware(OneRequestId)
        return application
